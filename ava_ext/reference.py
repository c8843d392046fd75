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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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
    ignore_index or padding are None.
    """
    tokens = targets if input_ids is None else input_ids
    source, void = tokens.tolist(), (~counted_rows(config, tokens, attention_mask)).tolist()
    segments = segments.tolist()
    for b, t in counted.nonzero().tolist():
        end = t if input_ids is None else t + 1
        inside = [s for s in range(end) if segments[b][s] == segments[b][t]]
        yield b, t, [None if void[b][s] else source[b][s] for s in inside]


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
    """Tokens that followed earlier occurrences of the last n-1 context tokens: the ngram_slots most recent distinct
    ones.

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


# -- The rows of one call


class Rows(NamedTuple):
    """What every component reads of a call, after the shift of unshifted labels."""

    config: UnifiedLossConfig
    targets: Tensor  # [B, T]
    counted: Tensor  # [B, T] bool
    segments: Tensor  # [B, T]
    token_weights: Tensor  # [B, T]
    n: Tensor  # [] the denominator
    temperature: float | Tensor  # []

    def effective(
        self,
        logits: Tensor,  # [B, T, vocab]
        counted: Tensor,  # [B, T] bool
    ) -> Tensor:
        """Effective logits; a row that does not count is zeros, so that nothing it held reaches a gradient."""
        return effective_logits(
            torch.where(counted.unsqueeze(-1), logits, 0.0),
            temperature=self.temperature,
            logit_softcap=self.config.logit_softcap,
            vocab_size=self.config.vocab_size,
        )

    def reduce(
        self,
        values: Tensor,  # [B, T]
        counted: Tensor | None = None,  # [B, T] bool
        token_weights: Tensor | None = None,  # [B, T]
    ) -> Tensor:
        """sum_t w_t values_t / N over the rows that count, []; "none": w_t values_t and zeros, [B, T]."""
        counted = self.counted if counted is None else counted
        token_weights = self.token_weights if token_weights is None else token_weights
        values = torch.where(counted, values, 0.0) * torch.where(counted, token_weights, 0.0)
        return values if self.config.reduction == "none" else values.sum() / self.n

    def mean(
        self,
        values: Tensor,  # [B, T]
        counted: Tensor | None = None,  # [B, T] bool
    ) -> Tensor:
        """Unweighted mean over the rows that count, []; 0 where there are none."""
        counted = self.counted if counted is None else counted
        return torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1)


Terms = tuple[dict[str, Tensor], dict[str, Tensor]]  # weighted contributions, metrics


def row_terms(
    rows: Rows,
    logits: Tensor,  # [B, T, vocab]
    read: dict[str, Tensor],  # [B, T] input_ids and their attention_mask
    negative_ids: Tensor | None,  # [B, T, M]
    negative_weights: Tensor | None,  # [B, T, M]
) -> Terms:
    """Every term of the logits rows."""
    config = rows.config
    z = rows.effective(logits, rows.counted)
    targets = torch.where(rows.counted, rows.targets, 0)
    nll = negative_log_likelihood(z, targets)
    hard = focal(z, targets, config.focal_alpha, config.focal_gamma) if config.use_focal_loss else nll

    def penalty(candidate_weights: Tensor) -> Tensor:  # [B, T, vocab_size]
        values = unlikelihood(z.flatten(0, 1), candidate_weights.flatten(0, 1))
        return rows.reduce(values.reshape(targets.shape))

    place = (config, rows.targets, rows.counted, rows.segments)
    addends = {"main_loss": rows.reduce(smoothed(hard, z, config.label_smoothing, config.smoothing_mode))}
    if config.z_loss_weight > 0:
        addends["z_loss"] = config.z_loss_weight * rows.reduce(z_loss(z))
    if config.confidence_penalty_weight > 0:
        addends["confidence_penalty"] = config.confidence_penalty_weight * rows.reduce(confidence_penalty(z))
    if config.use_ngram_penalty:
        addends["ngram_penalty"] = penalty(ngram_weights(*place, **read))
    if config.use_immediate_repetition_penalty:
        addends["immediate_repetition_penalty"] = penalty(immediate_repetition_weights(*place, **read))
    if config.eos_ids and config.eos_penalty_weight > 0:
        addends["eos_penalty"] = penalty(early_eos_weights(*place))
    if negative_ids is None:
        negative_ids = torch.full((*targets.shape, 1), -1)
    given = negative_weights_dense(config, rows.targets, rows.counted, negative_ids, negative_weights)
    addends["negative_penalty"] = penalty(given)

    metrics = {
        "cross_entropy": rows.mean(nll),
        "perplexity": rows.mean(nll).exp(),
        "n_tokens": rows.counted.sum(),
        "accuracy": rows.mean((z.argmax(-1) == targets).to(z.dtype)),
        "entropy": rows.mean(token_entropy(z)),
        "temperature": torch.as_tensor(rows.temperature),
    }
    if config.use_focal_loss:
        metrics["focal_loss"] = addends["main_loss"]
    return addends, metrics


# -- Multi-token prediction


class Depth(NamedTuple):
    loss: Tensor  # [B, T] smoothed cross-entropy
    nll: Tensor  # [B, T]
    counted: Tensor  # [B, T] bool
    token_weights: Tensor  # [B, T]


def mtp_depth(
    rows: Rows,
    logits: Tensor,  # [B, T, vocab]
    depth: int,
) -> Depth:
    """Row t predicts targets[t + depth], with that row's token weight, if it counts and lies in the same segment.

    Row t itself need not count (the last prompt rows predict into the answer). Temperature, soft cap, smoothing and
    padded vocabulary are those of the main term; focal is not applied.
    """

    def ahead(x: Tensor) -> Tensor:  # [B, T]
        return torch.cat([x[:, depth:], torch.zeros_like(x[:, :depth])], 1)

    counted = ahead(rows.counted) & (ahead(rows.segments) == rows.segments)
    z = rows.effective(logits, counted)
    nll = negative_log_likelihood(z, torch.where(counted, ahead(rows.targets), 0))
    loss = smoothed(nll, z, rows.config.label_smoothing, rows.config.smoothing_mode)
    return Depth(loss, nll, counted, ahead(rows.token_weights))


def confidence_calibration(
    confidence: Tensor,  # [B, T] in [0, 1]
    first: Depth,
) -> Tensor:
    """BCE(confidence, detached probability that head 1 gives its target), [B, T]; logs bounded by -100 as in F."""
    confidence = torch.where(first.counted, confidence, 0.5)
    return F.binary_cross_entropy(confidence, torch.exp(-first.nll).detach(), reduction="none")


def mtp_terms(
    rows: Rows,
    head_logits: Sequence[Tensor],  # K of [B, T, vocab], or none: switched off
    confidence: Tensor | None,  # [B, T], adaptive heads with confidence weighting
    is_calibrated: bool,
) -> Terms:
    """mtp_weight mean_k sum_t conf_t w_{t+k} CE_{k,t} / N, conf detached; and the calibration of the confidence."""
    config, n_depths = rows.config, rows.config.num_future_tokens
    if len(head_logits) not in (0, n_depths):
        raise ValueError(f"unified_loss: expected num_future_tokens = {n_depths} heads, got {len(head_logits)}")
    depths = [mtp_depth(rows, logits, depth) for depth, logits in enumerate(head_logits, start=1)]
    factor = 1.0 if confidence is None else confidence.detach()
    zero = rows.reduce(torch.zeros_like(rows.token_weights))
    losses = [rows.reduce(factor * d.loss, d.counted, d.token_weights) for d in depths]
    addends = {"mtp_loss": config.mtp_weight * sum(losses, zero) / n_depths}
    if is_calibrated:
        bce = zero
        if depths:
            bce = rows.reduce(confidence_calibration(confidence, depths[0]), depths[0].counted, depths[0].token_weights)
        addends["confidence_regularization"] = config.confidence_reg_strength * bce
    means = [rows.mean(d.loss, d.counted) for d in depths] or [torch.zeros_like(rows.n)] * n_depths
    return addends, {f"mtp_loss_depth_{depth}": value for depth, value in enumerate(means, start=1)}


# -- Mixture of experts: one layer, rows of one router


def router_probabilities(
    gate_logits: Tensor,  # [N, E]
    router_score: str,
) -> Tensor:
    """softmax, or sigmoid divided by its sum; [N, E]."""
    if router_score == "softmax":
        return torch.softmax(gate_logits, -1)
    scores = torch.sigmoid(gate_logits)
    return scores / scores.sum(-1, keepdim=True)


class RouterStatistics(NamedTuple):
    """Sums over the rows of one router, or of several added up."""

    counts: Tensor  # [E] choices of each expert
    probability: Tensor  # [E]
    lse_squared: Tensor  # []
    n_rows: Tensor  # []


def router_statistics(
    config: UnifiedLossConfig,
    gate_logits: Tensor,  # [N, E]
    keep: Tensor,  # [N] bool, False for padding
    expert_indices: Tensor | None = None,  # [N, k]
    expert_bias: Tensor | None = None,  # [E]
) -> RouterStatistics:
    """Sums over the kept rows.

    Without expert_indices: the top num_experts_per_token of the scores (probabilities, or sigmoid before it is
    normalised) + expert_bias, ties to the lowest index.
    """
    gate_logits = torch.where(keep.unsqueeze(-1), gate_logits, 0.0)
    probabilities = router_probabilities(gate_logits, config.router_score)
    if expert_indices is None:
        scores = probabilities if config.router_score == "softmax" else torch.sigmoid(gate_logits)
        scores = scores.detach() + (0.0 if expert_bias is None else expert_bias)
        expert_indices = torch.argsort(scores, dim=-1, descending=True, stable=True)[:, : config.num_experts_per_token]
    counts = F.one_hot(expert_indices[keep].long(), gate_logits.shape[-1]).sum((0, 1)).to(gate_logits.dtype)
    probability = torch.where(keep.unsqueeze(-1), probabilities, 0.0).sum(0)
    return RouterStatistics(counts, probability, torch.where(keep, z_loss(gate_logits), 0.0).sum(), keep.sum())


def moe_steering(
    statistics: RouterStatistics,
    expert_load: Tensor,  # [E] running load f, sums to 1
) -> Tensor:
    """E sum_e (f_e - 1/E) P_e, []: 0 at balance; pushes the mean probability P away from overloaded experts."""
    n_experts = expert_load.numel()
    mean_probability = statistics.probability / statistics.n_rows.clamp(min=1)
    return n_experts * ((expert_load.detach() - 1 / n_experts) * mean_probability).sum()


def updated_expert_load(
    expert_load: Tensor,  # [E]
    counts: Tensor,  # [E]
    momentum: float,
) -> Tensor:
    """f <- momentum f + (1 - momentum) c / sum c, [E]; unchanged without a choice."""
    if counts.sum() == 0:
        return expert_load
    return momentum * expert_load + (1 - momentum) * counts / counts.sum()


def updated_expert_bias(
    expert_bias: Tensor,  # [E]
    counts: Tensor,  # [E]
    rate: float,
) -> Tensor:
    """b <- b + rate sign(mean(c) - c), [E] (loss-free balancing, DeepSeek-V3)."""
    return expert_bias + rate * torch.sign(counts.mean() - counts)


def load_balancing(statistics: RouterStatistics, convention: str) -> Tensor:
    """E sum_e f_e P_e, []; P = mean probability. 0 without rows.

    "switch": f = c / (k N), so 1 at balance (Fedus et al. 2021). "huggingface": f = c / N, k times that.
    """
    n = statistics.n_rows.clamp(min=1)
    fractions = statistics.counts / (statistics.counts.sum().clamp(min=1) if convention == "switch" else n)
    return statistics.counts.numel() * (fractions * statistics.probability / n).sum()


def load_variation(counts: Tensor) -> tuple[Tensor, Tensor]:  # [E] -> [], []
    """Population std / mean of the counts, and max / mean - 1 (MaxVio); 0, 0 without a choice."""
    mean = counts.mean()
    if mean == 0:
        return mean, mean
    return counts.std(correction=0) / mean, counts.max() / mean - 1


def router_terms(
    config: UnifiedLossConfig,
    gates: Sequence[Tensor],  # one [N, E] per layer
    keeps: Sequence[Tensor],  # one [N] bool per layer, False for padding
    chosen: Sequence[Tensor | None],  # one [N, k] per layer
    expert_load: Tensor | None,  # [layers, E], default 1/E
    expert_bias: Tensor | None,  # [layers, E]
) -> Terms:
    """Each term per layer, then averaged over layers; "huggingface" load balancing adds the layers' rows up first."""
    n_layers, n_experts = len(gates), gates[0].shape[-1]
    load = gates[0].new_full((n_layers, n_experts), 1 / n_experts) if expert_load is None else expert_load
    bias = [None] * n_layers if expert_bias is None else expert_bias
    layers = [router_statistics(config, *layer) for layer in zip(gates, keeps, chosen, bias, strict=True)]
    addends = {}
    if config.use_moe_balancing:
        steering = [moe_steering(layer, f.to(gates[0].dtype)) for layer, f in zip(layers, load, strict=True)]
        addends["moe_balancing_term"] = config.gradient_balance_weight * torch.stack(steering).mean()
    if config.use_auxiliary_loss:
        convention, routers = config.load_balancing_convention, layers
        if convention == "huggingface":
            routers = [RouterStatistics(*(torch.stack(field).sum(0) for field in zip(*layers, strict=True)))]
        balance = torch.stack([load_balancing(router, convention) for router in routers]).mean()
        router_z = torch.stack([layer.lse_squared / layer.n_rows.clamp(min=1) for layer in layers]).mean()
        addends["aux_load_balancing"] = config.load_balancing_weight * balance
        addends["aux_router_z"] = config.router_z_weight * router_z
    variation = torch.stack([torch.stack(load_variation(layer.counts)) for layer in layers]).mean(0)
    return addends, {"moe_cv": variation[0], "moe_max_violation": variation[1]}


# -- Other terms of a batch


def diversity(
    expert_outputs: Tensor,  # [E, N, H]
    keep: Tensor,  # [N] bool
) -> Tensor:
    """Mean cosine similarity over the pairs of experts and the kept rows, [];
    0 for E < 2 and for vectors of length 0.
    """
    units = F.normalize(torch.where(keep.unsqueeze(-1), expert_outputs, 0.0), dim=-1)
    n_experts = len(units)
    pairs = [(units[i] * units[j]).sum(-1) for i in range(n_experts) for j in range(i)]
    if not pairs:
        return 0.0 * units.sum()
    return torch.stack(pairs).mean(0).sum() / keep.sum().clamp(min=1)


def info_nce(
    anchors: Tensor,  # [n, H]
    positives: Tensor,  # [n, H]
    temperature: float,
) -> Tensor:
    """Mean cross-entropy of cosine(a_i, b_j) / temperature with target j = i, []; 0 for n = 0.

    Both ways, from a to b and from b to a, averaged (Radford et al. 2021, CLIP).
    """
    similarity = F.normalize(anchors, dim=-1) @ F.normalize(positives, dim=-1).T / temperature
    partners = torch.arange(len(anchors))
    both = [F.cross_entropy(logits, partners, reduction="sum") for logits in (similarity, similarity.T)]
    return torch.stack(both).mean() / max(len(anchors), 1)


def simctg(
    hidden_states: Tensor,  # [B, T, H]
    keep: Tensor,  # [B, T] bool
    segments: Tensor,  # [B, T]
    margin: float = 0.5,
) -> Tensor:
    """Mean of max(0, margin - 1 + cosine(h_i, h_j)) over all pairs i != j of kept tokens of one segment,
    [] (Su et al. 2022).
    """
    units = F.normalize(torch.where(keep.unsqueeze(-1), hidden_states, 0.0), dim=-1)
    same = segments.unsqueeze(1) == segments.unsqueeze(2)
    pairs = same & keep.unsqueeze(1) & keep.unsqueeze(2) & ~torch.eye(keep.shape[1], dtype=torch.bool)
    hinge = torch.relu(margin - 1 + units @ units.transpose(1, 2))
    return torch.where(pairs, hinge, 0.0).sum() / pairs.sum().clamp(min=1)


def adaptive_temperature(
    config: UnifiedLossConfig,
    history: Sequence[float],  # the finite cross-entropies of the commits so far
) -> float:
    """T = clamp(T0 (1 + gain (cv - 0.075)), bounds) with cv = population std / mean of the last 100;
    T0 below 10 of them.
    """
    recent = list(history)[-100:]
    if len(recent) < 10:
        return config.initial_temperature
    mean = sum(recent) / len(recent)
    std = math.sqrt(sum((value - mean) ** 2 for value in recent) / len(recent))
    cv = std / mean if mean != 0 else 0.0
    low, high = config.temperature_bounds
    return min(max(config.initial_temperature * (1 + config.temperature_gain * (cv - 0.075)), low), high)


# -- Everything together


def unified_loss(
    config: UnifiedLossConfig,
    logits: Tensor | None = None,  # [B, T, vocab] or [n_rows, vocab]
    targets: Tensor | None = None,  # [B, T] or [n_rows]
    attention_mask: Tensor | None = None,  # as targets
    hidden_states: Tensor | None = None,  # [B, T, H] or [n_rows, H]
    primary_logits: Tensor | None = None,  # as logits
    additional_logits: Tensor | Sequence[Tensor] | None = None,  # num_future_tokens of logits' shape
    confidence_scores: Tensor | None = None,  # [B], [B, 1], [B, T] or [B, T, 1]
    mtp_active: bool | Tensor | None = None,  # [] False switches the heads of both kinds off
    gate_logits: Tensor | Sequence[Tensor] | None = None,  # [N, E], [layers, N, E], or [..., E] for one layer
    expert_indices: Tensor | Sequence[Tensor] | None = None,  # [N, k] or [layers, N, k]
    expert_outputs: Tensor | Sequence[Tensor] | None = None,  # [E, N, H] or [E, B, T, H]
    *,
    lm_head_weight: Tensor | None = None,  # [vocab, H]
    lm_head_bias: Tensor | None = None,  # [vocab]
    token_weights: Tensor | None = None,  # as targets
    input_ids: Tensor | None = None,  # as targets
    position_ids: Tensor | None = None,  # as targets or [1, T]
    segment_ids: Tensor | None = None,  # as targets or [1, T]
    cu_seqlens: Tensor | None = None,  # [n_segments + 1]
    num_items_in_batch: float | Tensor | None = None,
    negative_ids: Tensor | None = None,  # [B, T, M]
    negative_weights: Tensor | None = None,  # [B, T, M]
    contrastive_pair: tuple[Tensor, Tensor] | None = None,  # two of [n, H]
    temperature: float | Tensor | None = None,  # [] the adaptive one; default initial_temperature
    expert_load: Tensor | None = None,  # [layers, E], default 1/E
    expert_bias: Tensor | None = None,  # [layers, E], for the own top-k
    mtp_logits: Sequence[Tensor] | Callable[[int], Tensor] | None = None,  # of logits' shape; or depth 1..K -> that
) -> dict[str, Tensor]:
    """What UnifiedLoss(...).forward(..., return_detailed=True) returns: total_loss, its addends (detached), METRICS.

    The keys depend on the configuration only: `negative_penalty` is always there (0 where nothing is given),
    `confidence_regularization` where the adaptive heads use confidence weighting and its strength is > 0, the `moe_`
    metrics with use_moe_balancing or use_auxiliary_loss. Choices where the specification is silent:

    * Router rows, expert outputs and hidden states leave out *padding* (attention_mask 0 or a pad target), not rows
      that are only ignore_index: prompts are routed too. In unshifted mode a router over all B T tokens is masked by
      the unshifted mask. moe_ metrics: counts of this call, per layer, then averaged over layers.
    * Terms of a batch are multiplied by n_local / N with num_items_in_batch under "mean" (n_local: number of local rows
      that count), else by 1, or 0 where no row counts: the whole loss is 0 then.
    * primary "adaptive_mtp" uses the adaptive heads whatever mtp_type says. The depth metrics are the depth's loss
      (with main's smoothing), unweighted, over the rows that count at that depth. BCE rows are weighted and divided by
      N as token terms are.
    * labels_are_shifted=False on flat rows needs segments; reduction "none" then has the shape [B, T-1].
    """
    adaptive_heads = config.primary_loss_type == "adaptive_mtp" or (config.use_mtp and config.mtp_type == "adaptive")
    deepseek_heads = config.use_mtp and not adaptive_heads
    if primary_logits is not None and (config.primary_loss_type == "adaptive_mtp" or logits is None):
        logits = primary_logits
    if logits is None and hidden_states is not None and lm_head_weight is not None:
        logits = F.linear(hidden_states, lm_head_weight, lm_head_bias)
    logits = _required(logits, "logits (or hidden_states and lm_head_weight)", "unified_loss")
    targets = _required(targets, "targets", "unified_loss")

    flat = targets.dim() == 1
    has_sequences = not flat or any(given is not None for given in (segment_ids, position_ids, cu_seqlens))
    needs_sequences = {
        "use_ngram_penalty": config.use_ngram_penalty,
        "use_immediate_repetition_penalty": config.use_immediate_repetition_penalty,
        "eos_token_id": bool(config.eos_ids) and config.eos_penalty_weight > 0,
        "use_mtp": deepseek_heads or adaptive_heads,
        "use_contrastive_loss": config.use_contrastive_loss and contrastive_pair is None,
        "labels_are_shifted=False": not config.labels_are_shifted,
    }
    for option, is_on in needs_sequences.items():
        if is_on and not has_sequences:
            raise ValueError(
                f"unified_loss: {option} needs sequences: expected targets of shape [B, T], or segment_ids, "
                f"position_ids or cu_seqlens, got targets of shape {list(targets.shape)}"
            )
    # [n_rows, ...] is one sequence [1, n_rows, ...]; unshifted: row t predicts label t + 1
    rows_end, labels_start = (None, None) if config.labels_are_shifted else (-1, 1)

    def of_rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else (x.unsqueeze(0) if flat else x)[:, :rows_end]

    def of_labels(x: Tensor | None) -> Tensor | None:
        return None if x is None else (x.unsqueeze(0) if flat else x)[:, labels_start:]

    n_batch, n_time = (1, len(targets)) if flat else targets.shape
    token_segments = segment_numbers(
        n_batch, n_time, segment_ids=segment_ids, position_ids=position_ids, cu_seqlens=cu_seqlens
    )
    token_keep, token_mask = ~is_padding(config, targets, attention_mask), of_rows(attention_mask)
    logits, targets, attention_mask = of_rows(logits), of_labels(targets), of_labels(attention_mask)
    row_keep = ~is_padding(config, targets, attention_mask)
    segments = token_segments[:, :rows_end]
    label_in_segment = token_segments[:, labels_start:] == segments
    targets = torch.where(label_in_segment, targets, config.ignore_index)
    counted = counted_rows(config, targets, attention_mask)
    for b, t in (counted & ((targets < 0) | (targets >= config.vocab_size))).nonzero().tolist():
        raise IndexError(
            f"unified_loss: expected targets in [0, vocab_size = {config.vocab_size}) or ignore_index, "
            f"got {int(targets[b, t])} in row {b * targets.shape[1] + t}"
        )
    dtype = logits.dtype
    weights = torch.ones_like(targets, dtype=dtype) if token_weights is None else of_labels(token_weights).to(dtype)
    n = denominator(config, counted, weights, num_items_in_batch).to(dtype)
    temperature = config.initial_temperature if temperature is None else temperature
    rows = Rows(config, targets, counted, segments, weights, n, temperature)

    # unshifted: the mask is that of the tokens read, and that of the labels where it is shifted with them
    read = {"attention_mask": attention_mask}
    if input_ids is not None:
        read = {"input_ids": of_rows(input_ids), "attention_mask": token_mask}
    terms = [row_terms(rows, logits, read, of_rows(negative_ids), of_rows(negative_weights))]
    if deepseek_heads or adaptive_heads:
        heads, confidence = [], None
        is_weighted = adaptive_heads and config.use_confidence_weighting
        if mtp_active is None or bool(mtp_active):
            if adaptive_heads and additional_logits is None and mtp_active is None:
                heads = []  # as many as are given
            elif adaptive_heads:
                heads = list(_required(additional_logits, "additional_logits", "mtp_active"))
            elif callable(mtp_logits):
                heads = [mtp_logits(depth) for depth in range(1, config.num_future_tokens + 1)]
            else:
                heads = list(_required(mtp_logits, "hidden_states", "use_mtp"))
            if is_weighted and heads:
                scores = _required(confidence_scores, "confidence_scores", "use_confidence_weighting").to(dtype)
                per_batch_row = scores.reshape(n_batch, n_time if scores.numel() == n_batch * n_time else 1)
                confidence = per_batch_row.expand(n_batch, n_time)[:, :rows_end]
        is_calibrated = is_weighted and config.confidence_reg_strength > 0
        terms.append(mtp_terms(rows, [of_rows(x) for x in heads], confidence, is_calibrated))

    def kept(n_rows: int) -> Tensor:
        """The rows that are no padding, where the mask has their number; else all. [n_rows] bool"""
        matching = [keep for keep in (row_keep, token_keep) if keep.numel() == n_rows]
        return matching[0].reshape(-1) if matching else torch.ones(n_rows, dtype=torch.bool)

    of_batch = {}
    if config.use_moe_balancing or config.use_auxiliary_loss:
        option = "use_moe_balancing" if config.use_moe_balancing else "use_auxiliary_loss"
        gates = _layers(config, _required(gate_logits, "gate_logits", option))
        chosen = [None] * len(gates) if expert_indices is None else _layers(config, expert_indices)
        keeps = [kept(len(gate)) for gate in gates]
        addends, metrics = router_terms(config, gates, keeps, chosen, expert_load, expert_bias)
        of_batch |= addends
        terms.append(({}, metrics))
    if config.use_diversity_loss:
        outputs = torch.stack(list(_required(expert_outputs, "expert_outputs", "use_diversity_loss")))
        outputs = outputs.reshape(len(outputs), -1, outputs.shape[-1])
        of_batch["diversity_loss"] = config.diversity_weight * diversity(outputs, kept(outputs.shape[1]))
    if config.use_contrastive_loss:
        if contrastive_pair is not None:
            contrast = info_nce(*contrastive_pair, config.contrastive_temperature)
        else:
            states = _required(hidden_states, "contrastive_pair or hidden_states", "use_contrastive_loss")
            contrast = simctg(of_rows(states), row_keep, segments)
        of_batch["contrastive_loss"] = config.contrastive_weight * contrast
    share = counted.any().to(dtype)
    if num_items_in_batch is not None and config.reduction == "mean":
        share = counted.sum() / n
    terms.append(({name: share * value for name, value in of_batch.items()}, {}))

    addends = {name: value for term_addends, _ in terms for name, value in term_addends.items()}
    metrics = {name: value for _, term_metrics in terms for name, value in term_metrics.items()}
    result = {"total_loss": torch.stack(list(addends.values())).sum(0)}
    result |= {name: value.detach() for name, value in (addends | metrics).items()}
    return {name: value.squeeze(0) if flat and value.dim() == 2 else value for name, value in result.items()}


def _required(value: Any, argument: str, option: str) -> Any:
    if value is None:
        raise ValueError(f"unified_loss: {option} needs {argument}, got None")
    return value


def _layers(
    config: UnifiedLossConfig,
    x: Tensor | Sequence[Tensor],  # [layers, N, E], [N, E], [..., E]
) -> list[Tensor]:
    """One [N, E] per layer. A tensor of more than two dimensions has layers in front if num_moe_layers says as many."""
    if isinstance(x, Tensor):
        x = list(x) if x.dim() > 2 and len(x) == config.num_moe_layers else [x]
    return [layer.reshape(-1, layer.shape[-1]) for layer in x]
