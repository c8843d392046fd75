"""The operator that measures rows of logits, and its vector-Jacobian product: the gradient kernel of the fused loss.

The formulas stand in csrc/softmax_rows.h; what users call is in ops/softmax_statistics.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ava_ext import _library  # noqa: F401  the operators exist once it is imported
from ava_ext.ops.arguments import check_devices, with_dense_rows
from ava_ext.ops.derivatives import counted_only, refuse_tangents, refuse_transforms, without_second_derivative
from ava_ext.ops.row_evaluation import bounded, smallest_rest
from ava_ext.ops.row_fields import N_STATISTICS, N_SUMMARIES, STATISTIC_NAMES, accumulation_dtype

_ops = torch.ops.ava_ext
_row_statistics = _ops.row_statistics.default  # looked up once: each look-up costs a microsecond
_REST, _COUNT = STATISTIC_NAMES.index("rest"), STATISTIC_NAMES.index("count")


def row_statistics(
    owner: str,
    logits: Tensor,  # [..., n_columns]
    ids: Tensor | None,  # [..., n_ids]
    row_mask: Tensor | None,  # [...] bool
    options: Tensor,  # [N_OPTIONS]
    flags: int,
    vocab_size: int,
) -> Sequence[Tensor]:  # [..., n_ids], and N_SUMMARIES of [...]
    """log_probs and the summaries of `softmax_statistics`, of logits that exist. owner begins the messages."""
    refuse_transforms(owner, (logits, options))
    arguments = (with_dense_rows(logits), ids, row_mask, options, flags, vocab_size)
    if torch.compiler.is_compiling():
        _, log_probs, summaries = _row_statistics(*arguments)
        return [log_probs, *(summary.clone() for summary in summaries.unbind(0))]
    if logits.requires_grad and torch.is_grad_enabled():
        return _RowStatistics.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        _, log_probs, summaries = _row_statistics(*arguments)
    return [log_probs, *_apart(summaries)]


def _apart(
    summaries: Tensor,  # [N_SUMMARIES, ...]
) -> list[Tensor]:  # N_SUMMARIES of [...]
    """Each summary as a tensor of its own for autograd: whoever writes to one leaves the others alone."""
    return [summary.data for summary in summaries.unbind(0)]


class _RowStatistics(torch.autograd.Function):
    """`row_statistics` of the eager mode: torch.library's own autograd, below, costs three times as much Python."""

    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            statistics, log_probs, summaries = _row_statistics(*inputs)
        _save(ctx, inputs, statistics)
        return log_probs, *_apart(summaries)

    @staticmethod
    def backward(ctx, grad_log_probs, *grad_summaries):
        return _backward(ctx, grad_log_probs, grad_summaries)


def _save(ctx, inputs, statistics):
    logits, ids, row_mask, options, ctx.flags, ctx.vocab_size = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, ids, row_mask, options, statistics)


def _backward(ctx, grad_log_probs, grad_summaries):
    """grad_log_probs: [..., n_ids], grad_summaries: N_SUMMARIES of [...]; None where nothing comes from above."""
    refuse_tangents("softmax_statistics", (grad_log_probs, *grad_summaries))
    logits, ids, row_mask, options, statistics = ctx.saved_tensors
    coefficients = statistics_coefficients(statistics, ids, row_mask, grad_log_probs, grad_summaries)
    arguments = (logits.detach(), statistics, coefficients, ids, options, ctx.flags, ctx.vocab_size)
    gradient = _ops.row_gradient(*arguments)
    return without_second_derivative(gradient, logits, grad_log_probs, *grad_summaries), None, None, None, None, None


def statistics_coefficients(
    statistics: Tensor,  # [..., N_STATISTICS]
    ids: Tensor | None,  # [..., n_ids]
    row_mask: Tensor | None,  # [...] bool
    grad_log_probs: Tensor | None,  # [..., n_ids]
    grad_summaries: Sequence[Tensor | None],  # N_SUMMARIES of [...]
) -> Tensor:  # [..., N_ROW_COEFFICIENTS + n_ids]
    """What row_gradient multiplies p, p log p, 1, and the one-hots of the maximum and the ids with."""
    rest, count = statistics[..., _REST], statistics[..., _COUNT]
    zeros = torch.zeros_like(rest)
    grad_entropy, grad_lse, grad_log_rest, grad_mean = (zeros if grad is None else grad for grad in grad_summaries)
    if grad_log_probs is None:
        grad_log_probs = statistics.new_zeros((0,) if ids is None else ids.shape)
    # d entropy = -p (u - E),  d lse = p,  d mean = 1/V - p,  d log R = d (log(1 - p_max) - log p_max), by z
    maximum = bounded(-grad_log_rest * (1 + rest) / rest.clamp_min(smallest_rest(rest.dtype)))
    constant = grad_mean / count.clamp_min(1)
    shapes = torch.stack([grad_lse - grad_mean, -grad_entropy, constant, maximum], -1)
    coefficients = shapes if ids is None else torch.cat([shapes, grad_log_probs], -1)
    return coefficients if row_mask is None else counted_only(coefficients, ~row_mask.unsqueeze(-1))


@torch.library.register_fake("ava_ext::row_statistics")
def _(logits, ids, row_mask, options, flags, vocab_size):
    check_devices("softmax_statistics", logits, ids=ids, row_mask=row_mask, options=options)
    rows, real = logits.shape[:-1], accumulation_dtype(logits.dtype)
    return (
        logits.new_empty((*rows, N_STATISTICS), dtype=real),
        logits.new_empty((*rows, 0 if ids is None else ids.shape[-1]), dtype=real),
        logits.new_empty((N_SUMMARIES, *rows), dtype=real),
    )


def _save_row_statistics(ctx, inputs, output):
    ctx.mark_non_differentiable(output[0])
    _save(ctx, inputs, output[0])


def _row_statistics_backward(ctx, _, grad_log_probs, grad_summaries):
    nothing = (None,) * N_SUMMARIES
    return _backward(ctx, grad_log_probs, nothing if grad_summaries is None else grad_summaries.unbind(0))


torch.library.register_autograd("ava_ext::row_statistics", _row_statistics_backward, setup_context=_save_row_statistics)
