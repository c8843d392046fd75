"""Segments, which rows count, and what their sum is divided by."""

from __future__ import annotations

import torch
from torch import Tensor

from ava_ext.config import UnifiedLossConfig


def segment_numbers(
    n_batch: int,
    n_time: int,
    *,
    segment_ids: Tensor | None = None,  # [B, T], [1, T] or [T]
    position_ids: Tensor | None = None,  # [B, T], [1, T] or [T]
    cu_seqlens: Tensor | None = None,  # [n_segments + 1], over the rows in reading order, b * T + t
) -> Tensor:
    """The number of each row's segment within its batch row, [B, T] int64, from 0 up.

    A segment starts where segment_ids changes, where position_ids does not increase, at every cu_seqlens, and at t = 0;
    given together, each of them starts segments. Rows behind the last cu_seqlens are one more segment.
    """
    starts = torch.zeros(n_batch, n_time, dtype=torch.bool)
    if segment_ids is not None:
        ids = segment_ids.reshape(-1, n_time).expand(n_batch, n_time)
        starts[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    if position_ids is not None:
        positions = position_ids.reshape(-1, n_time).expand(n_batch, n_time)
        starts[:, 1:] |= positions[:, 1:] <= positions[:, :-1]
    if cu_seqlens is not None:
        for start in cu_seqlens.tolist():
            if start < n_batch * n_time:
                starts.view(-1)[start] = True
    starts[:, :1] = False
    return starts.long().cumsum(1)


def is_padding(
    config: UnifiedLossConfig,
    targets: Tensor,  # [B, T]
    attention_mask: Tensor | None,  # [B, T]
) -> Tensor:
    """attention_mask is 0, or the target is pad_token_id where pad is no EOS id; [B, T] bool."""
    padding = torch.zeros_like(targets, dtype=torch.bool)
    if attention_mask is not None:
        padding = padding | (attention_mask == 0)
    if config.pad_token_id is not None and config.pad_token_id not in config.eos_ids:
        padding = padding | (targets == config.pad_token_id)
    return padding


def counted_rows(
    config: UnifiedLossConfig,
    targets: Tensor,  # [B, T]
    attention_mask: Tensor | None = None,  # [B, T]
) -> Tensor:
    """Rows that count, [B, T] bool: neither ignore_index nor padding."""
    return (targets != config.ignore_index) & ~is_padding(config, targets, attention_mask)


def class_weights_of(
    config: UnifiedLossConfig,
    targets: Tensor,  # [B, T]
    counted: Tensor,  # [B, T] bool
) -> Tensor:
    """The weight of each target's class, [B, T] float64; 1 without class_weights and where a row does not count."""
    if config.class_weights is None:
        return torch.ones(targets.shape, dtype=torch.float64)
    weights = torch.tensor(config.class_weights, dtype=torch.float64)
    return torch.where(counted, weights[torch.where(counted, targets, 0)], 1.0)


def denominator(
    config: UnifiedLossConfig,
    counted: Tensor,  # [B, T] bool
    token_weights: Tensor | None = None,  # [B, T]
    num_items_in_batch: float | Tensor | None = None,
) -> Tensor:
    """N of every token term, a float64 scalar.

    "sum" and "none": 1. "mean": num_items_in_batch, else the sum of the token weights of the rows that count, else
    their number; 1 where that is 0 (the numerator is 0 then).
    """
    if config.reduction != "mean":
        return torch.ones((), dtype=torch.float64)
    if num_items_in_batch is not None:
        n = torch.as_tensor(num_items_in_batch).double()
    elif token_weights is not None:
        n = torch.where(counted, token_weights.double(), 0.0).sum()
    else:
        n = counted.sum().double()
    return torch.where(n == 0, 1.0, n)
