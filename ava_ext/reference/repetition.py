"""Candidates of the unlikelihood term, as dense weights [B, T, vocab_size] float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ava_ext.config import UnifiedLossConfig
from ava_ext.reference.sequences import counted_rows


def contexts(
    config: UnifiedLossConfig,
    targets: Tensor,  # [B, T]
    counted: Tensor,  # [B, T] bool
    segments: Tensor,  # [B, T]
    input_ids: Tensor | None = None,  # [B, T]
    attention_mask: Tensor | None = None,  # [B, T]
) -> Iterator[tuple[int, int, list[int | None]]]:
    """(b, t, context) of every row that counts.

    context = targets[b, :t], or input_ids[b, :t+1] where given, within the row's segment. Positions that hold
    ignore_index or padding are None.
    """
    tokens = targets if input_ids is None else input_ids
    source, void = tokens.tolist(), (~counted_rows(config, tokens, attention_mask)).tolist()
    segments = segments.tolist()
    for b, t in counted.nonzero().tolist():
        end = t if input_ids is None else t + 1
        inside = [s for s in range(end) if segments[b][s] == segments[b][t]]
        yield b, t, [None if void[b][s] else source[b][s] for s in inside]


def is_never_candidate(config: UnifiedLossConfig, token: int | None, target: int) -> bool:
    """True for a token that is never a candidate of the two repetition penalties."""
    return (
        token is None
        or not 0 <= token < config.vocab_size
        or token == target
        or (token == config.pad_token_id and token not in config.eos_ids)
        or token in config.repetition_allow_list
    )


def immediate_repetition_weights(
    config: UnifiedLossConfig,
    targets: Tensor,  # [B, T]
    counted: Tensor,  # [B, T] bool
    segments: Tensor,  # [B, T]
    *,
    input_ids: Tensor | None = None,  # [B, T]
    attention_mask: Tensor | None = None,  # [B, T]
) -> Tensor:
    """The previous token, once the run of equal tokens that ends the context has the threshold's length.

    Weight lambda min(growth^(run-1), 4).
    """
    weights = torch.zeros(*targets.shape, config.vocab_size, dtype=torch.float64)
    for b, t, context in contexts(config, targets, counted, segments, input_ids, attention_mask):
        if not context or is_never_candidate(config, context[-1], int(targets[b, t])):
            continue
        run, factor = 1, 1.0
        while run < len(context) and context[-1 - run] == context[-1]:
            run += 1
            factor = min(factor * config.immediate_repetition_growth, 4.0)
        if run >= config.immediate_repetition_threshold:
            weights[b, t, context[-1]] = config.immediate_repetition_weight * factor
    return weights


def ngram_weights(
    config: UnifiedLossConfig,
    targets: Tensor,  # [B, T]
    counted: Tensor,  # [B, T] bool
    segments: Tensor,  # [B, T]
    *,
    input_ids: Tensor | None = None,  # [B, T]
    attention_mask: Tensor | None = None,  # [B, T]
) -> Tensor:
    """Tokens that followed earlier occurrences of the last n-1 context tokens: the ngram_slots most recent distinct
    ones.

    With ngram_window_size W only followers at the last W context positions (None positions are positions too); the key
    before such a follower may reach further back. n = 1: the key is empty, every context token is a follower.
    """
    weights = torch.zeros(*targets.shape, config.vocab_size, dtype=torch.float64)
    n_key = config.ngram_size - 1
    for b, t, context in contexts(config, targets, counted, segments, input_ids, attention_mask):
        length = len(context)
        key = context[length - n_key :] if length >= n_key else [None]
        if None in key:
            continue
        oldest = n_key if config.ngram_window_size is None else max(n_key, length - config.ngram_window_size)
        followers: list[int] = []
        for s in reversed(range(oldest, length)):
            token = context[s]
            is_candidate = token not in followers and not is_never_candidate(config, token, int(targets[b, t]))
            if is_candidate and context[s - n_key : s] == key:
                followers.append(token)
        weights[b, t, followers[: config.ngram_slots]] = config.ngram_penalty_weight
    return weights


def early_eos_weights(
    config: UnifiedLossConfig,
    targets: Tensor,  # [B, T]
    counted: Tensor,  # [B, T] bool
    segments: Tensor,  # [B, T]
) -> Tensor:
    """Each EOS id, while fewer than min_sequence_length rows that count precede the row in its segment.

    None where the target itself is one of the EOS ids. An id named twice counts twice.
    """
    weights = torch.zeros(*targets.shape, config.vocab_size, dtype=torch.float64)
    for b, t in counted.nonzero().tolist():
        before = int((counted[b, :t] & (segments[b, :t] == segments[b, t])).sum())
        if before < config.min_sequence_length and int(targets[b, t]) not in config.eos_ids:
            for token in config.eos_ids:
                weights[b, t, token] += config.eos_penalty_weight
    return weights


def negative_weights_dense(
    config: UnifiedLossConfig,
    targets: Tensor,  # [B, T]
    counted: Tensor,  # [B, T] bool
    negative_ids: Tensor,  # [B, T, M], -1 absent
    negative_weights: Tensor | None = None,  # [B, T, M], 1 each where not given
) -> Tensor:
    """The given tokens without the row's own target; duplicates add. Ids outside [0, vocab_size) are absent."""
    weights = torch.zeros(*targets.shape, config.vocab_size, dtype=torch.float64)
    for b, t in counted.nonzero().tolist():
        for m, token in enumerate(negative_ids[b, t].tolist()):
            if 0 <= token < config.vocab_size and token != int(targets[b, t]):
                weights[b, t, token] += 1.0 if negative_weights is None else float(negative_weights[b, t, m])
    return weights
