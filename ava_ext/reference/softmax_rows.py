"""Rows of logits: softmax statistics, and the terms that are made of the effective logits z.

Probabilities are expressed by the log-odds of one column c of the effective logits z,

    odds_c = z_c - logsumexp_{j != c} z_j,     p_c = sigmoid(odds_c),
    -log p_c = softplus(-odds_c),     -log(1 - p_c) = softplus(odds_c),

which is exact also where p_c or 1 - p_c is far below the resolution of the dtype.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


def effective_logits(
    logits: Tensor,  # [..., vocab]
    *,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """z = softcap(s x) / T with softcap(x) = c tanh(x/c), [..., vocab].

    Columns whose raw logit is -inf and columns at or beyond vocab_size are -inf: p = 0, and their gradient is exactly
    0 whatever they hold (nan included, beyond vocab_size).
    """
    masked = logits == -math.inf
    if vocab_size is not None:
        masked = masked | (torch.arange(logits.shape[-1], device=logits.device) >= vocab_size)
    z = logit_scale * torch.where(
        masked, 0.0, logits
    )  # before any arithmetic, so that no masked value reaches a derivative
    if logit_softcap is not None:
        z = logit_softcap * torch.tanh(z / logit_softcap)
    return torch.where(masked, -math.inf, z / temperature)


def logsumexp(
    z: Tensor,  # [..., vocab]
    keep: Tensor,  # [..., vocab] bool
) -> Tensor:
    """log sum_j exp z_j over the kept columns, [...]; -inf with zero gradient where there is none.

    nan and +inf give nan, as in log_softmax. (torch.logsumexp has nan gradients for an empty sum.)
    """
    largest = torch.where(keep, z, -math.inf).amax(-1, keepdim=True).detach()
    empty = largest == -math.inf
    u = torch.where(keep, z - torch.where(empty, 0.0, largest), 0.0)
    total = torch.where(keep, torch.exp(u), 0.0).sum(-1)
    empty = empty.squeeze(-1)
    return torch.where(empty, -math.inf, largest.squeeze(-1) + torch.log(torch.where(empty, 1.0, total)))


def log_normaliser(z: Tensor) -> Tensor:  # [..., vocab] -> [...]
    """lse = log sum_j exp z_j."""
    return logsumexp(z, torch.ones_like(z, dtype=torch.bool))


def log_odds(
    z: Tensor,  # [..., vocab]
    ids: Tensor,  # [...]
) -> Tensor:
    """z_c - logsumexp_{j != c} z_j = log(p_c / (1 - p_c)) of one column per row, [...]."""
    others = torch.arange(z.shape[-1], device=z.device) != ids.unsqueeze(-1)
    return z.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logsumexp(z, others)


def softplus(x: Tensor) -> Tensor:  # [...]
    """log(1 + e^x). (torch's own is linear from 20 on: too coarse for float64.)"""
    return torch.logaddexp(torch.zeros_like(x), x)


def token_entropy(z: Tensor) -> Tensor:  # [..., vocab] -> [...]
    """H = -sum_j p_j log p_j = log1p(R) - sum_j u_j e^{u_j} / (1 + R), with u = z - max and R without the maximum.

    Both parts are positive, so H is exact also where it is tiny. The maximum is a constant to autograd: H is invariant
    to a shift of z. expm1 at the maximum is 0 and still has the derivative of exp.
    """
    masked = z == -math.inf
    largest, argmax = z.max(-1, keepdim=True)
    u = torch.where(masked, 0.0, z - largest.detach())
    exponential = torch.where(masked, 0.0, torch.exp(u))
    is_argmax = torch.arange(z.shape[-1], device=z.device) == argmax
    rest = torch.where(is_argmax, torch.expm1(u), exponential).sum(-1)
    return torch.log1p(rest) - (exponential * u).sum(-1) / (1 + rest)


def mean_log_prob(z: Tensor) -> Tensor:  # [..., vocab] -> [...]
    """Mean of log p_j over the unmasked columns."""
    masked = z == -math.inf
    log_probs = torch.where(masked, 0.0, torch.where(masked, 0.0, z) - log_normaliser(z).unsqueeze(-1))
    return log_probs.sum(-1) / (~masked).sum(-1)


class SoftmaxStatistics(NamedTuple):
    log_probs: Tensor  # [..., K]
    entropy: Tensor  # [...]
    lse: Tensor  # [...]
    log_rest: Tensor  # [...]
    mean_log_prob: Tensor  # [...]


def softmax_statistics(
    logits: Tensor,  # [..., vocab]
    ids: Tensor,  # [..., K] int, -1 absent
    *,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
) -> SoftmaxStatistics:
    """Statistics of the softmax of the effective logits z.

    log_probs = log p of the ids (0 for -1); entropy; lse; log_rest = log R = log sum_{j != argmax} exp(z_j - max);
    mean_log_prob over the unmasked columns.
    """
    z = effective_logits(
        logits,
        temperature=temperature,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
    )
    columns = [
        torch.where(ids[..., k] < 0, 0.0, -softplus(-log_odds(z, ids[..., k].clamp(min=0).long())))
        for k in range(ids.shape[-1])
    ]
    log_probs = torch.stack(columns, -1) if columns else z.new_zeros(ids.shape)
    log_rest = -log_odds(z, z.argmax(-1))
    return SoftmaxStatistics(log_probs, token_entropy(z), log_normaliser(z), log_rest, mean_log_prob(z))


def negative_log_likelihood(
    z: Tensor,  # [..., vocab]
    targets: Tensor,  # [...]
) -> Tensor:
    """n = -log p_t, [...]; +inf where the target's column is masked, nan where log_softmax gives nan."""
    lse = log_normaliser(z)
    return torch.where(lse.isnan(), lse, softplus(-log_odds(z, targets)))


def focal(
    z: Tensor,  # [..., vocab]
    targets: Tensor,  # [...]
    alpha: float,
    gamma: float,
) -> Tensor:
    """alpha (1 - p_t)^gamma (-log p_t), [...] (Lin et al. 2017)."""
    nll = negative_log_likelihood(z, targets)
    if gamma == 0:
        return alpha * nll
    modulation = torch.exp(-gamma * softplus(log_odds(z, targets)))
    # a masked target: the modulation is 1, and its derivative 0 must not meet the infinite loss
    return alpha * torch.where(nll == math.inf, 1.0, modulation) * nll


def token_weight(
    z: Tensor,  # [..., vocab]
    targets: Tensor,  # [...]
    token_reweighting: str,
    exponent: float,
) -> Tensor:
    """p_t^exponent ("dft") or (H / log V)^exponent ("eaft"; 0 where V = 1), without graph; [...]."""
    if token_reweighting == "dft":
        return negative_log_likelihood(z, targets).neg().exp().pow(exponent).detach()
    n_columns = (z != -math.inf).sum(-1)
    share = torch.where(n_columns == 1, 0.0, token_entropy(z) / torch.log(n_columns.clamp(min=2).to(z.dtype)))
    return share.pow(exponent).detach()


def reweighted(
    hard: Tensor,  # [...] cross-entropy or focal term
    weight: Tensor,  # [...]
) -> Tensor:
    """weight * hard, [...]; 0 where the weight is 0, also where the term is infinite."""
    return weight * torch.where(weight == 0, 0.0, hard)


def smoothed(
    hard: Tensor,  # [...] cross-entropy or focal term
    z: Tensor,  # [..., vocab]
    label_smoothing: float,
    smoothing_mode: str,
    weights: Tensor | None = None,  # [vocab]
) -> Tensor:
    """(1 - e) hard + e (-mean_j w_j log p_j), [...], over the V unmasked columns; w is 1 without weights.

    "uniform": q_t = 1 - e + e/V, F.cross_entropy's convention. "exclude_target": q_t = 1 - e and e/(V-1) on the
    others, which is the first with e V/(V-1); 0 where V = 1, where there are no others. A term with factor 0 is
    left out, also where it is infinite (e = 1 with a masked target).
    """
    if label_smoothing == 0:
        return hard
    n_columns = (z != -math.inf).sum(-1).to(z.dtype)
    e = torch.full_like(n_columns, label_smoothing)
    if smoothing_mode == "exclude_target":
        e = torch.where(n_columns > 1, e * n_columns / (n_columns - 1).clamp(min=1), 0.0)
    of_columns = mean_log_prob(z)
    if weights is not None:
        present = torch.where(z == -math.inf, 0.0, _of_columns(weights, z))
        of_columns = -cross_entropy_of_probabilities(z, present) / n_columns
    return torch.where(e == 1, 0.0, (1 - e) * hard) - e * of_columns


def _of_columns(
    weights: Tensor,  # [..., at most vocab]
    z: Tensor,  # [..., vocab]
) -> Tensor:  # [..., vocab]
    """weights, and 0 in the columns of padding."""
    return pad(weights.to(z.dtype), (0, z.shape[-1] - weights.shape[-1]))


def cross_entropy_of_probabilities(
    z: Tensor,  # [..., vocab]
    probabilities: Tensor,  # [..., vocab], or fewer columns: the others are padding
) -> Tensor:
    """-sum_j q_j log p_j, [...]; a masked column with q_j = 0 has no part in it."""
    q = _of_columns(probabilities, z)
    log_probs = z - log_normaliser(z).unsqueeze(-1)
    return -(q * torch.where((q == 0) & (z == -math.inf), 0.0, log_probs)).sum(-1)


def cross_entropy(
    z: Tensor,  # [..., vocab]
    targets: Tensor,  # [...]
    label_smoothing: float = 0.0,
    smoothing_mode: str = "uniform",
) -> Tensor:
    """-log p_t, smoothed; [...]."""
    return smoothed(negative_log_likelihood(z, targets), z, label_smoothing, smoothing_mode)


def z_loss(z: Tensor) -> Tensor:  # [..., vocab] -> [...]
    """lse^2."""
    return log_normaliser(z).square()


def confidence_penalty(z: Tensor) -> Tensor:  # [..., vocab] -> [...]
    """1 - H / log V over the V unmasked columns, in [0, 1]; 0 where V = 1."""
    n_columns = (z != -math.inf).sum(-1)
    log_columns = torch.log(n_columns.clamp(min=2).to(z.dtype))
    return torch.where(n_columns == 1, 0.0, 1 - token_entropy(z) / log_columns)


def soft_targets(
    z: Tensor,  # [..., vocab]
    ids: Tensor,  # [..., K] int, -1 absent
    weights: Tensor,  # [..., K]
) -> Tensor:
    """-sum_c q_c log p_c over the ids, [...]; a term with weight 0 is left out, also where it is infinite."""
    total = z.new_zeros(z.shape[:-1])
    for columns, q in zip(ids.unbind(-1), weights.to(z.dtype).unbind(-1), strict=True):
        q = torch.where(columns < 0, 0.0, q)
        total = total + reweighted(negative_log_likelihood(z, columns.clamp(min=0).long()), q)
    return total


def tail(
    z: Tensor,  # [..., vocab]
    ids: Tensor,  # [..., K] int, -1 absent
    weights: Tensor,  # [..., K]
) -> Tensor:
    """-q' log p' with q' = 1 - sum_c q_c, at least 0, and p' the probability of the columns that no id names; [...].

    -log p' is at most 690, so that ids of every column are finite; beyond, no more than the gradient of lse is left.
    """
    others = torch.ones_like(z, dtype=torch.bool)
    for columns in ids.unbind(-1):
        others = others & (torch.arange(z.shape[-1], device=z.device) != columns.unsqueeze(-1))
    lse, most = log_normaliser(z), -math.log(1e-300 if z.dtype == torch.float64 else 1e-37)
    of_others = logsumexp(z, others)
    is_left = lse - of_others < most
    nll = torch.where(is_left, lse - torch.where(is_left, of_others, 0.0), lse - lse.detach() + most)
    left = 1 - torch.where(ids < 0, 0.0, weights.to(z.dtype)).sum(-1)
    return left.clamp(min=0) * nll


def unlikelihood(
    z: Tensor,  # [n_rows, vocab]
    weights: Tensor,  # [n_rows, at most vocab], 0 where a column is not a candidate
) -> Tensor:
    """-sum_c w_c log(1 - p_c), [n_rows].

    log(1 - p_c) = logsumexp_{j != c} z_j - lse is floored at log(tiny) of the dtype, so that a candidate in the only
    column of a row is finite; beyond the floor the gradient is 0.
    """
    rows, columns = weights.nonzero(as_tuple=True)
    floor = -math.log(torch.finfo(z.dtype).tiny)
    penalties = weights[rows, columns].to(z.dtype) * softplus(log_odds(z[rows], columns).clamp(max=floor))
    return z.new_zeros(z.shape[0]).index_add(0, rows, penalties)
