"""Rows of logits: every row-wise loss term and its gradient in one pass.

The formulas stand in csrc/softmax_rows.h. What is made of the statistics themselves is in ops/softmax_statistics.py,
logits that never exist as a whole are in ops/linear_rows.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ava_ext import _library  # noqa: F401  the operators exist once it is imported
from ava_ext.ops.arguments import (
    as_ids,
    check_are_integers,
    check_are_tensors,
    check_constants,
    check_devices,
    check_integers,
    check_is_tensor,
    with_dense_rows,
)
from ava_ext.ops.column_weights import as_column_weights, with_probability_gradient
from ava_ext.ops.committed import is_checkpointed
from ava_ext.ops.derivatives import (
    counted_only,
    graph_is_kept,
    is_batched,
    is_exporting,
    is_forward_mode,
    raise_double_backward,
    refuse_nested_transforms,
    refuse_tangents,
    refuse_transforms,
    refuse_transforms_in_graphs,
    wants_gradient,
    without_second_derivative,
)
from ava_ext.ops.dtensor_logits import check_is_logits, has_dtensor, local_logits, whole_beside
from ava_ext.ops.dtensors import whole
from ava_ext.ops.gradient_layout import new_gradient
from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.linear_rows import linear_row_loss
from ava_ext.ops.row_fields import (
    N_ROW_COEFFICIENTS,
    N_STATISTICS,
    RANKS,
    Candidates,
    RowFlags,
    RowInputs,
    RowLoss,
    accumulation_dtype,
    n_terms,
)
from ava_ext.ops.sharded_logits import LocalRows, ShardedLogits
from ava_ext.ops.transformed_rows import transformed_row_loss
from ava_ext.ops.vocabulary_parallel import vocabulary_parallel_row_loss

_PLAIN = (Tensor, type(None))
_ops = torch.ops.ava_ext
# looked up once: each look-up costs a microsecond
_row_loss, _scale_rows_ = _ops.row_loss.default, _ops.scale_rows_.default


def row_loss(
    logits: Tensor | LinearLogits | ShardedLogits | LocalRows,  # [..., n_columns]
    targets: Tensor,  # [...]
    options: Tensor,  # [N_OPTIONS], from row_options
    *,
    flags: int = int(RowFlags.CROSS_ENTROPY),
    row_weights: Tensor | None = None,  # [...]
    candidates: Candidates | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "none",
    inplace_gradient: bool = False,
    chunk_bytes: int | None = None,
    max_counted_rows: int | None = None,
    target_probabilities: Tensor | None = None,  # [..., vocab_size], or n_columns
    smoothing_weights: Tensor | None = None,  # [vocab_size], or n_columns
    with_ranks: bool = False,
) -> RowLoss:
    """Every row-wise loss term, and its gradient, in one pass over the logits: what the losses of this library call.

    Of LinearLogits a few rows exist at a time. With reduction="sum" there is one upstream gradient, so everything is
    computed in forward, by three matrix products and one pass over each chunk. With "none" each row has an upstream
    gradient of its own, and backward computes the logits again; so it does for float16, whose gradients would be zeros
    before the scaler's factor. A part that needs no gradient costs none.

    Args:
        logits: [..., n_columns], float32, bfloat16, float16 or float64; any leading strides (a slice is not copied). Or
            LinearLogits(hidden_states [..., hidden_size], weight [n_columns, hidden_size], bias [n_columns]); or
            ShardedLogits, or a DTensor: see `ava_ext.distributed` for what a rank gets.
        targets: [...], integers in [0, vocab_size) or ignore_index, whose rows give 0 and get a zero gradient.
        options: [N_OPTIONS], see `row_options`; must not require grad.
        flags: which terms are on, a sum of `RowFlags`.
        row_weights: [...], what multiplies each row's loss and gradient, 1/N for a mean; must not require grad.
        candidates: tokens to push down; see `Candidates`.
        vocab_size: columns beyond it are padding. Default: n_columns.
        ignore_index: target of the rows that do not count.
        reduction: "none" gives the loss of every row, "sum" their sum.
        inplace_gradient: backward writes the gradient over the logits, which must not be a leaf. They stay readable
            until then; a second backward raises. The option changes nothing under torch.compile, which plans memory
            itself; under hooks on saved tensors (activation checkpointing, save_on_cpu), where a wrong use would go
            unnoticed; for LinearLogits, which do so anyway; and for a DTensor, whose other readers cannot be known.
        chunk_bytes: what the logits of one chunk of LinearLogits may take. Default: 64 MB, on CUDA 1 GB.
        max_counted_rows: an upper bound of how many targets are not ignore_index. Of LinearLogits, ignored rows are
            left out of the matrix products: on the CPU always, on a GPU with this number, which it need not wait for.
        target_probabilities: [..., vocab_size] q, read beside the logits: sum_j q_j (-log p_j) takes the place of the
            target's term, which may be smoothed. The targets still say which rows count, and what "correct" compares
            with. q may require grad; types other than the logits' and float32 are converted.
        smoothing_weights: [vocab_size] w, constants: the uniform part of label smoothing e is
            e/V sum_j w_j (-log p_j). The weight of each row's target comes with RowFlags.TARGET_WEIGHTS.
        with_ranks: the target's rank and the greatest logit's column are two further terms; see `token_metrics`.

    Returns:
        RowLoss(loss [...] or [], terms [N_TERMS + n_groups, ...]).

    Raises:
        ValueError: on weights that require grad, an unknown reduction, inplace_gradient on a leaf or on overlapping
            memory, targets that are not integers, RowFlags.EXCLUDE_TARGET beside target_probabilities, LinearLogits
            whose shapes and types do not fit, weights and candidates of other rows beside them.
        TypeError: on logits or targets that are not tensors, a vocab_size, ignore_index, chunk_bytes or
            max_counted_rows that is no integer.
        RuntimeError: on other wrong shapes and types; on double backward.
        IndexError: on a target outside [0, vocab_size) that is not ignore_index.
        NotImplementedError: on forward-mode derivatives of LinearLogits, and second derivatives of any kind; within
            torch.func, on LinearLogits that require grad or are beside target_probabilities that do; on
            target_probabilities, smoothing_weights and with_ranks beside ShardedLogits.

    Example:
        >>> logits, targets = torch.randn(4, 100, requires_grad=True), torch.tensor([1, 2, 3, -100])
        >>> loss = row_loss(logits, targets, row_options(logits), reduction="sum").loss
        >>> loss.backward()
    """
    is_plain = type(logits) is type(targets) is type(options) is Tensor  # a DTensor is a Tensor too
    is_plain = is_plain and type(row_weights) in _PLAIN
    is_plain = is_plain and (candidates is None or type(candidates.ids) is type(candidates.weights) is Tensor)
    if not (is_plain and type(target_probabilities) in _PLAIN and type(smoothing_weights) in _PLAIN):
        check_is_logits("row_loss", logits)
        given, logits = logits, local_logits("row_loss", logits)
        inplace_gradient = inplace_gradient and not has_dtensor(given)  # it may be a leaf, or be saved: not seen here
        check_is_tensor("row_loss", "targets", targets)
        check_is_tensor("row_loss", "options", options)
        check_are_tensors("row_loss", smoothing_weights=smoothing_weights)
        if not isinstance(logits, LocalRows):  # which take their rows of DTensors
            ids, weights, groups = candidates if candidates else (None, None, ())
            of_rows = {
                "targets": targets,
                "row_weights": row_weights,
                "candidate_ids": ids,
                "candidate_weights": weights,
                "target_probabilities": target_probabilities,
            }
            targets, row_weights, ids, weights, target_probabilities = whole_beside("row_loss", given, **of_rows)
            candidates = None if candidates is None else Candidates(ids, weights, groups)
        beside = isinstance(logits, LocalRows) or has_dtensor(given)
        smoothing_weights = whole("row_loss", "smoothing_weights", smoothing_weights, beside)  # of every row
    check_are_integers("row_loss", vocab_size=vocab_size, ignore_index=ignore_index)
    candidate_weights = None if candidates is None else candidates.weights
    check_constants("row_loss", options=options, row_weights=row_weights, candidate_weights=candidate_weights)
    if targets.dtype != torch.int64:
        check_integers("row_loss", "targets", targets)
        targets = targets.long()
    if candidates is not None and candidates.ids.dtype not in (torch.int32, torch.int64):
        ids = as_ids("row_loss", "candidate_ids", candidates.ids, "[..., n_candidates]")
        candidates = candidates._replace(ids=ids)
    if reduction not in ("none", "sum"):
        raise ValueError(f"row_loss: expected reduction 'none' or 'sum', got {reduction!r}")
    if target_probabilities is not None and torch.is_grad_enabled() and torch._C._are_functorch_transforms_active():
        if torch.compiler.is_compiling():  # a graph cannot tell whether a batch of vmap requires grad
            refuse_transforms_in_graphs("row_loss", vmap_works=False)
        elif wants_gradient(target_probabilities) and not isinstance(logits, Tensor):
            refuse_transforms("row_loss", (target_probabilities,))
    placed, probabilities = logits, target_probabilities
    if target_probabilities is not None:
        refuse_tangents("row_loss", (target_probabilities,))
        target_probabilities = target_probabilities.detach()
    block = None
    if isinstance(logits, LocalRows):
        logits, block = logits
        if target_probabilities is not None:
            target_probabilities = block.local(target_probabilities)
    if vocab_size is None:
        vocab_size = logits.shape[-1]
    column_weights, column_flags = as_column_weights(logits, flags, vocab_size, target_probabilities, smoothing_weights)
    flags = flags | column_flags | (RANKS if with_ranks else 0)
    inputs = RowInputs(targets, options, flags, row_weights, candidates, vocab_size, ignore_index)
    local = inputs if block is None else inputs.with_rows(block.local)
    if isinstance(logits, Tensor):
        found = _dense_row_loss(logits, local, reduction == "sum", inplace_gradient, column_weights)
    elif isinstance(logits, ShardedLogits):
        if with_ranks:
            raise NotImplementedError("row_loss: ranks of logits whose columns are spread over ranks")
        inplace = False
        if inplace_gradient and not isinstance(logits.logits, LinearLogits) and not torch.compiler.is_compiling():
            _check_inplace(logits.logits)
            inplace = not is_checkpointed()
        found = vocabulary_parallel_row_loss(logits, local, reduction, inplace, chunk_bytes, max_counted_rows)
    else:
        found = linear_row_loss(logits, local, reduction, chunk_bytes, max_counted_rows, column_weights)
    if block is not None:
        loss = found.loss if reduction == "sum" else block.among_all(found.loss)
        found = RowLoss(loss, block.among_all(found.terms))
    if probabilities is not None and wants_gradient(probabilities) and torch.is_grad_enabled():
        return found._replace(loss=with_probability_gradient(found.loss, probabilities, placed, inputs, chunk_bytes))
    return found


def _dense_row_loss(
    logits: Tensor,  # [..., n_columns]
    inputs: RowInputs,  # of [...]
    is_sum: bool,
    inplace_gradient: bool,
    column_weights: Tensor | None,  # [..., vocab_size] or [vocab_size]
) -> RowLoss:
    logits = with_dense_rows(logits)
    targets, options, flags, row_weights, candidates, vocab_size, ignore_index = inputs
    ids, weights, groups = candidates or (None, None, ())
    arguments = (logits, targets, options, row_weights, ids, weights, groups, flags, vocab_size, ignore_index)
    is_transformed = torch._C._are_functorch_transforms_active()
    differentiable = wants_gradient(logits) and torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        refuse_tangents("row_loss", (*arguments[:6], column_weights))
        if is_transformed:
            refuse_transforms_in_graphs("row_loss")
            differentiable = torch.is_grad_enabled()  # a graph cannot tell whether a batch of vmap requires grad
        # split: a compiled backward cannot ask whether the upstream gradient is 1, and a pass to scale costs as much
        # as the gradient
        # an exported program may be given logits that require grad
        with_statistics = differentiable or is_exporting()
        loss, terms = _row_loss(*arguments, False, with_statistics, column_weights)[:2]
        return RowLoss(loss.sum() if is_sum else loss, terms)
    if is_transformed:
        refuse_nested_transforms("row_loss")
    if is_forward_mode() or (differentiable and is_transformed):
        loss, terms = transformed_row_loss(*arguments, column_weights)
    elif not differentiable:
        with torch._C._AutoDispatchBelowAutograd():
            loss, terms = _row_loss(*arguments, False, False, column_weights)[:2]
    else:
        if inplace_gradient:
            _check_inplace(logits)
            # of what a hook gives back, nobody is told that it was written over
            inplace_gradient = not is_checkpointed()
        # a float16 gradient rounded before the scaler's factor would be zeros
        split = inplace_gradient or logits.dtype == torch.float16
        tensors, constants = arguments[:6], (*arguments[6:], not split, split, column_weights)
        loss, terms, _ = _apply_row_loss(*tensors, constants, is_sum, inplace_gradient)
        return RowLoss(loss, terms)
    return RowLoss(loss.sum() if is_sum else loss, terms)


def _check_inplace(logits: Tensor) -> None:
    base = logits if logits._base is None else logits._base  # also what a slice would write to
    if base.is_leaf and base.requires_grad:
        raise ValueError(
            "row_loss: inplace_gradient=True would write over a leaf (a parameter or an input that requires grad); "
            "expected logits that were computed"
        )
    extent = 1  # of the dimensions inside
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride < extent and logits.numel():
            raise ValueError(
                "row_loss: inplace_gradient=True expected logits that do not overlap in memory, got shape "
                f"{list(logits.shape)} with strides {list(logits.stride())}"
            )
        extent += (size - 1) * stride


def _save_row_loss(ctx, inputs, output, origin=None):
    (logits, targets, options, _, ids, _, _, ctx.flags, ctx.vocab_size, ctx.ignore_index, ctx.fused) = inputs[:11]
    column_weights = inputs[12]
    _, terms, grad_logits, statistics, row_coefficients = output
    ctx.mark_non_differentiable(terms, grad_logits, statistics, row_coefficients)
    ctx.set_materialize_grads(False)
    ctx.owns_gradient = ctx.inplace = False
    if ctx.fused:
        ctx.save_for_backward(grad_logits, targets, origin)
    else:
        ctx.save_for_backward(logits, targets, statistics, row_coefficients, ids, options, column_weights)


def _row_loss_backward(ctx, grad_loss, *_):
    """grad_loss: [...], or [] of the sum. Returns the gradient of the logits [..., n_columns], and None for the other
    inputs."""
    nothing = (None,) * 12
    if grad_loss is None:
        return None, *nothing
    refuse_tangents("row_loss", (grad_loss,))
    if ctx.fused:
        grad_logits, targets, origin = ctx.saved_tensors
        if is_batched(grad_loss) or torch.is_grad_enabled():
            # linear in what comes from above, and so differentiable by that
            ignored = torch.eq(targets, ctx.ignore_index)
            factors = counted_only(grad_loss.expand(targets.shape), ignored).unsqueeze(-1)
            return (without_second_derivative(grad_logits, origin) * factors).to(grad_logits.dtype), *nothing
        if torch.compiler.is_compiling() or not ctx.owns_gradient or graph_is_kept():
            grad_logits = grad_logits.clone()
        _scale_rows_(grad_logits, grad_loss.expand(targets.shape), targets, ctx.ignore_index)
        return grad_logits, *nothing
    logits, targets, statistics, row_coefficients, ids, options, column_weights = ctx.saved_tensors
    ignored = torch.eq(targets, ctx.ignore_index)
    targets = targets.masked_fill(ignored, -1).unsqueeze(-1)
    arguments = (
        logits.detach(),
        statistics,
        row_coefficients * counted_only(grad_loss.expand(ignored.shape), ignored).unsqueeze(-1),
        targets if ids is None else torch.cat([targets, ids], -1),
        options,
        ctx.flags,
        ctx.vocab_size,
        column_weights,
    )
    if not ctx.inplace or torch.compiler.is_compiling() or is_batched(grad_loss):
        return without_second_derivative(_ops.row_gradient(*arguments), logits, grad_loss), *nothing
    _ops.row_gradient_(*arguments)
    torch.autograd.graph.increment_version(logits)  # whoever saved the logits too is told so by autograd
    return without_second_derivative(logits.detach(), logits, grad_loss), *nothing


class _RowLoss(torch.autograd.Function):
    """`row_loss` of the eager mode: torch.library's own autograd, below, costs three times as much Python.

    The arguments that are not tensors come as one: torch looks at each.
    """

    @staticmethod
    def forward(ctx, logits, targets, options, row_weights, ids, weights, constants, is_sum, inplace_gradient):
        inputs = (logits, targets, options, row_weights, ids, weights, *constants)
        with torch._C._AutoDispatchBelowAutograd():
            output = _row_loss(*inputs)
        origin = logits.new_empty(0)  # an output that nobody can have changed, and that keeps no logits alive
        _save_row_loss(ctx, inputs, output, origin)
        ctx.owns_gradient, ctx.inplace = True, inplace_gradient
        loss, terms = output[:2]
        return loss.sum() if is_sum else loss, terms, origin

    @staticmethod
    def backward(ctx, *grads):
        return _row_loss_backward(ctx, *grads)[0], None, None, None, None, None, None, None, None


# Function.apply asks first whether torch.func is at work, which row_loss has done
_apply_row_loss = super(torch.autograd.Function, _RowLoss).apply


def _check_devices(logits, targets, options, row_weights, ids, weights, column_weights):
    others = {"targets": targets, "options": options, "row_weights": row_weights, "column_weights": column_weights}
    check_devices("row_loss", logits, **others, candidate_ids=ids, candidate_weights=weights)


def _check_devices_of_gradient(logits, statistics, row_coefficients, ids, options, column_weights):
    others = {"statistics": statistics, "row_coefficients": row_coefficients, "ids": ids, "options": options}
    check_devices("row_gradient", logits, **others, column_weights=column_weights)


@torch.library.register_fake("ava_ext::row_loss")
def _(
    logits,
    targets,
    options,
    row_weights,
    ids,
    weights,
    groups,
    flags,
    vocab_size,
    ignore_index,
    with_gradient,
    with_statistics,
    column_weights=None,
):
    _check_devices(logits, targets, options, row_weights, ids, weights, column_weights)
    rows, real = logits.shape[:-1], accumulation_dtype(logits.dtype)
    n_ids = 0 if ids is None else ids.shape[-1]
    return (
        logits.new_empty(rows, dtype=real),
        logits.new_empty((n_terms(groups, flags), *rows), dtype=real),
        new_gradient(logits) if with_gradient else logits.new_empty(0),
        logits.new_empty((*rows, N_STATISTICS) if with_statistics else (0,), dtype=real),
        logits.new_empty((*rows, N_ROW_COEFFICIENTS + 1 + n_ids) if with_statistics else (0,), dtype=real),
    )


@torch.library.register_fake("ava_ext::row_loss_")
def _(
    logits, targets, options, row_weights, ids, weights, groups, flags, vocab_size, ignore_index, column_weights=None
):
    _check_devices(logits, targets, options, row_weights, ids, weights, column_weights)
    rows, real = logits.shape[:-1], accumulation_dtype(logits.dtype)
    return logits.new_empty(rows, dtype=real), logits.new_empty((n_terms(groups, flags), *rows), dtype=real)


@torch.library.register_fake("ava_ext::row_gradient")
def _(logits, statistics, row_coefficients, ids, options, flags, vocab_size, column_weights=None):
    _check_devices_of_gradient(logits, statistics, row_coefficients, ids, options, column_weights)
    return new_gradient(logits)


@torch.library.register_fake("ava_ext::row_gradient_")
def _(logits, statistics, row_coefficients, ids, options, flags, vocab_size, column_weights=None):
    _check_devices_of_gradient(logits, statistics, row_coefficients, ids, options, column_weights)
    return None


@torch.library.register_fake("ava_ext::scale_rows_")
def _(rows, factors, targets=None, ignore_index=-100):
    check_devices("scale_rows_", rows, factors=factors, targets=targets)
    return None


torch.library.register_autograd("ava_ext::row_loss", _row_loss_backward, setup_context=_save_row_loss)
torch.library.register_autograd("ava_ext::row_gradient", raise_double_backward)
