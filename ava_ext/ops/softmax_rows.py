"""Rows of logits: every row-wise loss term and its gradient in one pass.

The formulas stand in csrc/softmax_rows.h. What is made of the statistics themselves is in ops/softmax_statistics.py.
"""

from __future__ import annotations

from enum import IntFlag
from typing import NamedTuple

import torch
from torch import Tensor

from ava_ext import _library  # noqa: F401  the operators exist once it is imported

_ops = torch.ops.ava_ext
_row_loss = _ops.row_loss.default  # looked up once: each look-up costs a microsecond
# private in torch, but what its own donated buffers rely on; without it we keep the graph's memory intact, at the
# price of a copy
graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class RowTerms(IntFlag):
    """Which terms the row kernel computes. Their weights come in the tensor of coefficients."""

    CROSS_ENTROPY = 1
    FOCAL = 2
    LABEL_SMOOTHING = 4
    EXCLUDE_TARGET = 8
    Z_LOSS = 16
    CONFIDENCE_PENALTY = 32
    SOFTCAP = 64
    ENTROPY = 128


# the first rows of row_terms; the groups of candidates follow
TERM_NAMES = ("main_loss", "z_loss", "confidence_penalty", "cross_entropy", "entropy", "correct")
N_STATISTICS = 6  # max, argmax, rest, weighted, sum, count: RowStatistics in softmax_rows.h


class RowLoss(NamedTuple):
    """What `row_loss` returns."""

    row_loss: Tensor  # [...]: row_weights times the sum of the terms and penalties; the differentiable output
    # [len(TERM_NAMES) + n_groups, ...]: each by itself, unweighted, without graph. The entropy is measured only with
    # RowTerms.ENTROPY, LABEL_SMOOTHING, CONFIDENCE_PENALTY or SOFTCAP.
    row_terms: Tensor


class Candidates(NamedTuple):
    """Tokens that a row pushes down: -sum_c weight_c log(1 - p_c)."""

    ids: Tensor  # [..., n_candidates] int32; -1: absent
    weights: Tensor  # [..., n_candidates] float32 (float64 beside float64 logits)
    groups: tuple[int, ...]  # sizes that add up to n_candidates; each group is reported by itself


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of statistics, terms and weights beside logits of this type: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_coefficients(
    like: Tensor,
    *,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    focal_alpha: float = 1.0,
    focal_gamma: float = 2.0,
    z_loss_weight: float = 0.0,
    confidence_penalty_weight: float = 0.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """The small tensor of options [7] that the kernels read, on the device of `like` and in its accumulation type.

    A schedule may change the values of such a tensor: nothing is recompiled and nothing synchronises.
    """
    values = [
        temperature,
        label_smoothing,
        focal_alpha,
        focal_gamma,
        z_loss_weight,
        confidence_penalty_weight,
        logit_softcap or 0.0,
    ]
    return torch.tensor(values, dtype=accumulation_dtype(like.dtype), device=like.device)


def row_loss(
    logits: Tensor,  # [..., n_columns]
    targets: Tensor,  # [...]
    coefficients: Tensor,  # [7], from row_coefficients
    *,
    terms: int = int(RowTerms.CROSS_ENTROPY),
    row_weights: Tensor | None = None,  # [...]
    candidates: Candidates | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    inplace_gradient: bool = False,
) -> RowLoss:
    """Every row-wise loss term, and its gradient, in one pass over the logits.

    Args:
        logits: [..., n_columns], float32, bfloat16, float16 or float64; any leading strides (a slice is not copied).
        targets: [...], integers in [0, vocab_size) or ignore_index, whose rows give 0 and get a zero gradient.
        coefficients: [7], see `row_coefficients`; must not require grad.
        terms: which terms are on, a sum of `RowTerms`.
        row_weights: [...], what multiplies each row's loss and gradient, 1/N for a mean; must not require grad.
        candidates: tokens to push down; see `Candidates`.
        vocab_size: columns beyond it are padding. Default: n_columns.
        ignore_index: target of the rows that do not count.
        inplace_gradient: backward writes the gradient over the logits, which must not be a leaf. They stay readable
            until then; a second backward raises. Under torch.compile, which plans memory itself, the option changes
            nothing.

    Returns:
        RowLoss(row_loss [...], row_terms [6 + n_groups, ...]).

    Raises:
        ValueError: on weights that require grad, or inplace_gradient on a leaf or on overlapping memory.
        RuntimeError: on wrong shapes and types; on double backward.
        IndexError: on a target outside [0, vocab_size) that is not ignore_index.

    Example:
        >>> logits, targets = torch.randn(4, 100, requires_grad=True), torch.tensor([1, 2, 3, -100])
        >>> loss = row_loss(logits, targets, row_coefficients(logits)).row_loss.sum()
        >>> loss.backward()
    """
    check_constants("row_loss", coefficients, row_weights, candidates)
    if targets.dtype != torch.int64:
        targets = targets.long()
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    ids, weights, groups = candidates if candidates else (None, None, ())
    n_columns = logits.shape[-1]
    arguments = (
        logits,
        targets,
        coefficients,
        row_weights,
        ids,
        weights,
        groups,
        terms,
        n_columns if vocab_size is None else vocab_size,
        ignore_index,
    )
    differentiable = logits.requires_grad and torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        # split: a compiled backward cannot ask whether the upstream gradient is 1, and a pass to scale costs as much
        # as the gradient
        return RowLoss(*_row_loss(*arguments, False, differentiable)[:2])
    if not differentiable:
        with torch._C._AutoDispatchBelowAutograd():
            return RowLoss(*_row_loss(*arguments, False, False)[:2])
    if inplace_gradient:
        _check_inplace(logits)
    # a float16 gradient rounded before the scaler's factor would be zeros
    split = inplace_gradient or logits.dtype == torch.float16
    tensors, options = arguments[:6], (*arguments[6:], not split, split)
    return RowLoss(*_RowLoss.apply(*tensors, options, inplace_gradient)[:2])


def check_constants(
    owner: str,
    coefficients: Tensor,  # [7]
    row_weights: Tensor | None,  # [...]
    candidates: Candidates | None,
) -> None:
    """Raises ValueError where one of them requires grad, which it would not get; owner begins the message."""
    for name, tensor in (
        ("coefficients", coefficients),
        ("row_weights", row_weights),
        ("candidate weights", candidates.weights if candidates else None),
    ):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{owner}: expected {name} without requires_grad: no gradient is computed for them")


def _check_inplace(logits: Tensor) -> None:
    base = logits if logits._base is None else logits._base  # also what a slice would write to
    if base.is_leaf and base.requires_grad:
        raise ValueError(
            "unified_loss: inplace_gradient=True would write over a leaf (a parameter or an input that requires grad); "
            "expected logits that were computed"
        )
    strides = zip(logits.shape, logits.stride(), strict=True)
    if logits.numel() and any(stride == 0 and size > 1 for size, stride in strides):
        raise ValueError(
            "unified_loss: inplace_gradient=True expected logits that do not overlap in memory, got an expanded tensor"
        )


def _save_row_loss(ctx, inputs, output, origin=None):
    (logits, targets, coefficients, _, ids, _, _, ctx.terms, ctx.vocab_size, ctx.ignore_index, ctx.fused) = inputs[:11]
    _, row_terms, grad_logits, statistics, row_coefficients = output
    ctx.mark_non_differentiable(row_terms, grad_logits, statistics, row_coefficients)
    ctx.set_materialize_grads(False)
    ctx.owns_gradient = ctx.inplace = False
    if ctx.fused:
        ctx.save_for_backward(grad_logits, origin)
    else:
        ctx.save_for_backward(logits, targets, statistics, row_coefficients, ids, coefficients)


def _row_loss_backward(ctx, grad_row_loss, *_):
    """grad_row_loss: [...]. Returns the gradient of the logits [..., n_columns], and None for every other input."""
    nothing = (None,) * 11
    if grad_row_loss is None:
        return None, *nothing
    if ctx.fused:
        grad_logits, origin = ctx.saved_tensors
        if not ctx.owns_gradient or graph_is_kept():
            grad_logits = grad_logits.clone()
        _ops.scale_rows_(grad_logits, grad_row_loss)
        return without_second_derivative(grad_logits, origin), *nothing
    logits, targets, statistics, coefficients_of_rows, ids, coefficients = ctx.saved_tensors
    targets = targets.masked_fill(targets == ctx.ignore_index, -1).to(torch.int32).unsqueeze(-1)
    arguments = (
        logits.detach(),
        statistics,
        coefficients_of_rows * grad_row_loss.unsqueeze(-1),
        targets if ids is None else torch.cat([targets, ids], -1),
        coefficients,
        ctx.terms,
        ctx.vocab_size,
    )
    if not ctx.inplace:
        return without_second_derivative(_ops.row_gradient(*arguments), logits), *nothing
    _ops.row_gradient_(*arguments)
    torch.autograd.graph.increment_version(logits)  # whoever saved the logits too is told so by autograd
    return without_second_derivative(logits.detach(), logits), *nothing


def without_second_derivative(
    gradient: Tensor,  # [..., n_columns]
    origin: Tensor | None,
) -> Tensor:  # [..., n_columns]
    """Inside backward(create_graph=True): a gradient that raises when it is differentiated, instead of passing for a
    constant.

    origin is a tensor that autograd reaches the logits by: autograd.grad(penalty, parameters) goes only where a
    parameter can be, and would pass by a gradient that leads nowhere.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradient  # compiled: row_gradient's own autograd raises
    raise_later = torch._C._functions.DelayedError(b"ava_ext: double backward is not supported", 2)
    return raise_later(gradient.detach(), gradient.new_empty(0).requires_grad_() if origin is None else origin)[0]


class _RowLoss(torch.autograd.Function):
    """`row_loss` of the eager mode: torch.library's own autograd, below, costs three times as much Python.

    The arguments that are no tensors come as one: torch looks at each.
    """

    @staticmethod
    def forward(ctx, logits, targets, coefficients, row_weights, ids, weights, options, inplace_gradient):
        inputs = (logits, targets, coefficients, row_weights, ids, weights, *options)
        with torch._C._AutoDispatchBelowAutograd():
            output = _row_loss(*inputs)
        origin = logits.new_empty(0)  # an output that nobody can have changed, and that keeps no logits alive
        _save_row_loss(ctx, inputs, output, origin)
        ctx.owns_gradient, ctx.inplace = True, inplace_gradient
        return *output[:2], origin

    @staticmethod
    def backward(ctx, *grads):
        return _row_loss_backward(ctx, *grads)[0], None, None, None, None, None, None, None


@torch.library.register_fake("ava_ext::row_loss")
def _(
    logits,
    targets,
    coefficients,
    row_weights,
    ids,
    weights,
    groups,
    flags,
    vocab_size,
    ignore_index,
    with_gradient,
    with_statistics,
):
    rows, real = logits.shape[:-1], accumulation_dtype(logits.dtype)
    n_ids = 0 if ids is None else ids.shape[-1]
    return (
        logits.new_empty(rows, dtype=real),
        logits.new_empty((len(TERM_NAMES) + len(groups), *rows), dtype=real),
        logits.new_empty(logits.shape if with_gradient else (0,)),
        logits.new_empty((*rows, N_STATISTICS) if with_statistics else (0,), dtype=real),
        logits.new_empty((*rows, 5 + n_ids) if with_statistics else (0,), dtype=real),
    )


@torch.library.register_fake("ava_ext::row_loss_")
def _(logits, targets, coefficients, row_weights, ids, weights, groups, flags, vocab_size, ignore_index):
    rows, real = logits.shape[:-1], accumulation_dtype(logits.dtype)
    return logits.new_empty(rows, dtype=real), logits.new_empty((len(TERM_NAMES) + len(groups), *rows), dtype=real)


@torch.library.register_fake("ava_ext::row_gradient")
def _(logits, statistics, row_coefficients, ids, coefficients, flags, vocab_size):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("ava_ext::row_gradient_")
def _(logits, statistics, row_coefficients, ids, coefficients, flags, vocab_size):
    return None


@torch.library.register_fake("ava_ext::scale_rows_")
def _(rows, factors):
    return None


torch.library.register_autograd("ava_ext::row_loss", _row_loss_backward, setup_context=_save_row_loss)


def _no_double_backward(ctx, *grads):
    # without this, torch would take the gradient for a constant: silently wrong
    raise RuntimeError("ava_ext: double backward is not supported")


torch.library.register_autograd("ava_ext::row_gradient", _no_double_backward)
