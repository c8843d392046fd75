"""Rows that do not count are left out of the products of a linear layer, and change nothing, whatever they hold."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import Numbers, seeds

from ava_ext import LinearLogits, UnifiedLoss, softmax_statistics, token_log_probs
from ava_ext.ops import Candidates, RowFlags, counted_rows, linear_rows, row_loss, row_options

V, HIDDEN, N_ROWS = 13, 5, 9
# what the host knows: it reads the device (a CPU), nothing, the number of rows that count, or more than that
WAYS = ("reads", "nothing", "number", "bound")
FLAGS = int(RowFlags.CROSS_ENTROPY | RowFlags.Z_LOSS | RowFlags.ENTROPY)


def given_number(way, counted, patch):
    """max_counted_rows of the way; where the host reads nothing, as on a GPU, that is how it is told apart here."""
    if way != "reads":
        patch.setattr(counted_rows, "host_reads", lambda device: False)
    n_counted = int(counted.sum())
    return {"number": n_counted, "bound": n_counted + 2}.get(way)


def make_problem(numbers, share):
    """A head, targets of which a share counts, and the same head with nan in the rows that do not."""
    targets = numbers.integers(0, V, N_ROWS).masked_fill(~numbers.true(share, N_ROWS), -100)
    states, weight, bias = numbers.normal(N_ROWS, HIDDEN), numbers.normal(V, HIDDEN), numbers.normal(V)
    poisoned = states.masked_fill((targets == -100).unsqueeze(1), math.nan)
    clean, poisoned = (
        LinearLogits(*(x.clone().requires_grad_() for x in (s, weight, bias))) for s in (states, poisoned)
    )
    return clean, poisoned, targets


shares = st.sampled_from([0.0, 0.3, 0.6, 1.0])
ways = st.sampled_from(WAYS)


@given(seeds, shares, ways, st.integers(1, 5), st.sampled_from(["sum", "none"]))
def test_the_loss_and_its_gradients(seed, share, way, chunk_rows, reduction):
    numbers = Numbers(seed)
    clean, poisoned, targets = make_problem(numbers, share)
    candidates = Candidates(numbers.integers(-1, V, N_ROWS, 3), numbers.uniform(N_ROWS, 3), (1, 2))
    keywords = {"row_weights": numbers.uniform(N_ROWS), "candidates": candidates, "flags": FLAGS}
    options = row_options(clean.weight, z_loss_weight=0.1)
    want = row_loss(F.linear(*clean), targets, options, reduction=reduction, **keywords)
    upstream = numbers.normal(*want.loss.shape)
    with pytest.MonkeyPatch.context() as patch:
        most = given_number(way, targets != -100, patch)
        keywords |= {"chunk_bytes": chunk_rows * V * 8, "max_counted_rows": most}
        got = row_loss(poisoned, targets, options, reduction=reduction, **keywords)
        gradients = torch.autograd.grad(got.loss, list(poisoned), upstream)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradients, torch.autograd.grad(want.loss, list(clean), upstream), rtol=1e-10, atol=1e-12)
    assert not gradients[0][targets == -100].any()


@given(seeds, shares, ways, st.integers(1, 5))
def test_the_statistics_and_their_gradients(seed, share, way, chunk_rows):
    numbers = Numbers(seed)
    clean, poisoned, targets = make_problem(numbers, share)
    mask, ids = targets != -100, numbers.integers(0, V, N_ROWS, 2)
    want = softmax_statistics(F.linear(*clean), ids, row_mask=mask)
    upstream = [numbers.normal(*value.shape) for value in want]
    with pytest.MonkeyPatch.context() as patch:
        keywords = {"chunk_bytes": chunk_rows * V * 8, "max_counted_rows": given_number(way, mask, patch)}
        got = softmax_statistics(poisoned, ids, row_mask=mask, **keywords)
        gradients = torch.autograd.grad(got, list(poisoned), upstream)
        log_prob, _ = token_log_probs(poisoned, targets, **keywords)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradients, torch.autograd.grad(want, list(clean), upstream), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(log_prob, token_log_probs(F.linear(*clean), targets)[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("way, n_rows", [("reads", 4), ("nothing", 9), ("number", 4), ("bound", 6)])
def test_what_is_computed(way, n_rows, reduction, monkeypatch):
    head = LinearLogits(torch.randn(9, HIDDEN, requires_grad=True), torch.randn(V, HIDDEN))
    targets = torch.tensor([-100, 1, -100, -100, 2, 3, -100, 4, -100])
    computed, of_a_chunk = [], linear_rows.rows_of_a_chunk
    monkeypatch.setattr(
        linear_rows, "rows_of_a_chunk", lambda n, *arguments: computed.append(n) or of_a_chunk(n, *arguments)
    )
    most = given_number(way, targets != -100, monkeypatch)
    options = row_options(head.weight)
    row_loss(head, targets, options, reduction=reduction, max_counted_rows=most).loss.sum().backward()
    token_log_probs(head, targets, max_counted_rows=most)[0].sum().backward()
    assert set(computed) == {n_rows} and len(computed) == (3 if reduction == "sum" else 4)


@pytest.mark.parametrize("share_head", [False, True])
def test_depths_of_multi_token_prediction(share_head, monkeypatch):
    targets = torch.randint(0, V, (2, 8), generator=torch.Generator().manual_seed(0))
    targets[:, :5] = -100
    loss_fn = UnifiedLoss(V, HIDDEN, use_mtp=True, num_future_tokens=2, mtp_share_head=share_head).double()
    states = torch.randn(2, 8, HIDDEN, dtype=torch.float64)
    arguments = {"targets": targets, "hidden_states": states, "lm_head_weight": torch.randn(V, HIDDEN).double()}
    expected = loss_fn(**arguments)
    computed, choose = [], linear_rows.choose_rows
    monkeypatch.setattr(linear_rows, "choose_rows", lambda *given: computed.append(given[1]) or choose(*given))
    monkeypatch.setattr(counted_rows, "host_reads", lambda device: False)
    torch.testing.assert_close(loss_fn(**arguments, max_counted_rows=6), expected, rtol=1e-12, atol=0)
    assert computed == ([6, 12] if share_head else [6, 6, 6])


@pytest.mark.parametrize("way", ["reads", "number"])
def test_more_rows_than_promised_raise(way, monkeypatch):
    head, targets = LinearLogits(torch.randn(4, HIDDEN), torch.randn(V, HIDDEN)), torch.tensor([1, -100, 2, 3])
    given_number(way, targets != -100, monkeypatch)
    expected = "at most max_counted_rows = 2 rows that count, got 3" if way == "reads" else "more rows count than"
    with pytest.raises((ValueError, RuntimeError), match=expected):
        row_loss(head, targets, row_options(head.weight), max_counted_rows=2)
    row_loss(head, targets, row_options(head.weight), max_counted_rows=3)
    with pytest.raises(ValueError, match="expected max_counted_rows >= 0, got -1"):
        row_loss(head, targets, row_options(head.weight), max_counted_rows=-1)
    with pytest.raises(TypeError, match="row_loss: expected max_counted_rows to be an integer, got"):
        row_loss(head, targets, row_options(head.weight), max_counted_rows=4.0)
    with pytest.raises(TypeError, match="token_log_probs: expected max_counted_rows to be an integer, got"):
        token_log_probs(head, targets, max_counted_rows="4")


def test_compiled(monkeypatch):
    clean, poisoned, targets = make_problem(Numbers(3), 0.5)
    loss_fn = UnifiedLoss(V, primary_loss_type="standard", z_loss_weight=0.1)

    def loss(states, weight, bias, max_counted_rows):
        head = {"hidden_states": states, "lm_head_weight": weight, "lm_head_bias": bias}
        return loss_fn(targets=targets, max_counted_rows=max_counted_rows, **head)

    expected = loss_fn(F.linear(*clean), targets)
    wanted = torch.autograd.grad(expected, list(clean))
    compiled = torch.compile(loss, fullgraph=True)
    for way in WAYS:
        with monkeypatch.context() as patch:
            value = compiled(*poisoned, given_number(way, targets != -100, patch))
            gradients = torch.autograd.grad(value, list(poisoned))
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradients, wanted, rtol=1e-10, atol=1e-13)


def test_a_target_out_of_range_is_named_by_its_own_row():
    head = LinearLogits(torch.randn(5, HIDDEN), torch.randn(V, HIDDEN))
    targets = torch.tensor([-100, 1, -100, 99, 2])
    with pytest.raises(IndexError, match=r"got 99 at position 3$"):
        row_loss(head, targets, row_options(head.weight))
    with pytest.raises(IndexError, match=r"got 99 at position 3 \(row 3\)$"):
        token_log_probs(head, targets, chunk_bytes=V * 4)
