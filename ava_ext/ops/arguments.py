"""Checks of arguments that the operators' own checks come too late for."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ava_ext.ops.derivatives import wants_gradient

POSITIVE = "a number > 0 in the range of float32"
INTEGERS = (  # not uint64, whose greatest would become -1, -100, ...
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32
)  # fmt: skip
_NUMBERS: tuple[Any, ...] = (float, Real, Tensor, torch.SymFloat, torch.SymInt)
_LEAST, GREATEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def check_is_tensor(
    owner: str, name: str, value: object, kinds: tuple[type, ...] = (Tensor,), expected: str = "a torch.Tensor"
) -> None:
    """Raises TypeError for a list, an array of NumPy, the output of a model, ..."""
    if not isinstance(value, kinds):
        raise TypeError(f"{owner}: expected {name} to be {expected}, got {torch.typename(value)}")


def check_are_tensors(owner: str, **values: object) -> None:
    """check_is_tensor for each that is not None."""
    for name, value in values.items():
        if value is not None:
            check_is_tensor(owner, name, value)


def check_has_columns(owner: str, name: str, values: object) -> None:
    """Raises TypeError for anything but a tensor, ValueError for a scalar, which has no columns."""
    check_is_tensor(owner, name, values)
    if values.dim() == 0:  # type: ignore[attr-defined]
        raise ValueError(f"{owner}: expected {name} of at least one dimension, got a scalar")


def is_positive(number: Any) -> bool:
    """Whether it is above 0 for the kernels, which read float32: nan is not, nor what becomes infinite or subnormal."""
    return isinstance(number, _NUMBERS) and bool(_LEAST <= number <= GREATEST)


def check_positive(owner: str, **numbers: object) -> None:
    """Raises ValueError for one that is not positive: a temperature, a soft cap, a scale."""
    for name, number in numbers.items():
        if not is_positive(number):
            raise ValueError(f"{owner}: expected {name} to be {POSITIVE}, got {number!r}")


def check_constants(owner: str, **numbers: Any) -> None:
    """Raises ValueError for a tensor that requires grad, which it would not get."""
    for name, number in numbers.items():
        if isinstance(number, Tensor) and wants_gradient(number):
            raise ValueError(f"{owner}: expected {name} without requires_grad: no gradient is computed for it")


def check_not_negative(owner: str, names: tuple[str, ...], numbers: tuple[float, ...]) -> None:
    """Raises ValueError for one that requires grad, or is not one >= 0 that float32 holds: a weight, an exponent."""
    total = sum(numbers)  # nan where one is, and a tensor that requires grad where one does
    if min(numbers) >= 0 and total <= GREATEST and not (isinstance(total, Tensor) and total.requires_grad):
        return
    check_constants(owner, **dict(zip(names, numbers, strict=True)))
    for name, number in zip(names, numbers, strict=True):
        if not 0 <= number <= GREATEST:
            raise ValueError(f"{owner}: expected {name} to be a number >= 0 in the range of float32, got {number}")


def check_integers(owner: str, name: str, tensor: Tensor, shape: str = "[...]") -> None:
    """Raises ValueError for numbers that a conversion to int64 would change."""
    if tensor.dtype not in INTEGERS:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{owner}: expected {name} to be integers of shape {shape}, got {dtype}")


def check_shape(owner: str, shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    """Raises ValueError where one that is not None has another shape."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{owner}: expected {name} of shape {list(shape)}, got {list(tensor.shape)}")


def check_are_integers(owner: str, **values: Any) -> None:
    """Raises TypeError for what is neither None nor an integer: operators truncate it, or print their own schema."""
    for name, value in values.items():
        if type(value) is int or value is None:
            continue
        is_integer = not isinstance(value, bool) and isinstance(value, (Integral, torch.SymInt))
        if not (is_integer or (isinstance(value, Tensor) and value.dtype in INTEGERS)):
            raise TypeError(f"{owner}: expected {name} to be an integer, got {value!r}")


def as_mask(owner: str, mask: Tensor) -> Tensor:
    """A row_mask as bools; raises ValueError for floats, as of an additive mask, where 0 is what counts."""
    if mask.is_floating_point() or mask.is_complex():
        dtype = str(mask.dtype).removeprefix("torch.")
        raise ValueError(f"{owner}: expected row_mask of bool, got {dtype}")
    return mask.to(torch.bool)


def check_real(owner: str, name: str, tensor: Tensor) -> None:
    """Raises ValueError for complex numbers: a conversion to floats would drop their imaginary part."""
    if tensor.is_complex():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{owner}: expected {name} of real numbers, got {dtype}")


def check_several_of_rows(
    owner: str,
    rows: torch.Size,  # [...]
    name: str,
    values: Tensor,  # [..., n]
    n: str,  # what the message calls it
) -> None:
    """Raises ValueError where there are not several values for each row."""
    if values.dim() != len(rows) + 1 or values.shape[:-1] != rows:
        expected = ", ".join([*map(str, rows), n])
        raise ValueError(f"{owner}: expected {name} of shape [{expected}], got {list(values.shape)}")


def check_devices(
    owner: str,
    like: Any,  # a tensor, or logits of any kind
    **others: Tensor | None,
) -> None:
    """Raises RuntimeError where one of the others is not on the device of `like`.

    Fakes begin with it: an operator with one tensor on meta is a fake, whose output on the CPU would be garbage.
    """
    for name, tensor in others.items():
        if tensor is not None and tensor.device != like.device:
            raise RuntimeError(f"{owner}: expected {name} on {like.device}, got {tensor.device}")


def with_dense_rows(
    values: Tensor,  # [..., n]
) -> Tensor:  # [..., n], last stride 1
    """values as the operators take them: a copy where the last stride is another, of an empty tensor too, which
    contiguous() leaves as it is.
    """
    if values.shape[-1] == 1 or values.stride(-1) == 1:
        return values
    if values.dim() < 3 or torch.compiler.is_compiling():
        return values.clone(memory_format=torch.contiguous_format)
    # on the CPU torch transposes two dimensions in blocks, and more of them number by number: [1, n_rows, n] too
    rows = values.flatten(0, -2)
    if rows.stride(-1) != 1:
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.view(values.shape)


def has_shape(
    values: Tensor,  # [...]
    *shapes: tuple[int, ...],
) -> bool:
    """Whether it has one of these.

    In a graph with dynamic shapes, `in` asks whether symbols are the same, not whether they are equal.
    """
    return any(values.shape == shape for shape in shapes)


def as_ids(owner: str, name: str, ids: Tensor, shape: str) -> Tensor:
    """ids in a type that the operators take, which check their range; shape is for the message."""
    if ids.dtype in (torch.int64, torch.int32):
        return ids
    check_integers(owner, name, ids, shape)
    return ids.to(torch.int64)
