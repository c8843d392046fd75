"""Terms and coefficients of rows whose statistics are known: evaluate and unlikelihood of csrc/softmax_rows.h.

For what has no kernel of its own: devices without kernels, and logits whose columns are spread over ranks. The formulas
and names are those of the header.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ava_ext.ops.row_fields import SMOOTHING_WEIGHTS, TAIL_ID, TARGET_PROBABILITIES, RowFlags, RowInputs


class RowOptions(NamedTuple):
    """The tensor of options, apart."""

    temperature: Tensor  # []
    label_smoothing: Tensor
    focal_alpha: Tensor
    focal_gamma: Tensor
    z_loss_weight: Tensor
    confidence_penalty_weight: Tensor
    softcap: Tensor
    reweighting_exponent: Tensor


class RowStatistics(NamedTuple):
    """The tensor of statistics, apart; all [...]."""

    max: Tensor
    argmax: Tensor
    rest: Tensor
    weighted: Tensor
    total_u: Tensor  # U
    n_present: Tensor  # V


class ColumnWeightSums(NamedTuple):
    """Sums over the weights q of the columns; all [...]."""

    rest: Tensor  # of all but that of the maximum
    at_maximum: Tensor
    weighted: Tensor  # of q u


def smallest_rest(dtype: torch.dtype) -> float:
    """What a lower R is taken for where something is divided by it."""
    return 1e-37 if dtype == torch.float32 else 1e-300


def bounded(
    coefficients: Tensor,  # [...]
    temperature: Tensor | None = None,  # []
) -> Tensor:
    """bounded_coefficient of csrc/softmax_rows.h; a nan passes."""
    largest = 2e38 if coefficients.dtype == torch.float32 else 1e308
    if temperature is None:
        return coefficients.clamp(-largest, largest)
    most = temperature.clamp(max=1) * largest
    return coefficients.clamp(-most, most)


def _evaluate(
    row: RowStatistics,
    options: RowOptions,
    flags: int,
    target_is_argmax: Tensor,  # [...]
    target_u: Tensor,  # [...]
    candidate_weights: Tensor | None,  # [..., n_candidates]: with TARGET_WEIGHTS the first is the target's
    column_weights: ColumnWeightSums | None,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The six terms, the coefficients a, b, k and that of the maximum, and s of the target; all [...]."""
    zero = torch.zeros_like(row.rest)
    total, mean_u = row.rest.log1p(), row.weighted / (1 + row.rest)
    has_entropy = (row.n_present > 1) | row.rest.isnan()  # a nan beside at most one column is not hidden either
    nll = torch.where(target_is_argmax, total, total - target_u)
    main, z_loss, confidence, own = zero, zero, zero, zero
    probability, entropy, constant, maximum = zero, zero, zero, zero
    of_columns = zero
    if column_weights is not None:
        of_columns = (column_weights.rest + column_weights.at_maximum) * total - column_weights.weighted
    cross_entropy = of_columns if flags & TARGET_PROBABILITIES else nll
    if flags & RowFlags.CROSS_ENTROPY:
        hard, slope = nll, torch.ones_like(nll)
        if flags & RowFlags.FOCAL:
            other = torch.where(target_is_argmax, row.rest / (1 + row.rest), -torch.expm1(-nll))
            modulation, p = options.focal_alpha * other.pow(options.focal_gamma), (-nll).exp()
            ratio = torch.where(nll < 1e-6, 1, nll / other)
            hard = modulation * nll
            slope = modulation * (1 + torch.where(p == 0, 0, options.focal_gamma * p * ratio))
        if flags & (RowFlags.DFT | RowFlags.EAFT):
            base = (-nll).exp()
            if flags & RowFlags.EAFT:
                base = torch.where(has_entropy, (total - mean_u) / row.n_present.log(), 0)
            weight = base.pow(options.reweighting_exponent)
            hard, slope = torch.where(weight == 0, 0, weight * hard), slope * weight
        if flags & TARGET_PROBABILITIES:
            hard, slope = zero, zero
        elif flags & RowFlags.TARGET_WEIGHTS and candidate_weights is not None:
            weight = candidate_weights[..., 0]
            hard, slope = torch.where(weight == 0, 0, weight * hard), slope * weight
        smoothing = options.label_smoothing if flags & RowFlags.LABEL_SMOOTHING else zero
        if flags & RowFlags.EXCLUDE_TARGET:
            smoothing = smoothing * torch.where(row.n_present > 1, row.n_present / (row.n_present - 1), 0)
        main = torch.where(smoothing == 1, 0, (1 - smoothing) * hard)
        own = -(1 - smoothing) * slope
        if column_weights is not None:
            factor = 1 - smoothing if flags & TARGET_PROBABILITIES else smoothing / row.n_present
            main = main + torch.where(factor == 0, 0, factor * of_columns)
            probability, maximum = probability + factor * column_weights.rest, zero - factor
        if flags & RowFlags.LABEL_SMOOTHING and not flags & SMOOTHING_WEIGHTS:
            # the sum of u may be -inf
            main = main + torch.where(smoothing == 0, 0, smoothing * (total - row.total_u / row.n_present))
            probability = probability + smoothing
            constant = -smoothing / row.n_present
    if flags & RowFlags.Z_LOSS:
        lse = row.max / options.temperature + total
        z_loss = options.z_loss_weight * lse * lse
        probability = probability + 2 * options.z_loss_weight * lse
    if flags & RowFlags.CONFIDENCE_PENALTY:
        entropy = torch.where(has_entropy, options.confidence_penalty_weight / row.n_present.log(), 0)
        confidence = torch.where(has_entropy, options.confidence_penalty_weight - entropy * (total - mean_u), 0)
    terms = [main, z_loss, confidence, cross_entropy, total - mean_u, target_is_argmax.to(nll.dtype)]
    return terms, [probability, entropy, constant, maximum], own


def _penalties(
    rest: Tensor,  # [...]
    u: Tensor,  # [..., n_candidates]
    is_argmax: Tensor,  # [..., n_candidates] bool
    targets: Tensor,  # [...], -1 where the row does not count
    ids: Tensor,  # [..., n_candidates]
    weights: Tensor,  # [..., n_candidates]
    n_soft: int,
) -> tuple[Tensor, Tensor]:
    """-w log(1 - p) of each candidate, -w log p of the last n_soft, and its s; both [..., n_candidates]."""
    target, rest = targets.unsqueeze(-1), rest.unsqueeze(-1)
    present = (ids >= 0) & (target >= 0) & (weights != 0)
    valid = present & (ids != target) & (u != -math.inf)
    smallest = smallest_rest(rest.dtype)
    inverse_rest = 1 / torch.where(rest < smallest, smallest, rest)  # a nan passes
    p = u.exp() / (1 + rest)
    loss = torch.where(is_argmax, inverse_rest.log1p(), -torch.log1p(-p))
    slope = torch.where(is_argmax, inverse_rest, p / (1 - p))
    losses, slopes = torch.where(valid, weights * loss, 0), torch.where(valid, weights * slope, 0)
    if n_soft:
        n_others, nll = ids.shape[-1] - n_soft, rest.log1p() - u.masked_fill(is_argmax, 0)
        soft = torch.where(present, weights * nll, 0)
        losses = torch.cat([losses[..., :n_others], soft[..., n_others:]], -1)
        slopes = torch.cat([slopes[..., :n_others], torch.where(present, -weights, 0)[..., n_others:]], -1)
    return losses, slopes


def _tail(
    rest: Tensor,  # [...]
    u: Tensor,  # [...]: log T of the columns that are not named
    targets: Tensor,  # [...], -1 where the row does not count
    ids: Tensor,  # [...]: TAIL_ID, or -1
    weights: Tensor,  # [...]
) -> tuple[Tensor, Tensor, Tensor]:  # each [...]
    """The term of the tail of soft targets, and its coefficients of p: of every column, of those that are not named."""
    weights = torch.where((ids == TAIL_ID) & (targets >= 0), weights, 0)
    nll = (rest.log1p() - u).clamp(max=-math.log(smallest_rest(rest.dtype)))
    present = weights != 0
    return torch.where(present, weights * nll, 0), weights, torch.where(present, -weights * nll.exp(), 0)


class RowEvaluation(NamedTuple):
    """What `evaluate_rows` returns; 0 where a row does not count."""

    loss: Tensor  # [...]: row weight times the sum of terms and penalties
    terms: Tensor  # [N_TERMS + n_groups, ...]: unweighted
    # of the weighted loss, as row_gradient reads them
    coefficients: Tensor  # [..., N_ROW_COEFFICIENTS + 1 + n_candidates]


def evaluate_rows(
    row: RowStatistics,
    inputs: RowInputs,  # of [...]; its ignore_index is -1
    u: Tensor,  # [..., 1 + n_candidates]: z - max z of the target, then of the candidates; -inf where masked; of
    # TAIL_ID the logarithm of the sum of e^u over what it stands for
    is_argmax: Tensor,  # [..., 1 + n_candidates] bool
    column_weights: ColumnWeightSums | None = None,
) -> RowEvaluation:
    """Every term, the penalty of every group of candidates, and the coefficients of the gradient."""
    targets, flags, row_weights = inputs.targets, inputs.flags, inputs.row_weights
    ids, weights, groups = inputs.candidates or (None, None, ())
    counts, options = targets >= 0, RowOptions(*inputs.options.unbind())
    terms, of_row, own = _evaluate(row, options, flags, is_argmax[..., 0], u[..., 0], weights, column_weights)
    total = terms[0] + terms[1] + terms[2]
    coefficients = torch.stack([*of_row, own], -1)
    if ids is not None and weights is not None:
        n_soft = groups[-1] if flags & RowFlags.SOFT_TARGETS and groups else 0
        losses, slopes = _penalties(row.rest, u[..., 1:], is_argmax[..., 1:], targets, ids, weights, n_soft)
        if n_soft and flags & RowFlags.TAIL:
            first = losses.shape[-1] - n_soft
            of_tail = (u[..., 1 + first], targets, ids[..., first], weights[..., first])
            loss, everywhere, outside = _tail(row.rest, *of_tail)
            losses[..., first] += loss
            slopes[..., first] += outside
            coefficients[..., 0] += everywhere
        penalties = [group.sum(-1) for group in losses.split(list(groups), -1)]
        total, terms = sum(penalties, total), terms + penalties
        coefficients = torch.cat([coefficients, slopes], -1)
    if row_weights is not None:
        total, coefficients = total * row_weights, coefficients * row_weights.unsqueeze(-1)
    return RowEvaluation(
        torch.where(counts, total, 0),
        torch.where(counts, torch.stack(terms), 0),
        torch.where(counts.unsqueeze(-1), bounded(coefficients), 0),
    )
