"""Softmax statistics of logits that are a linear function of hidden states, and never exist as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ava_ext._library import python_operator
from ava_ext.ops.arguments import check_devices
from ava_ext.ops.derivatives import (
    call_operator,
    raise_double_backward,
    refuse_tangents,
    refuse_transforms,
    without_second_derivative,
)
from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.linear_rows import as_matrix, by_chunks, empty_gradients
from ava_ext.ops.row_fields import N_STATISTICS, N_SUMMARIES, accumulation_dtype
from ava_ext.ops.row_statistics import statistics_coefficients

_ops = torch.ops.ava_ext


def linear_row_statistics(
    owner: str,
    logits: LinearLogits,  # [..., n_columns]
    ids: Tensor | None,  # [..., n_ids]
    row_mask: Tensor | None,  # [...] bool
    options: Tensor,  # [N_OPTIONS]
    flags: int,
    vocab_size: int,
    chunk_bytes: int | None,
    max_counted_rows: int | None,
) -> list[Tensor]:  # [..., n_ids], and N_SUMMARIES of [...]
    """log_probs and the summaries of `softmax_statistics` of LinearLogits.

    A chunk of rows is computed at a time; backward computes it again. owner begins the messages.
    """
    refuse_transforms(owner, (*logits, options))
    rows = logits.shape[:-1]
    tensors = (
        as_matrix(logits.hidden_states),
        logits.weight,
        logits.bias,
        None if ids is None else as_matrix(ids),
        None if row_mask is None else row_mask.reshape(-1),
        options,
    )
    constants = (flags, vocab_size, chunk_bytes, logits.dtype, max_counted_rows)
    operator = _ops.linear_row_statistics.default
    formula = (_save_linear_row_statistics, _linear_row_statistics_backward)
    _, log_probs, *summaries, _ = call_operator(operator, *formula, tensors, constants)
    return [log_probs.view(*rows, log_probs.shape[-1]), *(summary.view(rows) for summary in summaries)]


def _linear_row_statistics(
    hidden_states: Tensor,  # [n_rows, hidden_size]
    weight: Tensor,  # [n_columns, hidden_size]
    bias: Tensor | None,  # [n_columns]
    ids: Tensor | None,  # [n_rows, n_ids]
    row_mask: Tensor | None,  # [n_rows]
    options: Tensor,  # [N_OPTIONS]
    flags: int,
    vocab_size: int,
    chunk_bytes: int | None,
    dtype: torch.dtype,
    max_counted_rows: int | None,
    # statistics [n_rows, N_STATISTICS], log_probs [n_rows, n_ids], N_SUMMARIES of [n_rows]; and [0], which leads
    # autograd to the inputs and which nobody can have changed
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = statistics, log_probs, *summaries, _ = _zero_statistics(hidden_states, ids, dtype)

    def measure(logits: Tensor, rows: slice | Tensor) -> None:
        statistics[rows], log_probs[rows], of_rows = _ops.row_statistics(
            logits,
            None if ids is None else ids[rows],
            None if row_mask is None else row_mask[rows],
            options,
            flags,
            vocab_size,
        )
        for summary, values in zip(summaries, of_rows, strict=True):
            summary[rows] = values

    head = (hidden_states, weight, bias)
    by_chunks(*head, chunk_bytes, dtype, [False, False, False], measure, row_mask, max_counted_rows)
    return outputs


def _zero_statistics(hidden_states, ids, dtype):
    """What _linear_row_statistics returns where no row counts."""
    n_rows, real = hidden_states.shape[0], accumulation_dtype(dtype)
    return (
        hidden_states.new_zeros((n_rows, N_STATISTICS), dtype=real),
        hidden_states.new_zeros((n_rows, 0 if ids is None else ids.shape[-1]), dtype=real),
        *(hidden_states.new_zeros(n_rows, dtype=real) for _ in range(N_SUMMARIES)),
        hidden_states.new_zeros(0, dtype=real),
    )


def _linear_row_gradient(
    hidden_states: Tensor,  # [n_rows, hidden_size]
    weight: Tensor,  # [n_columns, hidden_size]
    bias: Tensor | None,  # [n_columns]
    statistics: Tensor,  # [n_rows, N_STATISTICS]
    row_coefficients: Tensor,  # [n_rows, N_ROW_COEFFICIENTS + n_ids]
    ids: Tensor | None,  # [n_rows, n_ids]
    row_mask: Tensor | None,  # [n_rows]
    options: Tensor,  # [N_OPTIONS]
    flags: int,
    vocab_size: int,
    chunk_bytes: int | None,
    dtype: torch.dtype,
    max_counted_rows: int | None,
    gradients: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # [n_rows, hidden_size], [n_columns, hidden_size], [n_columns]; [0] if not wanted
    def differentiate(logits: Tensor, rows: slice | Tensor) -> None:
        of_rows = (statistics[rows], row_coefficients[rows], None if ids is None else ids[rows])
        _ops.row_gradient_(logits, *of_rows, options, flags, vocab_size)

    head = (hidden_states, weight, bias)
    return by_chunks(*head, chunk_bytes, dtype, gradients, differentiate, row_mask, max_counted_rows)


@torch.library.register_fake(python_operator(_linear_row_statistics))
def _(hidden_states, weight, bias, ids, row_mask, options, flags, vocab_size, chunk_bytes, dtype, max_counted_rows):
    others = {"weight": weight, "bias": bias, "ids": ids, "row_mask": row_mask, "options": options}
    check_devices("softmax_statistics", hidden_states, **others)
    return _zero_statistics(hidden_states, ids, dtype)


@torch.library.register_fake(python_operator(_linear_row_gradient))
def _(
    hidden_states,
    weight,
    bias,
    statistics,
    row_coefficients,
    ids,
    row_mask,
    options,
    flags,
    vocab_size,
    chunk_bytes,
    dtype,
    max_counted_rows,
    wanted,
):
    others = {"weight": weight, "bias": bias, "statistics": statistics, "row_coefficients": row_coefficients}
    check_devices("linear_row_gradient", hidden_states, **others, ids=ids, row_mask=row_mask, options=options)
    return empty_gradients(hidden_states, weight, bias, wanted)


def _save_linear_row_statistics(ctx, inputs, output):
    hidden_states, weight, bias, ids, row_mask, options, *ctx.constants = inputs
    statistics, *_, origin = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden_states, weight, bias, ids, row_mask, options, statistics, origin)


def _linear_row_statistics_backward(ctx, _, grad_log_probs, *grads_and_none):
    """grad_log_probs: [n_rows, n_ids], those of the summaries: [n_rows]; None where nothing comes from above."""
    *parts, ids, row_mask, options, statistics, origin = ctx.saved_tensors
    grad_summaries = grads_and_none[:N_SUMMARIES]
    refuse_tangents("softmax_statistics", (grad_log_probs, *grad_summaries))
    wanted = list(ctx.needs_input_grad[:3])
    grads = _ops.linear_row_gradient(
        *(part if part is None else part.detach() for part in parts),
        statistics,
        statistics_coefficients(statistics, ids, row_mask, grad_log_probs, grad_summaries),
        ids,
        row_mask,
        options,
        *ctx.constants,
        wanted,
    )
    grads = [
        without_second_derivative(grad, origin, grad_log_probs, *grad_summaries) if is_wanted else None
        for grad, is_wanted in zip(grads, wanted, strict=True)
    ]
    return *grads, *(None,) * 8


torch.library.register_autograd(
    "ava_ext::linear_row_statistics", _linear_row_statistics_backward, setup_context=_save_linear_row_statistics
)
torch.library.register_autograd("ava_ext::linear_row_gradient", raise_double_backward)
