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


def index_error(
    owner: str,
    name: str,
    expected: str,
    ids: Tensor,  # [...]
    is_wrong: Tensor,  # [...] bool
) -> IndexError:
    """The error that names the first wrong id and where it is."""
    position = int(is_wrong.reshape(-1).nonzero()[0])
    got = int(ids.reshape(-1)[position])
    return IndexError(f"{owner}: expected {name} in {expected}, got {got} at position {position}")


def narrow_ids(
    ids: Tensor,  # [...] integers
) -> Tensor:  # [...] int32
    """ids as the operators take them. One beyond int32 stays out of range: another id in its place would pass."""
    if ids.dtype == torch.int32:
        return ids
    if ids.dtype.itemsize > torch.int32.itemsize:
        info = torch.iinfo(torch.int32)
        ids = ids.to(torch.int64).clamp(info.min, info.max)
    return ids.to(torch.int32)
