"""Rows of logits: softmax statistics, from which a new loss is made in a few lines of PyTorch.

Their vector-Jacobian product is the gradient kernel of the fused loss; the formulas stand in csrc/softmax_rows.h.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ava_ext.ops.softmax_rows import (
    N_STATISTICS,
    RowTerms,
    accumulation_dtype,
    row_coefficients,
    without_second_derivative,
)

_ops = torch.ops.ava_ext


class SoftmaxStatistics(NamedTuple):
    """Centred quantities of each row, which do not cancel. See `softmax_statistics`."""

    log_probs: Tensor  # [..., n_ids]
    entropy: Tensor  # [...]
    lse: Tensor  # [...]
    log_rest: Tensor  # [...]
    mean_log_prob: Tensor  # [...]


def softmax_statistics(
    logits: Tensor,  # [..., n_columns]
    ids: Tensor | None,  # [..., n_ids]
    *,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    row_mask: Tensor | None = None,  # [...]
) -> SoftmaxStatistics:
    """Softmax statistics of each row, differentiable at kernel speed: a new loss is a few lines of PyTorch on [n_rows]
    vectors.

    With z = softcap(logits) / temperature over the columns that are not masked (raw logit -inf, or beyond vocab_size):
    log_probs = z_id - lse, entropy = -sum p log p, lse = log sum exp z, log_rest = log sum_{j != argmax} exp(z_j - max
    z) (so that log(1 - max p) = log_rest - log1p(exp(log_rest)), exact however sure the row is), mean_log_prob = mean
    of log p.

    Args:
        logits: [..., n_columns], float32, bfloat16, float16 or float64.
        ids: [..., n_ids] integers in [0, vocab_size); -1 gives 0. None: no log_probs.
        temperature: a number, or a 0-dim tensor that does not require grad.
        logit_softcap: c of c tanh(logits / c).
        vocab_size: columns beyond it are padding. Default: n_columns.
        row_mask: [...] bool; rows where it is False give zeros and get a zero gradient, whatever they hold.

    Returns:
        SoftmaxStatistics, float32 (float64 for float64 logits).

    Raises:
        RuntimeError: on wrong shapes and types; on double backward. IndexError: on ids out of range.

    Example:
        >>> s = softmax_statistics(logits, targets.unsqueeze(-1))
        >>> margin_loss = torch.relu(1 + s.log_rest + s.entropy - s.log_probs[..., 0]).mean()
        >>> margin_loss.backward()
    """
    coefficients, flags = statistics_options(logits.dtype, logits.device, temperature, logit_softcap)
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    ids = None if ids is None else ids.to(torch.int32)
    n_columns = logits.shape[-1]
    _, log_probs, summaries = _ops.row_statistics(
        logits, ids, row_mask, coefficients, flags, n_columns if vocab_size is None else vocab_size
    )
    return SoftmaxStatistics(log_probs, *summaries.unbind(0))


def statistics_options(
    dtype: torch.dtype, device: torch.device, temperature: float | Tensor, logit_softcap: float | None
) -> tuple[Tensor, int]:
    """Coefficients [7] and flags of a kernel that measures logits of this type."""
    like = torch.empty(0, dtype=dtype, device=device)
    if isinstance(temperature, Tensor):
        if temperature.requires_grad:
            raise ValueError("softmax_statistics: expected a temperature without requires_grad")
        coefficients = row_coefficients(like, logit_softcap=logit_softcap)
        coefficients = torch.cat([temperature.reshape(1).to(coefficients), coefficients[1:]])
    else:
        coefficients = row_coefficients(like, temperature=temperature, logit_softcap=logit_softcap)
    return coefficients, int(RowTerms.ENTROPY | RowTerms.SOFTCAP) if logit_softcap else int(RowTerms.ENTROPY)


def token_log_probs(
    logits: Tensor,  # [..., n_columns]
    targets: Tensor,  # [...]
    *,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """log p of each target, and each row's entropy: what policy gradients need, in one pass over the logits.

    Args:
        logits, temperature, logit_softcap, vocab_size: as in `softmax_statistics`.
        targets: [...], integers in [0, vocab_size), or ignore_index: such rows give (0, 0) and get a zero gradient.

    Returns:
        (log_prob [...], entropy [...]), float32 (float64 for float64 logits), differentiable in the logits.

    Example:
        >>> log_prob, entropy = token_log_probs(logits, actions)
        >>> loss = -(advantages * log_prob).mean() - 0.01 * entropy.mean()
        >>> loss.backward()
    """
    counted = targets != ignore_index
    statistics = softmax_statistics(
        logits,
        targets.masked_fill(~counted, -1).unsqueeze(-1),
        temperature=temperature,
        logit_softcap=logit_softcap,
        vocab_size=vocab_size,
        row_mask=counted,
    )
    return statistics.log_probs.squeeze(-1), statistics.entropy


@torch.library.register_fake("ava_ext::row_statistics")
def _(logits, ids, row_mask, coefficients, flags, vocab_size):
    rows, real = logits.shape[:-1], accumulation_dtype(logits.dtype)
    return (
        logits.new_empty((*rows, N_STATISTICS), dtype=real),
        logits.new_empty((*rows, 0 if ids is None else ids.shape[-1]), dtype=real),
        logits.new_empty((4, *rows), dtype=real),
    )


def _save_row_statistics(ctx, inputs, output):
    logits, ids, _, coefficients, ctx.flags, ctx.vocab_size = inputs
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(logits, ids, coefficients, output[0])


def _row_statistics_backward(ctx, _, grad_log_probs, grad_summaries):
    """grad_log_probs: [..., n_ids], grad_summaries: [4, ...]."""
    logits, ids, coefficients, statistics = ctx.saved_tensors
    of_rows = coefficients_of_rows(statistics, grad_log_probs, grad_summaries)
    arguments = (logits.detach(), statistics, of_rows, ids, coefficients, ctx.flags, ctx.vocab_size)
    return without_second_derivative(_ops.row_gradient(*arguments), logits), None, None, None, None, None


def coefficients_of_rows(
    statistics: Tensor,  # [..., 6]
    grad_log_probs: Tensor,  # [..., n_ids]
    grad_summaries: Tensor,  # [4, ...]
) -> Tensor:  # [..., 4 + n_ids]
    """What row_gradient multiplies p, p log p, 1, and the one-hots of the maximum and the ids with."""
    grad_entropy, grad_lse, grad_log_rest, grad_mean = grad_summaries.unbind(0)
    rest, count = statistics[..., 2], statistics[..., 5]
    # d entropy = -p (u - E),  d lse = p,  d mean = 1/V - p,  d log R = d (log(1 - p_max) - log p_max), by z
    smallest = 1e-37 if rest.dtype == torch.float32 else 1e-300
    maximum = -grad_log_rest * (1 + rest) / rest.clamp_min(smallest)
    constant = grad_mean / count.clamp_min(1)
    shapes = torch.stack([grad_lse - grad_mean, -grad_entropy, constant, maximum], -1)
    return torch.cat([shapes, grad_log_probs], -1)


torch.library.register_autograd("ava_ext::row_statistics", _row_statistics_backward, setup_context=_save_row_statistics)
