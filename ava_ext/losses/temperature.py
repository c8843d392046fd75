"""Adaptive temperature: higher while training is volatile, slightly lower while it is stable.

    T = clamp(T0 (1 + gain (cv - 0.075)), bounds),    cv = population standard deviation / mean of the last 100 losses

from 10 losses on. A function of the recent past only: an integrating rule would walk to its bound.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ava_ext import _library  # noqa: F401  the operators exist once it is imported
from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.float32_buffers import Float32Buffers

HISTORY = 100  # losses kept: kHistory in csrc/temperature.h
_step = torch.ops.ava_ext.temperature_step_.default


class AdaptiveTemperature(Float32Buffers):
    """Watches the unfocused, unsmoothed cross-entropy of each optimizer step and sets the temperature of the next call.

    All on the device, without synchronisation. A step without a counted row, or whose loss is not finite, is not
    recorded.

    Buffers: value [], the temperature; history [100], the last losses in a ring; count [], losses recorded so far; not
        in
    state_dict: pending_loss [] and pending_rows [], sum and number of rows since the last step.

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
    pending_loss: Tensor
    pending_rows: Tensor

    def __init__(self, config: UnifiedLossConfig) -> None:
        super().__init__()
        self.initial = config.initial_temperature
        self.bounds = config.temperature_bounds
        self.gain = config.temperature_gain
        self.register_buffer("value", torch.tensor(self.initial, dtype=torch.float32))
        self.register_buffer("history", torch.zeros(HISTORY, dtype=torch.float32))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("pending_loss", torch.zeros((), dtype=torch.float32), persistent=False)
        self.register_buffer("pending_rows", torch.zeros((), dtype=torch.float32), persistent=False)

    def observe(
        self,
        loss_sum: Tensor,  # []: sum of the cross-entropy over the counted rows
        n_rows: Tensor,  # []
    ) -> None:
        """Adds a micro-step to what the next step() records."""
        self.pending_loss.add_(loss_sum)
        self.pending_rows.add_(n_rows)

    def step(self, process_group: Any = None) -> None:
        """Records the mean loss since the last step and sets the temperature;
        averages over the rows of process_group.
        """
        if process_group is not None:
            for pending in (self.pending_loss, self.pending_rows):
                torch.distributed.all_reduce(pending, group=process_group)
        state = (self.value, self.history, self.count, self.pending_loss, self.pending_rows)
        _step(*state, self.initial, self.gain, *self.bounds)

    def statistics(self) -> dict[str, Tensor]:
        """value, count, and mean_loss of the recorded losses (0 where there is none); scalars on the device."""
        mean_loss = self.history.sum() / self.count.clamp(1, HISTORY)
        return {"value": self.value.clone(), "count": self.count.clone(), "mean_loss": mean_loss}

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """Forgets every loss; the temperature is the initial one again."""
        self.value.fill_(self.initial)
        for buffer in (self.history, self.count, self.pending_loss, self.pending_rows):
            buffer.zero_()


@torch.library.register_fake("ava_ext::temperature_step_")
def _(value, history, count, pending_loss, pending_rows, initial, gain, low, high):
    return None
