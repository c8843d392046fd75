"""Confidence penalty: eta (1 - H / log V), with H the entropy of the row and V the number of its unmasked columns.

It is eta for a one-hot prediction and 0 for a uniform one, or if V = 1.

Source: Pereyra et al. 2017, "Regularizing neural networks by penalizing confident output distributions" (there without
log V).
"""

from __future__ import annotations

from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.component import RowTerm
from ava_ext.ops.row_fields import RowFlags


def from_config(config: UnifiedLossConfig) -> RowTerm | None:
    """The penalty where its weight is above 0."""
    if config.confidence_penalty_weight == 0:
        return None
    options = {"confidence_penalty_weight": config.confidence_penalty_weight}
    return RowTerm("confidence_penalty", RowFlags.CONFIDENCE_PENALTY, options)
