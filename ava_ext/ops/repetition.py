"""Repetition candidates: which tokens would repeat something in the context of each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import ava_ext._library  # noqa: F401  (loads the operators)

_OP = torch.ops.ava_ext.repetition_candidates.default
_TOKEN_DTYPES = (torch.int64, torch.int32)
_WEIGHT_DTYPES = (torch.float32, torch.float64)


def repetition_candidates(
    tokens: Tensor,  # [batch_size, n_tokens]
    targets: Tensor,  # [batch_size, n_tokens]
    *,
    weights: Tensor,  # [4]
    vocab_size: int,
    segments: Tensor | None = None,  # [batch_size or 1, n_tokens]
    tokens_include_row: bool = False,
    ignore_index: int = -100,
    excluded_ids: Sequence[int] = (),
    immediate: bool = False,
    immediate_threshold: int = 1,
    ngram_size: int = 0,
    ngram_window: int | None = None,
    ngram_slots: int = 8,
    eos_ids: Sequence[int] = (),
    min_sequence_length: int = 0,
) -> tuple[Tensor, Tensor]:
    """The tokens that unlikelihood training pushes down in each row, and how strongly.

    Row t predicts targets[:, t]. Its context is tokens[:, :t] (tokens are the targets) or, with tokens_include_row,
    tokens[:, :t + 1] (tokens are what the model read), from the start of its segment on. Each row has n_slots =
    immediate + len(eos_ids) + (ngram_slots if ngram_size else 0) slots, in this order:

    - one slot for the last token of the context. With run = the number of equal tokens that end the context,
      weight = weights[0] * min(weights[1] ** (run - 1), 4) where run >= immediate_threshold;
    - a slot per EOS id, weight = weights[2], while fewer than min_sequence_length counted rows of the segment precede
      the row and the row's own target is no EOS id;
    - ngram_slots slots for the distinct tokens that followed earlier occurrences of the context's last
      ngram_size - 1 tokens, most recent first, weight = weights[3].

    The first and the last kind never hold the row's own target, excluded_ids, or ids outside [0, vocab_size).
    Time and memory are linear in the number of tokens for every text. Not differentiable.

    Args:
        tokens: [batch_size, n_tokens], int64 or int32, any strides. ignore_index marks a masked position: it matches
            nothing, is never a candidate and ends a run. Ids outside the vocabulary match but are no candidates.
        targets: [batch_size, n_tokens], int64 or int32. Rows with ignore_index do not count: no candidates.
        weights: [4], float32 or float64, on the device of tokens: immediate weight, immediate growth, EOS weight,
            n-gram weight. A tensor, so that a schedule neither recompiles nor synchronises.
        vocab_size: candidates are below it; in [1, 2^31).
        segments: [batch_size, n_tokens] or [1, n_tokens], int64 or int32. Each run of equal values is a text of its
            own. None: each batch row is one.
        excluded_ids: ids that may repeat.
        immediate: whether there is a slot for the last token.
        ngram_size: n; 1 is every token of the context; 0 is no n-grams.
        ngram_window: only tokens among the last so many of the context; None is all of it.

    Returns:
        (ids, candidate_weights), both [batch_size, n_tokens, n_slots]: int32 with -1 for no candidate, and the dtype
        of weights with 0 there.

    Raises:
        ValueError: on wrong shapes, dtypes or numbers, or if weights require grad.

    Example:
        >>> text = torch.tensor([[5, 6, 7, 5, 6, 8]])
        >>> weights = torch.tensor([0.5, 1.0, 0.05, 0.1])
        >>> ids, _ = repetition_candidates(text, text, weights=weights, vocab_size=10, ngram_size=3, ngram_slots=2)
        >>> ids[0, 5].tolist()  # 7 followed "5 6"
        [7, -1]

    Source: unlikelihood training, Welleck et al. 2019, https://arxiv.org/abs/1908.04319.
    """
    shape = tokens.shape
    if tokens.dtype not in _TOKEN_DTYPES or tokens.dim() != 2:
        raise _bad("tokens", "int64 or int32 of shape [batch_size, n_tokens]", tokens)
    if targets.dtype not in _TOKEN_DTYPES or targets.shape != shape:
        raise _bad("targets", f"int64 or int32 of shape {list(shape)}", targets)
    if segments is not None and (
        segments.dtype not in _TOKEN_DTYPES or (segments.shape != shape and segments.shape != (1, shape[1]))
    ):
        raise _bad("segments", f"int64 or int32 of shape {list(shape)}", segments)
    if weights.dtype not in _WEIGHT_DTYPES or weights.shape != (4,):
        raise _bad("weights", "float32 or float64 of shape [4]", weights)
    if weights.requires_grad:
        raise ValueError("repetition_candidates: expected weights without grad, got weights that require grad")
    window = 0 if ngram_window is None else ngram_window
    if (
        not 0 < vocab_size < 2**31
        or immediate_threshold < 1
        or ngram_size < 0
        or window < 0
        or (ngram_size > 0 and ngram_slots < 1)
    ):
        raise ValueError(
            "repetition_candidates: expected vocab_size in [1, 2^31), immediate_threshold >= 1, ngram_size >= 0, "
            f"ngram_window >= 1 or None and ngram_slots >= 1, got {vocab_size}, {immediate_threshold}, {ngram_size}, "
            f"{ngram_window} and {ngram_slots}"
        )
    for eos in eos_ids:
        if not 0 <= eos < vocab_size:
            raise ValueError(f"repetition_candidates: expected eos_ids in [0, vocab_size = {vocab_size}), got {eos}")
    return _OP(
        tokens,
        targets,
        segments,
        weights,
        tokens_include_row=tokens_include_row,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        repetition_allow_list=excluded_ids,
        use_immediate_repetition_penalty=immediate,
        immediate_repetition_threshold=immediate_threshold,
        ngram_size=ngram_size,
        ngram_window_size=window,
        ngram_slots=ngram_slots,
        eos_ids=eos_ids,
        min_sequence_length=min_sequence_length,
    )


def _bad(name: str, expected: str, got: Tensor) -> ValueError:
    dtype = str(got.dtype).removeprefix("torch.")
    return ValueError(
        f"repetition_candidates: expected {name} to be {expected}, got {dtype} of shape {list(got.shape)}"
    )


@torch.library.register_fake("ava_ext::repetition_candidates")
def _(
    tokens: Tensor,  # [batch_size, n_tokens]
    targets: Tensor,  # [batch_size, n_tokens]
    segments: Tensor | None,  # [batch_size or 1, n_tokens]
    weights: Tensor,  # [4]
    *,
    use_immediate_repetition_penalty: bool,
    ngram_size: int,
    ngram_slots: int,
    eos_ids: Sequence[int],
    **options: object,
) -> tuple[Tensor, Tensor]:
    n_slots = int(use_immediate_repetition_penalty) + len(eos_ids) + (ngram_slots if ngram_size > 0 else 0)
    shape = (*tokens.shape, n_slots)
    return tokens.new_empty(shape, dtype=torch.int32), weights.new_empty(shape)


# Not differentiable, and said so in the dispatcher itself: an autograd function would add Python to every call.
_AUTOGRAD = torch.library.Library("ava_ext", "IMPL")
_AUTOGRAD.impl("repetition_candidates", torch.library.fallthrough_kernel, "Autograd")
