"""Repetition candidates as PyTorch operators; what they are is in csrc/repetition.h.

Every row is compared with every position of its context: time and memory grow with the square of the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ava_ext.ops.without_kernels.dtypes import widest_dtype

ROWS_AT_ONCE = 256  # bounds the memory: [batch_size, ROWS_AT_ONCE, n_tokens]


class _Text(NamedTuple):
    tokens: Tensor  # [batch_size, n_tokens] int64
    targets: Tensor  # [batch_size, n_tokens] int64
    starts: Tensor  # [batch_size, n_tokens]: where the segment of this position begins
    may_penalize: Tensor  # [batch_size, n_tokens] bool
    ignore_index: int


@torch.no_grad()
def repetition_candidates(
    tokens: Tensor,  # [batch_size, n_tokens]
    targets: Tensor,  # [batch_size, n_tokens]
    segments: Tensor | None,  # [batch_size or 1, n_tokens]
    weights: Tensor,  # [4]
    *,
    tokens_include_row: bool,
    vocab_size: int,
    ignore_index: int,
    repetition_allow_list: Sequence[int] | None,
    use_immediate_repetition_penalty: bool,
    immediate_repetition_threshold: int,
    ngram_size: int,
    ngram_window_size: int,
    ngram_slots: int,
    eos_ids: Sequence[int] | None,
    min_sequence_length: int,
) -> tuple[Tensor, Tensor]:
    """(ids, candidate_weights), both [batch_size, n_tokens, n_slots]; see ops/repetition.py."""
    shape = list(tokens.shape)
    if list(targets.shape) != shape:
        raise RuntimeError(f"repetition_candidates: expected targets of shape {shape}, got {list(targets.shape)}")
    eos_ids = eos_ids or ()
    for eos in eos_ids:
        if not 0 <= eos < vocab_size:
            raise RuntimeError(f"repetition_candidates: expected eos_ids in [0, vocab_size = {vocab_size}), got {eos}")
    n_slots = int(use_immediate_repetition_penalty) + len(eos_ids) + (ngram_slots if ngram_size > 0 else 0)
    if tokens.numel() == 0 or n_slots == 0:
        return tokens.new_empty((*shape, n_slots), dtype=torch.int32), weights.new_empty((*shape, n_slots))
    text = _read(tokens.long(), targets.long(), segments, vocab_size, ignore_index, repetition_allow_list or ())
    rows = torch.arange(tokens.shape[1], device=tokens.device)
    ends = rows + tokens_include_row
    immediate_weight, growth, eos_weight, ngram_weight = weights.to(widest_dtype(weights.device)).unbind()
    ids, values = [], []  # of each slot: [batch_size, n_tokens, any]
    if use_immediate_repetition_penalty:
        candidate, run = _runs(text, ends)
        allowed = (run >= immediate_repetition_threshold) & (run > 0) & (candidate != text.targets)
        allowed &= _at(text.may_penalize, ends - 1)
        ids.append(torch.where(allowed, candidate, -1).unsqueeze(-1))
        values.append((immediate_weight * growth.pow(run - 1).clamp(max=4)).unsqueeze(-1))
    if eos_ids:
        counted = (text.targets != ignore_index).long()
        before = counted.cumsum(1) - counted
        early = before - before.gather(1, text.starts) < min_sequence_length
        listed = torch.tensor(eos_ids, device=tokens.device)
        early &= ~torch.isin(text.targets, listed)
        ids.append(torch.where(early.unsqueeze(-1), listed, -1))
        values.append(eos_weight.expand(ids[-1].shape))
    if ngram_size > 0:
        oldest = ends - ngram_window_size if ngram_window_size > 0 else torch.zeros_like(ends)
        parts = [
            _followers(text, part, end, first, ngram_size, ngram_slots)
            for part, end, first in zip(*(t.split(ROWS_AT_ONCE) for t in (rows, ends, oldest)), strict=True)
        ]
        ids.append(torch.cat(parts, 1))
        values.append(ngram_weight.expand(ids[-1].shape))
    all_ids = torch.where((text.targets == ignore_index).unsqueeze(-1), -1, torch.cat(ids, -1))
    all_values = torch.where(all_ids >= 0, torch.cat(values, -1), 0)
    return all_ids.int().contiguous(), all_values.to(weights.dtype).contiguous()


def _read(
    tokens: Tensor,  # [batch_size, n_tokens]
    targets: Tensor,  # [batch_size, n_tokens]
    segments: Tensor | None,  # [batch_size or 1, n_tokens]
    vocab_size: int,
    ignore_index: int,
    repetition_allow_list: Sequence[int],
) -> _Text:
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    starts = torch.zeros_like(places)
    if segments is not None:
        marks = segments.expand_as(tokens)
        changes = _differs_from_last(marks)
        starts = torch.where(changes, places, 0).cummax(1).values
    may_penalize = (tokens >= 0) & (tokens < vocab_size) & (tokens != ignore_index)
    if repetition_allow_list:
        may_penalize &= ~torch.isin(tokens, torch.tensor(repetition_allow_list, device=tokens.device))
    return _Text(tokens, targets, starts, may_penalize, ignore_index)


def _differs_from_last(
    values: Tensor,  # [batch_size, n_tokens]
) -> Tensor:  # [batch_size, n_tokens] bool
    return torch.nn.functional.pad(values[:, 1:] != values[:, :-1], (1, 0))


def _at(
    values: Tensor,  # [batch_size, n_tokens]
    positions: Tensor,  # [n_rows]; those below 0 read position 0
) -> Tensor:  # [batch_size, n_rows]
    return values[:, positions.clamp_min(0)]


def _runs(
    text: _Text,
    ends: Tensor,  # [n_tokens]
) -> tuple[Tensor, Tensor]:
    """The last token of each context and how often it stands there in a row: both [batch_size, n_tokens]."""
    tokens = text.tokens
    places = torch.arange(tokens.shape[1], device=tokens.device)
    begins = (places == text.starts) | _differs_from_last(tokens)
    run_starts = torch.where(begins, places, 0).cummax(1).values
    last = _at(tokens, ends - 1)
    inside = (ends - 1 >= text.starts) & (last != text.ignore_index)
    return last, torch.where(inside, ends - _at(run_starts, ends - 1), 0)


def _followers(
    text: _Text,
    rows: Tensor,  # [n_rows]
    ends: Tensor,  # [n_rows]
    oldest: Tensor,  # [n_rows]
    ngram_size: int,
    ngram_slots: int,
) -> Tensor:  # [batch_size, n_rows, ngram_slots]
    """The distinct tokens that followed earlier occurrences of each row's key, most recent first; -1: no more."""
    tokens = text.tokens.unsqueeze(1)  # [batch_size, 1, n_tokens]
    places = torch.arange(tokens.shape[-1], device=tokens.device)  # [n_tokens]
    starts = _at(text.starts, rows).unsqueeze(-1)  # [batch_size, n_rows, 1]
    follows = (places >= starts + ngram_size - 1) & (places < ends.unsqueeze(-1)) & (places >= oldest.unsqueeze(-1))
    follows &= text.may_penalize.unsqueeze(1) & (tokens != _at(text.targets, rows).unsqueeze(-1))
    for k in range(1, ngram_size):
        key = _at(text.tokens, ends - k).unsqueeze(-1)
        follows &= (ends - k).unsqueeze(-1) >= starts
        follows &= (key != text.ignore_index) & (tokens[..., (places - k).clamp_min(0)] == key)
    found = []
    for _ in range(ngram_slots):
        newest = torch.where(follows, places, -1).amax(-1)
        token = text.tokens.gather(1, newest.clamp_min(0))
        found.append(torch.where(newest >= 0, token, -1))
        follows &= tokens != token.unsqueeze(-1)
    return torch.stack(found, -1)
