"""Which tokens of a text belong to an n-gram that occurred before: exact, on any device, without a wait for it."""

from __future__ import annotations

import torch
from torch import Tensor

from ava_ext.ops.arguments import check_are_integers, check_are_tensors, check_integers, check_is_tensor, check_shape
from ava_ext.ops.counted_rows import kept_by
from ava_ext.ops.dtensor_rows import of_whole_texts
from ava_ext.ops.dtensors import is_dtensor


def repeated_ngram_mask(
    tokens: Tensor,  # [batch_size, n_tokens]
    ngram_size: int,
    *,
    mask: Tensor | None = None,  # [batch_size, n_tokens]
    segments: Tensor | None = None,  # [batch_size or 1, n_tokens]
) -> Tensor:
    """True at every token of an n-gram that has begun earlier in the same text.

    The earlier occurrence may overlap: in 1 1 1 1, the second 1 1 1 repeats the first. The result is exact, not by
    hash: n-grams get numbers by sorting, log2(ngram_size) + 1 times. Nothing is copied to the host, and shapes depend
    on no value.

    Args:
        tokens: [batch_size, n_tokens], any integers. A DTensor in Shard(0) gives one.
        ngram_size: n >= 1.
        mask: [batch_size, n_tokens]; tokens where it is 0 or False (a prompt, padding) belong to no n-gram.
        segments: a number that changes where a text begins, contiguous; None: each batch row is one text.

    Returns:
        [batch_size, n_tokens] bool.

    Raises:
        ValueError: ngram_size is below 1, or shapes or types do not fit.
        TypeError: tokens, mask or segments are not a tensor, or ngram_size is not an integer.

    Example:
        >>> repeated_ngram_mask(torch.tensor([[1, 2, 3, 4, 1, 2, 3, 5]]), 3).int()
        tensor([[0, 0, 0, 0, 1, 1, 1, 0]], dtype=torch.int32)

    Source: Welleck et al. 2019, "Neural text generation with unlikelihood training", section 5.2.
    """
    check_is_tensor("repeated_ngram_mask", "tokens", tokens)
    check_are_tensors("repeated_ngram_mask", mask=mask, segments=segments)
    check_integers("repeated_ngram_mask", "tokens", tokens)
    check_are_integers("repeated_ngram_mask", ngram_size=ngram_size)
    if ngram_size < 1:
        raise ValueError(f"repeated_ngram_mask: expected ngram_size >= 1, got {ngram_size}")
    if tokens.dim() != 2:
        raise ValueError(
            f"repeated_ngram_mask: expected tokens of shape [batch_size, n_tokens], got {list(tokens.shape)}"
        )
    shape = tokens.shape
    check_shape("repeated_ngram_mask", shape, mask=mask)
    if segments is not None:
        if segments.shape != (1, shape[1]):
            check_shape("repeated_ngram_mask", shape, segments=segments)
        check_integers("repeated_ngram_mask", "segments", segments)
    if is_dtensor(tokens) or is_dtensor(mask) or is_dtensor(segments):

        def of_local(tokens: Tensor, mask: Tensor | None, segments: Tensor | None) -> tuple[Tensor]:
            return (repeated_ngram_mask(tokens, ngram_size, mask=mask, segments=segments),)

        return of_whole_texts("repeated_ngram_mask", of_local, tokens, mask=mask, segments=segments)[0]
    if tokens.numel() == 0:
        return torch.zeros_like(tokens, dtype=torch.bool)
    # each step makes a tensor of its own: torch.func.linearize loses what is written into one, vmap refuses to write
    text = torch.arange(shape[0], device=tokens.device).repeat_interleave(shape[1])  # of each token, in reading order
    if segments is not None:
        starts = torch.nn.functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
        text = starts.expand(shape).flatten().cumsum(0)
    if mask is None:
        keep = torch.ones(shape, dtype=torch.bool, device=tokens.device)
    else:
        keep = kept_by("repeated_ngram_mask", mask, "mask")
    # a number for each different token of each text; those that are left out have numbers of their own
    numbers = _renumber(_paired(_renumber(tokens.long().flatten()), 2 * text + keep.flatten()))
    length = 1
    while length < ngram_size:  # an n-gram is two shorter ones, which may overlap
        step = min(length, ngram_size - length)
        numbers = _renumber(_paired(numbers, numbers.roll(-step)))
        length += step
    ordered, places = numbers.sort(stable=True)
    is_later = torch.nn.functional.pad(ordered[1:] == ordered[:-1], (1, 0))
    repeats = torch.zeros_like(is_later).scatter(0, places, is_later)
    # whole within one text, and without what is left out; what has run over the end of the batch comes last of equals
    n_left_out = torch.nn.functional.pad((~keep).flatten().long().cumsum(0), (1, 0))
    begin = torch.arange(text.shape[0], device=text.device)
    end = (begin + ngram_size).clamp_max(text.shape[0])
    last = end - 1
    is_whole = (begin + ngram_size == end) & (text[last] == text) & (n_left_out[end] == n_left_out[begin])
    # a token belongs to the n-grams that begin at it or at the ngram_size - 1 before it
    n_begun = torch.nn.functional.pad((repeats & is_whole).long().cumsum(0), (1, 0))
    before = (begin - ngram_size + 1).clamp_min(0)
    return (n_begun[begin + 1] > n_begun[before]).view(shape)


def _renumber(
    values: Tensor,  # [n] int64
) -> Tensor:  # [n] int64 in [0, n)
    """Equal numbers for equal values, as few as there are different ones."""
    ordered, places = values.sort()
    is_new = torch.nn.functional.pad(ordered[1:] != ordered[:-1], (1, 0))
    return torch.zeros_like(ordered).scatter(0, places, is_new.cumsum(0))


def _paired(
    first: Tensor,  # [n] int64 in [0, n)
    second: Tensor,  # [n] int64 in [0, 2 n + 2)
) -> Tensor:  # [n] int64
    """One number for each different pair."""
    return first * (2 * first.shape[0] + 2) + second  # no len(), which makes a constant of a symbol in torch.export
