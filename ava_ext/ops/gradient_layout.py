"""Where a new gradient of logits lies in memory: csrc/gradient_layout.h, which gives the reasons, for fakes and for the
operators in PyTorch."""

from __future__ import annotations

from functools import cmp_to_key

import torch
from torch import SymBool, SymInt, Tensor

_Int = int | SymInt


def new_gradient(
    logits: Tensor,  # [..., n_columns]
) -> Tensor:  # [..., n_columns]
    """An uninitialised one."""
    sizes, own, in_16_bytes = logits.shape, logits.stride(), 16 // logits.dtype.itemsize
    strides = _contiguous_strides(sizes)
    begins_elsewhere = any(
        _holds((a - b) % in_16_bytes != 0) and not _holds(n == 1) for n, a, b in zip(sizes, own, strides, strict=True)
    )
    if begins_elsewhere:
        if not _is_compact(sizes, own):
            return logits.new_empty(sizes)
        strides = own
    offset = logits.storage_offset() % in_16_bytes
    if _holds(offset == 0):
        return logits.new_empty_strided(sizes, strides) if begins_elsewhere else logits.new_empty(sizes)
    extent = 1 + sum((torch.sym_max(n, 1) - 1) * stride for n, stride in zip(sizes, strides, strict=True))
    return logits.new_empty(offset + extent).as_strided(sizes, strides, offset)


def _holds(condition: bool | SymBool) -> bool:
    """Of sizes that a trace does not know: no."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # costs half a second

    return guard_or_false(condition)


def _contiguous_strides(sizes: torch.Size) -> tuple[_Int, ...]:
    strides: list[_Int] = []
    stride: _Int = 1
    for n in reversed(sizes):
        strides.append(stride)
        stride = stride * torch.sym_max(n, 1)
    return tuple(reversed(strides))


def _is_compact(
    sizes: torch.Size,
    strides: tuple[_Int, ...],
) -> bool:
    """Whether elements do not overlap and lie close together."""
    extent: _Int = 1  # of the dimensions inside
    n_elements: _Int = 1
    dims: list[tuple[_Int, _Int]] = [pair for pair in zip(strides, sizes, strict=True) if not _holds(pair[1] == 1)]
    for stride, n in sorted(dims, key=cmp_to_key(_innermost_first)):
        if _holds(stride < extent) or _holds(8 * stride > 9 * n_elements):
            return False
        extent, n_elements = stride * n, n_elements * n
    return True


def _innermost_first(one: tuple[_Int, _Int], other: tuple[_Int, _Int]) -> int:
    return -1 if _holds(one[0] < other[0]) else 1
