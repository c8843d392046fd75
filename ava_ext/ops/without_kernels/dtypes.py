"""The most exact floating-point type of a device."""

from __future__ import annotations

import torch


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it: not on Apple's GPUs, nor on some of Intel's."""
    if device.type == "mps":
        return torch.float32
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return torch.float32
    return torch.float64
