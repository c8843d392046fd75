"""Focal modulation of the main term: alpha (1 - p_target)^gamma n in place of n = -log p_target.

Rows the model is sure of weigh less. Safe for every gamma >= 0: the derivative is taken through
alpha (1 - p)^gamma (1 + gamma p n / (1 - p)), without the power gamma - 1.

Source: Lin et al. 2017, "Focal loss for dense object detection".
"""

from __future__ import annotations

from ava_ext.config import UnifiedLossConfig
from ava_ext.ops.softmax_rows import RowFlags


def row_options(config: UnifiedLossConfig) -> tuple[RowFlags, dict[str, float]]:
    """The kernel's flags and coefficients of the focal modulation."""
    if not config.use_focal_loss:
        return RowFlags(0), {}
    return RowFlags.FOCAL, {"focal_alpha": config.focal_alpha, "focal_gamma": config.focal_gamma}
