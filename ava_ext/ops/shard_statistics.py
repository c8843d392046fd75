"""Statistics of rows whose columns are spread over ranks: measured apart, gathered once, merged.

The statistics and their merge stand in csrc/softmax_rows.h; here a rank is what a lane is there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ava_ext import _library  # noqa: F401  the operators exist once it is imported
from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.row_evaluation import bounded
from ava_ext.ops.row_fields import N_ROW_COEFFICIENTS, N_STATISTICS, STATISTIC_NAMES, TAIL_ID

_ops = torch.ops.ava_ext
MAX, ARGMAX, COUNT = map(STATISTIC_NAMES.index, ("max", "argmax", "count"))
N_PLACE = 2  # first column and number of columns of a shard, sent along to be checked


class Shard(NamedTuple):
    """The columns of this rank, and how they are read."""

    group: Any
    first_column: int
    n_columns: int  # of this rank
    vocab_size: int  # of all ranks; columns beyond it are padding
    options: Tensor  # [N_OPTIONS]
    flags: int
    dtype: torch.dtype  # of the logits
    chunk_bytes: int | None  # of LinearLogits
    max_counted_rows: int | None

    @property
    def local_vocab_size(self) -> int:
        """How many of this rank's columns are not padding."""
        return min(max(self.vocab_size - self.first_column, 0), self.n_columns)

    def local_ids(
        self,
        ids: Tensor,  # [n_rows, n_ids]
    ) -> Tensor:  # [n_rows, n_ids]
        """Ids as columns of this rank; -1 where they are none. TAIL_ID stays: each rank has columns of the tail."""
        local = ids - self.first_column
        local.masked_fill_((local < 0) | (local >= self.local_vocab_size), -1)
        return local.masked_fill_(ids == TAIL_ID, TAIL_ID)


class MergedRows(NamedTuple):
    """What every rank knows of the rows of the whole logits, and of its own columns."""

    statistics: Tensor  # [n_rows, N_STATISTICS]: of all columns
    u: Tensor  # [n_rows, n_ids]: z - max z of the ids, or log sum e^u of a tail; -inf where masked or absent
    local_count: Tensor  # [n_rows]: this rank's columns that are neither masked nor padding


def measure(
    logits: Tensor | LinearLogits,  # [n_rows, n_local_columns]
    ids: Tensor,  # [n_rows, n_ids], columns of all ranks; -1: absent
    row_mask: Tensor,  # [n_rows] bool: the others are not looked at
    shard: Shard,
) -> MergedRows:
    """Measures the local columns, and merges what every rank has measured, in one all-gather."""
    local_ids = shard.local_ids(ids)
    statistics, log_probs = _measure_locally(logits, local_ids, row_mask, shard)
    statistics[:, ARGMAX] += shard.first_column  # of a row without columns it is never looked at
    log_probs = log_probs.masked_fill((local_ids == -1) | ~row_mask.unsqueeze(-1), -torch.inf)
    gathered = _gather(statistics, log_probs, shard)
    merged, u = _merge(gathered, shard.options[0], ids == TAIL_ID)
    return MergedRows(merged, u, statistics[:, COUNT])


def _measure_locally(
    logits: Tensor | LinearLogits,  # [n_rows, n_local_columns]
    ids: Tensor,  # [n_rows, n_ids]
    row_mask: Tensor,  # [n_rows] bool
    shard: Shard,
) -> tuple[Tensor, Tensor]:  # [n_rows, N_STATISTICS], [n_rows, n_ids]
    vocab_size = shard.local_vocab_size
    if vocab_size == 0:  # nothing but padding
        nothing = shard.options.new_zeros((ids.shape[0], N_STATISTICS))
        nothing[:, MAX].fill_(-torch.inf)
        nothing[:, ARGMAX].fill_(-1)
        return nothing, shard.options.new_full(ids.shape, -torch.inf)
    arguments = (ids, row_mask, shard.options, shard.flags, vocab_size)
    if isinstance(logits, LinearLogits):
        limits = (shard.chunk_bytes, shard.dtype, shard.max_counted_rows)
        return _ops.linear_row_statistics(*logits, *arguments, *limits)[:2]
    return _ops.row_statistics(logits, *arguments)[:2]


def _all_gather(
    received: Tensor,  # [world_size * n]
    sent: Tensor,  # [n]
    group: Any,
) -> None:
    distributed: Any = torch.distributed  # torch 2.13 has renamed it
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    gather(received, sent, group=group)


def _gather(
    statistics: Tensor,  # [n_rows, N_STATISTICS]
    log_probs: Tensor,  # [n_rows, n_ids]
    shard: Shard,
) -> Tensor:  # [world_size, n_rows, N_STATISTICS + n_ids]
    world_size = torch.distributed.get_world_size(shard.group)
    place = [statistics.new_full((1,), number) for number in (shard.first_column, shard.n_columns)]
    measured = torch.cat([statistics, log_probs], 1)
    sent = torch.cat([measured.flatten(), *place])
    received = sent.new_empty(world_size * sent.shape[0])
    _all_gather(received, sent, group=shard.group)
    received = received.view(world_size, -1)
    _check_places(received[:, -N_PLACE:])
    return received[:, :-N_PLACE].unflatten(1, measured.shape)


def _check_places(
    places: Tensor,  # [world_size, N_PLACE]
) -> None:
    """That the shards lie behind each other. On a GPU the device asserts it: the host does not wait."""
    first, n_columns = places.unbind(1)
    fit = (first[1:] == (first + n_columns)[:-1]).all() & (first[0] == 0)
    if places.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(fit, "ava_ext: shards of the vocabulary that do not lie behind each other")
    elif not fit:
        raise ValueError(
            "sharded_logits: expected shards that lie behind each other in the order of the ranks, got columns "
            + ", ".join(f"[{begin:.0f}, {begin + n:.0f})" for begin, n in places.tolist())
            + "; shards of different sizes need first_column and n_columns"
        )


def _merge(
    gathered: Tensor,  # [world_size, n_rows, N_STATISTICS + n_ids]
    temperature: Tensor,  # []
    is_tail: Tensor,  # [n_rows, n_ids] bool
) -> tuple[Tensor, Tensor]:  # [n_rows, N_STATISTICS], [n_rows, n_ids]
    """`merge` of csrc/softmax_rows.h over all ranks at once."""
    top, argmax, rest, weighted, sum_u, count = gathered[..., :N_STATISTICS].unbind(-1)  # [world_size, n_rows]
    top = top.masked_fill(top.isnan(), -torch.inf)  # of nothing but nan, which is never the maximum
    maximum, winner = top.max(0)  # the first of equals, whose columns come first
    is_winner = torch.arange(len(top), device=top.device).unsqueeze(1) == winner
    is_empty = top == -torch.inf
    as_it_is = is_winner | is_empty
    shift = ((top - maximum) / temperature).masked_fill_(as_it_is, 0)
    factor, total, log_total = shift.exp(), 1 + rest, rest.log1p()
    # where a factor is 0, shift * total may be infinite; a nan that an empty part has seen is in its rest
    rest = torch.where(as_it_is, rest, total * factor).sum(0)
    weighted = (factor * (weighted + shift * total)).masked_fill_(is_empty | (factor == 0), 0).sum(0)
    sum_u = (sum_u + shift * count).masked_fill_(is_empty, 0).sum(0)
    merged = [maximum, argmax.gather(0, winner.unsqueeze(0)).squeeze(0), rest, weighted, sum_u, count.sum(0)]
    # a log-probability of a shard is u - log1p(R) there; exactly 0 is added up at its maximum
    u_of_ranks = gathered[..., N_STATISTICS:] + (log_total + shift).unsqueeze(-1)
    u = torch.where(is_tail, u_of_ranks.logsumexp(0), u_of_ranks.amax(0))
    return torch.stack(merged, -1), u


def local_view(
    merged: MergedRows,
    row_coefficients: Tensor,  # [n_rows, N_ROW_COEFFICIENTS + n_ids], of the ids of all ranks
    ids: Tensor,  # [n_rows, n_ids]
    shard: Shard,
) -> tuple[Tensor, Tensor]:  # [n_rows, N_STATISTICS], [n_rows, N_ROW_COEFFICIENTS + n_ids]
    """Statistics and coefficients with which row_gradient writes the gradient of this rank's columns.

    At a column j of another id c, s_c enters as -s_c p_j: what the ids of other ranks have is added to the coefficient
    of p_j. So is that of the maximum, where another rank has it.
    """
    maximum, argmax, rest, weighted, sum_u, _ = merged.statistics.unbind(-1)
    local_argmax = argmax - shard.first_column
    is_local = (local_argmax >= 0) & (local_argmax < shard.local_vocab_size)
    # the number of columns says whether there are masked ones among them: the local number among the local columns
    statistics = [maximum, local_argmax.masked_fill_(~is_local, -1), rest, weighted, sum_u, merged.local_count]
    of_probability, *others, of_maximum = row_coefficients[:, :N_ROW_COEFFICIENTS].unbind(-1)
    is_tail = ids == TAIL_ID
    own = row_coefficients[:, N_ROW_COEFFICIENTS:].masked_fill((ids < 0) & ~is_tail, 0)
    elsewhere = own.masked_fill((shard.local_ids(ids) >= 0) | is_tail, 0).sum(-1) + of_maximum.masked_fill(is_local, 0)
    shapes = torch.stack([of_probability - elsewhere, *others, of_maximum.masked_fill(~is_local, 0)], -1)
    return torch.stack(statistics, -1), torch.cat([shapes, own], -1)


def local_gradients(
    parts: tuple[Tensor | None, ...],  # (logits [n_rows, n_local_columns],) or those of LinearLogits
    statistics: Tensor,  # [n_rows, N_STATISTICS], of local_view
    row_coefficients: Tensor,  # [n_rows, N_ROW_COEFFICIENTS + n_ids]
    ids: Tensor,  # [n_rows, n_ids], columns of all ranks
    row_mask: Tensor,  # [n_rows] bool
    shard: Shard,
    wanted: list[bool],
    inplace: bool,
) -> tuple[Tensor | None, ...]:
    """The gradient of each part; nothing is communicated."""
    vocab_size = shard.local_vocab_size
    if vocab_size == 0:
        return tuple(
            torch.zeros_like(part) if want and part is not None else None
            for part, want in zip(parts, wanted, strict=True)
        )
    row_coefficients = bounded(row_coefficients, shard.options[0])
    of_rows, options = (statistics, row_coefficients, shard.local_ids(ids)), (shard.options, shard.flags, vocab_size)
    if len(parts) > 1:
        constants = (*options, shard.chunk_bytes, shard.dtype, shard.max_counted_rows)
        gradients = _ops.linear_row_gradient(*parts, *of_rows, row_mask, *constants, wanted)
        return tuple(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    (logits,) = parts
    if not inplace:
        return (_ops.row_gradient(logits, *of_rows, *options),)
    _ops.row_gradient_(logits, *of_rows, *options)
    return (logits,)
