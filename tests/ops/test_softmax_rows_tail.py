"""The tail of soft targets, in the kernels: against the divergence of K + 1 classes in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.strategies import Numbers

from ava_ext.ops import Candidates, RowFlags, row_loss, row_options
from ava_ext.ops.row_fields import TAIL_ID

V = 9


def log_mass_outside(
    z,  # [n_rows, vocab_size]
    ids,  # [n_rows, n_soft_targets]
):
    """log(1 - sum p) over the distinct ids, as the sum of the others; [n_rows]."""
    return z.scatter(-1, ids, -math.inf).logsumexp(-1) - z.logsumexp(-1)


def with_tail(
    logits,  # [n_rows, vocab_size]
    ids,  # [n_rows, n_soft_targets]
    q,  # as ids
    **options,
):
    """Soft targets and their tail, and no other term; [n_rows]."""
    tail_ids, left = torch.full_like(ids[:, :1], TAIL_ID), 1 - q.sum(-1, keepdim=True)
    soft = Candidates(torch.cat([tail_ids, ids], -1), torch.cat([left, q], -1), (1 + ids.shape[-1],))
    flags = int(RowFlags.SOFT_TARGETS | RowFlags.TAIL)
    targets = torch.zeros(len(logits), dtype=torch.long)
    return row_loss(logits, targets, row_options(logits, **options), flags=flags, candidates=soft).loss


def expected_with_tail(logits, ids, q):
    """The same by divergence of K + 1 classes, in float64, and its gradient."""
    z = logits.detach().double().requires_grad_()
    q = torch.cat([q.double(), 1 - q.double().sum(-1, keepdim=True)], -1)
    log_p = torch.cat([z.log_softmax(-1).gather(-1, ids), log_mass_outside(z, ids).unsqueeze(-1)], -1)
    loss = F.kl_div(log_p, q, reduction="none").sum(-1) - q.xlogy(q).sum(-1)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["of the named", "of the tail"])
def test_the_tail_of_a_sure_row(where, dtype):
    """All columns but three have a probability far below the digits of that of the three."""
    vocab_size, ids = 3000, torch.tensor([[7, 1500, 2999]])
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, 0)  # of the gradient
    for gap in (1.0, 8, 16, 40, 70):  # and 8 more: beyond 87, e^u of a float is 0
        base = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(0)).to(dtype)
        logits = base.clone()
        logits[0, ids[0]] = torch.tensor([gap, gap - 0.5, gap - 1]).to(dtype) + 8
        if where == "of the tail":  # the maximum is in the tail
            logits[0, 5] = gap + 8.25
        logits.requires_grad_()
        q = torch.tensor([[0.5, 0.25, 0.125]]).to(torch.float64 if dtype == torch.float64 else torch.float32)
        loss = with_tail(logits, ids, q)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        expected, expected_gradient = expected_with_tail(logits, ids, q)
        exact = 1e-12 if dtype == torch.float64 else 1e-6 * (1 + gap / 8)  # u is rounded
        torch.testing.assert_close(loss.double(), expected, rtol=exact, atol=0)
        # a column of the tail has a share of q' however small its probability is
        smallest = 2**-24 if dtype == torch.float16 else 1e-37
        error = (gradient.double() - expected_gradient).abs()
        bound = (rounding + exact) * expected_gradient.abs() + smallest
        if where == "of the tail":  # p_j q' - p_j q' / p' cancels in a column of a tail that has nearly everything
            bound = bound + 1e-6 * logits.detach().double().softmax(-1)
        if dtype != torch.float64:
            bound[0, ids[0]] += 1e-7  # p_c - q_c of numbers near 1/2
        assert (error <= bound).all(), (gap, (error / bound).max())
        if where == "of the named" and gap > 8:
            assert gradient[0, 6] < -1e-7


def test_nothing_but_named_columns():
    """The tail has no column, or masked ones: a finite loss, and the gradient of the others."""
    for masked in (False, True):
        logits = torch.randn(1, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        ids = torch.arange(V).unsqueeze(0)
        if masked:
            logits[0, 5:], ids = -math.inf, ids[:, :5]
        logits.requires_grad_()
        q = torch.full_like(ids, 1, dtype=torch.float64) / 10
        loss = with_tail(logits, ids, q)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        expected = logits.detach().softmax(-1)
        expected[:, : ids.shape[1]] -= 0.1
        torch.testing.assert_close(gradient, expected)
        assert loss.isfinite().all() and loss > 50


def test_a_tail_that_the_teacher_leaves_empty_changes_nothing():
    numbers = Numbers(6)
    logits, ids = numbers.leaf(4, V), numbers.integers(0, V, 4, 3)
    q = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).expand(4, 3)
    flags = int(RowFlags.SOFT_TARGETS)
    without = row_loss(
        logits, torch.zeros(4, dtype=torch.long), row_options(logits), flags=flags, candidates=Candidates(ids, q, (3,))
    ).loss
    loss = with_tail(logits, ids, q)
    assert torch.equal(loss, without)
    gradients = (torch.autograd.grad(value.sum(), logits)[0] for value in (loss, without))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_a_class_of_probability_0_is_not_of_the_tail():
    """Named with q = 0: it costs nothing, and what it has is not the tail's."""
    logits = Numbers(7).leaf(1, V)
    ids, q = torch.tensor([[2, 4]]), torch.tensor([[0.0, 0.75]], dtype=torch.float64)
    loss = with_tail(logits, ids, q)
    expected, gradient = expected_with_tail(logits, ids, q)
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), logits)[0], gradient)


@pytest.mark.parametrize("reading", ["fused", "split", "capped"])
def test_the_gradient_of_the_tail_by_differences(reading):
    """Gradients that are computed with the loss, after it, over the logits; target and candidates in and out of it."""
    numbers = Numbers(8)
    base, row_weights = numbers.leaf(4, V, scale=2.0), numbers.uniform(4)
    ids = torch.tensor([[3, -1, TAIL_ID, 1, 7]] * 4)
    weights = torch.tensor([0.3, 0.4, 0.25, 0.5, 0.25], dtype=torch.float64).expand(4, 5)
    options = {"label_smoothing": 0.1, "z_loss_weight": 0.2, "confidence_penalty_weight": 0.3}
    flags = sum(RowFlags[name] for name in ["CROSS_ENTROPY", "LABEL_SMOOTHING", "Z_LOSS", "CONFIDENCE_PENALTY"])
    flags += RowFlags.SOFT_TARGETS + RowFlags.TAIL
    if reading == "capped":
        options["logit_softcap"], flags = 3.0, flags + RowFlags.SOFTCAP

    def losses(x, in_place=False):
        candidates = Candidates(ids, weights, (2, 3))
        targets = torch.tensor([1, 3, 5, -100])
        arguments = {"flags": int(flags), "row_weights": row_weights, "candidates": candidates}
        loss = row_loss(1 * x, targets, row_options(x, **options), inplace_gradient=in_place, **arguments).loss
        return loss * torch.arange(1.0, 5, dtype=torch.float64) if reading == "split" else loss

    assert torch.autograd.gradcheck(losses, base)
    gradients = (torch.autograd.grad(losses(base, in_place).sum(), base) for in_place in (False, True))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_rows_of_all_kinds(device, reduction, dtype):
    """Ordinary rows, sure ones, ignored ones, a soft cap, padding of the vocabulary."""
    numbers, vocab_size = Numbers(9), 40
    base = numbers.normal(6, vocab_size, scale=2.0).cpu()
    base[1, 3] = base[2, 7] = 60.0  # sure of a column that is named, and of one that is not
    base[3] = math.nan
    logits = base.to(dtype).to(device).requires_grad_()
    targets = torch.tensor([1, 3, 7, -100, 3, 5], device=device)
    ids = torch.tensor([[0, -1, TAIL_ID, 3, 3, 9, -1]] * 6, device=device)
    ids[4, 2] = -1
    real = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.tensor([0.3, 0.4, 0.25, 0.2, 0.05, 0.5, 0.7], dtype=real, device=device).expand(6, 7)
    flags = int(RowFlags.CROSS_ENTROPY | RowFlags.SOFTCAP | RowFlags.SOFT_TARGETS | RowFlags.TAIL)
    options = row_options(logits, temperature=0.8, logit_softcap=50.0)
    row_weights = numbers.uniform(6).to(options)
    candidates = Candidates(ids, weights, (2, 5))
    arguments = {"row_weights": row_weights, "candidates": candidates, "vocab_size": vocab_size - 1}
    got = row_loss(logits, targets, options, flags=flags, reduction=reduction, **arguments)
    whole = base.to(dtype).double().nan_to_num(0).requires_grad_()
    double = Candidates(ids.cpu(), weights.cpu().double(), (2, 5))
    z = 50 * torch.tanh(whole[..., : vocab_size - 1] / 50) / 0.8
    log_mass = log_mass_outside(z, ids.cpu()[:, 3:6])
    tail = torch.where(ids.cpu()[:, 2] == TAIL_ID, -0.25 * log_mass, 0).masked_fill(targets.cpu() == -100, 0)
    soft = -(z.log_softmax(-1)[:, [3, 3, 9]] * double.weights[:, 3:6]).sum(-1)
    soft = soft.masked_fill(targets.cpu() == -100, 0)
    bound = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got.terms[-1].double().cpu(), (soft + tail).detach(), **bound)
    (gradient,) = torch.autograd.grad(got.loss.sum(), logits)
    without = double._replace(ids=double.ids.masked_fill(double.ids == TAIL_ID, -1))
    options, row_weights = row_options(whole, temperature=0.8, logit_softcap=50.0), row_weights.double().cpu()
    loss = row_loss(
        whole,
        targets.cpu(),
        options,
        flags=flags - RowFlags.TAIL,
        row_weights=row_weights,
        candidates=without,
        vocab_size=vocab_size - 1,
    ).loss
    (expected,) = torch.autograd.grad((loss + row_weights * tail).sum(), whole)
    torch.testing.assert_close(got.loss.sum().double().cpu(), (loss + row_weights * tail).sum().detach(), **bound)
    rounding = {"rtol": 0.05, "atol": 0.02} if dtype == torch.bfloat16 else bound
    torch.testing.assert_close(gradient.double().cpu(), expected, **rounding)


@pytest.mark.devices("cpu")
def test_compiled():
    torch._dynamo.reset()
    numbers = Numbers(10)
    logits, ids = numbers.leaf(4, V), numbers.integers(0, V, 4, 3)
    q = torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64).expand(4, 3)
    compiled = torch.compile(with_tail, fullgraph=True, backend="aot_eager")
    loss, expected = (function(logits, ids, q) for function in (compiled, with_tail))
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    gradients = (torch.autograd.grad(value.sum(), logits) for value in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("groups", [(), (2,), (2, 0)])
def test_a_tail_without_soft_targets_is_none(groups):
    """The flag alone changes nothing, whatever else the row has."""
    numbers = Numbers(11)
    logits, targets = numbers.leaf(3, V), numbers.integers(0, V, 3)
    candidates = Candidates(numbers.integers(0, V, 3, 2), numbers.uniform(3, 2), groups) if groups else None
    soft = int(RowFlags.CROSS_ENTROPY | (RowFlags.SOFT_TARGETS if groups != (2,) else 0))
    got, expected = (
        row_loss(logits, targets, row_options(logits), flags=flags, candidates=candidates).loss
        for flags in (soft | RowFlags.TAIL, soft)
    )
    assert torch.equal(got, expected)
