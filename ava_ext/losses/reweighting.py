"""Token reweighting: the target's term times a weight that the model itself gives, a constant to autograd.

    dft:   p_target^exponent          tokens that the model finds unlikely weigh less (dynamic fine-tuning)
    eaft:  (H / log V)^exponent       tokens that the model is sure of weigh less, right or wrong (entropy-adaptive)

Label smoothing's share of the main term, the z-loss and all other terms are as they are. H is the entropy over all V
columns that are not masked. The paper on eaft approximates it by the 20 most likely tokens, over log 20, which
correlates with H by 0.999; H / log V is smaller than that by the factor log V / log 20, 3.6 for a vocabulary of 50257.

Sources: Wu et al. 2025, "On the generalization of SFT" (dft, arXiv 2508.05629); Diao et al. 2026, "Entropy-adaptive
fine-tuning" (eaft, arXiv 2601.02151).
"""

from __future__ import annotations

from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.component import RowTerm
from ava_ext.ops.row_fields import RowFlags


def from_config(config: UnifiedLossConfig) -> RowTerm | None:
    """The weight. It changes the main term."""
    if config.token_reweighting is None:
        return None
    flag = RowFlags.DFT if config.token_reweighting == "dft" else RowFlags.EAFT
    return RowTerm(None, flag, {"reweighting_exponent": config.reweighting_exponent})
