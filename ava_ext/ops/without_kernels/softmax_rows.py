"""Rows of logits as PyTorch operators; the formulas stand in csrc/softmax_rows.h, and the names are the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ava_ext.ops.gradient_layout import new_gradient
from ava_ext.ops.row_evaluation import ColumnWeightSums, RowOptions, RowStatistics, bounded, evaluate_rows
from ava_ext.ops.row_fields import (
    COLUMN_WEIGHT_FLAGS,
    IDS_ARE_PRESENT,
    N_ROW_COEFFICIENTS,
    N_STATISTICS,
    RANKS,
    TAIL_ID,
    TARGET_PROBABILITIES,
    RowFlags,
    accumulation_dtype,
)

LOWEST_U = -1000.0  # e^u is 0, and u e^u too: what stands for a lower u beside its e^u


class _Columns(NamedTuple):
    """All [..., vocab_size]."""

    u: Tensor  # -inf where masked
    is_argmax: Tensor
    probability: Tensor
    cap_slope: Tensor | None


def _check(op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise RuntimeError(f"{op}: expected {name} of shape {list(shape)}, got {list(tensor.shape)}")


def _check_rows(op: str, logits: Tensor, options: Tensor, vocab_size: int) -> None:
    if logits.dim() < 1 or not 1 <= vocab_size <= logits.shape[-1]:
        raise RuntimeError(f"{op}: expected vocab_size in [1, n_columns], got {vocab_size} and {list(logits.shape)}")
    _check(op, "options", options, (len(RowOptions._fields),))


def _capped(
    logits: Tensor,  # [..., n_columns]
    options: RowOptions,
    flags: int,
    vocab_size: int,
) -> tuple[Tensor, Tensor | None]:  # [..., vocab_size] and the derivative, or None for 1
    x = logits[..., :vocab_size].to(accumulation_dtype(logits.dtype))
    if not flags & RowFlags.SOFTCAP:
        return x, None
    tanh = torch.tanh(x / options.softcap)
    return torch.where(x == -math.inf, x, options.softcap * tanh), 1 - tanh * tanh


def _u_of(
    value: Tensor,  # [..., vocab_size]
    row_max: Tensor,  # [...]
    argmax: Tensor,  # [...]
    temperature: Tensor,  # []
) -> tuple[Tensor, Tensor]:  # u and is_argmax, both [..., vocab_size]
    places = torch.arange(value.shape[-1], device=value.device)
    is_argmax = places == argmax.unsqueeze(-1)
    shift = torch.where(row_max == -math.inf, 0, row_max).unsqueeze(-1)
    # -inf is for masked columns alone
    u = ((value - shift) / temperature).clamp_min(torch.finfo(value.dtype).min).masked_fill(is_argmax, 0)
    return u.masked_fill(value == -math.inf, -math.inf), is_argmax


def _measure(
    logits: Tensor,  # [..., n_columns]
    options: RowOptions,
    flags: int,
    vocab_size: int,
    measured: Tensor | None,  # [...] bool
) -> tuple[RowStatistics, _Columns]:
    value, cap_slope = _capped(logits, options, flags, vocab_size)
    present = value > -math.inf  # a nan is not: it travels in R
    sortable = torch.where(present, value, -math.inf)
    argmax = sortable.argmax(-1)
    row_max = sortable.gather(-1, argmax.unsqueeze(-1)).squeeze(-1)
    argmax = torch.where(row_max == -math.inf, -1, argmax)
    u, is_argmax = _u_of(value, row_max, argmax, options.temperature)
    exponential = u.exp()
    rest = exponential.masked_fill(is_argmax, 0).sum(-1)
    weighted = torch.where(present, u.clamp_min(LOWEST_U) * exponential, 0).sum(-1)
    n_present = present.sum(-1).to(u.dtype)
    rest = rest.masked_fill(row_max == math.inf, math.nan)  # as in torch
    # a row of nothing but nan is not left out, as one of nothing but masked columns is
    is_nan = (n_present == 0) & rest.isnan()
    row_max, n_present = row_max.masked_fill(is_nan, math.nan), n_present.masked_fill(is_nan, 1)
    row = RowStatistics(row_max, argmax.to(u.dtype), rest, weighted, torch.where(present, u, 0).sum(-1), n_present)
    if measured is not None:
        nothing = (-math.inf, -1, 0, 0, 0, 0)
        row = RowStatistics(*(torch.where(measured, field, empty) for field, empty in zip(row, nothing, strict=True)))
    return row, _Columns(u, is_argmax, exponential / (1 + row.rest).unsqueeze(-1), cap_slope)


def _places(
    ids: Tensor,  # [..., n_ids]
    counted: Tensor | None,  # [..., 1] bool
    flags: int,
) -> Tensor:  # [..., n_ids]
    """Where to gather: column 0 for an absent id and in a row that does not count. Out of range is torch's error."""
    places = ids.long()
    if not flags & IDS_ARE_PRESENT:
        places = torch.where(places == -1, 0, places)
    if flags & RowFlags.TAIL:
        places = torch.where(places == TAIL_ID, 0, places)
    return places if counted is None else torch.where(counted, places, 0)


def _checked_weights(
    op: str,
    column_weights: Tensor | None,  # [..., vocab_size] or more columns
    like: _Columns,
    flags: int,
) -> Tensor | None:  # [..., vocab_size]
    if (column_weights is not None) != bool(flags & COLUMN_WEIGHT_FLAGS):
        got = "none" if column_weights is None else "column_weights"
        raise RuntimeError(
            f"{op}: expected column_weights with the flags of probabilities or of smoothing weights, and with no "
            f"other, got {got}"
        )
    if column_weights is None:
        return None
    vocab_size = like.u.shape[-1]
    if column_weights.shape[:-1] not in (like.u.shape[:-1], ()) or column_weights.shape[-1] < vocab_size:
        raise RuntimeError(
            f"{op}: expected column_weights of shape {list(like.u.shape)} or with more columns, got "
            f"{list(column_weights.shape)}"
        )
    return column_weights[..., :vocab_size].to(like.u.dtype)


def _sum_weights(
    q: Tensor,  # [..., vocab_size]
    columns: _Columns,
    flags: int,
) -> ColumnWeightSums:
    if not flags & TARGET_PROBABILITIES:
        q = torch.where(columns.u == -math.inf, 0, q)
    at_maximum = torch.where(columns.is_argmax, q, 0).sum(-1)
    weighted = torch.where(q == 0, 0, q * columns.u).sum(-1)
    return ColumnWeightSums(torch.where(columns.is_argmax, 0, q).sum(-1), at_maximum, weighted)


def _ranks(
    logits: Tensor,  # [..., vocab_size]
    targets: Tensor,  # [...], -1 where the row does not count
    argmax: Tensor,  # [...]
) -> Tensor:  # [N_RANKS, ...]
    own = logits.gather(-1, targets.clamp_min(0).unsqueeze(-1))
    rank = torch.where(own.isnan(), True, logits > own).sum(-1)
    return torch.where(targets < 0, 0, 1 + torch.stack([rank.to(argmax.dtype), argmax]))


def _is_named(
    ids: Tensor,  # [..., n_ids]
    n_columns: int,
) -> Tensor:  # [..., n_columns] bool
    """Whether a column's id stands behind TAIL_ID."""
    behind = ((ids == TAIL_ID).cumsum(-1) > 0) & (ids >= 0)
    named = ids.new_zeros((*ids.shape[:-1], n_columns), dtype=torch.int64)
    return named.scatter_add_(-1, ids.clamp_min(0).long(), behind.long()) > 0


def _u_of_ids(
    u: Tensor,  # [..., vocab_size]
    at: Tensor,  # [..., n_ids]: their columns
    ids: Tensor,  # [..., n_ids]
    flags: int,
) -> Tensor:  # [..., n_ids]
    """u of each id; of TAIL_ID log sum e^u over the columns that are not named."""
    of_ids = u.gather(-1, at)
    if not flags & RowFlags.TAIL:
        return of_ids
    mass = u.masked_fill(_is_named(ids, u.shape[-1]), -math.inf).exp().sum(-1, keepdim=True)
    return torch.where(ids == TAIL_ID, mass.log(), of_ids)


def _gradient(
    logits: Tensor,  # [..., n_columns]
    options: RowOptions,
    row: RowStatistics,
    columns: _Columns,
    coefficients: Sequence[Tensor],  # a, b, k, each [...]
    ids: Tensor,  # [..., n_ids], -1: absent
    own: Tensor,  # [..., n_ids]: s of each
    flags: int,
    of_columns: Tensor | None = None,  # [..., vocab_size]: s of every column
) -> Tensor:  # [..., n_columns]
    """(1) of csrc/softmax_rows.h, rounded once."""
    own = bounded(own, options.temperature)
    of_tail = torch.where(ids == TAIL_ID, own, 0).sum(-1, keepdim=True)
    own = own.masked_fill(ids < 0, 0)
    probability, entropy, constant = (c.unsqueeze(-1) for c in coefficients)
    rest, argmax = row.rest.unsqueeze(-1), row.argmax.unsqueeze(-1)
    mean_u = row.weighted.unsqueeze(-1) / (1 + rest)
    at_maximum = ids == argmax
    # apart from each other: where a row is sure, s of the maximum may be 1e30
    maximum = torch.where(at_maximum, own, 0).sum(-1, keepdim=True)
    others = torch.where(at_maximum, 0, own).sum(-1, keepdim=True)
    by_column = torch.zeros_like(columns.u).scatter_add_(-1, ids.clamp_min(0).long(), own)
    if of_columns is not None:
        # at the maximum as an id's; the others' -s p_j is in the coefficient of p_j, but for the maximum's
        at_top = torch.where(columns.is_argmax, of_columns, 0)
        maximum = maximum + at_top.sum(-1, keepdim=True)
        by_column = by_column + at_top
        constant = constant + of_columns - at_top
    p, u = columns.probability, columns.u.clamp_min(LOWEST_U)
    elsewhere = torch.where(columns.is_argmax, others, others - by_column + maximum)
    complement = torch.where(columns.is_argmax, rest / (1 + rest), 1 - p)
    gradient = p * (probability - elsewhere + entropy * (u - mean_u)) + constant + by_column * complement
    if flags & RowFlags.TAIL:
        gradient = gradient + torch.where(_is_named(ids, p.shape[-1]), 0, of_tail * p)
    gradient = gradient / options.temperature
    if columns.cap_slope is not None:
        gradient = gradient * columns.cap_slope
    left_out = (columns.u == -math.inf) | (row.n_present == 0).unsqueeze(-1)
    padding = logits.shape[-1] - columns.u.shape[-1]
    gradient = torch.nn.functional.pad(gradient.masked_fill(left_out, 0).to(logits.dtype), (0, padding))
    placed = new_gradient(logits)
    is_in_place = placed.stride() == gradient.stride() and placed.storage_offset() == 0
    return gradient if is_in_place else placed.copy_(gradient)


def row_loss(
    logits: Tensor,  # [..., n_columns]
    targets: Tensor,  # [...]
    options: Tensor,  # [8]
    row_weights: Tensor | None,  # [...]
    candidate_ids: Tensor | None,  # [..., n_candidates]
    candidate_weights: Tensor | None,  # [..., n_candidates]
    candidate_groups: Sequence[int] | None,
    flags: int,
    vocab_size: int,
    ignore_index: int,
    with_gradient: bool,
    with_statistics: bool,
    column_weights: Tensor | None = None,  # [..., vocab_size]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row_loss, row_terms, grad_logits, statistics, row_coefficients); see csrc/library.cpp."""
    rows = tuple(logits.shape[:-1])
    _check_rows("row_loss", logits, options, vocab_size)
    _check("row_loss", "targets", targets, rows)
    _check("row_loss", "row_weights", row_weights, rows)
    values, counts = RowOptions(*options.unbind()), targets != ignore_index
    row, columns = _measure(logits, values, flags, vocab_size, counts)
    q = _checked_weights("row_loss", column_weights, columns, flags)
    counted_targets = torch.where(counts, targets, -1)
    at, ids = torch.where(counts, targets, 0).unsqueeze(-1), counted_targets.unsqueeze(-1)
    if candidate_ids is not None and candidate_weights is not None:
        _check("row_loss", "candidate_weights", candidate_weights, tuple(candidate_ids.shape))
        counted = counts.unsqueeze(-1)
        at = torch.cat([at, _places(candidate_ids, counted, flags)], -1)
        ids = torch.cat([ids, torch.where(counted, candidate_ids.long(), -1)], -1)
    loss, terms, coefficients = evaluate_rows(
        row,
        values,
        flags,
        counted_targets,
        _u_of_ids(columns.u, at, ids, flags),
        columns.is_argmax.gather(-1, at),
        row_weights,
        candidate_ids,
        candidate_weights,
        candidate_groups or (),
        None if q is None else _sum_weights(q, columns, flags),
    )
    if flags & RANKS:
        terms = torch.cat([terms, _ranks(logits[..., :vocab_size], counted_targets, row.argmax)])
    gradient, statistics, saved = logits.new_empty(0), loss.new_empty(0), loss.new_empty(0)
    if with_gradient:
        of_row, own = coefficients[..., :3].unbind(-1), coefficients[..., N_ROW_COEFFICIENTS:]
        of_columns = None if q is None else q * coefficients[..., 3:4]
        gradient = _gradient(logits, values, row, columns, of_row, ids, own, flags, of_columns)
    if with_statistics:
        statistics, saved = torch.stack(row, -1), coefficients
    return loss, terms, gradient, statistics, saved


def row_loss_(
    logits: Tensor,  # [..., n_columns]
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """row_loss whose gradient is written over the logits; the same arguments but with_gradient and with_statistics."""
    loss, terms, gradient, _, _ = row_loss(logits, *(*arguments[:9], True, False, *arguments[9:]))
    logits.copy_(gradient)
    return loss, terms


def row_statistics(
    logits: Tensor,  # [..., n_columns]
    ids: Tensor | None,  # [..., n_ids]
    row_mask: Tensor | None,  # [...]
    options: Tensor,  # [8]
    flags: int,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(statistics [..., 6], log_probs [..., n_ids], summaries [4, ...])."""
    _check_rows("row_statistics", logits, options, vocab_size)
    _check("row_statistics", "row_mask", row_mask, tuple(logits.shape[:-1]))
    row, columns = _measure(logits, RowOptions(*options.unbind()), flags, vocab_size, row_mask)
    total = row.rest.log1p()
    summaries = torch.stack(
        [
            total - row.weighted / (1 + row.rest),
            row.max / options[0] + total,
            row.rest.log(),
            row.total_u / row.n_present - total,
        ]
    )
    log_probs = row.rest.new_empty(*row.rest.shape, 0)
    if ids is not None:
        at = _places(ids, None if row_mask is None else row_mask.unsqueeze(-1), flags)
        log_probs = _u_of_ids(columns.u, at, ids, flags) - total.unsqueeze(-1)
        log_probs = log_probs.masked_fill((ids < 0) & (ids != TAIL_ID), 0)
    if row_mask is not None:
        summaries = torch.where(row_mask, summaries, 0)
        log_probs = torch.where(row_mask.unsqueeze(-1), log_probs, 0)
    return torch.stack(row, -1), log_probs, summaries


def row_gradient(
    logits: Tensor,  # [..., n_columns]
    statistics: Tensor,  # [..., N_STATISTICS]
    row_coefficients: Tensor,  # [..., 4 + n_ids]
    ids: Tensor | None,  # [..., n_ids]
    options: Tensor,  # [8]
    flags: int,
    vocab_size: int,
    column_weights: Tensor | None = None,  # [..., vocab_size]
) -> Tensor:  # [..., n_columns]
    """The gradient from statistics and coefficients."""
    rows = tuple(logits.shape[:-1])
    _check_rows("row_gradient", logits, options, vocab_size)
    _check("row_gradient", "statistics", statistics, (*rows, N_STATISTICS))
    n_ids = 0 if ids is None else ids.shape[-1]
    _check("row_gradient", "row_coefficients", row_coefficients, (*rows, 4 + n_ids))
    values, row = RowOptions(*options.unbind()), RowStatistics(*statistics.unbind(-1))
    value, cap_slope = _capped(logits, values, flags, vocab_size)
    u, is_argmax = _u_of(value, row.max, row.argmax, values.temperature)
    columns = _Columns(u, is_argmax, u.exp() / (1 + row.rest).unsqueeze(-1), cap_slope)
    q = _checked_weights("row_gradient", column_weights, columns, flags)
    named = row.argmax.long().unsqueeze(-1)  # i*, whose s is the fourth coefficient
    of_columns = None
    if q is not None:
        named, of_columns = torch.full_like(named, -1), q * row_coefficients[..., 3:4]
    if ids is not None:
        named = torch.cat([named, torch.where((row.n_present == 0).unsqueeze(-1), -1, ids.long())], -1)
    of_row, own = row_coefficients[..., :3].unbind(-1), row_coefficients[..., 3:]
    return _gradient(logits, values, row, columns, of_row, named, own, flags, of_columns)


def row_gradient_(
    logits: Tensor,  # [..., n_columns]
    *arguments: Any,
) -> None:
    """row_gradient written over the logits; the same arguments."""
    logits.copy_(row_gradient(logits, *arguments))


def scale_rows_(
    rows: Tensor,  # [..., n_columns]
    factors: Tensor,  # [...]
    targets: Tensor | None = None,  # [...]
    ignore_index: int = -100,
) -> None:
    """Multiplies each row by its factor, in place, but for those whose target is ignore_index."""
    _check("scale_rows_", "factors", factors, tuple(rows.shape[:-1]))
    _check("scale_rows_", "targets", targets, tuple(rows.shape[:-1]))
    if targets is not None:
        factors = torch.where(targets == ignore_index, 1, factors)
    rows.copy_(rows.to(factors.dtype) * factors.unsqueeze(-1))
