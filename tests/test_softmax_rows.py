"""row_loss and the operators it is made of: values and gradients against the reference in float64.

test_build.py runs this file once more for every instruction set, so it stays quick.
"""

import math

import torch
from assertions import assert_within, relative_error
from hypothesis import given
from row_oracle import expected_row_loss
from strategies import row_problems

from ava_ext.ops.softmax_rows import Candidates, RowTerms, row_coefficients, row_loss

ops = torch.ops.ava_ext


def fused(problem):
    return ops.row_loss(problem.logits, *problem.arguments, True, False)[:3]


def split(problem, into=None):
    """Statistics and coefficients first, the gradient from them after."""
    loss, terms, _, statistics, row_coefficients = ops.row_loss(problem.logits, *problem.arguments, False, True)
    columns = problem.targets.masked_fill(problem.targets == problem.ignore_index, -1).int().unsqueeze(-1)
    if problem.candidates:
        columns = torch.cat([columns, problem.candidates.ids], -1)
    arguments = (statistics, row_coefficients, columns, problem.coefficients, problem.terms, problem.vocab_size)
    if into is None:
        return loss, terms, ops.row_gradient(problem.logits, *arguments)
    ops.row_gradient_(into, *arguments)
    return loss, terms, into


def in_place(problem, op):
    """Over a copy of the logits; nothing beside them may be written."""
    base = problem.base.clone()
    logits = problem.view(base)
    loss, terms = ops.row_loss_(logits, *problem.arguments) if op == "row_loss_" else split(problem, logits)[:2]
    grad_logits = logits.clone()
    logits.fill_(math.nan)
    assert base.isnan().all(), "written beside the logits"
    return loss, terms, grad_logits


def by_autograd(problem):
    logits = problem.logits.detach().requires_grad_()
    loss, terms = row_loss(logits, problem.targets, problem.coefficients, **problem.options)
    assert not terms.requires_grad
    return loss.detach(), terms, torch.autograd.grad(loss.sum(), logits)[0]


def by_inplace_gradient(problem):
    """backward writes over the logits, a view of a computed tensor."""
    base = problem.base.clone().requires_grad_()
    computed = base * 1
    logits = problem.view(computed)
    loss, terms = row_loss(logits, problem.targets, problem.coefficients, inplace_gradient=True, **problem.options)
    (grad_base,) = torch.autograd.grad(loss.sum(), base)
    grad_logits = problem.view(grad_base)
    torch.testing.assert_close(logits.detach(), grad_logits, rtol=0, atol=0, equal_nan=True)
    return loss.detach(), terms, grad_logits


def without_gradient(problem):
    loss, terms = row_loss(problem.logits, problem.targets, problem.coefficients, **problem.options)
    assert not loss.requires_grad
    return loss, terms, None


def is_measured(name, terms):
    """The entropy is right only where it is asked for."""
    return name != "entropy" or bool(
        terms & (RowTerms.ENTROPY | RowTerms.CONFIDENCE_PENALTY | RowTerms.LABEL_SMOOTHING)
    )


def assert_right(problem, outputs, expected, name):
    loss, terms, grad_logits = outputs
    real = problem.coefficients.dtype
    assert loss.dtype == terms.dtype == real and loss.shape == expected.row_loss.shape
    assert_within(loss, expected.row_loss, expected.row_loss_bound, f"{name}: row_loss")
    bounds = expected.row_terms_bound.clone()
    if not is_measured("entropy", problem.terms):
        bounds[4] = math.inf
    if problem.terms & RowTerms.SOFTCAP:
        bounds[5] = math.inf  # saturated columns may be equal
    assert_within(terms, expected.row_terms, bounds, f"{name}: row_terms")
    if grad_logits is None:
        return
    assert grad_logits.dtype == problem.base.dtype and grad_logits.shape == expected.grad_logits.shape
    info = torch.finfo(grad_logits.dtype)
    stored = torch.where(
        expected.grad_logits == 0, 0.0, expected.grad_logits.abs() * info.eps / 2 + info.tiny * info.eps
    )
    assert_within(grad_logits, expected.grad_logits, expected.grad_logits_bound + stored, f"{name}: grad_logits")


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
            row_coefficients(logits),
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
