"""Class weights, as torch.nn.functional.cross_entropy has them: values, gradients, N."""

import pytest
import torch
import torch.nn.functional as F
from support.strategies import Numbers

from ava_ext import UnifiedLoss
from ava_ext.functional import cross_entropy, linear_cross_entropy

V = 7
WEIGHTS = (1.0, 0.3, 3.0, 0.0, 1.5, 0.1, 2.0)  # 0.3 and 0.1 have no exact float32


def problem(seed, *rows):
    numbers = Numbers(seed)
    targets = numbers.integers(0, V, *rows).masked_fill(numbers.true(0.3, *rows), -100)
    return numbers, targets, torch.tensor(WEIGHTS, dtype=torch.float64)


def assert_same_with_gradients(got, wanted, *leaves):
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-15)
    gradients = (torch.autograd.grad(value.sum(), leaves, retain_graph=True) for value in (got, wanted))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_functions_are_those_of_torch(reduction):
    numbers, targets, weight = problem(1, 9)
    logits = numbers.leaf(9, V)
    wanted = F.cross_entropy(logits, targets, weight, reduction=reduction)
    assert_same_with_gradients(cross_entropy(logits, targets, weight, reduction=reduction), wanted, logits)
    states, head = numbers.leaf(9, 4), numbers.leaf(V, 4)
    wanted = F.cross_entropy(F.linear(states, head), targets, weight, reduction=reduction)
    got = linear_cross_entropy(states, head, targets, weight=weight, reduction=reduction)
    assert_same_with_gradients(got, wanted, states, head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype):
    numbers, targets, weight = problem(2, 9)
    logits = numbers.normal(9, V).to(dtype).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    got = cross_entropy(logits, targets, weight.float())
    wanted = F.cross_entropy(wide, targets, weight)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=0)
    found, expected = torch.autograd.grad(got, logits)[0], torch.autograd.grad(wanted, wide)[0]
    torch.testing.assert_close(found.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


def test_every_token_term_has_the_same_n():
    numbers, targets, weight = problem(3, 2, 6)
    logits, token_weights = numbers.leaf(2, 6, V), numbers.uniform(2, 6)
    options = {"primary_loss_type": "standard", "z_loss_weight": 0.1}
    loss_fn = UnifiedLoss(V, class_weights=WEIGHTS, **options)
    counted = targets != -100
    n = (token_weights * weight[targets.clamp(min=0)])[counted].sum()
    torch.testing.assert_close(loss_fn.count_items(targets), weight[targets[counted]].sum().float())
    each = F.cross_entropy(logits[counted], targets[counted], weight, reduction="none")
    wanted = (token_weights[counted] * (each + 0.1 * logits[counted].logsumexp(-1).square())).sum()
    parts = loss_fn(logits, targets, token_weights=token_weights, return_detailed=True)
    assert_same_with_gradients(parts["total_loss"], wanted / n, logits)
    torch.testing.assert_close(parts["main_loss"] + parts["z_loss"], parts["total_loss"].detach())
    plain = F.cross_entropy(logits[counted], targets[counted]).detach()  # what one compares runs by
    torch.testing.assert_close(parts["cross_entropy"], plain)
    of_step = loss_fn(logits, targets, token_weights=token_weights, num_items_in_batch=4.0)
    assert_same_with_gradients(of_step, wanted / 4, logits)


def test_other_terms_and_depths_are_not_weighted_by_class():
    """They are divided by the same N: weights of mean 1 leave them as they are."""
    logits, heads, targets = torch.randn(2, 3, V), torch.randn(1, 2, 3, V), torch.tensor([[1, 2, 4], [5, 3, 6]])
    options = {"z_loss_weight": 0.1, "use_mtp": True, "mtp_type": "adaptive", "num_future_tokens": 1}

    def parts(class_weights):
        loss_fn = UnifiedLoss(V, primary_loss_type="standard", class_weights=class_weights, **options)
        found = loss_fn(logits, targets, additional_logits=heads, confidence_scores=torch.ones(2), return_detailed=True)
        return found["z_loss"], found["mtp_loss"]

    mean = torch.tensor(WEIGHTS)[targets].mean().item()
    torch.testing.assert_close(parts(tuple(w / mean for w in WEIGHTS)), parts(None))


def test_counts_of_micro_batches_add_up():
    logits, targets = torch.randn(2, 3, V), torch.tensor([[1, 2, 4], [3, 3, 3]])  # 3 has weight 0
    loss_fn = UnifiedLoss(V, primary_loss_type="standard", class_weights=WEIGHTS, z_loss_weight=0.1)
    counts = [loss_fn.count_items(part) for part in targets]
    assert counts[1] == 0 and sum(counts) == loss_fn.count_items(targets)
    parts = [loss_fn(logits[b], targets[b], num_items_in_batch=sum(counts)) for b in range(2)]
    torch.testing.assert_close(sum(parts), loss_fn(logits, targets))


def test_nothing_counts():
    logits = torch.full((2, V), torch.nan, requires_grad=True)
    loss_fn = UnifiedLoss(V, primary_loss_type="standard", class_weights=WEIGHTS)
    loss_fn(logits, torch.full((2,), -100)).backward()
    assert not logits.grad.any()
    logits = torch.randn(2, V, requires_grad=True)  # a class of weight 0 alone
    loss = loss_fn(logits, torch.tensor([3, 3]))
    assert loss == 0 and not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_whose_classes_weigh_nothing_are_divided_by_their_number_in_the_function_too(dtype):
    numbers = Numbers(4)
    logits, targets = numbers.normal(6, V).to(dtype), torch.tensor([0, 1, 0, 1, -100, 0])
    weights = torch.ones(V, dtype=dtype).index_fill(0, torch.tensor([0, 1]), 0)
    options = {"label_smoothing": 0.1, "z_loss_weight": 0.5}
    expected = UnifiedLoss(V, primary_loss_type="standard", class_weights=weights, **options)(logits, targets)
    torch.testing.assert_close(cross_entropy(logits, targets, weights, **options), expected)


def test_a_long_list_is_not_printed():
    assert "class_weights=(1.0, ..., 1.0)" in repr(UnifiedLoss(100, class_weights=(1.0,) * 100))
