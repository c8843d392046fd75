"""Rows of logits that are a linear function of hidden states, and never exist as a whole.

A few rows at a time: hidden_states @ weight.T into one buffer, the row kernel over it, and from what it leaves there,
the gradient, the matrix products that give those of hidden_states and weight. Extra memory: the buffer, and a float32
accumulator of the weight's gradient where the weight has fewer bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ava_ext.ops.softmax_rows import (
    TERM_NAMES,
    Candidates,
    RowLoss,
    RowTerms,
    accumulation_dtype,
    check_constants,
    graph_is_kept,
    without_second_derivative,
)
from ava_ext.ops.weight_gradient import add_weight_gradient_, has_bfloat16_products

_ops = torch.ops.ava_ext
# what a chunk of logits may take, by default
CPU_CHUNK_BYTES, CUDA_CHUNK_BYTES = 64_000_000, 1_000_000_000


class LinearLogits(NamedTuple):
    """The logits hidden_states @ weight.T + bias [..., n_columns], as what they are computed from.

    Example:
        >>> heads = [LinearLogits(h, head.weight) for head in further_heads]
        >>> loss = loss_fn(logits, targets, additional_logits=heads, confidence_scores=confidence)
    """

    hidden_states: Tensor  # [..., hidden_size]
    weight: Tensor  # [n_columns, hidden_size]
    bias: Tensor | None = None  # [n_columns]

    @property
    def shape(self) -> torch.Size:
        """[..., n_columns]: the shape of the logits."""
        return torch.Size((*self.hidden_states.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        """What the logits would be computed in: under autocast its type, as torch.nn.functional.linear."""
        dtype, device_type = self.hidden_states.dtype, self.hidden_states.device.type
        if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
            return torch.get_autocast_dtype(device_type)
        return dtype

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient is wanted of any of the three."""
        return torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in self)

    def unsqueeze(self, dim: int) -> LinearLogits:
        """The logits with one more leading dimension."""
        return self._replace(hidden_states=self.hidden_states.unsqueeze(dim))

    def check(self, owner: str) -> None:
        """Raises ValueError where shapes or types do not fit; owner begins the message."""
        hidden_states, weight, bias = self
        if weight.dim() != 2 or hidden_states.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{owner}: expected lm_head_weight of shape [vocab_size, {hidden_states.shape[-1]}] for "
                f"hidden_states of shape {list(hidden_states.shape)}, got {list(weight.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{owner}: expected lm_head_bias of shape [{len(weight)}], got {list(bias.shape)}")
        for name, part in (("lm_head_weight", weight), ("lm_head_bias", bias)):
            if part is None:
                continue
            if part.device != hidden_states.device:
                raise ValueError(f"{owner}: expected {name} on {hidden_states.device}, got {part.device}")
            if part.dtype != hidden_states.dtype and self.dtype == hidden_states.dtype:
                raise ValueError(
                    f"{owner}: expected {name} of hidden_states' type {hidden_states.dtype} outside autocast, "
                    f"got {part.dtype}"
                )

    def chunk_rows(self, chunk_bytes: int | None) -> int:
        """Rows of one chunk: as many as the budget allows (default 64 MB, 1 GB on CUDA), shared out evenly."""
        budget = chunk_bytes or (CUDA_CHUNK_BYTES if self.hidden_states.is_cuda else CPU_CHUNK_BYTES)
        most = max(1, budget // max(1, self.weight.shape[0] * self.dtype.itemsize))
        n_rows = self.shape[:-1].numel()
        n_chunks = max(1, -(-n_rows // most))
        return max(1, -(-n_rows // n_chunks))


def linear_row_loss(
    logits: LinearLogits,  # [..., n_columns]
    targets: Tensor,  # [...]
    coefficients: Tensor,  # [7], from row_coefficients
    *,
    terms: int = int(RowTerms.CROSS_ENTROPY),
    row_weights: Tensor | None = None,  # [...]
    candidates: Candidates | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    per_row: bool = False,
    chunk_bytes: int | None = None,
) -> RowLoss:
    """`row_loss` of logits that never exist as a whole, and its gradient by hidden_states, weight and bias.

    The sum over the rows has one upstream gradient: everything is computed in forward, by three matrix products and one
    pass over each chunk. With per_row each row has its own, and backward computes the logits again; so it does for
    float16, whose gradients would be zeros before the scaler's factor. A part that needs no gradient costs none.

    Args:
        logits: LinearLogits(hidden_states [..., hidden_size], weight [n_columns, hidden_size], bias [n_columns]).
        targets, coefficients, terms, row_weights, candidates, vocab_size, ignore_index: as in `row_loss`.
        per_row: give the loss of each row [...], not their sum [].
        chunk_bytes: what the logits of one chunk may take. Default: 64 MB, on CUDA 1 GB.

    Returns:
        RowLoss(row_loss [] or [...], row_terms [6 + n_groups, ...]).

    Raises:
        ValueError: on shapes and types that do not fit, on weights that require grad.
        IndexError: on a target out of range. RuntimeError: on double backward.

    Example:
        >>> logits = LinearLogits(hidden_states, lm_head.weight)
        >>> loss = linear_row_loss(logits, targets, row_coefficients(hidden_states)).row_loss
        >>> loss.backward()
    """
    logits.check("linear_row_loss")
    check_constants("linear_row_loss", coefficients, row_weights, candidates)
    rows, n_columns = logits.shape[:-1], logits.shape[-1]
    if targets.shape != rows:
        raise ValueError(f"linear_row_loss: expected targets of shape {list(rows)}, got {list(targets.shape)}")
    ids, weights, groups = candidates if candidates else (None, None, ())
    n_terms = len(TERM_NAMES) + len(groups)
    in_forward = logits.requires_grad and not per_row and logits.dtype != torch.float16
    total, row_losses, row_terms, *_ = _ops.linear_row_loss(
        logits.hidden_states.flatten(0, -2),
        logits.weight,
        logits.bias,
        targets.reshape(-1).long(),
        coefficients,
        None if row_weights is None else row_weights.reshape(-1),
        None if ids is None else ids.flatten(0, -2),
        None if weights is None else weights.flatten(0, -2),
        groups,
        int(terms),
        n_columns if vocab_size is None else vocab_size,
        ignore_index,
        logits.chunk_rows(chunk_bytes),
        logits.dtype,
        [in_forward and part is not None and part.requires_grad for part in logits],
    )
    return RowLoss(row_losses.view(rows) if per_row else total, row_terms.view(n_terms, *rows))


@torch.library.custom_op("ava_ext::linear_row_loss", mutates_args=())
def _linear_row_loss(
    hidden_states: Tensor,  # [n_rows, hidden_size]
    weight: Tensor,  # [n_columns, hidden_size]
    bias: Tensor | None,  # [n_columns]
    targets: Tensor,  # [n_rows]
    coefficients: Tensor,  # [7]
    row_weights: Tensor | None,  # [n_rows]
    candidate_ids: Tensor | None,  # [n_rows, n_candidates]
    candidate_weights: Tensor | None,  # [n_rows, n_candidates]
    candidate_groups: list[int],
    flags: int,
    vocab_size: int,
    ignore_index: int,
    chunk_rows: int,
    dtype: torch.dtype,
    gradients: list[bool],  # [3]: which of hidden_states, weight and bias get theirs now
    # total [], row_loss [n_rows], row_terms [n_terms, n_rows], and three gradients of the sum, or [0]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_rows, real = hidden_states.shape[0], accumulation_dtype(dtype)
    row_loss = hidden_states.new_empty(n_rows, dtype=real)
    row_terms = hidden_states.new_empty((len(TERM_NAMES) + len(candidate_groups), n_rows), dtype=real)
    options = (candidate_groups, flags, vocab_size, ignore_index)

    def chunk_loss(logits: Tensor, rows: slice) -> None:
        of_rows = (None if given is None else given[rows] for given in (row_weights, candidate_ids, candidate_weights))
        arguments = (logits, targets[rows], coefficients, *of_rows, *options)
        if any(gradients):
            row_loss[rows], row_terms[:, rows] = _ops.row_loss_(*arguments)
        else:
            row_loss[rows], row_terms[:, rows] = _ops.row_loss(*arguments, False, False)[:2]

    grads = by_chunks(hidden_states, weight, bias, chunk_rows, dtype, gradients, chunk_loss)
    return row_loss.sum(), row_loss, row_terms, *grads


def by_chunks(
    hidden_states: Tensor,  # [n_rows, hidden_size]
    weight: Tensor,  # [n_columns, hidden_size]
    bias: Tensor | None,  # [n_columns]
    chunk_rows: int,
    dtype: torch.dtype,
    gradients: list[bool],
    kernel: Callable[[Tensor, slice], None],
) -> tuple[Tensor, Tensor, Tensor]:  # [n_rows, hidden_size], [n_columns, hidden_size], [n_columns]; [0] if not wanted
    """Calls kernel(logits of a chunk, its rows) on every chunk. Where gradients are wanted, it leaves their gradient
    in the logits.
    """
    n_rows, (n_columns, hidden_size), real = hidden_states.shape[0], weight.shape, accumulation_dtype(dtype)
    with_hidden_states, with_weight, with_bias = gradients
    grad_hidden_states = hidden_states.new_empty((n_rows, hidden_size) if with_hidden_states else (0,))
    grad_weight = weight.new_zeros((n_columns, hidden_size) if with_weight else (0,), dtype=real)
    grad_bias = weight.new_zeros((n_columns,) if with_bias else (0,), dtype=real)
    # rows that begin at multiples of 64 bytes: a matrix product writes them a quarter faster than rows at odd places
    padded_columns = -(-n_columns * dtype.itemsize // 64) * 64 // dtype.itemsize
    buffer = hidden_states.new_empty((min(chunk_rows, n_rows), padded_columns), dtype=dtype)[:, :n_columns]
    # this may run inside an autocast region: a float32 product here is meant
    with torch.autocast(hidden_states.device.type, enabled=False):
        logits = buffer
        columns, offsets = weight.to(dtype), None if bias is None else bias.to(dtype)
        for begin in range(0, n_rows, chunk_rows):
            rows = slice(begin, min(begin + chunk_rows, n_rows))
            states, logits = hidden_states[rows].to(dtype), buffer[: rows.stop - begin]
            if offsets is None:
                torch.mm(states, columns.t(), out=logits)
            else:
                torch.addmm(offsets, states, columns.t(), out=logits)
            kernel(logits, rows)
            if with_hidden_states:
                if dtype == hidden_states.dtype:
                    torch.mm(logits, columns, out=grad_hidden_states[rows])
                else:
                    grad_hidden_states[rows] = logits @ columns
            if with_weight:
                _add_product(grad_weight, logits, states)
            if with_bias:
                grad_bias += logits.sum(0, dtype=real)
    del buffer, logits  # before the copies of lower precision
    return grad_hidden_states, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype if bias is None else bias.dtype)


def _add_product(
    grad_weight: Tensor,  # [n_columns, hidden_size], float32 or float64
    grad_logits: Tensor,  # [n_rows, n_columns]
    hidden_states: Tensor,  # [n_rows, hidden_size]
) -> None:
    """grad_weight += grad_logits.T @ hidden_states, in the type of grad_weight."""
    if grad_logits.dtype == grad_weight.dtype:
        grad_weight.addmm_(grad_logits.t(), hidden_states)
    elif grad_logits.is_cuda:
        torch.addmm(grad_weight, grad_logits.t(), hidden_states, out_dtype=grad_weight.dtype, out=grad_weight)
    elif grad_logits.dtype == torch.bfloat16 and has_bfloat16_products():
        add_weight_gradient_(grad_weight, grad_logits, hidden_states)
    else:
        # by blocks of columns: the float32 copy of the gradient stays in the caches
        states, n_columns = hidden_states.to(grad_weight.dtype), 4096
        for columns, block in zip(grad_logits.split(n_columns, 1), grad_weight.split(n_columns), strict=True):
            block.addmm_(columns.to(grad_weight.dtype).t(), states)


@_linear_row_loss.register_fake
def _(
    hidden_states,
    weight,
    bias,
    targets,
    coefficients,
    row_weights,
    candidate_ids,
    candidate_weights,
    candidate_groups,
    flags,
    vocab_size,
    ignore_index,
    chunk_rows,
    dtype,
    gradients,
):
    n_rows, real = hidden_states.shape[0], accumulation_dtype(dtype)
    return (
        hidden_states.new_empty((), dtype=real),
        hidden_states.new_empty(n_rows, dtype=real),
        hidden_states.new_empty((len(TERM_NAMES) + len(candidate_groups), n_rows), dtype=real),
        *empty_gradients(hidden_states, weight, bias, gradients),
    )


def empty_gradients(hidden_states, weight, bias, gradients):
    """What by_chunks returns, without values."""
    return (
        hidden_states.new_empty(hidden_states.shape if gradients[0] else (0,)),
        weight.new_empty(weight.shape if gradients[1] else (0,)),
        (weight if bias is None else bias).new_empty(weight.shape[:1] if gradients[2] else (0,)),
    )


def _save_linear_row_loss(ctx, inputs, output):
    ctx.options, ctx.gradients = inputs[8:14], inputs[14]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    # the total is what an error of double backward is tied to
    ctx.save_for_backward(output[0], *(output[3:] if any(ctx.gradients) else inputs[:8]))


def _linear_row_loss_backward(ctx, grad_total, grad_row_loss, *_):
    """grad_total: [], grad_row_loss: [n_rows]. Returns the gradients of hidden_states, weight and bias, and None for
    every other input.
    """
    nothing = (None,) * 15
    if grad_total is None and grad_row_loss is None:
        return nothing
    if any(ctx.gradients):
        total, *grads = ctx.saved_tensors
        if grad_row_loss is not None:
            raise RuntimeError("ava_ext: linear_row_loss computed the gradient of the sum; the rows need per_row=True")
        wanted, grads = ctx.gradients, [_scaled(grad, grad_total) for grad in grads]
    else:
        total, *parts, targets, coefficients, row_weights, ids, id_weights = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        upstream = sum(grad for grad in (grad_total, grad_row_loss) if grad is not None)
        upstream = upstream.expand(len(targets)) if row_weights is None else upstream * row_weights
        parts = [part if part is None else part.detach() for part in parts]
        arguments = (*parts, targets, coefficients, upstream, ids, id_weights, *ctx.options, wanted)
        grads = _ops.linear_row_loss(*arguments)[3:]
    grads = [
        without_second_derivative(grad, total) if is_wanted else None
        for grad, is_wanted in zip(grads, wanted, strict=True)
    ]
    return *grads, *nothing[3:]


def _scaled(
    gradient: Tensor,  # [n, hidden_size] or [n]
    factor: Tensor,  # []
) -> Tensor:  # as gradient
    """gradient * factor; over the gradient where nobody can ask for it again, and at no cost where the factor is 1."""
    if torch.compiler.is_compiling() or graph_is_kept():
        return gradient * factor.to(gradient.dtype)
    rows = gradient if gradient.dim() == 2 else gradient.unsqueeze(0)
    if rows.numel():
        _ops.scale_rows_(rows, factor.to(accumulation_dtype(rows.dtype)).expand(len(rows)))
    return gradient


_linear_row_loss.register_autograd(_linear_row_loss_backward, setup_context=_save_linear_row_loss)
