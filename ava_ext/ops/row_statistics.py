"""The operator that measures rows of logits, and its vector-Jacobian product: the gradient kernel of the fused loss.

The formulas stand in csrc/softmax_rows.h; what users call is in ops/softmax_statistics.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ava_ext import _library  # noqa: F401  the operators exist once it is imported
from ava_ext.ops.row_fields import N_STATISTICS, N_SUMMARIES, STATISTIC_NAMES, accumulation_dtype
from ava_ext.ops.second_derivative import without_second_derivative

_ops = torch.ops.ava_ext
_REST, _COUNT = STATISTIC_NAMES.index("rest"), STATISTIC_NAMES.index("count")


def row_statistics(
    logits: Tensor,  # [..., n_columns]
    ids: Tensor | None,  # [..., n_ids] int32
    row_mask: Tensor | None,  # [...] bool
    options: Tensor,  # [N_OPTIONS]
    flags: int,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:  # [..., n_ids], [N_SUMMARIES, ...]
    """log_probs and summaries of `softmax_statistics` of logits that exist."""
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    return _ops.row_statistics(logits, ids, row_mask, options, flags, vocab_size)[1:]


@torch.library.register_fake("ava_ext::row_statistics")
def _(logits, ids, row_mask, options, flags, vocab_size):
    rows, real = logits.shape[:-1], accumulation_dtype(logits.dtype)
    return (
        logits.new_empty((*rows, N_STATISTICS), dtype=real),
        logits.new_empty((*rows, 0 if ids is None else ids.shape[-1]), dtype=real),
        logits.new_empty((N_SUMMARIES, *rows), dtype=real),
    )


def _save_row_statistics(ctx, inputs, output):
    logits, ids, _, options, ctx.flags, ctx.vocab_size = inputs
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(logits, ids, options, output[0])


def _row_statistics_backward(ctx, _, grad_log_probs, grad_summaries):
    """grad_log_probs: [..., n_ids], grad_summaries: [N_SUMMARIES, ...]."""
    logits, ids, options, statistics = ctx.saved_tensors
    of_rows = statistics_coefficients(statistics, grad_log_probs, grad_summaries)
    arguments = (logits.detach(), statistics, of_rows, ids, options, ctx.flags, ctx.vocab_size)
    return without_second_derivative(_ops.row_gradient(*arguments), logits), None, None, None, None, None


def statistics_coefficients(
    statistics: Tensor,  # [..., N_STATISTICS]
    grad_log_probs: Tensor,  # [..., n_ids]
    grad_summaries: Tensor,  # [N_SUMMARIES, ...]
) -> Tensor:  # [..., N_ROW_COEFFICIENTS + n_ids]
    """What row_gradient multiplies p, p log p, 1, and the one-hots of the maximum and the ids with."""
    grad_entropy, grad_lse, grad_log_rest, grad_mean = grad_summaries.unbind(0)
    rest, count = statistics[..., _REST], statistics[..., _COUNT]
    # d entropy = -p (u - E),  d lse = p,  d mean = 1/V - p,  d log R = d (log(1 - p_max) - log p_max), by z
    smallest = 1e-37 if rest.dtype == torch.float32 else 1e-300
    maximum = -grad_log_rest * (1 + rest) / rest.clamp_min(smallest)
    constant = grad_mean / count.clamp_min(1)
    shapes = torch.stack([grad_lse - grad_mean, -grad_entropy, constant, maximum], -1)
    return torch.cat([shapes, grad_log_probs], -1)


torch.library.register_autograd("ava_ext::row_statistics", _row_statistics_backward, setup_context=_save_row_statistics)
