"""Times, peak memory and values of variants on a GPU; on the CPU (a dry run) the wall clock, and no memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from row_loss import Variant
from torch import Tensor

from ava_ext.bench.memory import extra_bytes_on_gpu
from ava_ext.bench.timing import Times, interleave, wall_clock
from ava_ext.ops.row_fields import accumulation_dtype

# Written before each measurement, outside the time: several times the L2 of any GPU so far, and for long enough (about
# a millisecond) that the host has queued the whole call before the GPU gets to it. So launches cost nothing, as in
# training, where the GPU is behind; a call that waits for the GPU in the middle pays for that.
_FLUSH_BYTES, _FLUSH_REPEATS = 256 << 20, 16
# of loss and norms of the gradients, from the reference's: 16-bit peers round in other places
_VALUE_TOLERANCE = 0.02
_FIRST_ROUNDS = 4  # after which the figures of a case exist; a run may be cut short


class DeviceLostError(RuntimeError):
    """An error of a kernel stays: every later call on the device fails in this process, and says nothing."""


def require_device(device: torch.device, after: str) -> None:
    """Raises DeviceLostError if the device no longer works."""
    try:
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError as error:
        raise DeviceLostError(f"the device is lost after {after}: {_reason(error)}") from error


class DeviceStopwatch:
    """Time of a call on the device, ms; caches hold nothing of its inputs."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:
            self.flushed = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Callable[[], object], repeats: int) -> float:
        if not self.is_cuda:
            return wall_clock(call, repeats)
        for _ in range(_FLUSH_REPEATS):
            self.flushed.zero_()
        self.start.record()
        for _ in range(repeats):
            result = call()
        self.end.record()
        self.end.synchronize()
        del result
        return self.start.elapsed_time(self.end) / repeats


class Outcome(NamedTuple):
    """What was measured of one case."""

    times: Times  # of the variants that ran
    absent: dict[str, str]  # the others: why
    extra_bytes: dict[str, int]  # peak memory during a call - memory before it; empty on the CPU


def measure(
    variants: Mapping[str, Variant],
    device: torch.device,
    *,
    rounds: int,
    before: Callable[[], None] = lambda: None,
    slow_every: int = 1,
    references: Mapping[str, str] | None = None,
    on_progress: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Runs every variant once, then interleaves those that work.

    A variant that fails, runs out of memory, or gives another loss or other gradients than its reference is left out,
    and the outcome says why.

    Args:
        before: runs before each call, outside the time.
        slow_every: slow variants run in every so many-th round only.
        references: for a variant, the one whose values it should give; that one has to come first in `variants`.
        on_progress: gets the outcome of the first rounds.

    Raises:
        DeviceLostError: if a variant leaves a device that does not work any more.
    """
    absent: dict[str, str] = {}
    extra: dict[str, int] = {}
    values: dict[str, list[float]] = {}
    for name, variant in variants.items():
        try:
            before()
            values[name] = _magnitudes(variant.call())  # also compiles
            before()
            if device.type == "cuda":
                extra[name] = extra_bytes_on_gpu(variant.call)
        except Exception as error:
            absent[name] = _reason(error)
            values.pop(name, None)
            extra.pop(name, None)
            require_device(device, name)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for name, reference in (references or {}).items():
        if name in values and reference in values and (wrong := _difference(values[name], values[reference])):
            absent[name] = wrong
    running = {name: variant.call for name, variant in variants.items() if name not in absent}
    every = {name: slow_every for name in running if variants[name].is_slow}
    stopwatch = DeviceStopwatch(device)
    extra = {name: extra[name] for name in running if name in extra}

    def more(rounds: int, warm_ups: int) -> Times:
        return interleave(running, rounds=rounds, before=before, every=every, warm_ups=warm_ups, stopwatch=stopwatch)

    times = more(min(rounds, _FIRST_ROUNDS), 1)
    if rounds > _FIRST_ROUNDS:
        on_progress(Outcome(times, absent, extra))
        later = more(rounds - _FIRST_ROUNDS, 0).milliseconds
        times = Times({name: [*values, *later[name]] for name, values in times.milliseconds.items()})
    return Outcome(times, absent, extra)


def _magnitudes(result: Any) -> list[float]:
    """The loss, and the norms of the gradients."""
    tensors = [value.detach() for value in result if isinstance(value, Tensor)]
    return [float(torch.linalg.vector_norm(tensor, dtype=accumulation_dtype(tensor.dtype))) for tensor in tensors]


def _difference(values: list[float], expected: list[float]) -> str | None:
    for value, wanted in zip(values, expected, strict=True):
        if not abs(value - wanted) <= _VALUE_TOLERANCE * abs(wanted):  # nan is no less wrong
            return f"wrong: loss and gradient norms {values}, expected {expected}"
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]
