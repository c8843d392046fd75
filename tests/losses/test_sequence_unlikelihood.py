"""Sequence-level unlikelihood, token by token, from logits and from hidden states."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.strategies import Numbers

from ava_ext import LinearLogits, SequenceUnlikelihoodLoss, UnifiedLoss, repeated_ngram_mask
from ava_ext.ops import linear_rows

V, HIDDEN = 11, 4
TOKENS = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 5], [0, 0, 0, 0, 7, 8, 9, 7]])
REPEATS = [(0, 4), (0, 5), (0, 6), (1, 1), (1, 2), (1, 3)]  # n = 3


def head():
    numbers = Numbers(0)
    return LinearLogits(numbers.leaf(2, 8, HIDDEN), numbers.leaf(V + 1, HIDDEN), numbers.leaf(V + 1))


def expected_rows(logits, rows=REPEATS):
    log_probs = logits[..., :V].log_softmax(-1)
    return [-torch.log1p(-log_probs[b, t, TOKENS[b, t]].exp()) for b, t in rows]


@pytest.mark.parametrize("is_linear", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_values_and_gradients(is_linear, reduction):
    given = head()
    logits = F.linear(*given)
    loss_fn = SequenceUnlikelihoodLoss(V, 3, reduction=reduction, linear_chunk_bytes=2 * V * 8)
    got = loss_fn(given if is_linear else logits, TOKENS)
    rows = expected_rows(logits)
    if reduction == "none":
        expected = torch.zeros(2, 8, dtype=torch.float64)
        for (b, t), value in zip(REPEATS, rows, strict=True):
            expected[b, t] = value
    else:
        expected = sum(rows) / (len(rows) if reduction == "mean" else 1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(loss.sum(), list(given), retain_graph=True) for loss in (got, expected))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_prompt_padding_and_packing():
    logits = F.linear(*head()).detach()
    loss_fn = SequenceUnlikelihoodLoss(V, 3)
    continuation = torch.ones(2, 8)
    continuation[0, :4] = 0  # what the prompt held may be said again
    continuation[1, 3:] = 0
    wild = logits.masked_fill((continuation == 0).unsqueeze(-1), math.nan)
    assert loss_fn(wild, TOKENS, continuation) == 0
    continuation[1, 3] = 1
    got = loss_fn(logits, TOKENS, continuation)
    torch.testing.assert_close(got, sum(expected_rows(logits, [(1, 1), (1, 2), (1, 3)])) / 3, rtol=1e-12, atol=0)
    packed = loss_fn(logits, TOKENS, segment_ids=torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0] * 8]))
    torch.testing.assert_close(packed, got, rtol=1e-12, atol=0)


def test_micro_batches_add_up():
    logits, loss_fn = F.linear(*head()).detach(), SequenceUnlikelihoodLoss(V, 3)
    n = loss_fn.repeats(TOKENS).sum()
    parts = [loss_fn(logits[b : b + 1], TOKENS[b : b + 1], num_items_in_batch=n) for b in range(2)]
    torch.testing.assert_close(sum(parts), loss_fn(logits, TOKENS), rtol=1e-12, atol=0)


def test_the_number_of_items_is_checked():
    logits, loss_fn = F.linear(*head()).detach(), SequenceUnlikelihoodLoss(V, 3)
    for one in (3, torch.tensor([3]), torch.tensor([[3.0]])):  # any form of one number
        torch.testing.assert_close(
            loss_fn(logits, TOKENS, num_items_in_batch=one), loss_fn(logits, TOKENS, num_items_in_batch=3.0)
        )
    with pytest.raises(ValueError, match="sequence_unlikelihood: expected num_items_in_batch to be >= 0, got -5"):
        loss_fn(logits, TOKENS, num_items_in_batch=-5)
    with pytest.raises(ValueError, match=r"expected num_items_in_batch of one element, got shape \[2\]"):
        loss_fn(logits, TOKENS, num_items_in_batch=torch.tensor([1, 2]))
    with pytest.raises(TypeError, match=r"expected num_items_in_batch to be a number or a torch.Tensor, got str"):
        loss_fn(logits, TOKENS, num_items_in_batch="3")
    with pytest.raises(ValueError, match="num_items_in_batch needs reduction='mean', got 'sum'"):
        SequenceUnlikelihoodLoss(V, 3, reduction="sum")(logits, TOKENS, num_items_in_batch=3)


def test_nothing_repeats():
    given, loss_fn = head(), SequenceUnlikelihoodLoss(V, 6)
    loss = loss_fn(given, TOKENS)
    assert loss == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, list(given)))


def test_only_what_repeats_is_computed(monkeypatch):
    computed, of_a_chunk = [], linear_rows.rows_of_a_chunk
    monkeypatch.setattr(linear_rows, "rows_of_a_chunk", lambda n, *given: computed.append(n) or of_a_chunk(n, *given))
    SequenceUnlikelihoodLoss(V, 3)(head(), TOKENS)
    assert computed == [len(REPEATS)]


def test_options_of_the_row():
    logits = F.linear(*head())
    got = SequenceUnlikelihoodLoss(V, 3, initial_temperature=0.7, logit_softcap=2.0)(logits, TOKENS)
    effective = 2 * torch.tanh(logits / 2) / 0.7
    torch.testing.assert_close(got, sum(expected_rows(effective)) / 6, rtol=1e-12, atol=0)


def test_beside_the_likelihood_in_one_loss():
    given = head()
    logits = F.linear(*given)
    repeats = repeated_ngram_mask(TOKENS, 3)
    loss_fn = UnifiedLoss(V, primary_loss_type="standard", negatives_need_target=False)
    negatives = torch.where(repeats, TOKENS, -1).unsqueeze(-1)
    parts = loss_fn(logits, torch.full_like(TOKENS, -100), negative_ids=negatives, return_detailed=True)
    torch.testing.assert_close(parts["negative_penalty"], SequenceUnlikelihoodLoss(V, 3)(logits, TOKENS).detach())


def test_compiled():
    given, loss_fn = head(), SequenceUnlikelihoodLoss(V, 3)
    for logits in (given, F.linear(*given)):
        compiled = torch.compile(loss_fn, fullgraph=True)
        got, want = compiled(logits, TOKENS), loss_fn(logits, TOKENS)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        gradients = (torch.autograd.grad(loss, list(given), retain_graph=True) for loss in (got, want))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("padding", [-1, -100, V])
@pytest.mark.parametrize("is_linear", [False, True])
def test_tokens_that_repeat_are_in_the_vocabulary(padding, is_linear):
    given, loss_fn = head(), SequenceUnlikelihoodLoss(V, 2)
    logits = given if is_linear else F.linear(*given)
    tokens = TOKENS.clone()
    tokens[:, 5:] = padding
    with pytest.raises(IndexError, match=rf"^sequence_unlikelihood: expected tokens that repeat to be in \[0, {V}\)"):
        loss_fn(logits, tokens)
    padded = TOKENS.clone()
    padded[:, 5:] = 0
    is_written = torch.arange(8).expand(2, 8) < 5
    torch.testing.assert_close(loss_fn(logits, tokens, is_written), loss_fn(logits, padded, is_written))


def test_linearized():
    loss_fn, logits = SequenceUnlikelihoodLoss(V, 2), Numbers(0).normal(2, 8, V)
    _, tangent = torch.func.jvp(lambda x: loss_fn(x, TOKENS), (logits,), (logits.sin(),))
    _, linear = torch.func.linearize(lambda x: loss_fn(x, TOKENS), logits)
    torch.testing.assert_close(linear(logits.sin()), tangent)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"expected logits of shape \[2, 8, at least 11\], got \[2, 7, 11\]"):
        SequenceUnlikelihoodLoss(V)(torch.zeros(2, 7, V), TOKENS)
    with pytest.raises(ValueError, match="expected ngram_size to be an integer >= 1, got 0"):
        SequenceUnlikelihoodLoss(V, 0)
    with pytest.raises(ValueError, match="expected vocab_size >= 2, got 1"):
        SequenceUnlikelihoodLoss(1)
