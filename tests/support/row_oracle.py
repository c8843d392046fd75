"""What `row_loss` should give, by ava_ext/reference/ in float64, and how far rounding may take a kernel from it."""

import math
from typing import NamedTuple

import torch
from support.strategies import RowProblem
from torch import Tensor

from ava_ext import reference
from ava_ext.ops.row_fields import N_TERMS, TERM_NAMES, RowFlags


class Expected(NamedTuple):
    """float64, with a bound of the rounding error beside each."""

    loss: Tensor  # [...]
    loss_bound: Tensor
    terms: Tensor  # [N_TERMS + n_groups, ...]
    terms_bound: Tensor
    grad_logits: Tensor  # [..., n_columns]
    grad_logits_bound: Tensor


def expected_row_loss(problem: RowProblem) -> Expected:
    rows, counted = problem.targets.shape, problem.targets != problem.ignore_index
    terms_shape = (N_TERMS + (len(problem.candidates.groups) if problem.candidates else 0), *rows)
    shapes = (rows, rows, terms_shape, terms_shape, problem.logits.shape, problem.logits.shape)
    expected = Expected(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))
    if counted.any():
        for name, all_rows, value in zip(Expected._fields, expected, _counted_rows(problem, counted), strict=True):
            all_rows[(slice(None), counted) if "terms" in name else counted] = value
    return expected


def _counted_rows(problem: RowProblem, counted: Tensor) -> Expected:
    """The rows that count, one after the other.

    u_j = z_j - max is rounded, so e^u_j is off by |u_j| units, and R and all that is made of it by the distance of the
    largest column but one. What adds up in a term or in dz_j is bounded by the sum of the sizes of its parts.
    """
    temperature, smoothing, alpha, gamma, z_weight, confidence_weight, cap, exponent = problem.options.double().tolist()
    on = {flag: bool(problem.flags & flag) for flag in RowFlags}
    is_float64 = problem.base.dtype == torch.float64
    unit = 2.0**-45 if is_float64 else 2.0**-24  # the reference, too, rounds in float64
    logits, targets = problem.logits[counted].double().requires_grad_(), problem.targets[counted]
    row_weights = torch.ones(len(targets)).double()
    if problem.row_weights is not None:
        row_weights = problem.row_weights[counted].double()
    z = reference.effective_logits(
        logits,
        temperature=temperature,
        logit_softcap=cap if on[RowFlags.SOFTCAP] else None,
        vocab_size=problem.vocab_size,
    )
    zero = torch.zeros(len(targets)).double()

    with torch.no_grad():
        present, largest = z > -math.inf, z.amax(-1)
        n_present = present.sum(-1)
        u = torch.where(present, z - largest.unsqueeze(-1), 0.0)
        p = torch.where(present, torch.exp(z - reference.log_normaliser(z).unsqueeze(-1)), 0.0)
        second = torch.where(present, z, -math.inf).scatter(-1, z.argmax(-1, keepdim=True), -math.inf).amax(-1)
        cap_error = 16 * unit * cap / temperature if on[RowFlags.SOFTCAP] else 0.0  # of u: tanh has 2 ulp
        of_rest = 8 * unit + 4 * unit * torch.where(second > -math.inf, largest - second, 0.0) + cap_error
        of_u = 4 * unit * u.abs() + cap_error
        lse_size = largest.abs() + reference.log_normaliser(z) - largest
        if on[RowFlags.CROSS_ENTROPY] and on[RowFlags.FOCAL]:
            of_rest = of_rest * (1 + gamma)

    # every term with the size that its error is measured by
    terms = dict.fromkeys(TERM_NAMES, (zero, zero))
    nll = reference.negative_log_likelihood(z, targets)
    terms["cross_entropy"] = nll, nll
    terms["entropy"] = reference.token_entropy(z), reference.token_entropy(z)
    terms["correct"] = (z.argmax(-1) == targets).double(), zero
    # sizes of the coefficients of p_j, of p_j (u_j - E), of 1(j = c) - p_j, and the last one's share at c itself
    probability_size, entropy_size = zero, zero
    log_prob_size, own = torch.zeros_like(z), torch.zeros_like(z)
    constant_size = zero
    # under a cap even equal columns are as far from the rounded maximum as one multiply-add leaves them
    of_tie = 2 * unit * largest.abs() if on[RowFlags.SOFTCAP] else zero
    of_mean = zero  # what that leaves of the mean of u
    if on[RowFlags.CROSS_ENTROPY]:
        unweighted = reference.focal(z, targets, alpha, gamma) if on[RowFlags.FOCAL] else nll
        weight, weight_size = zero + 1, zero + 1
        for flag, name in ((RowFlags.DFT, "dft"), (RowFlags.EAFT, "eaft")):  # with both, eaft
            if on[flag]:
                weight = reference.token_weight(z, targets, name, exponent)
                weight_size = weight * (1 + exponent * (nll.detach().clamp(max=1e3) if name == "dft" else 1))
        if on[RowFlags.TARGET_WEIGHTS] and problem.candidates:
            of_target = problem.candidates.weights[counted][:, 0].double()
            weight, weight_size = weight * of_target, weight_size * of_target
        hard = reference.reweighted(unweighted, weight)
        e = zero
        if on[RowFlags.LABEL_SMOOTHING]:
            e = zero + smoothing
            if on[RowFlags.EXCLUDE_TARGET]:
                e = torch.where(n_present > 1, e * n_present / (n_present - 1).clamp(min=1), 0.0)
            mode = "exclude_target" if on[RowFlags.EXCLUDE_TARGET] else "uniform"
            main = reference.smoothed(hard, z, smoothing, mode)
            hard_size = torch.where(e == 1, 0.0, (1 - e).abs() * reference.reweighted(unweighted, weight_size))
            terms["main_loss"] = main, main.abs() + 2 * hard_size
            of_mean = e * of_tie
        else:
            terms["main_loss"] = hard, reference.reweighted(unweighted, weight_size)
        size = (1 - e).abs() * weight_size * (alpha * (1 + gamma) if on[RowFlags.FOCAL] else 1)
        probability_size, constant_size = probability_size + e, e / n_present
        log_prob_size.scatter_(-1, targets.unsqueeze(-1), size.unsqueeze(-1))
        other_probability = torch.sigmoid(-reference.log_odds(z, targets)).detach()
        own.scatter_(-1, targets.unsqueeze(-1), (size * other_probability).unsqueeze(-1))
    if on[RowFlags.Z_LOSS]:
        lse_size = lse_size + 2.0**-50 * (1 + largest.abs()) / of_rest  # the reference adds R to 1
        terms["z_loss"] = z_weight * reference.z_loss(z), z_weight * lse_size.square()
        probability_size = probability_size + 2 * z_weight * lse_size
    if on[RowFlags.CONFIDENCE_PENALTY]:
        terms["confidence_penalty"] = confidence_weight * reference.confidence_penalty(z), zero + confidence_weight
        entropy_size = confidence_weight / torch.log(n_present.clamp(min=2).double())

    smallest_rest = 1e-300 if is_float64 else 1e-37
    groups = _groups(problem, counted)
    for number, (ids, weights) in enumerate(groups):
        penalty, penalty_size = zero, zero
        if on[RowFlags.SOFT_TARGETS] and number == len(groups) - 1:
            penalty = reference.soft_targets(z, ids, weights)
            columns, weights = ids.clamp(min=0).long(), torch.where(ids < 0, 0.0, weights)
            log_prob_size.scatter_add_(-1, columns, weights)
            for c, q in zip(columns.unbind(-1), weights.unbind(-1), strict=True):
                own.scatter_add_(
                    -1, c.unsqueeze(-1), (q * torch.sigmoid(-reference.log_odds(z.detach(), c))).unsqueeze(-1)
                )
            terms[f"group {len(terms)}"] = penalty, penalty.detach()
            continue
        for columns, column_weights in zip(ids.unbind(-1), weights.unbind(-1), strict=True):
            candidate = columns.clamp(min=0).long().unsqueeze(-1)
            is_pushed = (columns >= 0) & (columns != targets) & present.gather(-1, candidate).squeeze(-1)
            (n,) = is_pushed.nonzero(as_tuple=True)
            c = candidate[n, 0]
            odds = reference.log_odds(z[n], c)
            penalties = column_weights[n] * reference.softplus(odds.clamp(max=-math.log(smallest_rest)))
            penalty = penalty.index_add(0, n, penalties)
            as_uncertain_as_p = 1 + of_u[n, c] / of_rest[n]
            penalty_size = penalty_size.index_add(0, n, penalties.detach() * as_uncertain_as_p)
            s = column_weights[n] * torch.where(odds < -math.log(smallest_rest), torch.exp(odds.detach()), 0.0)
            log_prob_size[n, c] += s * as_uncertain_as_p
            own[n, c] += s * as_uncertain_as_p * torch.sigmoid(-odds.detach())
        terms[f"group {len(terms)}"] = penalty, penalty_size

    added = [name for name in terms if name not in ("cross_entropy", "entropy", "correct")]
    loss = row_weights * sum(terms[name][0] for name in added)
    grad_logits = torch.zeros_like(logits)
    if loss.requires_grad:
        (grad_logits,) = torch.autograd.grad(loss.sum(), logits)
    with torch.no_grad():
        all_terms = torch.stack([value for value, _ in terms.values()])
        underflow = 0.0 if is_float64 else 1e-34  # of a sum over the columns, times u
        terms_bound = torch.stack([size for _, size in terms.values()]) * of_rest + underflow
        terms_bound[list(terms).index("main_loss")] += of_mean
        size = sum(terms[name][1] for name in added)
        loss_bound = row_weights.abs() * (size * (of_rest + 4 * unit) + of_mean + underflow)
        mean_u = (p * u).sum(-1, keepdim=True)
        # s_c at its own column is s_c (1 - p_c): at the maximum that is small, and must not hide what the others give
        at_maximum = torch.zeros_like(present).scatter(-1, z.argmax(-1, keepdim=True), True)
        others = log_prob_size.masked_fill(at_maximum, 0).sum(-1, keepdim=True)
        others = others + torch.where(at_maximum, 0.0, log_prob_size.masked_fill(~at_maximum, 0).sum(-1, keepdim=True))
        probability_size = probability_size.unsqueeze(-1) + others
        size = p * (probability_size + entropy_size.unsqueeze(-1) * (u.abs() + mean_u.abs()))
        size = size + (own + constant_size.unsqueeze(-1)) * present
        cap_slope = 1 - torch.tanh(logits / cap).square().nan_to_num() if on[RowFlags.SOFTCAP] else torch.ones(())
        # the derivative of the entropy at the maximum: autograd's own rounding, and that of u where a kernel takes it
        # from one multiply-add, z - largest with the product unrounded, and subtracts what that leaves at the maximum
        of_entropy = 2.0**-48 * (1 + largest.abs()) * entropy_size
        grad_bound = size * ((of_u + of_rest.unsqueeze(-1)) * cap_slope + 4 * unit)
        # twice as far are columns computed by themselves, by another tanh: the maximum, targets and candidates.
        # CUDA takes that of the others from the logistic function, whose error is one of the cap, not of the logit
        of_apart = torch.where(second < largest, of_tie.maximum(zero + cap_error / 4), of_tie)
        is_apart = (z == largest.unsqueeze(-1)) | (log_prob_size > 0)
        is_apart.scatter_(-1, targets.unsqueeze(-1), True)
        of_ties = of_tie.unsqueeze(-1) + torch.where(is_apart, of_apart.unsqueeze(-1), 0.0)
        grad_bound = grad_bound + p * of_ties * entropy_size.unsqueeze(-1) * cap_slope
        underflow = (0.0 if is_float64 else 2e-38) * (1 + probability_size + entropy_size.unsqueeze(-1) * 100)
        grad_bound = grad_bound + (underflow + of_entropy.unsqueeze(-1)) * present
        grad_bound = row_weights.abs().unsqueeze(-1) * grad_bound / temperature
    return Expected(loss.detach(), loss_bound, all_terms, terms_bound, grad_logits, grad_bound)


def _groups(problem: RowProblem, counted: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(ids, float64 weights) [n_counted, size] of each group of candidates."""
    if problem.candidates is None:
        return []
    ids, weights, groups = problem.candidates
    return list(zip(ids[counted].split(groups, -1), weights[counted].double().split(groups, -1), strict=True))
