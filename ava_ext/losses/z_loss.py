"""z-loss: beta lse(z)^2, which keeps the log-normaliser near 0 and low-precision logits in range.

Source: Chowdhery et al. 2022, "PaLM"; Mesh TensorFlow.
"""

from __future__ import annotations

from ava_ext.config import UnifiedLossConfig
from ava_ext.ops.softmax_rows import RowFlags


def row_options(config: UnifiedLossConfig) -> tuple[RowFlags, dict[str, float]]:
    """The kernel's flags and coefficients of the z-loss."""
    if config.z_loss_weight == 0:
        return RowFlags(0), {}
    return RowFlags.Z_LOSS, {"z_loss_weight": config.z_loss_weight}
