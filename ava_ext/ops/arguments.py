"""Checks of arguments that the operators' own checks come too late for."""

from __future__ import annotations

import torch
from torch import Tensor


def check_is_tensor(owner: str, name: str, value: object, *, or_linear: bool = False) -> None:
    """Raises TypeError for a list, an array of NumPy, the output of a model, ..."""
    if not isinstance(value, Tensor):
        expected = "a Tensor or LinearLogits" if or_linear else "a Tensor"
        raise TypeError(
            f"{owner}: expected {name} to be {expected}, got {type(value).__module__}.{type(value).__qualname__}"
        )


def check_integers(owner: str, name: str, tensor: Tensor, shape: str = "[...]") -> None:
    """Raises ValueError for numbers that a conversion to integers would change."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{owner}: expected {name} to be integers of shape {shape}, got {dtype}")


def check_devices(owner: str, like: Tensor, **others: Tensor | None) -> None:
    """Raises RuntimeError where one of the others is not on the device of `like`.

    Fakes begin with it: an operator with one tensor on meta is a fake, whose output on the CPU would be garbage.
    """
    for name, tensor in others.items():
        if tensor is not None and tensor.device != like.device:
            raise RuntimeError(f"{owner}: expected {name} on {like.device}, got {tensor.device}")


def as_ids(owner: str, name: str, ids: Tensor, shape: str) -> Tensor:
    """ids in a type that the operators take, which check their range; shape is for the message."""
    if ids.dtype in (torch.int64, torch.int32):
        return ids
    check_integers(owner, name, ids, shape)
    return ids.to(torch.int64)
