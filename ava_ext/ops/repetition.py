"""Repetition candidates: which tokens would repeat something in the context of each row."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from ava_ext import _library  # noqa: F401  the operators exist once it is imported
from ava_ext.ops.arguments import as_ids, check_are_tensors, check_devices, check_is_tensor, check_shape
from ava_ext.ops.dtensor_rows import of_whole_texts
from ava_ext.ops.dtensors import DTENSOR, is_dtensor
from ava_ext.ops.row_fields import Candidates, numbers_like

_OP = torch.ops.ava_ext.repetition_candidates.default
_WEIGHT_DTYPES = (torch.float32, torch.float64)
WEIGHT_NAMES = (
    "immediate_repetition_weight",
    "immediate_repetition_growth",
    "eos_penalty_weight",
    "ngram_penalty_weight",
)
N_REPETITION_WEIGHTS = len(WEIGHT_NAMES)


def repetition_weights(
    like: Tensor,
    *,
    immediate_repetition_weight: float = 0.5,
    immediate_repetition_growth: float = 1.0,
    eos_penalty_weight: float = 0.05,
    ngram_penalty_weight: float = 0.1,
) -> Tensor:  # [N_REPETITION_WEIGHTS]
    """The weights that repetition_candidates reads, on the device of `like` and in its accumulation type.

    A schedule may change the values of such a tensor: nothing is recompiled and nothing synchronises.

    Raises:
        ValueError: a weight is below 0 or beyond the range of float32, or requires grad.

    Example:
        >>> repetition_weights(torch.zeros(1), ngram_penalty_weight=0.2)
        tensor([0.5000, 1.0000, 0.0500, 0.2000])
    """
    values = (immediate_repetition_weight, immediate_repetition_growth, eos_penalty_weight, ngram_penalty_weight)
    return numbers_like("repetition_weights", like, WEIGHT_NAMES, values)


def repetition_candidates(
    tokens: Tensor,  # [batch_size, n_tokens]
    targets: Tensor,  # [batch_size, n_tokens]
    *,
    vocab_size: int,
    weights: Tensor,  # [N_REPETITION_WEIGHTS], from repetition_weights
    segments: Tensor | None = None,  # [batch_size or 1, n_tokens]
    tokens_include_row: bool = False,
    ignore_index: int = -100,
    use_immediate_repetition_penalty: bool = False,
    immediate_repetition_threshold: int = 1,
    use_ngram_penalty: bool = False,
    ngram_size: int = 4,
    ngram_window_size: int | None = None,
    ngram_slots: int = 8,
    eos_token_id: int | Sequence[int] | None = None,
    min_sequence_length: int = 20,
    repetition_allow_list: Sequence[int] = (),
) -> Candidates:
    """The tokens that unlikelihood training pushes down in each row, and how strongly.

    Row t predicts targets[:, t]. Its context is tokens[:, :t] if tokens are the targets, or with tokens_include_row
    tokens[:, :t + 1], if tokens are what the model read; it begins with the row's segment. Each row has a group of
    slots for every kind that is on, in this order:

    - immediate repetition: one slot for the last token of the context. With run = the number of equal tokens that end
      the context, weight = weights[0] * min(weights[1] ** (run - 1), 4) where run >= immediate_repetition_threshold;
    - early EOS: a slot per EOS id, weight = weights[2], while fewer than min_sequence_length counted rows of the
      segment precede the row and the row's own target is not an EOS id;
    - n-grams: ngram_slots slots for the distinct tokens that followed earlier occurrences of the context's last
      ngram_size - 1 tokens, most recent first, weight = weights[3].

    The first and the last kind never hold the row's own target, ids of repetition_allow_list, or ids outside
    [0, vocab_size). Time and memory are linear in the number of tokens for every text, except on CUDA with more than 31
    ngram_slots: n-grams then cost up to the number of tokens times `ngram_window_size`. Not differentiable.

    Args:
        tokens: [batch_size, n_tokens] integers, any strides. ignore_index marks a masked position: it matches nothing,
            is never a candidate and ends a run. Ids outside the vocabulary match but are not candidates. A DTensor in
            Shard(0) gives DTensors.
        targets: [batch_size, n_tokens] integers. Rows with ignore_index do not count: no candidates.
        vocab_size: candidates are below it; in [1, 2^31).
        weights: [N_REPETITION_WEIGHTS], float32 or float64, on the device of tokens; see `repetition_weights`.
        segments: [batch_size, n_tokens] or [1, n_tokens] integers. Each run of equal values is a text of its own. None:
            each batch row is one.
        use_immediate_repetition_penalty: whether there is a slot for the last token.
        use_ngram_penalty: whether there are slots for n-grams.
        ngram_size: n; 1 is every token of the context.
        ngram_window_size: only tokens among the last so many of the context; None is all of it.
        eos_token_id: one id or several; None: none.
        repetition_allow_list: ids that may repeat.

    Returns:
        Candidates(ids [batch_size, n_tokens, n_slots], weights, groups): int32 with -1 for no candidate, the dtype of
        weights with 0 there, and the number of slots of each kind that is on.

    Raises:
        ValueError: on wrong shapes, dtypes or numbers, or if weights require grad.
        TypeError: tokens, targets, weights or segments are not a tensor.

    Example:
        >>> text = torch.tensor([[5, 6, 7, 5, 6, 8]])
        >>> options = {"use_ngram_penalty": True, "ngram_size": 3, "ngram_slots": 2}
        >>> weights = repetition_weights(torch.zeros(1))
        >>> repetition_candidates(text, text, vocab_size=10, weights=weights, **options).ids[0, 5].tolist()
        [7, -1]

    The last row's context ends in "5 6", which 7 followed before.

    Source: unlikelihood training, Welleck et al. 2019, https://arxiv.org/abs/1908.04319.
    """
    for name, given in (("tokens", tokens), ("targets", targets), ("weights", weights)):
        check_is_tensor("repetition_candidates", name, given)
    check_are_tensors("repetition_candidates", segments=segments)
    shape = tokens.shape
    if len(shape) != 2:
        raise ValueError(f"repetition_candidates: expected tokens of shape [batch_size, n_tokens], got {list(shape)}")
    check_shape("repetition_candidates", shape, targets=targets)
    tokens = as_ids("repetition_candidates", "tokens", tokens, "[batch_size, n_tokens]")
    targets = as_ids("repetition_candidates", "targets", targets, "[batch_size, n_tokens]")
    if segments is not None:
        if segments.shape != (1, shape[1]):
            check_shape("repetition_candidates", shape, segments=segments)
        segments = as_ids("repetition_candidates", "segments", segments, "[batch_size, n_tokens]")
    if weights.dtype not in _WEIGHT_DTYPES or weights.shape != (N_REPETITION_WEIGHTS,):
        raise ValueError(
            f"repetition_candidates: expected weights of float32 or float64 and shape [{N_REPETITION_WEIGHTS}], got "
            f"{weights.dtype} of shape {list(weights.shape)}"
        )
    if weights.requires_grad:
        raise ValueError("repetition_candidates: expected weights without requires_grad, got weights with it")
    if (
        not 0 < vocab_size < 2**31
        or immediate_repetition_threshold < 1
        or (use_ngram_penalty and (ngram_size < 1 or ngram_slots < 1))
        or (ngram_window_size is not None and ngram_window_size < 1)
    ):
        raise ValueError(
            "repetition_candidates: expected vocab_size in [1, 2^31), immediate_repetition_threshold >= 1, "
            "ngram_size >= 1, ngram_slots >= 1 and ngram_window_size >= 1 or None, got "
            f"{vocab_size}, {immediate_repetition_threshold}, {ngram_size}, {ngram_slots} and {ngram_window_size}"
        )
    if isinstance(eos_token_id, tuple):  # asking a tuple is fast, asking a Sequence is not
        eos_ids: tuple[int, ...] = eos_token_id
    elif eos_token_id is None:
        eos_ids = ()
    else:
        eos_ids = tuple(eos_token_id) if isinstance(eos_token_id, Sequence) else (eos_token_id,)
    for eos in eos_ids:
        if not 0 <= eos < vocab_size:
            raise ValueError(
                f"repetition_candidates: expected eos_token_id in [0, vocab_size = {vocab_size}), got {eos}"
            )
    options = {
        "tokens_include_row": tokens_include_row,
        "vocab_size": vocab_size,
        "ignore_index": ignore_index,
        "repetition_allow_list": repetition_allow_list,
        "use_immediate_repetition_penalty": use_immediate_repetition_penalty,
        "immediate_repetition_threshold": immediate_repetition_threshold,
        "ngram_size": ngram_size if use_ngram_penalty else 0,
        "ngram_window_size": ngram_window_size or 0,
        "ngram_slots": ngram_slots,
        "eos_ids": eos_ids,
        "min_sequence_length": min_sequence_length,
    }
    if DTENSOR in sys.modules and (is_dtensor(tokens) or is_dtensor(targets) or is_dtensor(segments)):
        operator = functools.partial(_OP, weights=weights, **options)
        of_rows = {"targets": targets, "segments": segments}
        ids, candidate_weights = of_whole_texts("repetition_candidates", operator, tokens, **of_rows)
    else:
        ids, candidate_weights = _OP(tokens, targets, segments, weights, **options)
    groups: tuple[int, ...] = (1,) if use_immediate_repetition_penalty else ()
    groups += (len(eos_ids),) if eos_ids else ()
    groups += (ngram_slots,) if use_ngram_penalty else ()
    return Candidates(ids, candidate_weights, groups)


@torch.library.register_fake("ava_ext::repetition_candidates")
def _(
    tokens: Tensor,  # [batch_size, n_tokens]
    targets: Tensor,  # [batch_size, n_tokens]
    segments: Tensor | None,  # [batch_size or 1, n_tokens]
    weights: Tensor,  # [N_REPETITION_WEIGHTS]
    *,
    use_immediate_repetition_penalty: bool,
    ngram_size: int,
    ngram_slots: int,
    eos_ids: Sequence[int] | None,
    **options: object,
) -> tuple[Tensor, Tensor]:
    check_devices("repetition_candidates", tokens, targets=targets, segments=segments, weights=weights)
    n_slots = int(use_immediate_repetition_penalty) + len(eos_ids or ()) + (ngram_slots if ngram_size > 0 else 0)
    shape = (*tokens.shape, n_slots)
    return tokens.new_empty(shape, dtype=torch.int32), weights.new_empty(shape)


# Not differentiable, and said so in the dispatcher itself: an autograd function would add Python to every call.
_AUTOGRAD = torch.library.Library("ava_ext", "IMPL")
_AUTOGRAD.impl("repetition_candidates", torch.library.fallthrough_kernel, "Autograd")
