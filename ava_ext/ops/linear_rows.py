"""Rows of logits that are a linear function of hidden states, and never exist as a whole.

A few rows at a time: hidden_states @ weight.T into one buffer, the row kernel over it, and from what it leaves there,
the gradient, the matrix products that give those of hidden_states and weight. Extra memory: the buffer, and a float32
accumulator of the weight's gradient where the weight has fewer bits; a single chunk needs none on a GPU, nor on a CPU
with bfloat16 products in that type. On a GPU all rows are one chunk where that takes no more memory. Rows that do not
count are left out of the products (ops/counted_rows.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ava_ext._library import python_operator
from ava_ext.ops.arguments import check_are_integers, check_devices
from ava_ext.ops.counted_rows import choose_rows
from ava_ext.ops.derivatives import (
    call_operator,
    counted_only,
    graph_is_kept,
    is_batched,
    refuse_tangents,
    refuse_transforms,
    without_second_derivative,
)
from ava_ext.ops.linear_logits import LinearLogits, rows_of_a_chunk, without_autocast
from ava_ext.ops.row_fields import RowInputs, RowLoss, accumulation_dtype, n_terms
from ava_ext.ops.weight_gradient import add_weight_gradient_, has_bfloat16_products

_ops = torch.ops.ava_ext


def as_matrix(
    values: Tensor,  # [..., n]
) -> Tensor:  # [n_rows, n]
    """Rows in one dimension; of a row alone too."""
    return values.unsqueeze(0) if values.dim() == 1 else values.flatten(0, -2)


def linear_row_loss(
    logits: LinearLogits,  # [..., n_columns]
    inputs: RowInputs,  # of [...]
    reduction: str,
    chunk_bytes: int | None,
    max_counted_rows: int | None,
    column_weights: Tensor | None,  # [..., vocab_size] or [vocab_size]
) -> RowLoss:
    """`row_loss` of LinearLogits: see there."""
    check_are_integers("row_loss", chunk_bytes=chunk_bytes, max_counted_rows=max_counted_rows)
    rows = logits.shape[:-1]
    targets, options, flags, row_weights, candidates, vocab_size, ignore_index = inputs.in_one_dimension(rows)
    ids, weights, groups = candidates or (None, None, ())
    refuse_transforms("row_loss", (*logits, options, row_weights), vmap_works=True)
    refuse_tangents("row_loss", (weights, column_weights))
    in_forward = logits.requires_grad and reduction == "sum" and logits.dtype != torch.float16
    if torch._C._are_functorch_transforms_active():  # a graph cannot tell whether a batch of vmap requires grad
        in_forward = False
    of_head = (as_matrix(logits.hidden_states), logits.weight, logits.bias)
    tensors = (*of_head, targets, options, row_weights, ids, weights)
    constants = (
        groups,
        int(flags),
        vocab_size,
        ignore_index,
        chunk_bytes,
        logits.dtype,
        max_counted_rows,
        [in_forward and part is not None and part.requires_grad for part in logits],
        column_weights if column_weights is None or column_weights.dim() == 1 else column_weights.flatten(0, -2),
    )
    operator, formula = _ops.linear_row_loss.default, (_save_linear_row_loss, _linear_row_loss_backward)
    total, losses, terms, *_ = call_operator(operator, *formula, tensors, constants)
    return RowLoss(total if reduction == "sum" else losses.view(rows), terms.view(len(terms), *rows))


def _linear_row_loss(
    hidden_states: Tensor,  # [n_rows, hidden_size]
    weight: Tensor,  # [n_columns, hidden_size]
    bias: Tensor | None,  # [n_columns]
    targets: Tensor,  # [n_rows]
    options: Tensor,  # [N_OPTIONS]
    row_weights: Tensor | None,  # [n_rows]
    candidate_ids: Tensor | None,  # [n_rows, n_candidates]
    candidate_weights: Tensor | None,  # [n_rows, n_candidates]
    candidate_groups: list[int] | None,  # None: AOTInductor has no empty list
    flags: int,
    vocab_size: int,
    ignore_index: int,
    chunk_bytes: int | None,
    dtype: torch.dtype,
    max_counted_rows: int | None,
    gradients: list[bool],  # [3]: which of hidden_states, weight and bias get theirs now
    column_weights: Tensor | None = None,  # [n_rows, vocab_size] or [vocab_size]
    # total [], losses [n_rows], terms [n_terms, n_rows], three gradients of the sum, or [0]; and [0], which leads
    # autograd to the inputs and which nobody can have changed
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_rows, real, groups = hidden_states.shape[0], accumulation_dtype(dtype), candidate_groups or []
    losses = hidden_states.new_zeros(n_rows, dtype=real)
    terms = hidden_states.new_zeros((n_terms(groups, flags), n_rows), dtype=real)
    constants = (groups, flags, vocab_size, ignore_index)

    def chunk_loss(logits: Tensor, rows: slice | Tensor) -> None:
        of_rows = (None if given is None else given[rows] for given in (row_weights, candidate_ids, candidate_weights))
        arguments = (logits, targets[rows], options, *of_rows, *constants)
        of_columns = column_weights
        if of_columns is not None and of_columns.dim() > 1:
            of_columns = of_columns[rows]
        if any(gradients):
            losses[rows], terms[:, rows] = _ops.row_loss_(*arguments, of_columns)
        else:
            losses[rows], terms[:, rows] = _ops.row_loss(*arguments, False, False, of_columns)[:2]

    counted = targets != ignore_index
    head = (hidden_states, weight, bias)
    grads = by_chunks(*head, chunk_bytes, dtype, gradients, chunk_loss, counted, max_counted_rows)
    return losses.sum(), losses, terms, *grads, losses.new_empty(0)


def by_chunks(
    hidden_states: Tensor,  # [n_rows, hidden_size]
    weight: Tensor,  # [n_columns, hidden_size]
    bias: Tensor | None,  # [n_columns]
    chunk_bytes: int | None,
    dtype: torch.dtype,
    gradients: list[bool],
    kernel: Callable[[Tensor, slice | Tensor], None],
    counted: Tensor | None,  # [n_rows] bool
    max_counted_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # [n_rows, hidden_size], [n_columns, hidden_size], [n_columns]; [0] if not wanted
    """Calls kernel(logits of a chunk, its rows) on every chunk of the rows that count. Where gradients are wanted, it
    leaves their gradient in the logits. The rows are a slice, or the numbers of rows. counted None: all count.
    """
    n_rows, (n_columns, hidden_size), real = hidden_states.shape[0], weight.shape, accumulation_dtype(dtype)
    with_hidden_states, with_weight, with_bias = gradients
    chosen, is_exact = choose_rows(counted, max_counted_rows)
    n_chosen = n_rows if chosen is None else len(chosen)
    is_cuda, is_summed_apart = hidden_states.is_cuda, with_weight and weight.dtype == dtype != real
    accumulator_bytes = weight.numel() * real.itemsize if is_summed_apart and is_cuda else 0
    chunk_rows = rows_of_a_chunk(n_chosen, n_columns, dtype, hidden_states.device, chunk_bytes, accumulator_bytes)
    # a single chunk needs no accumulator, where one product has float32 sums and is fast
    is_one_product = is_cuda or (dtype == torch.bfloat16 and has_bfloat16_products())
    of_weight = dtype if is_summed_apart and is_one_product and chunk_rows >= n_chosen else real
    of_hidden_states = (n_rows, hidden_size) if with_hidden_states else (0,)
    grad_hidden_states = (
        hidden_states.new_empty(of_hidden_states) if chosen is None else hidden_states.new_zeros(of_hidden_states)
    )
    grad_weight = weight.new_empty((n_columns, hidden_size) if with_weight else (0,), dtype=of_weight)
    grad_bias = weight.new_zeros((n_columns,) if with_bias else (0,), dtype=real)
    # rows that begin at multiples of 64 bytes: a matrix product writes them a quarter faster than rows at odd places
    padded_columns = -(-n_columns * dtype.itemsize // 64) * 64 // dtype.itemsize
    buffer = hidden_states.new_empty((min(chunk_rows, n_chosen), padded_columns), dtype=dtype)[:, :n_columns]
    # this may run inside an autocast region: a float32 product here is meant
    with without_autocast(hidden_states.device):
        logits = buffer
        columns, offsets = weight.to(dtype), None if bias is None else bias.to(dtype)
        for begin in range(0, n_chosen, chunk_rows):
            end = min(begin + chunk_rows, n_chosen)
            rows = slice(begin, end) if chosen is None else chosen[begin:end]
            states, logits = hidden_states[rows].to(dtype), buffer[: end - begin]
            if with_weight and counted is not None and not is_exact:
                # a row that is left out may hold nan, and 0 * nan in the product with its gradient is nan
                states = states.masked_fill(~counted[rows].unsqueeze(1), 0)
            if offsets is None:
                torch.mm(states, columns.t(), out=logits)
            else:
                torch.addmm(offsets, states, columns.t(), out=logits)
            try:
                kernel(logits, rows)
            except IndexError:
                # the kernel counts from the first row of the chunk; it looks at ids before it looks at logits
                kernel(logits.new_zeros(1, n_columns).expand(n_rows, n_columns), slice(None))
                raise
            if with_hidden_states:
                if chosen is not None or dtype != hidden_states.dtype:
                    grad_hidden_states[rows] = (logits @ columns).to(hidden_states.dtype)
                else:
                    torch.mm(logits, columns, out=grad_hidden_states[rows])
            if with_weight:
                _add_product(grad_weight, logits, states, begin == 0)
            if with_bias:
                # on the CPU, sum makes a copy in its type first: of a few rows, it stays in the caches
                for block in (logits,) if logits.is_cuda or dtype == real else logits.split(64):
                    grad_bias += block.sum(0, dtype=real)
    if n_chosen == 0:
        grad_weight.zero_()
    del buffer, logits  # before the copies of lower precision
    return grad_hidden_states, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype if bias is None else bias.dtype)


def _add_product(
    grad_weight: Tensor,  # [n_columns, hidden_size]
    grad_logits: Tensor,  # [n_rows, n_columns]
    hidden_states: Tensor,  # [n_rows, hidden_size]
    is_first: bool,
) -> None:
    """grad_weight += grad_logits.T @ hidden_states, in the type of grad_weight; the first time = instead of +=."""
    beta = 0 if is_first else 1  # 0: what is there is not read, be it nan
    if grad_logits.dtype == grad_weight.dtype:
        torch.addmm(grad_weight, grad_logits.t(), hidden_states, beta=beta, out=grad_weight)
    elif grad_logits.is_cuda:
        product = (grad_logits.t(), hidden_states)
        torch.addmm(grad_weight, *product, out_dtype=grad_weight.dtype, beta=beta, out=grad_weight)
    elif grad_logits.dtype == torch.bfloat16 and has_bfloat16_products():
        if is_first:
            grad_weight.zero_()
        add_weight_gradient_(grad_weight, grad_logits, hidden_states)
    else:
        # by blocks of columns: the float32 copy of the gradient stays in the caches
        states, n_columns = hidden_states.to(grad_weight.dtype), 4096
        for columns, block in zip(grad_logits.split(n_columns, 1), grad_weight.split(n_columns), strict=True):
            block.addmm_(columns.to(grad_weight.dtype).t(), states, beta=beta)


@torch.library.register_fake(python_operator(_linear_row_loss))
def _(
    hidden_states,
    weight,
    bias,
    targets,
    options,
    row_weights,
    candidate_ids,
    candidate_weights,
    candidate_groups,
    flags,
    vocab_size,
    ignore_index,
    chunk_bytes,
    dtype,
    max_counted_rows,
    gradients,
    column_weights=None,
):
    check_devices(
        "row_loss",
        hidden_states,
        weight=weight,
        bias=bias,
        targets=targets,
        options=options,
        row_weights=row_weights,
        candidate_ids=candidate_ids,
        candidate_weights=candidate_weights,
        column_weights=column_weights,
    )
    n_rows, real = hidden_states.shape[0], accumulation_dtype(dtype)
    return (
        hidden_states.new_empty((), dtype=real),
        hidden_states.new_empty(n_rows, dtype=real),
        hidden_states.new_empty((n_terms(candidate_groups, flags), n_rows), dtype=real),
        *empty_gradients(hidden_states, weight, bias, gradients),
        hidden_states.new_empty(0, dtype=real),
    )


def empty_gradients(hidden_states, weight, bias, gradients):
    """What by_chunks returns, without values."""
    return (
        hidden_states.new_empty(hidden_states.shape if gradients[0] else (0,)),
        weight.new_empty(weight.shape if gradients[1] else (0,)),
        (weight if bias is None else bias).new_empty(weight.shape[:1] if gradients[2] else (0,)),
    )


def _save_linear_row_loss(ctx, inputs, output):
    *head, targets, options, row_weights, ids, id_weights = inputs[:8]
    groups, flags, vocab_size, ctx.ignore_index, *limits, ctx.gradients, column_weights = inputs[8:]
    ctx.constants = (groups, flags, vocab_size, ctx.ignore_index, *limits)
    terms, *grads, origin = output[2:]
    ctx.mark_non_differentiable(terms, *grads)
    ctx.set_materialize_grads(False)
    again = (*head, options, row_weights, ids, id_weights, column_weights)
    ctx.save_for_backward(origin, targets, *(grads if any(ctx.gradients) else again))


def _linear_row_loss_backward(ctx, grad_total, grad_losses, *_):
    """grad_total: [], grad_losses: [n_rows]. Returns the gradients of hidden_states, weight and bias, and None for
    every other input.
    """
    nothing = (None,) * 17
    if grad_total is None and grad_losses is None:
        return nothing
    refuse_tangents("row_loss", (grad_total, grad_losses))
    if any(ctx.gradients):
        origin, targets, *grads = ctx.saved_tensors
        if grad_losses is not None:
            raise RuntimeError("ava_ext: the gradient of the sum was computed; the rows need reduction='none'")
        of_rows = counted_only(grad_total.expand(targets.shape[0]), targets == ctx.ignore_index)
        wanted, factors = ctx.gradients, (of_rows, grad_total, grad_total)
        triples = zip(grads, factors, wanted, strict=True)
        # linear in what comes from above, and so differentiable by that
        grads = [
            _scaled(without_second_derivative(grad, origin), factor) if is_wanted else None
            for grad, factor, is_wanted in triples
        ]
        return *grads, *nothing[3:]
    origin, targets, *parts, options, row_weights, ids, id_weights, column_weights = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    upstream = sum(grad for grad in (grad_total, grad_losses) if grad is not None)
    factors = upstream.expand(targets.shape[0]) if row_weights is None else upstream * row_weights
    parts = [part if part is None else part.detach() for part in parts]
    arguments = (*parts, targets, options, factors, ids, id_weights, *ctx.constants, wanted, column_weights)
    grads = [
        without_second_derivative(grad, origin, upstream) if is_wanted else None
        for grad, is_wanted in zip(_ops.linear_row_loss(*arguments)[3:6], wanted, strict=True)
    ]
    return *grads, *nothing[3:]


def _scaled(
    gradient: Tensor,  # [n, hidden_size] or [n]
    factor: Tensor,  # [] or [n]
) -> Tensor:  # as gradient
    """gradient * factor; over the gradient where nobody can ask for it again, and at no cost where the factor is 1.

    The factor is never rounded to bfloat16: the whole gradient would be off by as much, and always to the same side.
    """
    rows = gradient if gradient.dim() == 2 else gradient.unsqueeze(0)
    factors = factor.to(accumulation_dtype(rows.dtype)).expand(rows.shape[0])
    # a compiler makes one kernel of it; what requires grad, in create_graph=True, is not written over
    if torch.compiler.is_compiling() or gradient.requires_grad or is_batched(factor):
        return (rows * factors.unsqueeze(-1)).to(gradient.dtype).view_as(gradient)
    if graph_is_kept():
        gradient = gradient.clone()
        rows = gradient.view_as(rows)
    if rows.numel():
        _ops.scale_rows_(rows, factors)
    return gradient


torch.library.register_autograd(
    "ava_ext::linear_row_loss", _linear_row_loss_backward, setup_context=_save_linear_row_loss
)
