"""The ways from a problem to its gradient by the operators, and what each must give."""

import math

import torch
from support.assertions import assert_within

from ava_ext.ops.row_fields import RowFlags

ops = torch.ops.ava_ext


def fused(problem):
    return ops.row_loss(problem.logits, *problem.arguments, True, False)[:3]


def split(problem, into=None):
    """Statistics and coefficients first, the gradient from them after."""
    loss, terms, _, statistics, row_coefficients = ops.row_loss(problem.logits, *problem.arguments, False, True)
    columns = problem.targets.masked_fill(problem.targets == problem.ignore_index, -1).int().unsqueeze(-1)
    if problem.candidates:
        columns = torch.cat([columns, problem.candidates.ids], -1)
    arguments = (statistics, row_coefficients, columns, problem.options, problem.flags, problem.vocab_size)
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


# the entropy is right only where one of these asks for it
NEED_ENTROPY = RowFlags.ENTROPY | RowFlags.CONFIDENCE_PENALTY | RowFlags.LABEL_SMOOTHING | RowFlags.EAFT


def assert_right(problem, outputs, expected, name):
    loss, terms, grad_logits = outputs
    real = problem.options.dtype
    assert loss.dtype == terms.dtype == real and loss.shape == expected.loss.shape
    assert_within(loss, expected.loss, expected.loss_bound, f"{name}: loss")
    bounds = expected.terms_bound.clone()
    if not problem.flags & NEED_ENTROPY:
        bounds[4] = math.inf
    if problem.flags & RowFlags.SOFTCAP:
        bounds[5] = math.inf  # saturated columns may be equal
    assert_within(terms, expected.terms, bounds, f"{name}: terms")
    if grad_logits is None:
        return
    assert grad_logits.dtype == problem.base.dtype and grad_logits.shape == expected.grad_logits.shape
    info = torch.finfo(grad_logits.dtype)
    stored = torch.where(
        expected.grad_logits == 0, 0.0, expected.grad_logits.abs() * info.eps / 2 + info.tiny * info.eps
    )
    assert_within(grad_logits, expected.grad_logits, expected.grad_logits_bound + stored, f"{name}: grad_logits")
