"""Softmax statistics of logits that are a linear function of hidden states, and never exist as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.linear_rows import by_chunks, empty_gradients
from ava_ext.ops.row_fields import N_STATISTICS, N_SUMMARIES, accumulation_dtype
from ava_ext.ops.row_statistics import statistics_coefficients
from ava_ext.ops.second_derivative import without_second_derivative

_ops = torch.ops.ava_ext


def linear_row_statistics(
    owner: str,
    logits: LinearLogits,  # [..., n_columns]
    ids: Tensor | None,  # [..., n_ids] int32
    row_mask: Tensor | None,  # [...] bool
    options: Tensor,  # [N_OPTIONS]
    flags: int,
    vocab_size: int,
    chunk_bytes: int | None,
) -> tuple[Tensor, Tensor]:  # [..., n_ids], [N_SUMMARIES, ...]
    """log_probs and summaries of `softmax_statistics` of LinearLogits.

    A chunk of rows is computed at a time; backward computes it again. owner begins the messages.
    """
    logits.check(owner)
    rows = logits.shape[:-1]
    if ids is not None and ids.shape[:-1] != rows:
        raise ValueError(f"{owner}: expected ids of shape [{', '.join(map(str, rows))}, n_ids], got {list(ids.shape)}")
    if row_mask is not None and row_mask.shape != rows:
        raise ValueError(f"{owner}: expected row_mask of shape {list(rows)}, got {list(row_mask.shape)}")
    _, log_probs, summaries = _ops.linear_row_statistics(
        logits.hidden_states.flatten(0, -2),
        logits.weight,
        logits.bias,
        None if ids is None else ids.flatten(0, -2),
        None if row_mask is None else row_mask.reshape(-1),
        options,
        flags,
        vocab_size,
        logits.chunk_rows(chunk_bytes),
        logits.dtype,
    )
    return log_probs.view(*rows, log_probs.shape[-1]), summaries.view(N_SUMMARIES, *rows)


@torch.library.custom_op("ava_ext::linear_row_statistics", mutates_args=())
def _linear_row_statistics(
    hidden_states: Tensor,  # [n_rows, hidden_size]
    weight: Tensor,  # [n_columns, hidden_size]
    bias: Tensor | None,  # [n_columns]
    ids: Tensor | None,  # [n_rows, n_ids]
    row_mask: Tensor | None,  # [n_rows]
    options: Tensor,  # [N_OPTIONS]
    flags: int,
    vocab_size: int,
    chunk_rows: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # [n_rows, N_STATISTICS], [n_rows, n_ids], [N_SUMMARIES, n_rows]
    n_rows, real = hidden_states.shape[0], accumulation_dtype(dtype)
    statistics = hidden_states.new_empty((n_rows, N_STATISTICS), dtype=real)
    log_probs = hidden_states.new_empty((n_rows, 0 if ids is None else ids.shape[-1]), dtype=real)
    summaries = hidden_states.new_empty((N_SUMMARIES, n_rows), dtype=real)

    def measure(logits: Tensor, rows: slice) -> None:
        statistics[rows], log_probs[rows], summaries[:, rows] = _ops.row_statistics(
            logits,
            None if ids is None else ids[rows],
            None if row_mask is None else row_mask[rows],
            options,
            flags,
            vocab_size,
        )

    by_chunks(hidden_states, weight, bias, chunk_rows, dtype, [False, False, False], measure)
    return statistics, log_probs, summaries


@torch.library.custom_op("ava_ext::linear_row_gradient", mutates_args=())
def _linear_row_gradient(
    hidden_states: Tensor,  # [n_rows, hidden_size]
    weight: Tensor,  # [n_columns, hidden_size]
    bias: Tensor | None,  # [n_columns]
    statistics: Tensor,  # [n_rows, N_STATISTICS]
    row_coefficients: Tensor,  # [n_rows, N_ROW_COEFFICIENTS + n_ids]
    ids: Tensor | None,  # [n_rows, n_ids]
    options: Tensor,  # [N_OPTIONS]
    flags: int,
    vocab_size: int,
    chunk_rows: int,
    dtype: torch.dtype,
    gradients: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # [n_rows, hidden_size], [n_columns, hidden_size], [n_columns]; [0] if not wanted
    def differentiate(logits: Tensor, rows: slice) -> None:
        of_rows = (statistics[rows], row_coefficients[rows], None if ids is None else ids[rows])
        _ops.row_gradient_(logits, *of_rows, options, flags, vocab_size)

    return by_chunks(hidden_states, weight, bias, chunk_rows, dtype, gradients, differentiate)


@_linear_row_statistics.register_fake
def _(hidden_states, weight, bias, ids, row_mask, options, flags, vocab_size, chunk_rows, dtype):
    n_rows, real = hidden_states.shape[0], accumulation_dtype(dtype)
    return (
        hidden_states.new_empty((n_rows, N_STATISTICS), dtype=real),
        hidden_states.new_empty((n_rows, 0 if ids is None else ids.shape[-1]), dtype=real),
        hidden_states.new_empty((N_SUMMARIES, n_rows), dtype=real),
    )


@_linear_row_gradient.register_fake
def _(
    hidden_states,
    weight,
    bias,
    statistics,
    row_coefficients,
    ids,
    options,
    flags,
    vocab_size,
    chunk_rows,
    dtype,
    wanted,
):
    return empty_gradients(hidden_states, weight, bias, wanted)


def _save_linear_row_statistics(ctx, inputs, output):
    hidden_states, weight, bias, ids, _, options, *ctx.constants = inputs
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(hidden_states, weight, bias, ids, options, output[0], output[2])


def _linear_row_statistics_backward(ctx, _, grad_log_probs, grad_summaries):
    """grad_log_probs: [n_rows, n_ids], grad_summaries: [N_SUMMARIES, n_rows]."""
    *parts, ids, options, statistics, summaries = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    grads = _ops.linear_row_gradient(
        *(part if part is None else part.detach() for part in parts),
        statistics,
        statistics_coefficients(statistics, grad_log_probs, grad_summaries),
        ids,
        options,
        *ctx.constants,
        wanted,
    )
    grads = [
        without_second_derivative(grad, summaries) if is_wanted else None
        for grad, is_wanted in zip(grads, wanted, strict=True)
    ]
    return *grads, *(None,) * 7


_linear_row_statistics.register_autograd(_linear_row_statistics_backward, setup_context=_save_linear_row_statistics)
