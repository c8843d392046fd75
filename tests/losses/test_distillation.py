"""Soft targets against torch's own cross-entropy with probabilities and Kullback-Leibler divergence."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.strategies import Numbers

from ava_ext import UnifiedLoss
from ava_ext.ops import Candidates, RowFlags, row_loss, row_options

V, HIDDEN_SIZE = 9, 4


def standard(**options):
    return UnifiedLoss(V, primary_loss_type="standard", **options)


def of_teacher(numbers, *rows, n_tokens=V, temperature=1.0):
    """The most likely tokens of random logits: ids and probabilities [*rows, n_tokens]."""
    q, ids = (numbers.normal(*rows, V, scale=2.0) / temperature).softmax(-1).topk(n_tokens)
    return ids, q


def log_mass_outside(
    z,  # [..., vocab_size]
    ids,  # [..., n_soft_targets]
):
    """log(1 - sum p) over the distinct ids, as the sum of the others; [...]."""
    named = torch.zeros(z.shape).scatter_add(-1, ids.clamp(min=0), (ids >= 0).float()) > 0
    return z.masked_fill(named, -math.inf).logsumexp(-1) - z.logsumexp(-1)


def assert_same_with_gradients(got, wanted, *leaves):
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-14)
    gradients = (torch.autograd.grad(value.sum(), leaves) for value in (got, wanted))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


def test_the_whole_vocabulary_is_cross_entropy_with_probabilities():
    numbers = Numbers(1)
    logits, targets = numbers.leaf(5, V), numbers.integers(0, V, 5)
    ids, q = of_teacher(numbers, 5)
    parts = standard()(logits, targets, soft_target_ids=ids, soft_target_weights=q, return_detailed=True)
    probabilities = torch.zeros(5, V, dtype=torch.float64).scatter(-1, ids, q)
    soft = F.cross_entropy(logits, probabilities)
    assert_same_with_gradients(parts["total_loss"], F.cross_entropy(logits, targets) + soft, logits)
    torch.testing.assert_close(parts["distillation_loss"], soft.detach(), rtol=1e-12, atol=0)
    kl = F.kl_div(logits.log_softmax(-1), probabilities, reduction="batchmean")
    torch.testing.assert_close(parts["teacher_kl"], kl.detach(), rtol=1e-11, atol=0)


# at a temperature of 1 the term is part of the only pass over the rows
@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (1.0, 0.3), (2.0, 0.3), (0.5, 1.0)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("tail", [False, True])
def test_a_few_tokens_of_a_teacher(tail, linear, reduction, temperature, weight):
    """Beside a temperature, a soft cap, negatives, ignored rows, token weights and padding of the vocabulary."""
    numbers = Numbers(2)
    targets = numbers.integers(0, V, 2, 6).masked_fill(numbers.true(0.3, 2, 6), -100)
    ids, q = of_teacher(numbers, 2, 6, n_tokens=3, temperature=temperature)
    ids[0, 0, 1] = -1
    ids[0, 1] = ids[0, 1, 0]  # they add up
    given = {"soft_target_ids": ids.int(), "soft_target_weights": q}
    negatives = {"negative_ids": numbers.integers(0, V, 2, 6, 2)}
    options = {"reduction": reduction, "initial_temperature": 1.3, "logit_softcap": 4.0, "logit_scale": 0.8}
    options |= {"distillation_weight": weight, "distillation_temperature": temperature, "distillation_tail": tail}
    loss_fn = standard(**options)
    if linear:
        leaves = numbers.leaf(2, 6, HIDDEN_SIZE), numbers.leaf(V + 2, HIDDEN_SIZE)
        arguments = {"hidden_states": leaves[0], "lm_head_weight": leaves[1]}
        logits = F.linear(*leaves)
    else:
        logits = numbers.leaf(2, 6, V + 2)
        leaves, arguments = (logits,), {"logits": logits}
    weights = numbers.uniform(2, 6)
    arguments |= {"targets": targets, "token_weights": weights, **negatives}
    got = loss_fn(**arguments, **given, return_detailed=True)
    without = loss_fn(**arguments)
    z = 4 * torch.tanh(0.8 * logits[..., :V] / 4) / 1.3 / temperature
    log_p = z.log_softmax(-1).gather(-1, ids.clamp(min=0))
    counted, q = targets != -100, q.masked_fill(ids < 0, 0)
    if tail:
        log_p = torch.cat([log_p, log_mass_outside(z, ids).unsqueeze(-1)], -1)
        q = torch.cat([q, (1 - q.sum(-1, keepdim=True)).clamp(min=0)], -1)
    each = -weight * temperature**2 * (q * log_p).sum(-1) * weights
    each = each.where(counted, 0)
    soft = each if reduction == "none" else each.sum() / weights[counted].sum()
    torch.testing.assert_close(got["distillation_loss"], soft.detach(), rtol=1e-11, atol=1e-14)
    assert_same_with_gradients(got["total_loss"], without + soft, *leaves)
    kl = F.kl_div(log_p[counted], q[counted], reduction="sum") / counted.sum()
    torch.testing.assert_close(got["teacher_kl"], kl.detach(), rtol=1e-10, atol=1e-13)


def test_distillation_at_a_temperature_is_hintons():
    numbers = Numbers(3)
    student, teacher, temperature = numbers.leaf(4, V), numbers.normal(4, V), 3.0
    ids = torch.arange(V).expand(4, V)
    q = (teacher / temperature).softmax(-1)
    loss_fn = standard(distillation_temperature=temperature)
    targets = numbers.integers(0, V, 4)
    got = loss_fn(student, targets, soft_target_ids=ids, soft_target_weights=q, return_detailed=True)
    kl = F.kl_div((student / temperature).log_softmax(-1), q, reduction="batchmean")
    torch.testing.assert_close(got["teacher_kl"], kl.detach(), rtol=1e-11, atol=0)
    entropy = -(q * q.log()).sum(-1).mean()  # which the teacher fixes
    wanted = F.cross_entropy(student, targets) + temperature**2 * (kl + entropy)
    assert_same_with_gradients(got["total_loss"], wanted, student)


def test_only_the_temperature_is_multiplied():
    """A soft cap at the end of float32 stays what it is."""
    numbers = Numbers(3)
    logits, targets = numbers.normal(6, V).float(), numbers.integers(0, V, 6)
    given = {"soft_target_ids": targets.unsqueeze(-1), "soft_target_weights": torch.ones(6, 1)}
    expected = standard(distillation_temperature=2.0)(logits, targets, **given)
    torch.testing.assert_close(
        standard(distillation_temperature=2.0, logit_softcap=2e38)(logits, targets, **given), expected
    )


def test_rows_that_do_not_count_may_hold_anything():
    logits = torch.full((2, V), math.nan, requires_grad=True)
    soft = {"soft_target_ids": torch.full((2, 3), V + 5), "soft_target_weights": torch.full((2, 3), math.nan)}
    parts = standard()(logits, torch.full((2,), -100), **soft, return_detailed=True)
    parts["total_loss"].backward()
    assert parts["total_loss"] == parts["distillation_loss"] == parts["teacher_kl"] == 0 and not logits.grad.any()


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_only_ids_of_the_vocabulary_and_absent_ones(tail, linear):
    """With the tail too, for which the kernels have an id of their own."""
    numbers = Numbers(6)
    ids, q = of_teacher(numbers, 2, n_tokens=3)
    states, weight = numbers.normal(2, HIDDEN_SIZE), numbers.normal(V, HIDDEN_SIZE)
    of_logits = {"hidden_states": states, "lm_head_weight": weight} if linear else {"logits": states @ weight.T}
    loss_fn, targets = standard(distillation_tail=tail), torch.tensor([0, 1])
    for other in (-3, -2, V):
        with pytest.raises(IndexError, match="expected candidate_ids in"):
            loss_fn(
                targets=targets,
                soft_target_ids=ids.index_fill(1, torch.tensor(1), other),
                soft_target_weights=q,
                **of_logits,
            )


@pytest.mark.parametrize("tail", [False, True])
def test_no_soft_targets(tail):
    logits, targets, nothing = Numbers(6).leaf(2, V), torch.tensor([0, 1]), torch.zeros(2, 0, dtype=torch.float64)
    soft = {"soft_target_ids": nothing.long(), "soft_target_weights": nothing}
    loss = standard(distillation_tail=tail)(logits, targets, **soft)
    assert_same_with_gradients(loss, F.cross_entropy(logits, targets), logits)  # all columns are the tail, of p = 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_masked_column_has_no_probability(dtype):
    """As a target in a masked column: the loss is infinite, the gradient that of the others. Not with a weight of 0."""
    logits = torch.randn(1, V, dtype=dtype)
    logits[0, 2] = -math.inf
    logits.requires_grad_()
    for weight, is_finite in ((0.5, False), (0.0, True)):
        soft = Candidates(torch.tensor([[2, 4]]), torch.tensor([[weight, 0.25]], dtype=dtype), (2,))
        loss = row_loss(
            logits, torch.tensor([1]), row_options(logits), flags=int(RowFlags.SOFT_TARGETS), candidates=soft
        ).loss
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        expected = (weight + 0.25) * logits.detach().softmax(-1)
        expected[0, 4] -= 0.25
        assert loss.isfinite().all() == is_finite
        torch.testing.assert_close(gradient, expected)


def test_many_soft_targets():
    """More than the row's columns are looked at one by one for."""
    numbers = Numbers(4)
    logits, targets = numbers.leaf(3, 500), numbers.integers(0, 500, 3)
    ids = torch.stack([torch.randperm(500)[:64] for _ in range(3)])
    q = numbers.uniform(3, 64)
    loss_fn = UnifiedLoss(500, primary_loss_type="standard")
    got = loss_fn(logits, targets, soft_target_ids=ids, soft_target_weights=q)
    soft = -(q * logits.log_softmax(-1).gather(-1, ids)).sum(-1).mean()
    assert_same_with_gradients(got, F.cross_entropy(logits, targets) + soft, logits)


def test_two_passes_do_not_fit_over_the_logits():
    with pytest.raises(ValueError, match="distillation_temperature other than 1 reads the logits twice"):
        standard(distillation_temperature=2.0, inplace_gradient=True)
