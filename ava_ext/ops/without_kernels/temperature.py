"""The adaptive temperature as PyTorch operators; see csrc/temperature.h. Nothing comes back to the host."""

from __future__ import annotations

import torch
from torch import Tensor

from ava_ext.ops.without_kernels.dtypes import widest_dtype

FIRST_LOSSES = 10  # kFirstLosses in csrc/temperature.h


def temperature_step_(
    value: Tensor,  # []
    history: Tensor,  # [n_history]
    count: Tensor,  # [], int64
    pending_loss: Tensor,  # []
    pending_rows: Tensor,  # []
    initial: float,
    gain: float,
    low: float,
    high: float,
) -> None:
    """Records pending_loss / pending_rows and sets the temperature."""
    n_history = history.shape[0]
    count.clamp_min_(0)  # of a damaged checkpoint
    places = torch.arange(n_history, device=history.device)
    loss = pending_loss / pending_rows  # nan without rows
    recorded = torch.isfinite(loss)
    history.copy_(torch.where(recorded & (places == count % n_history), loss, history))
    count.add_(recorded)
    n_losses = count.clamp(max=n_history)
    losses = torch.where(places < n_losses, history, 0).to(widest_dtype(history.device))
    mean = losses.sum() / n_losses.clamp_min(1)
    variance = torch.where(places < n_losses, (losses - mean) ** 2, 0).sum() / n_losses.clamp_min(1)
    wanted = (initial * (1 + gain * (variance.sqrt() / mean - 0.075))).clamp(low, high)
    value.copy_(torch.where((n_losses >= FIRST_LOSSES) & (mean > 0), wanted, initial))
    pending_loss.zero_()
    pending_rows.zero_()
