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
    Candidates,
    RowFlags,
    RowInputs,
    accumulation_dtype,
)

LOWEST_U = -1000.0  # e^u is 0, and u e^u too: what stands for a lower u beside its e^u
# terms that need more of a row than its maximum and R: kDenseFlags of csrc/softmax_rows.h, and the soft cap
_DENSE_FLAGS = (
    RowFlags.LABEL_SMOOTHING
    | RowFlags.CONFIDENCE_PENALTY
    | RowFlags.ENTROPY
    | RowFlags.EAFT
    | RowFlags.SOFTCAP
    | COLUMN_WEIGHT_FLAGS
)


class _Columns(NamedTuple):
    """What is as large as the logits, all [..., vocab_size]; of the maximum's column e^u and u are 0."""

    exponential: Tensor  # e^u
    u: Tensor | None  # this and the next only with _DENSE_FLAGS
    is_masked: Tensor | None
    cap_slope: Tensor | None


def _check(op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise RuntimeError(f"{op}: expected {name} of shape {list(shape)}, got {list(tensor.shape)}")


def _check_rows(op: str, logits: Tensor, options: Tensor, vocab_size: int) -> None:
    if logits.dim() < 1 or not 1 <= vocab_size <= logits.shape[-1]:
        raise RuntimeError(f"{op}: expected vocab_size in [1, n_columns], got {vocab_size} and {list(logits.shape)}")
    _check(op, "options", options, (len(RowOptions._fields),))


def _capped(
    logits: Tensor,  # [...]
    options: RowOptions,
    flags: int,
) -> tuple[Tensor, Tensor | None]:  # [...] and the derivative, or None for 1
    x = logits.to(accumulation_dtype(logits.dtype))
    if not flags & RowFlags.SOFTCAP:
        return x, None
    tanh = torch.tanh(x / options.softcap)
    return torch.where(x == -math.inf, x, options.softcap * tanh), 1 - tanh * tanh


def _place_of_maximum(
    argmax: Tensor,  # [...]: -1, or another rank's column, where it is none of these
    n_columns: int,
) -> tuple[Tensor, Tensor]:  # [..., 1]: its column, 0 where there is none, and whether there is one
    has_argmax = ((argmax >= 0) & (argmax < n_columns)).unsqueeze(-1)
    return torch.where(has_argmax, argmax.long().unsqueeze(-1), 0), has_argmax


def _without_maximum(
    values: Tensor,  # [..., vocab_size]
    argmax: Tensor,  # [...]
) -> Tensor:
    """0 in its place, written over the values."""
    place, has_argmax = _place_of_maximum(argmax, values.shape[-1])
    return values.scatter_(-1, place, values.gather(-1, place).masked_fill_(has_argmax, 0))


def _columns_of(
    value: Tensor,  # [..., vocab_size]
    cap_slope: Tensor | None,  # [..., vocab_size]
    row_max: Tensor,  # [...]
    argmax: Tensor,  # [...]
    temperature: Tensor,  # []
    flags: int,
) -> _Columns:
    shift = row_max.masked_fill(row_max == -math.inf, 0).unsqueeze(-1)
    u = _without_maximum((value - shift).div_(temperature), argmax)
    if not flags & _DENSE_FLAGS:
        return _Columns(_without_maximum(u.exp_(), argmax), None, None, cap_slope)
    return _Columns(_without_maximum(u.exp(), argmax), u, value == -math.inf, cap_slope)


def _measure(
    logits: Tensor,  # [..., vocab_size]
    options: RowOptions,
    flags: int,
    measured: Tensor | None,  # [...] bool
) -> tuple[RowStatistics, _Columns]:
    value, cap_slope = _capped(logits, options, flags)
    # a nan is not the maximum: it travels in R
    row_max, argmax = value.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).max(-1)
    argmax = argmax.masked_fill(row_max == -math.inf, -1)
    columns = _columns_of(value, cap_slope, row_max, argmax, options.temperature, flags)
    rest = columns.exponential.sum(-1).masked_fill(row_max == math.inf, math.nan)  # as in torch
    # a row of nothing but nan is not left out, as one of nothing but masked columns is
    row_max = row_max.masked_fill((row_max == -math.inf) & rest.isnan(), math.nan)
    weighted, total_u, n_present = torch.zeros_like(rest), torch.zeros_like(rest), (row_max != -math.inf).to(rest.dtype)
    if columns.u is not None and columns.is_masked is not None:
        weighted = (columns.u.clamp_min(LOWEST_U) * columns.exponential).sum(-1)
        total_u = columns.u.masked_fill(columns.is_masked, 0).sum(-1)
        n_present = (value.shape[-1] - columns.is_masked.sum(-1)).to(rest.dtype)
    row = RowStatistics(row_max, argmax.to(rest.dtype), rest, weighted, total_u, n_present)
    if measured is not None:
        nothing = (-math.inf, -1, 0, 0, 0, 0)
        row = RowStatistics(*(torch.where(measured, field, empty) for field, empty in zip(row, nothing, strict=True)))
    return row, columns


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
    logits: Tensor,  # [..., vocab_size]
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
    vocab_size = logits.shape[-1]
    if column_weights.shape[:-1] not in (logits.shape[:-1], ()) or column_weights.shape[-1] < vocab_size:
        raise RuntimeError(
            f"{op}: expected column_weights of shape {list(logits.shape)} or with more columns, got "
            f"{list(column_weights.shape)}"
        )
    return column_weights[..., :vocab_size].to(accumulation_dtype(logits.dtype)).expand(logits.shape)


def _sum_weights(
    q: Tensor,  # [..., vocab_size]
    columns: _Columns,
    argmax: Tensor,  # [...]
    flags: int,
) -> ColumnWeightSums:
    u, is_masked = columns.u, columns.is_masked
    assert u is not None and is_masked is not None  # the flags of weights are dense
    if not flags & TARGET_PROBABILITIES:
        q = q.masked_fill(is_masked, 0)
    place, has_argmax = _place_of_maximum(argmax, q.shape[-1])
    at_maximum = q.gather(-1, place).masked_fill(~has_argmax, 0).squeeze(-1)
    weighted = (q * u).masked_fill_(q == 0, 0).sum(-1)
    return ColumnWeightSums(_without_maximum(q.clone(), argmax).sum(-1), at_maximum, weighted)


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


def _u_at(
    logits: Tensor,  # [..., vocab_size]
    places: Tensor,  # [..., n_ids]
    row: RowStatistics,
    options: RowOptions,
    flags: int,
) -> tuple[Tensor, Tensor]:  # u, -inf where masked, and is_argmax, both [..., n_ids]
    value, _ = _capped(logits.gather(-1, places), options, flags)
    is_argmax = places == row.argmax.unsqueeze(-1)
    shift = row.max.masked_fill(row.max == -math.inf, 0).unsqueeze(-1)
    u = ((value - shift) / options.temperature).clamp_min(torch.finfo(value.dtype).min)
    return u.masked_fill(value == -math.inf, -math.inf).masked_fill(is_argmax, 0), is_argmax


def _with_tail(
    u: Tensor,  # [..., n_ids]
    ids: Tensor,  # [..., n_ids]
    columns: _Columns,
    argmax: Tensor,  # [...]
) -> Tensor:  # [..., n_ids]
    """u of each id; of TAIL_ID log sum e^u over the columns that are not named."""
    is_named = _is_named(ids, columns.exponential.shape[-1])
    place, has_argmax = _place_of_maximum(argmax, is_named.shape[-1])
    of_maximum = has_argmax & ~is_named.gather(-1, place)
    mass = columns.exponential.masked_fill(is_named, 0).sum(-1, keepdim=True) + of_maximum.to(u.dtype)
    return torch.where(ids == TAIL_ID, mass.log(), u)


def _gradient(
    logits: Tensor,  # [..., vocab_size]
    options: RowOptions,
    row: RowStatistics,
    columns: _Columns,
    coefficients: Tensor,  # [..., N_ROW_COEFFICIENTS + n_ids]
    ids: Tensor,  # [..., n_ids], -1: absent
    q: Tensor | None,  # [..., vocab_size]: the weights of the columns
    flags: int,
) -> Tensor:  # [..., vocab_size] in the accumulation type
    """(1) of csrc/softmax_rows.h: dense_gradient, and sparse_gradient at the ids and the maximum."""
    n_columns, inverse_total = logits.shape[-1], (1 / (1 + row.rest)).unsqueeze(-1)
    probability, entropy, constant, at_maximum = coefficients[..., :N_ROW_COEFFICIENTS].split(1, -1)
    own = coefficients[..., N_ROW_COEFFICIENTS:]
    mean_u = row.weighted.unsqueeze(-1) * inverse_total
    place, has_argmax = _place_of_maximum(row.argmax, n_columns)
    of_columns = None if q is None else q * at_maximum
    if of_columns is not None:
        at_maximum = of_columns.gather(-1, place)
    # an absent id, and a maximum that is not here, stand as column 0 with an s of 0
    places = torch.cat([ids.clamp_min(0).long(), place], -1)
    s = torch.cat([own.masked_fill(ids < 0, 0), at_maximum.masked_fill(~has_argmax, 0)], -1)
    of_places = torch.zeros_like(columns.exponential).scatter_add_(-1, places, s).gather(-1, places)
    of_places = bounded(of_places, options.temperature)
    u, is_argmax = _u_at(logits, places, row, options, flags)
    # apart from each other: where a row is sure, s of the maximum may be 1e30
    maximum = bounded(torch.where(is_argmax, s, 0).sum(-1, keepdim=True), options.temperature)
    others = bounded(torch.where(is_argmax, 0, s).sum(-1, keepdim=True), options.temperature)

    p = u.exp() * inverse_total
    elsewhere = torch.where(is_argmax, others, others - of_places + maximum)
    complement = torch.where(is_argmax, row.rest.unsqueeze(-1) * inverse_total, 1 - p)
    at_places = p * (probability - elsewhere + entropy * (u.clamp_min(LOWEST_U) - mean_u)) + of_places * complement
    at_places = at_places + constant
    factor = probability - others - maximum - entropy * mean_u
    if of_columns is not None:  # s_j of every column but the maximum; what -s_j p gives is in `probability` already
        at_places = at_places + of_columns.gather(-1, places).masked_fill(is_argmax, 0)
        constant = constant + of_columns
    if flags & RowFlags.TAIL:
        of_tail = bounded(torch.where(ids == TAIL_ID, own, 0).sum(-1, keepdim=True), options.temperature)
        is_named = _is_named(ids, n_columns)
        at_places = at_places + (p * of_tail).masked_fill(is_named.gather(-1, places), 0)
        factor = torch.where(is_named, factor, factor + of_tail)

    gradient = columns.exponential * (bounded(factor, options.temperature) * inverse_total / options.temperature)
    if columns.u is not None and columns.is_masked is not None:
        slope = entropy * inverse_total / options.temperature
        gradient += columns.u.clamp_min(LOWEST_U).mul_(columns.exponential).mul_(slope)
        gradient = (gradient + constant / options.temperature).masked_fill_(columns.is_masked, 0)
    gradient.scatter_(-1, places, (at_places / options.temperature).masked_fill_(u == -math.inf, 0))
    if columns.cap_slope is not None:
        gradient *= columns.cap_slope
    return gradient.masked_fill_((row.n_present == 0).unsqueeze(-1), 0)


def _like_logits(
    gradient: Tensor,  # [..., vocab_size]
    logits: Tensor,  # [..., n_columns]
) -> Tensor:  # [..., n_columns]
    """Rounded once, where new gradients of these logits lie."""
    gradient, placed = gradient.to(logits.dtype), new_gradient(logits)
    if padding := logits.shape[-1] - gradient.shape[-1]:
        gradient = torch.nn.functional.pad(gradient, (0, padding))
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
    _check_rows("row_loss", logits, options, vocab_size)
    _check("row_loss", "targets", targets, tuple(logits.shape[:-1]))
    _check("row_loss", "row_weights", row_weights, tuple(logits.shape[:-1]))
    x, values, counts = logits[..., :vocab_size], RowOptions(*options.unbind()), targets != ignore_index
    row, columns = _measure(x, values, flags, counts)
    q = _checked_weights("row_loss", column_weights, x, flags)
    counted_targets = torch.where(counts, targets, -1)
    places, ids = torch.where(counts, targets, 0).unsqueeze(-1), counted_targets.unsqueeze(-1)
    candidates = None
    if candidate_ids is not None and candidate_weights is not None:
        candidates = Candidates(candidate_ids, candidate_weights, tuple(candidate_groups or ()))
        _check("row_loss", "candidate_weights", candidate_weights, tuple(candidate_ids.shape))
        counted = counts.unsqueeze(-1)
        places = torch.cat([places, _places(candidate_ids, counted, flags)], -1)
        ids = torch.cat([ids, torch.where(counted, candidate_ids.long(), -1)], -1)
    u, is_argmax = _u_at(x, places, row, values, flags)
    if flags & RowFlags.TAIL:
        u = _with_tail(u, ids, columns, row.argmax)
    weights = None if q is None else _sum_weights(q, columns, row.argmax, flags)
    inputs = RowInputs(counted_targets, options, flags, row_weights, candidates, vocab_size, -1)
    loss, terms, coefficients = evaluate_rows(row, inputs, u, is_argmax, weights)
    if flags & RANKS:
        terms = torch.cat([terms, _ranks(x, counted_targets, row.argmax)])
    gradient, statistics, saved = logits.new_empty(0), loss.new_empty(0), loss.new_empty(0)
    if with_gradient:
        gradient = _like_logits(_gradient(x, values, row, columns, coefficients, ids, q, flags), logits)
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
    logits, values = logits[..., :vocab_size], RowOptions(*options.unbind())
    row, columns = _measure(logits, values, flags, row_mask)
    total = row.rest.log1p()
    summaries = torch.stack(
        [
            total - row.weighted / (1 + row.rest),
            row.max / values.temperature + total,
            row.rest.log(),
            row.total_u / row.n_present - total,
        ]
    )
    log_probs = row.rest.new_empty(*row.rest.shape, 0)
    if ids is not None:
        at = _places(ids, None if row_mask is None else row_mask.unsqueeze(-1), flags)
        u, _ = _u_at(logits, at, row, values, flags)
        if flags & RowFlags.TAIL:
            u = _with_tail(u, ids, columns, row.argmax)
        log_probs = (u - total.unsqueeze(-1)).masked_fill((ids < 0) & (ids != TAIL_ID), 0)
    if row_mask is not None:
        summaries = torch.where(row_mask, summaries, 0)
        log_probs = torch.where(row_mask.unsqueeze(-1), log_probs, 0)
    return torch.stack(row, -1), log_probs, summaries


def row_gradient(
    logits: Tensor,  # [..., n_columns]
    statistics: Tensor,  # [..., N_STATISTICS]
    row_coefficients: Tensor,  # [..., N_ROW_COEFFICIENTS + n_ids]
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
    _check("row_gradient", "row_coefficients", row_coefficients, (*rows, N_ROW_COEFFICIENTS + n_ids))
    x, values, row = logits[..., :vocab_size], RowOptions(*options.unbind()), RowStatistics(*statistics.unbind(-1))
    columns = _columns_of(*_capped(x, values, flags), row.max, row.argmax, values.temperature, flags)
    q = _checked_weights("row_gradient", column_weights, x, flags)
    present = logits.new_empty((*rows, 0), dtype=torch.int64) if ids is None else ids.long()
    present = present.masked_fill((row.n_present == 0).unsqueeze(-1), -1)
    return _like_logits(_gradient(x, values, row, columns, row_coefficients, present, q, flags), logits)


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
