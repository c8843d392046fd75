"""Softmax statistics of logits that are a linear function of hidden states, and never exist as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ava_ext.ops.linear_rows import LinearLogits, by_chunks, empty_gradients
from ava_ext.ops.softmax_rows import N_STATISTICS, accumulation_dtype, without_second_derivative
from ava_ext.ops.softmax_statistics import SoftmaxStatistics, coefficients_of_rows, statistics_options

_ops = torch.ops.ava_ext


def linear_softmax_statistics(
    hidden_states: Tensor,  # [..., hidden_size]
    weight: Tensor,  # [n_columns, hidden_size]
    ids: Tensor | None,  # [..., n_ids]
    *,
    bias: Tensor | None = None,  # [n_columns]
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    row_mask: Tensor | None = None,  # [...]
    chunk_bytes: int | None = None,
) -> SoftmaxStatistics:
    """`softmax_statistics` of hidden_states @ weight.T + bias, without the logits.

    A chunk of rows is computed at a time; backward computes it again. Differentiable in hidden_states, weight and bias.

    Args:
        hidden_states, weight, bias: of one type, or under autocast.
        ids, temperature, logit_softcap, vocab_size, row_mask: as in `softmax_statistics`.
        chunk_bytes: what the logits of one chunk may take. Default: 64 MB, on CUDA 1 GB.

    Returns:
        SoftmaxStatistics, float32 (float64 for float64).

    Raises:
        ValueError: on shapes and types that do not fit. IndexError: on ids out of range.
        RuntimeError: on double backward.

    Example:
        >>> s = linear_softmax_statistics(hidden_states, lm_head.weight, actions.unsqueeze(-1))
        >>> loss = -(advantages * s.log_probs[..., 0]).mean() - 0.01 * s.entropy.mean()
        >>> loss.backward()
    """
    logits = LinearLogits(hidden_states, weight, bias)
    logits.check("linear_softmax_statistics")
    rows = logits.shape[:-1]
    if ids is not None and ids.shape[:-1] != rows:
        raise ValueError(
            f"linear_softmax_statistics: expected ids of shape [{', '.join(map(str, rows))}, n_ids], "
            f"got {list(ids.shape)}"
        )
    if row_mask is not None and row_mask.shape != rows:
        raise ValueError(
            f"linear_softmax_statistics: expected row_mask of shape {list(rows)}, got {list(row_mask.shape)}"
        )
    coefficients, flags = statistics_options(logits.dtype, hidden_states.device, temperature, logit_softcap)
    _, log_probs, summaries = _ops.linear_row_statistics(
        hidden_states.flatten(0, -2),
        weight,
        bias,
        None if ids is None else ids.flatten(0, -2).to(torch.int32),
        None if row_mask is None else row_mask.reshape(-1),
        coefficients,
        flags,
        logits.shape[-1] if vocab_size is None else vocab_size,
        logits.chunk_rows(chunk_bytes),
        logits.dtype,
    )
    return SoftmaxStatistics(log_probs.view(*rows, -1), *summaries.view(4, *rows).unbind(0))


def linear_token_log_probs(
    hidden_states: Tensor,  # [..., hidden_size]
    weight: Tensor,  # [n_columns, hidden_size]
    targets: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [n_columns]
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log p of each target, and each row's entropy, without the logits: what reinforcement learning needs of a model.

    Args:
        hidden_states, weight, bias, temperature, logit_softcap, vocab_size, chunk_bytes: as in
            `linear_softmax_statistics`.
        targets: [...], integers in [0, vocab_size), or ignore_index: such rows give (0, 0) and get a zero gradient.

    Returns:
        (log_prob [...], entropy [...]), float32 (float64 for float64), differentiable in hidden_states, weight, bias.

    Raises:
        ValueError: on shapes and types that do not fit. IndexError: on a target out of range.
        RuntimeError: on double backward.

    Example:
        >>> log_prob, entropy = linear_token_log_probs(hidden_states, lm_head.weight, actions)
        >>> loss = -(advantages * (log_prob - old_log_prob).exp()).mean() - 0.01 * entropy.mean()
        >>> loss.backward()
    """
    if targets.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"linear_token_log_probs: expected targets of shape {list(hidden_states.shape[:-1])}, "
            f"got {list(targets.shape)}"
        )
    counted = targets != ignore_index
    statistics = linear_softmax_statistics(
        hidden_states,
        weight,
        targets.masked_fill(~counted, -1).unsqueeze(-1),
        bias=bias,
        temperature=temperature,
        logit_softcap=logit_softcap,
        vocab_size=vocab_size,
        row_mask=counted,
        chunk_bytes=chunk_bytes,
    )
    return statistics.log_probs.squeeze(-1), statistics.entropy


@torch.library.custom_op("ava_ext::linear_row_statistics", mutates_args=())
def _linear_row_statistics(
    hidden_states: Tensor,  # [n_rows, hidden_size]
    weight: Tensor,  # [n_columns, hidden_size]
    bias: Tensor | None,  # [n_columns]
    ids: Tensor | None,  # [n_rows, n_ids]
    row_mask: Tensor | None,  # [n_rows]
    coefficients: Tensor,  # [7]
    flags: int,
    vocab_size: int,
    chunk_rows: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # [n_rows, 6], [n_rows, n_ids], [4, n_rows]
    n_rows, real = hidden_states.shape[0], accumulation_dtype(dtype)
    statistics = hidden_states.new_empty((n_rows, N_STATISTICS), dtype=real)
    log_probs = hidden_states.new_empty((n_rows, 0 if ids is None else ids.shape[-1]), dtype=real)
    summaries = hidden_states.new_empty((4, n_rows), dtype=real)

    def measure(logits: Tensor, rows: slice) -> None:
        statistics[rows], log_probs[rows], summaries[:, rows] = _ops.row_statistics(
            logits,
            None if ids is None else ids[rows],
            None if row_mask is None else row_mask[rows],
            coefficients,
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
    statistics: Tensor,  # [n_rows, 6]
    row_coefficients: Tensor,  # [n_rows, 4 + n_ids]
    ids: Tensor | None,  # [n_rows, n_ids]
    coefficients: Tensor,  # [7]
    flags: int,
    vocab_size: int,
    chunk_rows: int,
    dtype: torch.dtype,
    gradients: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # [n_rows, hidden_size], [n_columns, hidden_size], [n_columns]; [0] if not wanted
    def differentiate(logits: Tensor, rows: slice) -> None:
        of_rows = (statistics[rows], row_coefficients[rows], None if ids is None else ids[rows])
        _ops.row_gradient_(logits, *of_rows, coefficients, flags, vocab_size)

    return by_chunks(hidden_states, weight, bias, chunk_rows, dtype, gradients, differentiate)


@_linear_row_statistics.register_fake
def _(hidden_states, weight, bias, ids, row_mask, coefficients, flags, vocab_size, chunk_rows, dtype):
    n_rows, real = hidden_states.shape[0], accumulation_dtype(dtype)
    return (
        hidden_states.new_empty((n_rows, N_STATISTICS), dtype=real),
        hidden_states.new_empty((n_rows, 0 if ids is None else ids.shape[-1]), dtype=real),
        hidden_states.new_empty((4, n_rows), dtype=real),
    )


@_linear_row_gradient.register_fake
def _(
    hidden_states, weight, bias, statistics, of_rows, ids, coefficients, flags, vocab_size, chunk_rows, dtype, wanted
):
    return empty_gradients(hidden_states, weight, bias, wanted)


def _save_linear_row_statistics(ctx, inputs, output):
    hidden_states, weight, bias, ids, _, coefficients, *ctx.options = inputs
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(hidden_states, weight, bias, ids, coefficients, output[0], output[2])


def _linear_row_statistics_backward(ctx, _, grad_log_probs, grad_summaries):
    """grad_log_probs: [n_rows, n_ids], grad_summaries: [4, n_rows]."""
    *parts, ids, coefficients, statistics, summaries = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    grads = _ops.linear_row_gradient(
        *(part if part is None else part.detach() for part in parts),
        statistics,
        coefficients_of_rows(statistics, grad_log_probs, grad_summaries),
        ids,
        coefficients,
        *ctx.options,
        wanted,
    )
    grads = [
        without_second_derivative(grad, summaries) if is_wanted else None
        for grad, is_wanted in zip(grads, wanted, strict=True)
    ]
    return *grads, *(None,) * 7


_linear_row_statistics.register_autograd(_linear_row_statistics_backward, setup_context=_save_linear_row_statistics)
