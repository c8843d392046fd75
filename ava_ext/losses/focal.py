"""Focal modulation of the main term: alpha (1 - p_target)^gamma n in place of n = -log p_target.

Rows that the model is sure of weigh less. The derivative is alpha (1 - p)^gamma (1 + gamma p n / (1 - p)); it avoids
the power gamma - 1, so every gamma >= 0 is safe.

Source: Lin et al. 2017, "Focal loss for dense object detection".
"""

from __future__ import annotations

from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.component import RowTerm
from ava_ext.ops.row_fields import RowFlags


def from_config(config: UnifiedLossConfig) -> RowTerm | None:
    """The modulation. It changes the main term, whose value is then also reported as focal_loss."""
    if not config.use_focal_loss:
        return None
    options = {"focal_alpha": config.focal_alpha, "focal_gamma": config.focal_gamma}
    return RowTerm(None, RowFlags.FOCAL, options, metric="focal_loss")
