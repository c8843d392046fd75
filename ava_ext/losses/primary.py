"""The main term: cross-entropy with label smoothing.

    uniform:         (1 - e) n - e mean_j log softmax(z)_j                (as torch.nn.functional.cross_entropy)
    exclude_target:  (1 - e) n - e mean_{j != target} log softmax(z)_j    (computed as uniform with e V / (V - 1))
    class_weights w: (1 - e) w_target n - e mean_j w_j log softmax(z)_j
    target_probabilities q: -(1 - e) sum_j q_j log softmax(z)_j - e mean_j log softmax(z)_j

z are the effective logits (`losses.effective_logits`) of the V columns that are not masked, n is -log
softmax(z)_target, and e is label_smoothing. The focal factor and token_reweighting modulate the first term, with
exclude_target that of e V / (V - 1): the e / (V - 1) n which the second then holds is not modulated.

Source: Szegedy et al. 2016, "Rethinking the Inception architecture" (smoothing).
"""

from __future__ import annotations

from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.component import RowTerm
from ava_ext.ops.row_fields import RowFlags


def from_config(config: UnifiedLossConfig) -> RowTerm:
    """The main term; it is always on."""
    flags = RowFlags.CROSS_ENTROPY
    if config.label_smoothing > 0:
        flags |= RowFlags.LABEL_SMOOTHING
        if config.smoothing_mode == "exclude_target":
            flags |= RowFlags.EXCLUDE_TARGET
    if config.class_weights is not None:
        flags |= RowFlags.TARGET_WEIGHTS
    return RowTerm("main_loss", flags, {"label_smoothing": config.label_smoothing})
