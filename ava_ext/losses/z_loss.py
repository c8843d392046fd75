"""z-loss: beta lse(z)^2. It keeps the log-normaliser near 0, and so low-precision logits in range.

Source: Chowdhery et al. 2022, "PaLM"; Mesh TensorFlow.
"""

from __future__ import annotations

from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.component import RowTerm
from ava_ext.ops.row_fields import RowFlags


def from_config(config: UnifiedLossConfig) -> RowTerm | None:
    """The z-loss where its weight is above 0."""
    if config.z_loss_weight == 0:
        return None
    return RowTerm("z_loss", RowFlags.Z_LOSS, {"z_loss_weight": config.z_loss_weight})
