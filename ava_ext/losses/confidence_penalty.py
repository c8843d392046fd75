"""Confidence penalty: eta (1 - H / log V), in [0, eta], with H the entropy of the row and V its columns that are not
masked.

It is eta for a one-hot prediction and 0 for a uniform one (and where V = 1).

Source: Pereyra et al. 2017, "Regularizing neural networks by penalizing confident output distributions" (there without
    log V).
"""

from __future__ import annotations

from ava_ext.config import UnifiedLossConfig
from ava_ext.ops.softmax_rows import RowFlags


def row_options(config: UnifiedLossConfig) -> tuple[RowFlags, dict[str, float]]:
    """The kernel's flags and coefficients of the confidence penalty."""
    if config.confidence_penalty_weight == 0:
        return RowFlags(0), {}
    return RowFlags.CONFIDENCE_PENALTY, {"confidence_penalty_weight": config.confidence_penalty_weight}
