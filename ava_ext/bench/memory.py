"""Peak memory of one call: on a GPU what its allocator says, on Linux the resident memory of this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch


def is_available() -> bool:
    """Whether this system lets a process reset the peak of its resident memory."""
    return Path("/proc/self/clear_refs").exists()


def extra_bytes(call: Callable[[], object]) -> int:
    """Greatest resident memory during the call - resident memory before it, in this process.

    Memory that is free inside the process, in a pool or in malloc, does not count: measure in a process that has not
    called before. Linux only: VmRSS and VmHWM of /proc/self/status, after writing 5 to /proc/self/clear_refs, which
    resets VmHWM.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    result = call()
    extra = _status_bytes("VmHWM") - before
    del result  # what the call returns counts
    return extra


def extra_bytes_on_gpu(call: Callable[[], object]) -> int:
    """Greatest allocated memory during the call - that before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"peak_memory: expected {field} in /proc/self/status, got none")
