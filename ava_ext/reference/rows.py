"""The rows of one call: every term of the logits, and multi-token prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ava_ext.config import UnifiedLossConfig
from ava_ext.reference.repetition import (
    early_eos_weights,
    immediate_repetition_weights,
    negative_weights_dense,
    ngram_weights,
)
from ava_ext.reference.sequences import class_weights_of
from ava_ext.reference.softmax_rows import (
    confidence_penalty,
    cross_entropy_of_probabilities,
    effective_logits,
    focal,
    negative_log_likelihood,
    reweighted,
    smoothed,
    soft_targets,
    tail,
    token_entropy,
    token_weight,
    unlikelihood,
    z_loss,
)


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
            logit_scale=self.config.logit_scale,
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
    soft_target_ids: Tensor | None,  # [B, T, K]
    soft_target_weights: Tensor | None,  # [B, T, K]
    target_probabilities: Tensor | None,  # [B, T, vocab]
    kept: Tensor,  # [B, T] bool: no padding
    has_num_items: bool,
) -> Terms:
    """Every term of the logits rows."""
    config = rows.config
    z = rows.effective(logits, rows.counted)
    targets = torch.where(rows.counted, rows.targets, 0)
    nll = negative_log_likelihood(z, targets)
    hard = focal(z, targets, config.focal_alpha, config.focal_gamma) if config.use_focal_loss else nll

    if config.token_reweighting is not None:
        weight = token_weight(z, targets, config.token_reweighting, config.reweighting_exponent)
        hard = reweighted(hard, weight)

    hard = reweighted(hard, class_weights_of(config, targets, rows.counted))
    weights = None if config.class_weights is None else torch.tensor(config.class_weights, dtype=torch.float64)
    if target_probabilities is not None:
        hard = nll = cross_entropy_of_probabilities(z, target_probabilities)

    def penalty(candidate_weights: Tensor) -> Tensor:  # [B, T, vocab_size]
        values = unlikelihood(z.flatten(0, 1), candidate_weights.flatten(0, 1))
        return rows.reduce(values.reshape(targets.shape))

    place = (config, rows.targets, rows.counted, rows.segments)
    addends = {"main_loss": rows.reduce(smoothed(hard, z, config.label_smoothing, config.smoothing_mode, weights))}
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
    if config.negatives_need_target:
        given = negative_weights_dense(config, rows.targets, rows.counted, negative_ids, negative_weights)
        addends["negative_penalty"] = penalty(given)
    else:
        own_targets = torch.where(rows.counted, rows.targets, -1)
        given = negative_weights_dense(config, own_targets, kept, negative_ids, negative_weights)
        has_any = (given > 0).any(-1)
        of_pass = rows
        if config.reduction == "mean" and not has_num_items:
            n = torch.where(has_any, rows.token_weights, 0.0).sum()
            of_pass = rows._replace(n=torch.where(n == 0, 1.0, n))
        values = unlikelihood(rows.effective(logits, has_any).flatten(0, 1), given.flatten(0, 1))
        addends["negative_penalty"] = of_pass.reduce(values.reshape(targets.shape), has_any)

    teacher_kl = torch.zeros_like(nll)
    if config.distillation_weight > 0:
        distillation = torch.zeros_like(nll)
        if soft_target_ids is not None and soft_target_weights is not None:
            q = torch.where(soft_target_ids < 0, 0.0, soft_target_weights)
            distillation = soft_targets(z / config.distillation_temperature, soft_target_ids, q)
            teacher_kl = torch.xlogy(q, q).sum(-1)
            if config.distillation_tail:
                distillation = distillation + tail(z / config.distillation_temperature, soft_target_ids, q)
                left = (1 - q.sum(-1)).clamp(min=0)
                teacher_kl = teacher_kl + torch.xlogy(left, left)
            teacher_kl = teacher_kl + distillation
        factor = config.distillation_weight * config.distillation_temperature**2
        addends["distillation_loss"] = factor * rows.reduce(distillation)

    metrics = {
        "cross_entropy": rows.mean(nll),
        "perplexity": rows.mean(nll).exp(),
        "n_tokens": rows.counted.sum(),
        "accuracy": rows.mean((z.argmax(-1) == targets).to(z.dtype)),
        "entropy": rows.mean(token_entropy(z)),
        "temperature": torch.as_tensor(rows.temperature),
    }
    for k in config.accuracy_top_k:
        own = logits.gather(-1, targets.unsqueeze(-1))
        rank = (logits[..., : config.vocab_size] > own).sum(-1)
        metrics[f"accuracy_top_{k}"] = rows.mean((rank < k).to(z.dtype))
    if config.distillation_weight > 0:
        metrics["teacher_kl"] = rows.mean(teacher_kl)
    if config.use_focal_loss:
        metrics["focal_loss"] = addends["main_loss"]
    return addends, metrics


class Depth(NamedTuple):
    loss: Tensor  # [B, T] smoothed cross-entropy
    nll: Tensor  # [B, T]
    counted: Tensor  # [B, T] bool
    token_weights: Tensor  # [B, T]
    correct: Tensor  # [B, T]


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
    correct = (z.argmax(-1) == ahead(rows.targets)).to(z.dtype)
    return Depth(loss, nll, counted, ahead(rows.token_weights), correct)


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
    depth_weights: Tensor | None = None,  # [K]
) -> Terms:
    """mtp_weight mean_k c_k sum_t conf_t w_{t+k} CE_{k,t} / N_k, conf detached; and the calibration of the confidence.

    N_k = N, and with mtp_own_denominator N * sum_t w_{t+k} / sum_t w_t over the rows that count. Metrics of a depth:
    loss and accuracy over its rows; acceptance: how often depths 1..k are all right, over rows that count at all of
    them.
    """
    config, n_depths = rows.config, rows.config.num_future_tokens
    if len(head_logits) not in (0, n_depths):
        raise ValueError(f"unified_loss: expected num_future_tokens = {n_depths} heads, got {len(head_logits)}")
    depths = [mtp_depth(rows, logits, depth) for depth, logits in enumerate(head_logits, start=1)]
    factor = 1.0 if confidence is None else confidence.detach()
    zero = rows.reduce(torch.zeros_like(rows.token_weights))
    losses = [rows.reduce(factor * d.loss, d.counted, d.token_weights) for d in depths]
    for k, d in enumerate(depths):
        if config.mtp_own_denominator:
            own = torch.where(d.counted, d.token_weights, 0.0).sum()
            losses[k] = losses[k] * (torch.where(rows.counted, rows.token_weights, 0.0).sum() / own if own else 0.0)
        if depth_weights is not None:
            losses[k] = losses[k] * depth_weights[k]
    addends = {"mtp_loss": config.mtp_weight * sum(losses, zero) / n_depths}
    if is_calibrated:
        bce = zero
        if depths:
            bce = rows.reduce(confidence_calibration(confidence, depths[0]), depths[0].counted, depths[0].token_weights)
        addends["confidence_regularization"] = config.confidence_reg_strength * bce
    metrics = {}
    for k in range(1, n_depths + 1):
        values = [torch.zeros_like(rows.n)] * 3
        if depths:
            d, chain = depths[k - 1], depths[:k]
            all_counted = torch.stack([x.counted for x in chain]).all(0)
            all_correct = torch.stack([x.correct for x in chain]).prod(0)
            values = [
                rows.mean(d.loss, d.counted),
                rows.mean(d.correct, d.counted),
                rows.mean(all_correct, all_counted),
            ]
        names = (f"mtp_loss_depth_{k}", f"mtp_accuracy_depth_{k}", f"mtp_acceptance_depth_{k}")
        metrics |= dict(zip(names, values, strict=True))
    return addends, metrics
