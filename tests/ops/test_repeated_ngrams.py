"""Tokens of repeated n-grams, against a set of the n-grams seen so far."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import Numbers, seeds

from ava_ext import repeated_ngram_mask


def by_sets(tokens, n, mask, segments):
    """One text after the other, one n-gram after the other."""
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for b, row in enumerate(tokens.tolist()):
        seen = set()
        for t in range(len(row) - n + 1):
            window = range(t, t + n)
            if any(segments[b, i] != segments[b, t] or not mask[b, i] for i in window):
                continue
            ngram = (int(segments[b, t]), *(row[i] for i in window))
            if ngram in seen:
                found[b, t : t + n] = True
            seen.add(ngram)
    return found


@given(seeds, st.integers(1, 3), st.integers(1, 12), st.integers(1, 5), st.booleans(), st.booleans())
def test_against_sets(seed, batch_size, n_tokens, n, is_masked, is_packed):
    numbers = Numbers(seed)
    ids = torch.tensor([5, -7, 2**40])  # any integers
    tokens = ids[numbers.integers(0, 3, batch_size, n_tokens)]
    mask = numbers.true(0.8, batch_size, n_tokens)
    segments = numbers.true(0.2, batch_size, n_tokens).cumsum(1)
    given_mask, given_segments = mask if is_masked else None, segments if is_packed else None
    got = repeated_ngram_mask(tokens, n, mask=given_mask, segments=given_segments)
    everything, one = torch.ones_like(mask), torch.zeros_like(segments)
    expected = by_sets(tokens, n, mask if is_masked else everything, segments if is_packed else one)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("tokens", "n", "expected"),
    [
        ([1, 2, 3, 4, 1, 2, 3, 5], 3, [0, 0, 0, 0, 1, 1, 1, 0]),
        ([1, 1, 1, 1], 3, [0, 1, 1, 1]),  # an occurrence that overlaps
        ([1, 2, 1, 2], 2, [0, 0, 1, 1]),  # the last n-gram of the text
        ([1, 2, 1, 2], 5, [0, 0, 0, 0]),
        ([4, 5, 4], 1, [0, 0, 1]),
    ],
)
def test_by_hand(tokens, n, expected):
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert repeated_ngram_mask(torch.tensor([tokens], dtype=dtype), n).int().tolist() == [expected]


def test_texts_do_not_meet():
    text = torch.tensor([[1, 2, 3], [1, 2, 3]])
    assert not repeated_ngram_mask(text, 2).any()
    packed = torch.tensor([[1, 2, 3, 1, 2, 3]])
    for n_rows in (1, 2):  # one row of segments is that of all
        assert not repeated_ngram_mask(packed.expand(n_rows, 6), 2, segments=torch.tensor([[0, 0, 0, 1, 1, 1]])).any()
    assert repeated_ngram_mask(packed, 2).sum() == 3
    # the window that would run over the end of the batch
    assert not repeated_ngram_mask(torch.tensor([[1, 2, 1]]), 2).any()


def test_empty():
    for shape in ((0, 4), (2, 0), (0, 0)):
        assert repeated_ngram_mask(torch.zeros(shape, dtype=torch.int64), 2).shape == shape


def test_compiles_without_a_graph_break():
    tokens = Numbers(0).integers(0, 3, 2, 9)
    compiled = torch.compile(repeated_ngram_mask, fullgraph=True)
    assert torch.equal(compiled(tokens, 3), repeated_ngram_mask(tokens, 3))


def test_bad_input_is_named():
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    for message, arguments, keywords in (
        ("expected ngram_size >= 1, got 0", (tokens, 0), {}),
        (r"expected tokens of shape \[batch_size, n_tokens\], got \[3\]", (tokens[0], 2), {}),
        ("expected tokens to be integers", (tokens.float(), 2), {}),
        (r"expected mask of shape \[2, 3\], got \[1, 3\]", (tokens, 2), {"mask": tokens[:1]}),
        (r"expected segments of shape \[2, 3\], got \[2, 2\]", (tokens, 2), {"segments": tokens[:, :2]}),
        ("expected segments to be integers", (tokens, 2), {"segments": tokens + 0.5}),
    ):
        with pytest.raises(ValueError, match=message):
            repeated_ngram_mask(*arguments, **keywords)
    for name, arguments, keywords in (
        ("tokens", ([[1]], 2), {}),
        ("ngram_size", (tokens, 2.0), {}),
        ("mask", (tokens, 2), {"mask": [[1, 1, 1]] * 2}),
        ("segments", (tokens, 2), {"segments": [[1, 1, 1]] * 2}),
    ):
        with pytest.raises(TypeError, match=f"^repeated_ngram_mask: expected {name} to be"):
            repeated_ngram_mask(*arguments, **keywords)


def test_under_vmap():
    tokens, segments = torch.tensor([[1, 2, 1, 2, 1]]), torch.tensor([[[0, 0, 0, 0, 0]], [[0, 0, 1, 1, 1]]])
    got = torch.vmap(lambda given: repeated_ngram_mask(tokens, 2, segments=given))(segments)
    assert torch.equal(got, torch.stack([repeated_ngram_mask(tokens, 2, segments=given) for given in segments]))
