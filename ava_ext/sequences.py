"""Sequences: where a segment begins, and the rows ahead."""

from __future__ import annotations

import torch
from torch import Tensor

from ava_ext.ops.arguments import check_integers, check_shape, has_shape
from ava_ext.ops.counted_rows import host_sees


def segment_numbers(
    shape: tuple[int, int],  # (batch_size, n_tokens)
    segment_ids: Tensor | None,  # [batch_size, n_tokens], [1, n_tokens] or [n_tokens]
    position_ids: Tensor | None,  # [batch_size, n_tokens], [1, n_tokens] or [n_tokens]
    cu_seqlens: Tensor | None,  # [n_segments + 1], over the rows in reading order
) -> Tensor | None:
    """A number for each row that changes where a segment begins, [batch_size or 1, n_tokens]; None: one segment a
    batch row.

    A segment begins where segment_ids change, where position_ids do not increase, and at every cu_seqlens; given
    together, each of them begins segments.

    Raises:
        ValueError: on shapes that do not fit, and on numbers that are not integers. Nothing checks that cu_seqlens
            ascend.
    """
    batch_size, n_tokens = shape
    starts: list[Tensor] = []
    for name, given, begins in (("segment_ids", segment_ids, torch.ne), ("position_ids", position_ids, torch.le)):
        if given is None:
            continue
        if not has_shape(given, (1, n_tokens), (n_tokens,)):
            check_shape("unified_loss", shape, **{name: given})
        check_integers("unified_loss", name, given, "[batch_size, n_tokens]")
        given = torch.atleast_2d(given.long())  # unsigned integers have no order
        starts.append(begins(given[:, 1:], given[:, :-1]))
    numbers = None
    if starts:
        starting = starts[0] if len(starts) == 1 else starts[0] | starts[1]
        numbers = torch.nn.functional.pad(starting.cumsum(1), (min(1, n_tokens), 0))
    if cu_seqlens is None:
        return numbers
    if cu_seqlens.dim() != 1:
        raise ValueError(f"unified_loss: expected cu_seqlens of shape [n_segments + 1], got {list(cu_seqlens.shape)}")
    check_integers("unified_loss", "cu_seqlens", cu_seqlens, "[n_segments + 1]")
    rows = torch.arange(batch_size * n_tokens, device=cu_seqlens.device).view(batch_size, n_tokens)
    packed = torch.searchsorted(cu_seqlens.to(torch.int64), rows, right=True)
    # both count upwards, so their sum changes where either does
    return packed if numbers is None else packed + numbers


def text_numbers(
    shape: tuple[int, int],  # (batch_size, n_tokens)
    segments: Tensor | None,  # [batch_size, n_tokens], from segment_numbers
    cu_seqlens: Tensor | None,  # [n_segments + 1], where these alone tell texts apart
    device: torch.device,
) -> tuple[Tensor, int]:
    """The number of each row's text in reading order, from 0 on, [batch_size * n_tokens], and a bound of the numbers.

    The bound is exact on the CPU, and without packing. Else it is what can be said without waiting for the device: what
    the length of cu_seqlens allows, or as many as there are rows.
    """
    batch_size, n_tokens = shape
    if segments is None:
        return torch.arange(batch_size, device=device).repeat_interleave(n_tokens), max(batch_size, 1)
    starts = torch.nn.functional.pad(segments[:, 1:] != segments[:, :-1], (min(1, n_tokens), 0), value=True)
    numbers = starts.flatten().cumsum(0) - 1
    n_rows = batch_size * n_tokens
    if n_rows == 0 or not host_sees(numbers):
        n_most = n_rows if cu_seqlens is None else min(n_rows, cu_seqlens.shape[0] + 1 + batch_size)
        return numbers, max(n_most, 1)
    return numbers, int(numbers[-1]) + 1


def shift_left(
    values: Tensor,  # [batch_size, n_tokens]
    fill: int,
    k: int = 1,
    segments: Tensor | None = None,  # [batch_size, n_tokens]
) -> Tensor:
    """values[:, t + k] at t, `fill` where that is beyond the end or in another segment; [batch_size, n_tokens].

    Rows keep their number, so that logits are never copied.

    Example:
        >>> shift_left(torch.tensor([[5, 6, 7, 8]]), -100, k=2)
        tensor([[   7,    8, -100, -100]])
    """
    n_tokens = values.shape[1]
    k = min(k, n_tokens)
    values = values[:, k:]
    if segments is not None:
        values = torch.where(segments[:, k:] == segments[:, : n_tokens - k], values, fill)
    return torch.constant_pad_nd(values, (0, k), fill)  # functional.pad would take fill for a float, of 53 bits
