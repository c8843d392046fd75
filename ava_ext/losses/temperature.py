"""Adaptive temperature: higher while training is volatile, slightly lower while it is stable.

    T = clamp(T0 (1 + gain (cv - 0.075)), bounds),    cv = population standard deviation / mean of the last 100 losses

T stays T0 until 10 losses are recorded. It depends on the recent past only: a rule that integrates would drift to its
bound.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ava_ext import _library  # noqa: F401  the operators exist once it is imported
from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.learned_state import LearnedState
from ava_ext.ops.arguments import check_devices

HISTORY = 100  # losses kept: kHistory in csrc/temperature.h
_step = torch.ops.ava_ext.temperature_step_.default


class AdaptiveTemperature(LearnedState):
    """Watches the cross-entropy (without focal and smoothing) of each step, and sets the temperature of the next call.

    Everything happens on the device, without synchronisation. A step is not recorded if none of its rows counts or its
    loss is not finite.

    Buffers: value [], the temperature; history [100], the last losses in a ring; count [], losses recorded so far.
    Pending: pending_loss [] and pending_rows [], sum and number of rows since the last step.

    Args:
        initial_temperature: T0.
        bounds: least and greatest temperature.
        gain: how strongly volatility moves the temperature.
        adapts: if False, the temperature stays T0.

    Example:
        >>> temperature = AdaptiveTemperature()
        >>> temperature.record(True, pending_loss=torch.tensor(12.0), pending_rows=torch.tensor(4.0))
        >>> temperature.step()
    """

    statistics_name = "temperature"
    PENDING = ("pending_loss", "pending_rows")
    READ = ("value",)

    value: Tensor
    history: Tensor
    count: Tensor

    def __init__(
        self,
        initial_temperature: float = UnifiedLossConfig.initial_temperature,
        bounds: tuple[float, float] = UnifiedLossConfig.temperature_bounds,
        gain: float = UnifiedLossConfig.temperature_gain,
        *,
        adapts: bool = True,
    ) -> None:
        super().__init__()
        self.initial = initial_temperature
        self.bounds = bounds
        self.gain = gain
        self.adapts = adapts
        self.register_buffer("value", torch.empty((), dtype=torch.float32))
        self.register_buffer("history", torch.empty(HISTORY, dtype=torch.float32))
        self.register_buffer("count", torch.empty((), dtype=torch.int64))
        self.previous_value = torch.empty((), dtype=torch.float32)
        self.pending_loss = torch.empty((), dtype=torch.float32)
        self.pending_rows = torch.empty((), dtype=torch.float32)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: UnifiedLossConfig) -> AdaptiveTemperature:
        """The temperature of UnifiedLoss. It exists even if it does not adapt, so that checkpoints fit."""
        return cls(
            config.initial_temperature,
            config.temperature_bounds,
            config.temperature_gain,
            adapts=config.temperature_adapts,
        )

    def step(self, process_group: Any = None, recording: bool | Tensor = True) -> None:
        """Records the mean loss since the last step, over all rows of process_group, and sets the temperature."""
        if not self.adapts:
            return
        if process_group is not None:
            self.reduce_pending(process_group)
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
        self.history.zero_()
        self.count.zero_()
        self.settle()


@torch.library.register_fake("ava_ext::temperature_step_")
def _(value, history, count, pending_loss, pending_rows, initial, gain, low, high):
    others = {"history": history, "count": count, "pending_loss": pending_loss, "pending_rows": pending_rows}
    check_devices("temperature_step_", value, **others)
    return None
