"""The executable specification: what every component computes, in plain PyTorch, slow and without any kernel.

Only tests and benchmarks import this module. It runs in the dtype of its inputs (float64 where it serves as an oracle),
autograd differentiates it, and it loops over tokens in Python: inputs are tiny.

Probabilities are expressed by the log-odds of one column c of the effective logits z,

    odds_c = z_c - logsumexp_{j != c} z_j,     p_c = sigmoid(odds_c),
    -log p_c = softplus(-odds_c),     -log(1 - p_c) = softplus(odds_c),

which is exact also where p_c or 1 - p_c is far below the resolution of the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ava_ext.config import UnifiedLossConfig

# entries of unified_loss() that are not weighted contributions; "mtp_loss_depth_<k>" belong to them too
METRICS = (
    "cross_entropy", "perplexity", "focal_loss", "n_tokens", "accuracy", "entropy", "temperature",
    "moe_cv", "moe_max_violation",
)  # fmt: skip


# -- Softmax statistics


def effective_logits(
    logits: Tensor,  # [..., vocab]
    *,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """z = softcap(x) / T with softcap(x) = c tanh(x/c), [..., vocab].

    Columns whose raw logit is -inf and columns at or beyond vocab_size are -inf: p = 0, and their gradient is exactly
    0 whatever they hold (nan included, beyond vocab_size).
    """
    masked = logits == -math.inf
    if vocab_size is not None:
        masked = masked | (torch.arange(logits.shape[-1], device=logits.device) >= vocab_size)
    z = torch.where(masked, 0.0, logits)  # before any arithmetic, so that no masked value reaches a derivative
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
    keep = keep & (z != -math.inf)
    largest = torch.where(keep, z, -math.inf).amax(-1, keepdim=True).detach()
    empty = largest == -math.inf
    # 0 where left out, before exp: an overflow there would make its derivative nan
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
    vocab_size: int | None = None,
) -> SoftmaxStatistics:
    """Statistics of the softmax of the effective logits z.

    log_probs = log p of the ids (0 for -1); entropy; lse; log_rest = log R = log sum_{j != argmax} exp(z_j - max);
    mean_log_prob over the unmasked columns.
    """
    z = effective_logits(logits, temperature=temperature, logit_softcap=logit_softcap, vocab_size=vocab_size)
    columns = [
        torch.where(ids[..., k] < 0, 0.0, -softplus(-log_odds(z, ids[..., k].clamp(min=0).long())))
        for k in range(ids.shape[-1])
    ]
    log_probs = torch.stack(columns, -1) if columns else z.new_zeros(ids.shape)
    log_rest = -log_odds(z, z.argmax(-1))
    return SoftmaxStatistics(log_probs, token_entropy(z), log_normaliser(z), log_rest, mean_log_prob(z))


# -- Row terms of the effective logits z


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


def smoothed(
    hard: Tensor,  # [...] cross-entropy or focal term
    z: Tensor,  # [..., vocab]
    label_smoothing: float,
    smoothing_mode: str,
) -> Tensor:
    """(1 - e) hard + e (-mean_j log p_j), [...], over the V unmasked columns.

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
    return torch.where(e == 1, 0.0, (1 - e) * hard) - e * mean_log_prob(z)


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


def unlikelihood(
    z: Tensor,  # [n_rows, vocab]
    weights: Tensor,  # [n_rows, at most vocab], 0 where a column is no candidate
) -> Tensor:
    """-sum_c w_c log(1 - p_c), [n_rows].

    log(1 - p_c) = logsumexp_{j != c} z_j - lse is floored at log(tiny) of the dtype, so that a candidate in the only
    column of a row is finite; beyond the floor the gradient is 0.
    """
    rows, columns = weights.nonzero(as_tuple=True)
    floor = -math.log(torch.finfo(z.dtype).tiny)
    penalties = weights[rows, columns].to(z.dtype) * softplus(log_odds(z[rows], columns).clamp(max=floor))
    return z.new_zeros(z.shape[0]).index_add(0, rows, penalties)


# -- Segments, rows that count, denominator


def segment_numbers(
    n_batch: int,
    n_time: int,
    *,
    segment_ids: Tensor | None = None,  # [B, T], [1, T] or [T]
    position_ids: Tensor | None = None,  # [B, T], [1, T] or [T]
    cu_seqlens: Tensor | None = None,  # [n_segments + 1], over the rows in reading order, b * T + t
) -> Tensor:
    """The number of each row's segment within its batch row, [B, T] int64, from 0 up.

    A segment starts where segment_ids changes, where position_ids does not increase, at every cu_seqlens, and at t = 0;
    given together, each of them starts segments. Rows behind the last cu_seqlens are one more segment.
    """
    starts = torch.zeros(n_batch, n_time, dtype=torch.bool)
    if segment_ids is not None:
        ids = segment_ids.reshape(-1, n_time).expand(n_batch, n_time)
        starts[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    if position_ids is not None:
        positions = position_ids.reshape(-1, n_time).expand(n_batch, n_time)
        starts[:, 1:] |= positions[:, 1:] <= positions[:, :-1]
    if cu_seqlens is not None:
        for start in cu_seqlens.tolist():
            if start < n_batch * n_time:
                starts.view(-1)[start] = True
    starts[:, :1] = False
    return starts.long().cumsum(1)


def is_padding(
    config: UnifiedLossConfig,
    targets: Tensor,  # [B, T]
    attention_mask: Tensor | None,  # [B, T]
) -> Tensor:
    """attention_mask is 0, or the target is pad_token_id where pad is no EOS id; [B, T] bool."""
    padding = torch.zeros_like(targets, dtype=torch.bool)
    if attention_mask is not None:
        padding = padding | (attention_mask == 0)
    if config.pad_token_id is not None and config.pad_token_id not in config.eos_ids:
        padding = padding | (targets == config.pad_token_id)
    return padding


def counted_rows(
    config: UnifiedLossConfig,
    targets: Tensor,  # [B, T]
    attention_mask: Tensor | None = None,  # [B, T]
) -> Tensor:
    """Rows that count, [B, T] bool: neither ignore_index nor padding."""
    return (targets != config.ignore_index) & ~is_padding(config, targets, attention_mask)


def denominator(
    config: UnifiedLossConfig,
    counted: Tensor,  # [B, T] bool
    token_weights: Tensor | None = None,  # [B, T]
    num_items_in_batch: float | Tensor | None = None,
) -> Tensor:
    """N of every token term, a float64 scalar.

    "sum" and "none": 1. "mean": num_items_in_batch, else the sum of the token weights of the rows that count, else
    their number; 1 where that is 0 (the numerator is 0 then).
    """
    if config.reduction != "mean":
        return torch.ones((), dtype=torch.float64)
    if num_items_in_batch is not None:
        n = torch.as_tensor(num_items_in_batch).double()
    elif token_weights is not None:
        n = torch.where(counted, token_weights.double(), 0.0).sum()
    else:
        n = counted.sum().double()
    return torch.where(n == 0, 1.0, n)


# -- Candidates of the unlikelihood term, as dense weights [B, T, vocab_size] float64


def contexts(
    config: UnifiedLossConfig,
    targets: Tensor,  # [B, T]
    counted: Tensor,  # [B, T] bool
    segments: Tensor,  # [B, T]
    input_ids: Tensor | None = None,  # [B, T]
    attention_mask: Tensor | None = None,  # [B, T]
) -> Iterator[tuple[int, int, list[int | None]]]:
    """(b, t, context) of every row that counts.

    context = targets[b, :t], or input_ids[b, :t+1] where given, within the row's segment. Positions that hold
    ignore_index or whose attention_mask is 0 are None. A pad token is a token like others here (only no candidate).
    """
    source = (targets if input_ids is None else input_ids).tolist()
    void = ((targets if input_ids is None else input_ids) == config.ignore_index).tolist()
    masked = torch.zeros_like(targets).bool() if attention_mask is None else attention_mask == 0
    masked, segments = masked.tolist(), segments.tolist()
    for b, t in counted.nonzero().tolist():
        end = t if input_ids is None else t + 1
        inside = [s for s in range(end) if segments[b][s] == segments[b][t]]
        yield b, t, [None if void[b][s] or masked[b][s] else source[b][s] for s in inside]


def is_never_candidate(config: UnifiedLossConfig, token: int | None, target: int) -> bool:
    """True for a token that is never a candidate of the two repetition penalties."""
    return (
        token is None
        or not 0 <= token < config.vocab_size
        or token == target
        or (token == config.pad_token_id and token not in config.eos_ids)
        or token in config.repetition_allow_list
    )


def immediate_repetition_weights(
    config: UnifiedLossConfig,
    targets: Tensor,  # [B, T]
    counted: Tensor,  # [B, T] bool
    segments: Tensor,  # [B, T]
    *,
    input_ids: Tensor | None = None,  # [B, T]
    attention_mask: Tensor | None = None,  # [B, T]
) -> Tensor:
    """The previous token, once the run of equal tokens that ends the context has the threshold's length.

    Weight lambda min(growth^(run-1), 4).
    """
    weights = torch.zeros(*targets.shape, config.vocab_size, dtype=torch.float64)
    for b, t, context in contexts(config, targets, counted, segments, input_ids, attention_mask):
        if not context or is_never_candidate(config, context[-1], int(targets[b, t])):
            continue
        run, factor = 1, 1.0
        while run < len(context) and context[-1 - run] == context[-1]:
            run += 1
            factor = min(factor * config.immediate_repetition_growth, 4.0)
        if run >= config.immediate_repetition_threshold:
            weights[b, t, context[-1]] = config.immediate_repetition_weight * factor
    return weights


def ngram_weights(
    config: UnifiedLossConfig,
    targets: Tensor,  # [B, T]
    counted: Tensor,  # [B, T] bool
    segments: Tensor,  # [B, T]
    *,
    input_ids: Tensor | None = None,  # [B, T]
    attention_mask: Tensor | None = None,  # [B, T]
) -> Tensor:
    """Tokens that followed earlier occurrences of the last n-1 context tokens: the ngram_slots most recent distinct ones.

    With ngram_window_size W only followers at the last W context positions (None positions are positions too); the key
    before such a follower may reach further back. n = 1: the key is empty, every context token is a follower.
    """
    weights = torch.zeros(*targets.shape, config.vocab_size, dtype=torch.float64)
    n_key = config.ngram_size - 1
    for b, t, context in contexts(config, targets, counted, segments, input_ids, attention_mask):
        length = len(context)
        key = context[length - n_key :] if length >= n_key else [None]
        if None in key:
            continue
        oldest = n_key if config.ngram_window_size is None else max(n_key, length - config.ngram_window_size)
        followers: list[int] = []
        for s in reversed(range(oldest, length)):
            token = context[s]
            is_candidate = token not in followers and not is_never_candidate(config, token, int(targets[b, t]))
            if is_candidate and context[s - n_key : s] == key:
                followers.append(token)
        weights[b, t, followers[: config.ngram_slots]] = config.ngram_penalty_weight
    return weights


def early_eos_weights(
    config: UnifiedLossConfig,
    targets: Tensor,  # [B, T]
    counted: Tensor,  # [B, T] bool
    segments: Tensor,  # [B, T]
) -> Tensor:
    """Each EOS id, while fewer than min_sequence_length rows that count precede the row in its segment.

    None where the target itself is one of the EOS ids. An id named twice counts twice.
    """
    weights = torch.zeros(*targets.shape, config.vocab_size, dtype=torch.float64)
    for b, t in counted.nonzero().tolist():
        before = int((counted[b, :t] & (segments[b, :t] == segments[b, t])).sum())
        if before < config.min_sequence_length and int(targets[b, t]) not in config.eos_ids:
            for token in config.eos_ids:
                weights[b, t, token] += config.eos_penalty_weight
    return weights


def negative_weights_dense(
    config: UnifiedLossConfig,
    targets: Tensor,  # [B, T]
    counted: Tensor,  # [B, T] bool
    negative_ids: Tensor,  # [B, T, M], -1 absent
    negative_weights: Tensor | None = None,  # [B, T, M], 1 each where not given
) -> Tensor:
    """The given tokens without the row's own target; duplicates add. Ids outside [0, vocab_size) are absent."""
    weights = torch.zeros(*targets.shape, config.vocab_size, dtype=torch.float64)
    for b, t in counted.nonzero().tolist():
        for m, token in enumerate(negative_ids[b, t].tolist()):
            if 0 <= token < config.vocab_size and token != int(targets[b, t]):
                weights[b, t, token] += 1.0 if negative_weights is None else float(negative_weights[b, t, m])
    return weights
