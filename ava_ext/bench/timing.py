"""Interleaved timing: noise of the machine hits every variant of a round alike, and cancels in their ratios."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping

# a call and how often it is repeated -> milliseconds of one
Stopwatch = Callable[[Callable[[], object], int], float]


def wall_clock(call: Callable[[], object], repeats: int) -> float:
    """Time of one call, ms."""
    start = time.perf_counter_ns()
    for _ in range(repeats):
        result = call()
    elapsed = time.perf_counter_ns() - start
    del result  # after the clock: what frees a gradient in training is the next layer's backward
    return elapsed / repeats / 1e6


class Times:
    """What `interleave` measured: for every variant one time per round, None where it did not run."""

    def __init__(self, milliseconds: Mapping[str, list[float | None]]) -> None:
        self.milliseconds = milliseconds

    def ran(self, name: str) -> list[float]:
        """The times of the rounds in which the variant ran, ms."""
        return [value for value in self.milliseconds[name] if value is not None]

    def median(self, name: str) -> float:
        """Median time, ms."""
        return statistics.median(self.ran(name))

    def quartiles(self, name: str) -> tuple[float, float]:
        """The times that a quarter and three quarters of the rounds stay below, ms."""
        values = self.ran(name)
        if len(values) == 1:
            return values[0], values[0]
        lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
        return lower, upper

    def ratio(self, name: str, reference: str) -> float:
        """Median over the rounds of time(name) / time(reference); the ratio of the medians would forget the pairs.

        Raises:
            ValueError: if the two never ran in the same round.
        """
        pairs = zip(self.milliseconds[name], self.milliseconds[reference], strict=True)
        ratios = [time / other for time, other in pairs if time is not None and other is not None]
        if not ratios:
            raise ValueError(f"ratio: expected {name} and {reference} in the same rounds, got none")
        return statistics.median(ratios)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    before: Callable[[], None] | None = None,
    every: Mapping[str, int] | None = None,
    repeats: int = 1,
    warm_ups: int = 2,
    stopwatch: Stopwatch = wall_clock,
) -> Times:
    """Runs every variant once per round, in an order that changes from round to round.

    Each round begins with another variant, and every second one goes backwards, so that none always follows the same.

    Args:
        calls: variants by name. What a call returns is freed after the clock has stopped.
        before: runs before each call, outside the time.
        every: variants that run in every so many-th round only, because they are slow.
        repeats: calls within one measurement, for those of microseconds.
        warm_ups: calls of each variant that are not measured: compilation, first touch of memory.
        stopwatch: measures; it frees what the call returns.
    """
    names = list(calls)
    milliseconds: dict[str, list[float | None]] = {name: [None] * rounds for name in names}
    for name in names:
        for _ in range(warm_ups):
            _time(calls[name], before, 1, stopwatch)
    collects = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            first = number % len(names)
            order = names[first:] + names[:first]
            for name in reversed(order) if number % 2 else order:
                if number % (every or {}).get(name, 1) == 0:
                    milliseconds[name][number] = _time(calls[name], before, repeats, stopwatch)
            gc.collect()
    finally:
        if collects:
            gc.enable()
    return Times(milliseconds)


def _time(call: Callable[[], object], before: Callable[[], None] | None, repeats: int, stopwatch: Stopwatch) -> float:
    if before is not None:
        before()
    return stopwatch(call, repeats)
