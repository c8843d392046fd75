"""row_loss within autograd: upstream gradients, kept graphs, other users of the logits, and what must raise."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.assertions import assert_bitwise_equal
from support.strategies import row_problems
from torch.utils.checkpoint import checkpoint

from ava_ext.ops.row_fields import Candidates, RowFlags, row_options
from ava_ext.ops.softmax_rows import row_loss
from ava_ext.ops.softmax_statistics import softmax_statistics

ops = torch.ops.ava_ext
TARGETS = [[3, 0, 10], [-100, 7, 7]]
# without token reweighting, whose weight is a constant to autograd
EVERY_TERM = sum(RowFlags) - RowFlags.TAIL - RowFlags.TARGET_WEIGHTS - RowFlags.DFT - RowFlags.EAFT
SINGLE_TERMS = {
    "cross_entropy": RowFlags.CROSS_ENTROPY,
    "focal": RowFlags.CROSS_ENTROPY | RowFlags.FOCAL,
    "label_smoothing": RowFlags.CROSS_ENTROPY | RowFlags.LABEL_SMOOTHING,
    "exclude_target": RowFlags.CROSS_ENTROPY | RowFlags.LABEL_SMOOTHING | RowFlags.EXCLUDE_TARGET,
    "z_loss": RowFlags.Z_LOSS,
    "confidence_penalty": RowFlags.CONFIDENCE_PENALTY,
    "softcap": RowFlags.CROSS_ENTROPY | RowFlags.SOFTCAP,
    "candidates": 0,
    "soft targets": RowFlags.SOFT_TARGETS,
    "all": EVERY_TERM,
}


def random_logits(dtype=torch.float32, n_columns=11):
    return torch.randn(2, 3, n_columns, generator=torch.Generator().manual_seed(0)).to(dtype)


def loss_of(logits, flags=EVERY_TERM, with_candidates=True, **keywords):
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    options = row_options(
        logits, temperature=0.8, label_smoothing=0.2, focal_alpha=0.5, focal_gamma=1.5, z_loss_weight=0.3,
        confidence_penalty_weight=0.4, logit_softcap=4.0,
    )  # fmt: skip
    ids = torch.tensor([1, 4, 4, 7, -1], dtype=torch.int32).expand(2, 3, 5)
    candidates = (
        Candidates(ids, torch.linspace(0.5, 2, 30, dtype=real).view(2, 3, 5), (1, 4)) if with_candidates else None
    )
    weights = torch.tensor([[1.0, 0.5, 2.0], [1.0, 1.0, -1.0]], dtype=real)
    targets = torch.tensor(TARGETS)
    return row_loss(logits, targets, options, flags=flags, candidates=candidates, row_weights=weights, **keywords).loss


def gradient_of(loss, *inputs):
    return torch.autograd.grad(loss.sum(), *inputs)[0]


@pytest.mark.parametrize("name", SINGLE_TERMS)
def test_gradcheck(name):
    logits = random_logits(torch.float64)
    logits[0, 0, 5] = logits[0, 1, 0] = -math.inf  # the second one is a target, so the finite rows are checked
    kept = logits.isfinite()

    def loss(values):
        x = torch.full_like(logits, -math.inf).masked_scatter(kept, values)
        rows = loss_of(x, SINGLE_TERMS[name], name in ("candidates", "all"))
        return rows[torch.tensor(TARGETS) != 0]

    assert torch.autograd.gradcheck(loss, logits[kept].requires_grad_())


@given(problem=row_problems(dtypes=[torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 99))
def test_upstream_factor_of_each_row(problem, seed):
    """sum_i f_i loss_i: the gradient of row i times f_i, rounded once more where it was stored before."""
    factors = torch.randn(problem.targets.shape, generator=torch.Generator().manual_seed(seed))
    plain, scaled, one = (problem.logits.detach().requires_grad_() for _ in range(3))
    loss = row_loss(plain, problem.targets, problem.options, **problem.keywords).loss
    expected = gradient_of(loss, plain).float() * factors.unsqueeze(-1)
    gradient = torch.autograd.grad(
        row_loss(scaled, problem.targets, problem.options, **problem.keywords).loss, scaled, factors
    )[0]
    info = torch.finfo(gradient.dtype)
    rounding = dict(rtol=2 * info.eps + 1e-6, atol=4 * info.tiny * info.eps, equal_nan=True)
    torch.testing.assert_close(gradient.float(), expected, **rounding)
    loss = row_loss(one, problem.targets, problem.options, **problem.keywords).loss
    torch.testing.assert_close(
        gradient_of(loss * -3.0, one).float(), gradient_of(loss_again(problem, one), one).float() * -3, **rounding
    )


def loss_again(problem, logits):
    return row_loss(logits, problem.targets, problem.options, **problem.keywords).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_kept_graph_gives_the_right_gradient_again(dtype):
    logits = random_logits(dtype).requires_grad_()
    loss = loss_of(logits)
    first = torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0]
    saved = first.clone()
    twice = torch.autograd.grad(2 * loss.sum(), logits, retain_graph=True)[0]
    again = torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0]
    quarter = torch.autograd.grad(loss.sum() / 4, logits)[0]
    assert_bitwise_equal(first, saved, "held while others are computed")
    assert_bitwise_equal(twice, 2 * first)
    assert_bitwise_equal(again, first)
    assert_bitwise_equal(quarter, first / 4)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss.sum(), logits)


@pytest.mark.parametrize("n_columns", [11, 400000])  # the large one comes from the pool
def test_gradients_accumulate_in_a_leaf(n_columns):
    logits = random_logits(n_columns=n_columns).requires_grad_()
    expected = gradient_of(loss_of(logits), logits)
    kept = expected.clone()
    for n_times in (1, 2, 3):
        loss_of(logits).sum().backward()
        torch.testing.assert_close(logits.grad, kept * n_times, rtol=1e-6, atol=1e-12)
    assert_bitwise_equal(expected, kept)


@pytest.mark.parametrize("own_loss_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_second_user_of_the_logits(own_loss_first, dtype):
    leaf = random_logits(dtype).requires_grad_()
    alone = gradient_of(loss_of(leaf * 1), leaf)
    logits = leaf * 1
    losses = [loss_of(logits), logits.square()]
    total = sum(loss.sum() for loss in (losses if own_loss_first else losses[::-1]))
    (gradient,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(gradient, alone + 2 * leaf.detach(), rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    assert_bitwise_equal(logits.detach(), leaf.detach(), "logits")


def test_two_losses_of_the_same_logits():
    leaf = random_logits().requires_grad_()
    one, other = gradient_of(loss_of(leaf, 1), leaf), gradient_of(loss_of(leaf, 16), leaf)
    logits = leaf * 1
    (gradient,) = torch.autograd.grad(loss_of(logits, 1).sum() + loss_of(logits, 16).sum(), leaf)
    torch.testing.assert_close(gradient, one + other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("saver_first", [True, False])
def test_inplace_gradient_beside_a_user_that_saved_the_logits(saver_first):
    leaf = random_logits().requires_grad_()
    logits = leaf * 1
    users = [lambda: logits.square().sum(), lambda: loss_of(logits, inplace_gradient=True).sum()]
    first, second = users if saver_first else users[::-1]
    total = first() + second()
    if saver_first:  # autograd goes back from the youngest: the logits are written before they are read
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()
    else:
        expected = gradient_of(loss_of(leaf), leaf) + 2 * leaf.detach()
        torch.testing.assert_close(gradient_of(total, leaf), expected, rtol=1e-6, atol=1e-6)


def test_inplace_gradient():
    leaf = random_logits().requires_grad_()
    expected = gradient_of(loss_of(leaf), leaf)
    logits = leaf * 1
    version = logits._version
    loss = loss_of(logits, inplace_gradient=True)
    assert_bitwise_equal(logits.detach(), leaf.detach(), "readable until backward")
    assert logits._version == version
    (gradient,) = torch.autograd.grad(3 * loss.sum(), logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr() and logits._version == version + 1
    # addends of up to 15 cancel in some entries: two units in the last place of those
    torch.testing.assert_close(gradient, 3 * expected, rtol=2e-6, atol=2e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss.sum(), logits)


def test_inplace_gradient_of_two_losses_raises():
    logits = random_logits().requires_grad_() * 1
    total = loss_of(logits, inplace_gradient=True).sum() + loss_of(logits, inplace_gradient=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def checkpointed(function, *leaves):
    return checkpoint(function, *leaves, use_reentrant=False)


def saved_on_cpu(function, *leaves):
    with torch.autograd.graph.save_on_cpu():
        return function(*leaves)


@pytest.mark.parametrize("inplace_gradient", [True, False])
@pytest.mark.parametrize("under_hooks", [checkpointed, saved_on_cpu])
def test_hooks_on_saved_tensors_change_nothing(under_hooks, inplace_gradient):
    """Another operation saves the logits too; a second backward where the graph was kept."""
    weight = torch.randn(11, 4, requires_grad=True)
    states = torch.randn(2, 3, 4, requires_grad=True)

    def head(states, weight, inplace_gradient=inplace_gradient):
        logits = states @ weight.T
        return logits.logsumexp(-1).square().sum() + loss_of(logits, inplace_gradient=inplace_gradient).sum()

    expected = torch.autograd.grad(head(states, weight, False), (states, weight))
    loss = under_hooks(head, states, weight)
    torch.testing.assert_close(torch.autograd.grad(loss, (states, weight), retain_graph=True), expected)
    torch.testing.assert_close(torch.autograd.grad(loss, (states, weight)), expected)


@pytest.mark.parametrize("view", [lambda leaf: leaf, lambda leaf: leaf[:], lambda leaf: leaf.view(2, 3, 11)[:, :]])
def test_inplace_gradient_of_a_leaf_raises(view):
    """A view of a leaf is the leaf's memory."""
    with pytest.raises(ValueError, match="inplace_gradient=True would write over a leaf"):
        loss_of(view(torch.zeros(2, 3, 11, requires_grad=True)), inplace_gradient=True)


@pytest.mark.parametrize("strides", [(0, 11, 1), (33, 0, 1), (3, 1, 1), (33, 10, 1), (30, 11, 1), (10, 20, 1)])
def test_inplace_gradient_of_overlapping_rows_raises(strides):
    logits = torch.zeros(66, requires_grad=True) * 1
    with pytest.raises(ValueError, match="expected logits that do not overlap in memory"):
        loss_of(logits.as_strided((2, 3, 11), strides), inplace_gradient=True)


@pytest.mark.parametrize("strides", [(33, 11, 1), (11, 22, 1), (36, 12, 1)])
def test_inplace_gradient_of_rows_that_do_not_overlap(strides):
    leaf = torch.zeros(75, requires_grad=True)
    losses = [
        loss_of((leaf * 1).as_strided((2, 3, 11), strides), inplace_gradient=inplace) for inplace in (True, False)
    ]
    torch.testing.assert_close(*(gradient_of(loss, leaf) for loss in losses), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("inplace_gradient", [False, True])
def test_double_backward_raises(dtype, inplace_gradient):
    leaf = random_logits(dtype).requires_grad_()
    loss = loss_of(leaf * 1, inplace_gradient=inplace_gradient)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("way", ["fused", "split", "in place", "open"])
def test_a_gradient_penalty_on_parameters_raises(way):
    """torch.autograd.grad goes only where the parameters are: the error must lie on that way."""
    first, second = torch.randn(6, 6, requires_grad=True), torch.randn(6, 11, requires_grad=True)
    logits = (torch.randn(2, 3, 6) @ first).tanh() @ second
    logits = logits.half() if way == "split" else logits
    if way == "open":
        loss = softmax_statistics(logits, None).entropy
    else:
        loss = loss_of(logits, inplace_gradient=way == "in place")
    gradients = torch.autograd.grad(loss.sum(), (first, second), create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in gradients)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(penalty, (first, second), allow_unused=True)


@pytest.mark.parametrize("with_gradient", [True, False])
def test_double_backward_of_the_operator_raises(with_gradient):
    logits = torch.randn(3, 7, requires_grad=True)
    arguments = (torch.tensor([0, 1, 2]), row_options(logits), None, None, None, [], 1, 7, -100)
    loss, *_ = ops.row_loss(logits, *arguments, with_gradient, not with_gradient)
    (gradient,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
    p = logits.detach().softmax(-1)
    torch.testing.assert_close(gradient.detach(), p - torch.eye(3, 7), rtol=1e-5, atol=1e-7)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.square().sum().backward()


def test_no_gradient_is_computed_where_none_is_wanted():
    logits = random_logits().requires_grad_()
    expected = loss_of(logits)
    with torch.no_grad():
        under_no_grad = loss_of(logits)
    with torch.inference_mode():
        under_inference_mode = loss_of(logits)
    for value in (under_no_grad, under_inference_mode, loss_of(logits.detach())):
        assert not value.requires_grad
        assert_bitwise_equal(value, expected.detach())


@pytest.mark.parametrize("name", ["options", "row_weights", "candidate_weights"])
def test_weights_that_require_grad_raise(name):
    def leaf(tensor, here):
        return tensor.requires_grad_(name == here)

    logits = torch.zeros(1, 5)
    candidates = Candidates(torch.zeros(1, 1, dtype=torch.int32), leaf(torch.ones(1, 1), "candidate_weights"), (1,))
    with pytest.raises(ValueError, match=f"row_loss: expected {name} without requires_grad"):
        row_loss(
            logits, torch.tensor([1]), leaf(row_options(logits), "options"), candidates=candidates,
            row_weights=leaf(torch.ones(1), "row_weights"),
        )  # fmt: skip
