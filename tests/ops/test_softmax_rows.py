"""row_loss and the operators it is made of: values and gradients against the reference in float64.

test_build.py runs this file once more for every instruction set, so it stays quick.
"""

import pytest
import torch
from hypothesis import given
from support.assertions import relative_error
from support.row_oracle import expected_row_loss
from support.row_ways import assert_right, fused, in_place, split
from support.strategies import RowProblem, row_problems

from ava_ext.ops.row_fields import Candidates, RowFlags, row_options
from ava_ext.ops.softmax_rows import row_loss

ops = torch.ops.ava_ext


def by_autograd(problem):
    logits = problem.logits.detach().requires_grad_()
    loss, terms = row_loss(logits, problem.targets, problem.options, **problem.keywords)
    assert not terms.requires_grad
    return loss.detach(), terms, torch.autograd.grad(loss.sum(), logits)[0]


def by_inplace_gradient(problem):
    """backward writes over the logits, a view of a computed tensor."""
    base = problem.base.clone().requires_grad_()
    computed = base * 1
    logits = problem.view(computed)
    loss, terms = row_loss(logits, problem.targets, problem.options, inplace_gradient=True, **problem.keywords)
    (grad_base,) = torch.autograd.grad(loss.sum(), base)
    grad_logits = problem.view(grad_base)
    torch.testing.assert_close(logits.detach(), grad_logits, rtol=0, atol=0, equal_nan=True)
    return loss.detach(), terms, grad_logits


def without_gradient(problem):
    loss, terms = row_loss(problem.logits, problem.targets, problem.options, **problem.keywords)
    assert not loss.requires_grad
    return loss, terms, None


@given(row_problems())
def test_every_way_to_the_gradient(problem):
    expected = expected_row_loss(problem)
    ways = dict(fused=fused, split=split, autograd=by_autograd, without_gradient=without_gradient)
    if not problem.is_expanded:
        ways["row_loss_"] = lambda problem: in_place(problem, "row_loss_")
        ways["row_gradient_"] = lambda problem: in_place(problem, "row_gradient_")
        ways["inplace_gradient"] = by_inplace_gradient
    before = problem.base.clone()
    for name, way in ways.items():
        assert_right(problem, way(problem), expected, name)
        torch.testing.assert_close(problem.base, before, rtol=0, atol=0, equal_nan=True, msg=f"{name} wrote the logits")


def test_the_entropy_of_a_flat_row_under_a_soft_cap():
    """Equal capped columns differ from the rounded maximum by what one multiply-add leaves unrounded."""
    for cap in (5.0, 8.0):
        base = torch.full((1, 2), -30.0)
        options = row_options(base, confidence_penalty_weight=0.2, logit_softcap=cap)
        flags = int(RowFlags.CONFIDENCE_PENALTY | RowFlags.SOFTCAP)
        problem = RowProblem(base, lambda rows: rows, torch.tensor([1]), options, flags, None, None, 2)
        for way in (fused, split, by_autograd):
            assert_right(problem, way(problem), expected_row_loss(problem), way.__name__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scale", "options"), [(1, dict(logit_softcap=0.5)), (10000, dict(temperature=20000.0))])
def test_no_logit_is_so_low_that_it_does_not_count(dtype, scale, options):
    """Where the soft cap is low, or the temperature too high for the type, no stand-in for a logit is nothing."""
    base = (torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)
    flags = RowFlags.CROSS_ENTROPY | RowFlags.CONFIDENCE_PENALTY | RowFlags.LABEL_SMOOTHING
    if "logit_softcap" in options:
        flags |= RowFlags.SOFTCAP
    options = row_options(base.float(), confidence_penalty_weight=0.2, label_smoothing=0.1, **options)
    problem = RowProblem(base, lambda rows: rows, torch.tensor([1, 2, 3]), options, int(flags), None, None, 40)
    for way in (fused, split, by_autograd):
        assert_right(problem, way(problem), expected_row_loss(problem), way.__name__)


def test_the_columns_of_a_large_vocabulary():
    """Where the target's entry is all of the norm, the others are compared by themselves."""
    logits = torch.randn(3, 128256, generator=torch.Generator().manual_seed(0)) * 3
    targets = torch.tensor([0, 77, 128255])
    x = logits.double().requires_grad_()
    expected_loss = torch.nn.functional.cross_entropy(x, targets, reduction="none")
    expected_loss.sum().backward()
    for candidates in (None, Candidates(torch.tensor([[5], [-1], [77]], dtype=torch.int32), torch.ones(3, 1), (1,))):
        loss, _, gradient, *_ = ops.row_loss(
            logits,
            targets,
            row_options(logits),
            None,
            *(candidates or (None, None, [])),
            1,
            128256,
            -100,
            True,
            False,
        )
        expected = x.grad.clone()
        if candidates:
            p = x.detach().softmax(-1)[[0, 2], [5, 77]]
            expected[[0, 2]] -= x.detach()[[0, 2]].softmax(-1) * (p / (1 - p))[:, None]
            expected[[0, 2], [5, 77]] += p / (1 - p)
        torch.testing.assert_close(loss[1].double(), expected_loss[1].detach(), rtol=3e-7, atol=0)
        special = torch.zeros_like(logits, dtype=torch.bool)
        special[range(3), targets] = special[0, 5] = special[2, 77] = True
        assert relative_error(gradient[~special], expected[~special]) < 5e-7
        torch.testing.assert_close(gradient[special].double(), expected[special], rtol=1e-6, atol=0)
