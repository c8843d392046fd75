"""`row_loss` and `softmax_statistics` of logits whose columns are spread over ranks.

Forward: each rank measures its columns, one all-gather of 7 numbers per row and one per candidate, and every rank
evaluates the terms of the whole rows. Backward: each rank writes the gradient of its columns, and nothing is
communicated, except that of hidden states, which every rank has: it is added up once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ava_ext.ops.arguments import with_dense_rows
from ava_ext.ops.derivatives import without_second_derivative
from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.linear_rows import as_matrix
from ava_ext.ops.row_evaluation import RowStatistics, evaluate_rows
from ava_ext.ops.row_fields import IDS_ARE_PRESENT, N_SUMMARIES, TAIL_ID, RowFlags, RowInputs, RowLoss
from ava_ext.ops.row_statistics import statistics_coefficients
from ava_ext.ops.shard_statistics import MergedRows, Shard, local_gradients, local_view, measure
from ava_ext.ops.sharded_logits import ShardedLogits


def vocabulary_parallel_row_loss(
    logits: ShardedLogits,  # [..., n_columns]
    inputs: RowInputs,  # of [...]
    reduction: str,
    inplace_gradient: bool,
    chunk_bytes: int | None,
    max_counted_rows: int | None,
) -> RowLoss:
    """`row_loss` of ShardedLogits: see there."""
    rows = logits.shape[:-1]
    inputs = inputs.in_one_dimension(rows)
    options, flags, vocab_size = inputs.options, inputs.flags, inputs.vocab_size
    parts, shard = _shard_of(logits, options, flags, vocab_size, chunk_bytes, max_counted_rows)
    row_mask = inputs.targets != inputs.ignore_index
    _check_range("row_loss", "targets", inputs.targets.masked_fill(~row_mask, 0), 0, vocab_size)
    inputs = inputs._replace(targets=inputs.targets.masked_fill(~row_mask, -1), ignore_index=-1)
    ids = inputs.targets.unsqueeze(-1)
    if inputs.candidates is not None:
        of_candidates = inputs.candidates.ids.masked_fill(~row_mask.unsqueeze(-1), -1)  # of other rows: not looked at
        lowest = TAIL_ID if flags & RowFlags.TAIL else -1
        _check_range("row_loss", "candidate_ids", of_candidates, lowest, vocab_size)
        ids = torch.cat([ids, of_candidates], -1)
    loss, terms = _RowLossOfShard.apply(shard, inplace_gradient, (ids, row_mask, inputs), *parts)
    loss, terms = loss.view(rows), terms.view(len(terms), *rows)
    return RowLoss(loss if reduction == "none" else loss.sum(), terms)


def vocabulary_parallel_statistics(
    owner: str,
    logits: ShardedLogits,  # [..., n_columns]
    ids: Tensor | None,  # [..., n_ids]
    row_mask: Tensor | None,  # [...] bool
    options: Tensor,  # [N_OPTIONS]
    flags: int,
    vocab_size: int,
    chunk_bytes: int | None,
    max_counted_rows: int | None,
) -> tuple[Tensor, Tensor]:  # [..., n_ids], [N_SUMMARIES, ...]
    """log_probs and summaries of `softmax_statistics` of ShardedLogits; owner begins the messages."""
    rows, lowest = logits.shape[:-1], 0 if flags & IDS_ARE_PRESENT else -1
    flags = flags & ~IDS_ARE_PRESENT  # each rank has the ids of other ranks' columns as absent
    parts, shard = _shard_of(logits, options, flags, vocab_size, chunk_bytes, max_counted_rows)
    if ids is None:
        ids = torch.empty((*rows, 0), dtype=torch.int32, device=logits.device)
    if row_mask is None:
        row_mask = torch.ones(rows, dtype=torch.bool, device=logits.device)
    is_masked = ~row_mask.unsqueeze(-1)  # what such rows hold is not looked at
    _check_range(owner, "ids", ids.masked_fill(is_masked, lowest), lowest, shard.vocab_size)
    ids = ids.masked_fill(is_masked, -1)
    arguments = (as_matrix(ids), row_mask.reshape(-1))
    log_probs, summaries = _StatisticsOfShard.apply(shard, arguments, *parts)
    return log_probs.view(ids.shape), summaries.view(N_SUMMARIES, *rows)


def _shard_of(
    logits: ShardedLogits,  # [..., n_columns]
    options: Tensor,  # [N_OPTIONS]
    flags: int,
    vocab_size: int,
    chunk_bytes: int | None,
    max_counted_rows: int | None,
) -> tuple[tuple[Tensor | None, ...], Shard]:
    """The local logits as a matrix, or the parts of LinearLogits, and what is to be known of their columns."""
    first_column, n_columns = logits.place()
    local, group = logits.logits, logits.process_group()
    if not 1 <= vocab_size <= n_columns:
        raise ValueError(f"sharded_logits: expected vocab_size in [1, {n_columns}], got {vocab_size}")
    columns, limits = (first_column, local.shape[-1], vocab_size), (chunk_bytes, max_counted_rows)
    shard = Shard(group, *columns, options, flags, local.dtype, *limits)
    if isinstance(local, LinearLogits):
        local.check("sharded_logits")
        states = _SumOfGradients.apply(local.hidden_states, group)
        return (as_matrix(states), *local[1:]), shard
    return (as_matrix(with_dense_rows(local)),), shard


def _check_range(
    owner: str,
    name: str,
    ids: Tensor,  # [...]
    lowest: int,  # -1 where ids may be absent
    vocab_size: int,
) -> None:
    """IndexError on an id out of range; on a GPU the device asserts it. Another rank's columns are in range."""
    if ids.numel() == 0:
        return
    least, greatest = torch.aminmax(ids)
    fit = (least >= lowest) & (greatest < vocab_size)
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(fit, f"{owner}: {name} out of range")
    elif not fit:
        position = int(((ids < lowest) | (ids >= vocab_size)).flatten().nonzero()[0])
        raise IndexError(
            f"{owner}: expected {name} in [0, {vocab_size}), got {int(ids.flatten()[position])} at position {position}"
        )


class _SumOfGradients(torch.autograd.Function):
    """What every rank has; in backward, the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, values, group):
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


def _save(ctx: Any, shard: Shard, parts: tuple[Tensor | None, ...], *tensors: Tensor) -> None:
    ctx.shard, ctx.n_parts = shard._replace(options=None), len(parts)  # type: ignore[arg-type]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*parts, shard.options, *tensors)


def _saved(ctx: Any) -> tuple[tuple[Tensor | None, ...], Shard, list[Tensor]]:
    saved = ctx.saved_tensors  # read once: under activation checkpointing a second look raises
    parts, (options, *tensors) = saved[: ctx.n_parts], saved[ctx.n_parts :]
    return parts, ctx.shard._replace(options=options), tensors


def _gradients(
    parts: tuple[Tensor | None, ...],
    of_rows: tuple[Tensor, Tensor],  # [n_rows, N_STATISTICS], [n_rows, N_ROW_COEFFICIENTS + n_ids]
    ids: Tensor,  # [n_rows, n_ids]
    row_mask: Tensor,  # [n_rows]
    shard: Shard,
    wanted: list[bool],
    upstream: tuple[Tensor | None, ...],
    inplace: bool = False,
) -> tuple[Tensor | None, ...]:
    detached = tuple(None if part is None else part.detach() for part in parts)
    gradients = local_gradients(detached, *of_rows, ids, row_mask, shard, wanted, inplace)
    if inplace and parts[0] is not None:
        torch.autograd.graph.increment_version(parts[0])  # whoever saved the logits too is told so by autograd
    origins = (*parts, *upstream)
    return tuple(None if gradient is None else without_second_derivative(gradient, *origins) for gradient in gradients)


class _RowLossOfShard(torch.autograd.Function):
    """(loss [n_rows], terms [n_terms, n_rows]) of the local logits, or of the parts of LinearLogits."""

    @staticmethod
    def forward(ctx, shard, inplace, arguments, *parts):
        ids, row_mask, inputs = arguments
        logits = LinearLogits(*parts) if len(parts) > 1 else parts[0]
        merged = measure(logits, ids, row_mask, shard)
        row = RowStatistics(*merged.statistics.unbind(-1))
        loss, terms, coefficients = evaluate_rows(row, inputs, merged.u, ids == row.argmax.unsqueeze(-1))
        ctx.inplace = inplace
        _save(ctx, shard, parts, ids, row_mask, *local_view(merged, coefficients, ids, shard))
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    def backward(ctx, grad_loss, _):
        nothing, wanted = (None,) * 3, list(ctx.needs_input_grad[3:])
        if grad_loss is None or not any(wanted):
            return *nothing, *(None for _ in wanted)
        parts, shard, (ids, row_mask, statistics, coefficients) = _saved(ctx)
        coefficients = coefficients * grad_loss.masked_fill(~row_mask, 0).unsqueeze(-1)
        of_rows = (statistics, coefficients)
        inplace = ctx.inplace and not torch.compiler.is_compiling()
        gradients = _gradients(parts, of_rows, ids, row_mask, shard, wanted, (grad_loss,), inplace)
        return *nothing, *gradients


class _StatisticsOfShard(torch.autograd.Function):
    """(log_probs [n_rows, n_ids], summaries [N_SUMMARIES, n_rows])."""

    @staticmethod
    def forward(ctx, shard, arguments, *parts):
        ids, row_mask = arguments
        logits = LinearLogits(*parts) if len(parts) > 1 else parts[0]
        merged = measure(logits, ids, row_mask, shard)
        maximum, _, rest, weighted, sum_u, count = merged.statistics.unbind(-1)
        total = rest.log1p()
        summaries = torch.stack(
            [total - weighted / (1 + rest), maximum / shard.options[0] + total, rest.log(), sum_u / count - total]
        )
        is_argmax = ids == merged.statistics[:, 1:2]
        log_probs = torch.where(is_argmax, 0.0, merged.u) - total.unsqueeze(-1)
        log_probs = torch.where((ids >= 0) & row_mask.unsqueeze(-1), log_probs, 0.0)
        _save(ctx, shard, parts, ids, row_mask, *merged)
        return log_probs, torch.where(row_mask, summaries, 0.0)

    @staticmethod
    def backward(ctx, grad_log_probs, grad_summaries):
        nothing, wanted = (None,) * 2, list(ctx.needs_input_grad[2:])
        if not any(wanted):
            return *nothing, *(None for _ in wanted)
        parts, shard, (ids, row_mask, *fields) = _saved(ctx)
        merged = MergedRows(*fields)
        of_summaries = (None,) * N_SUMMARIES if grad_summaries is None else grad_summaries.unbind(0)
        coefficients = statistics_coefficients(merged.statistics, ids, row_mask, grad_log_probs, of_summaries)
        of_rows, upstream = local_view(merged, coefficients, ids, shard), (grad_log_probs, grad_summaries)
        gradients = _gradients(parts, of_rows, ids, row_mask, shard, wanted, upstream)
        return *nothing, *gradients
