"""Adaptive temperature: higher while training is volatile, slightly lower while it is stable.

    T = clamp(T0 (1 + gain (cv - 0.075)), bounds),    cv = population standard deviation / mean of the last 100 losses

from 10 losses on. A function of the recent past only: an integrating rule would walk to its bound.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.float32_buffers import Float32Buffers

HISTORY = 100  # losses kept
FIRST = 10  # losses before the temperature moves
CALM = 0.075  # coefficient of variation that leaves it where it is


class AdaptiveTemperature(Float32Buffers):
    """Watches the unfocused, unsmoothed cross-entropy of each optimizer step and sets the temperature of the next call.

    All on the device, without synchronisation. A step without a counted row, or whose loss is not finite, is not recorded.

    Buffers: value [], the temperature; history [100], the last losses in a ring; count [], losses recorded so far; not in
    state_dict: pending [2], the sum and number of rows since the last step.

    Args:
        config: initial_temperature, temperature_bounds, temperature_gain.

    Example:
        >>> temperature = AdaptiveTemperature(UnifiedLossConfig(vocab_size=8))
        >>> temperature.observe(torch.tensor(12.0), torch.tensor(4))
        >>> temperature.step()
    """

    value: Tensor
    history: Tensor
    count: Tensor
    pending: Tensor
    slots: Tensor

    def __init__(self, config: UnifiedLossConfig) -> None:
        super().__init__()
        self.initial = config.initial_temperature
        self.bounds = config.temperature_bounds
        self.gain = config.temperature_gain
        self.register_buffer("value", torch.tensor(self.initial, dtype=torch.float32))
        self.register_buffer("history", torch.zeros(HISTORY, dtype=torch.float32))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("pending", torch.zeros(2, dtype=torch.float32), persistent=False)
        self.register_buffer("slots", torch.arange(HISTORY), persistent=False)

    @torch.no_grad()
    def observe(
        self,
        loss_sum: Tensor,  # []: sum of the cross-entropy over the counted rows
        n_rows: Tensor,  # []
    ) -> None:
        """Adds a micro-step to what the next step() records."""
        self.pending.add_(torch.stack([loss_sum, n_rows]))

    @torch.no_grad()
    def step(self, process_group: Any = None) -> None:
        """Records the mean loss since the last step and sets the temperature; averages over the rows of process_group."""
        if process_group is not None:
            torch.distributed.all_reduce(self.pending, group=process_group)
        loss = self.pending[0] / self.pending[1]  # nan without rows
        self.pending.zero_()
        recorded = loss.abs() < torch.inf  # false for nan
        self.history.copy_(torch.where((self.slots == self.count % HISTORY) & recorded, loss, self.history))
        self.count.add_(recorded)
        # empty slots are 0 and add nothing; float64, where the difference of the two moments does not cancel
        n = self.count.clamp_max(HISTORY)
        history = self.history.double()
        mean = history.sum() / n
        variance = history.dot(history) / n - mean * mean
        variation = variance.clamp_min(0).sqrt() / mean
        wanted = (self.initial * (1 - CALM * self.gain) + (self.initial * self.gain) * variation).clamp(*self.bounds)
        self.value.copy_(torch.where((self.count >= FIRST) & (mean > 0), wanted, self.initial))

    def statistics(self) -> dict[str, Tensor]:
        """value, count, and mean_loss of the recorded losses (0 where there is none); scalars on the device."""
        mean_loss = self.history.sum() / self.count.clamp(1, HISTORY)
        return {"value": self.value.clone(), "count": self.count.clone(), "mean_loss": mean_loss}

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """Forgets every loss; the temperature is the initial one again."""
        self.value.fill_(self.initial)
        for buffer in (self.history, self.count, self.pending):
            buffer.zero_()
