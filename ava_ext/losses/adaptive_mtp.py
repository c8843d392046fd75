"""Multi-token prediction on logits that the model gives, weighted by a confidence that is kept calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.float32_buffers import Float32Buffers
from ava_ext.losses.mtp import MAIN_LOSS, HeadLoss, counted_ahead, shift_targets
from ava_ext.ops.linear_rows import LinearLogits
from ava_ext.ops.softmax_rows import TERM_NAMES

CROSS_ENTROPY = TERM_NAMES.index("cross_entropy")

# log(confidence) and log(1 - confidence) stay above log(1e-6): a confidence of exactly 0 or 1 costs 13.8, not infinity
CONFIDENCE_MARGIN = 1e-6


Heads = Tensor | Sequence[Tensor | LinearLogits] | None


class AdaptiveMTPTerms(NamedTuple):
    """What adaptive_mtp_terms returns."""

    mtp_loss: Tensor  # []  with graph; [batch, length] with per_row
    confidence_regularization: Tensor  # []  with graph; [batch, length] with per_row
    depth_losses: Tensor  # [n_heads]  mean loss of each head over its own rows, unweighted; detached
    mean_confidence: Tensor  # []  over rows whose head 1 has a target; detached
    mean_target_probability: Tensor  # []  over the same rows, what head 1 gives its target; detached


def adaptive_mtp_terms(
    additional_logits: Heads,  # [n_heads, batch, length, vocab_size], or a list
    targets: Tensor,  # [batch, length]
    row_weights: Tensor,  # [batch, length]
    segments: Tensor | None,  # [batch, length]
    head_loss: HeadLoss,
    *,
    confidence_scores: Tensor | None = None,  # [batch], [batch, 1], [batch, length] or [batch, length, 1]
    mtp_active: bool | Tensor | None = None,  # [] or [batch] bool
    mtp_weight: float = UnifiedLossConfig.mtp_weight,
    confidence_reg_strength: float = UnifiedLossConfig.confidence_reg_strength,
    use_confidence_weighting: bool = UnifiedLossConfig.use_confidence_weighting,
    ignore_index: int = UnifiedLossConfig.ignore_index,
    per_row: bool = False,
) -> AdaptiveMTPTerms:
    """Confidence-weighted losses of the heads, and the term that calibrates the confidence.

        mtp_loss = mtp_weight * mean over heads k of sum_t w_{t+k} c_t CE(head k's logits at t, targets[t + k])
        confidence_regularization = strength * sum_t w_{t+1} BCE(c_t, q_t)

    w is row_weights, c the confidence (detached in mtp_loss: the heads' losses cannot be lowered by giving up; 1
    without confidence weighting), q the detached probability that head 1 gives its target. The second term is lowest
    at c = q.

    Args:
        additional_logits: of the heads k = 1..n_heads; head k's row t predicts targets[:, t + k]. A list may hold
            LinearLogits, whose logits never exist as a whole.
        targets: row t's target of depth 0 (the next token).
        row_weights: token weight / N of each row at depth 0, 0 where it does not count; no gradient.
        segments: contiguous documents of packed rows; None: a row is one segment.
        head_loss: main's cross-entropy: (logits, targets, row_weights) -> RowLoss, of the sum or with per_row of each
            row, with 0 where the target is ignore_index.
        confidence_scores: in [0, 1], per sequence or per row. Without, c = 1 and no confidence term.
        mtp_active: False switches the heads off for this call; a tensor does so on the device, for all or per
            sequence; None: on.
        mtp_weight, confidence_reg_strength, use_confidence_weighting, ignore_index: see UnifiedLossConfig.
        per_row: give both terms per row, [batch, length].

    Returns:
        AdaptiveMTPTerms, float32 (float64 for float64 logits). Zeros, connected to the graph, while switched off.

    Raises:
        ValueError: no heads while they are on, shapes that do not fit.

    Example:
        >>> weights = torch.full((2, 5), 1 / 10)
        >>> terms = adaptive_mtp_terms(heads, targets, weights, None, head_loss, confidence_scores=confidence)
        >>> loss = main + terms.mtp_loss + terms.confidence_regularization
    """
    heads = _heads(additional_logits, targets)
    if mtp_active is False or not heads:
        if mtp_active is not False:
            raise ValueError("adaptive_mtp: expected additional_logits of at least 1 head, got none")
        return _switched_off(heads, targets, row_weights, confidence_scores, per_row)
    batch, length = targets.shape
    dtype = torch.float64 if heads[0].dtype == torch.float64 else torch.float32
    weights = row_weights.detach().to(dtype)
    if isinstance(mtp_active, Tensor):
        weights = torch.where(_rows(mtp_active, batch, length, "mtp_active").to(torch.bool), weights, 0.0)
    confidence = None
    if confidence_scores is not None:
        confidence = _rows(confidence_scores, batch, length, "confidence_scores").to(dtype)
    head_weights = weights.new_tensor(mtp_weight / len(heads))
    if confidence is not None and use_confidence_weighting:
        head_weights = head_weights * confidence.detach()
    losses, main_losses, probability = [], [], torch.zeros_like(weights)
    all_targets = [shift_targets(targets, segments, weights != 0, k, ignore_index) for k in range(1, len(heads) + 1)]
    for k, (logits, depth_targets) in enumerate(zip(heads, all_targets, strict=True), start=1):
        output = head_loss(logits, depth_targets, head_weights * counted_ahead(weights, segments, k))
        losses.append(output.loss)
        main_losses.append(_mean_of(output.terms[MAIN_LOSS], depth_targets != ignore_index))
        if k == 1:
            probability = output.terms[CROSS_ENTROPY].neg().exp().to(dtype)
    is_target = all_targets[0] != ignore_index
    regularization = torch.zeros_like(weights)
    if confidence is not None:
        certainty = confidence.clamp(CONFIDENCE_MARGIN, 1 - CONFIDENCE_MARGIN)
        cross_entropy = -(probability * certainty.log() + (1 - probability) * torch.log1p(-certainty))
        row_weight = confidence_reg_strength * counted_ahead(weights, segments, 1)
        regularization = torch.where(is_target, cross_entropy, 0.0) * row_weight
    seen = torch.ones_like(weights) if confidence is None else confidence.detach()
    return AdaptiveMTPTerms(
        mtp_loss=torch.stack(losses).sum(0),
        confidence_regularization=regularization if per_row else regularization.sum(),
        depth_losses=torch.stack(main_losses),
        mean_confidence=_mean_of(seen, is_target),
        mean_target_probability=_mean_of(probability, is_target),
    )


def _heads(additional_logits: Heads, targets: Tensor) -> list[Tensor | LinearLogits]:
    if targets.dim() != 2:
        raise ValueError(f"adaptive_mtp: expected targets [batch, length], got {list(targets.shape)}")
    if additional_logits is None:
        return []
    if isinstance(additional_logits, LinearLogits):  # a tuple, but of one head
        raise ValueError("adaptive_mtp: expected a list of LinearLogits, one per head, got one LinearLogits")
    if isinstance(additional_logits, Tensor) and additional_logits.dim() != 4:
        raise ValueError(
            "adaptive_mtp: expected additional_logits [n_heads, batch, length, vocab_size], got "
            f"{list(additional_logits.shape)}"
        )
    heads = list(additional_logits)
    for number, logits in enumerate(heads):
        if isinstance(logits, LinearLogits):
            logits.check(f"adaptive_mtp: additional_logits[{number}]")
        if len(logits.shape) != 3 or logits.shape[:2] != targets.shape:
            raise ValueError(
                f"adaptive_mtp: expected additional_logits[{number}] of shape [{targets.shape[0]}, {targets.shape[1]}, "
                f"vocab_size], got {list(logits.shape)}"
            )
    return heads


def _rows(values: Tensor, batch: int, length: int, name: str) -> Tensor:  # [batch, length]
    shape = list(values.shape)
    if shape == [batch, length, 1]:
        return values.squeeze(-1)
    if shape in ([batch], [batch, 1]):
        return values.reshape(batch, 1).expand(batch, length)
    if shape == [batch, length] or (not shape and name == "mtp_active"):
        return values.expand(batch, length)
    raise ValueError(
        f"adaptive_mtp: expected {name} of shape [{batch}], [{batch}, 1], [{batch}, {length}] or [{batch}, "
        f"{length}, 1], "
        f"got {shape}"
    )


def _mean_of(values: Tensor, mask: Tensor) -> Tensor:  # [batch, length], [batch, length] -> []
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp_min(1)


def _switched_off(
    heads: list[Tensor | LinearLogits],
    targets: Tensor,
    row_weights: Tensor,
    confidence_scores: Tensor | None,
    per_row: bool,
) -> AdaptiveMTPTerms:
    dtype = torch.float64 if row_weights.dtype == torch.float64 else torch.float32
    zeros = torch.zeros(targets.shape if per_row else (), dtype=dtype, device=targets.device)
    mtp_loss, regularization = zeros, zeros.clone()
    # sums of nothing: connected to the graph, so that DDP sees a gradient for every parameter, and blind to nan
    for logits in heads:
        for part in logits if isinstance(logits, LinearLogits) else (logits,):
            mtp_loss = mtp_loss if part is None else mtp_loss + part[..., :0].sum()
    if confidence_scores is not None:
        regularization = regularization + confidence_scores.reshape(-1)[:0].sum()
    nothing = torch.zeros((), dtype=dtype, device=targets.device)
    return AdaptiveMTPTerms(mtp_loss, regularization, nothing.expand(len(heads)), nothing, nothing)


class AdaptiveMTP(Float32Buffers):
    """adaptive_mtp_terms with the options of a configuration, and running averages for get_loss_statistics().

    In training with grad enabled every call that is not switched off, has a row that counts and is finite
    adds to the averages.

    Args:
        config: mtp_weight, confidence_reg_strength, use_confidence_weighting and ignore_index are used.

    Example:
        >>> adaptive = AdaptiveMTP(UnifiedLossConfig(vocab_size=100, primary_loss_type="adaptive_mtp"))
        >>> terms = adaptive(heads, targets, weights, None, head_loss, confidence_scores=confidence)
        >>> adaptive.statistics()["mean_confidence"]
    """

    AVERAGES = ("mtp_loss", "confidence_regularization", "mean_confidence", "mean_target_probability")

    sums: Tensor
    count: Tensor

    def __init__(self, config: UnifiedLossConfig) -> None:
        super().__init__()
        self.mtp_weight = config.mtp_weight
        self.confidence_reg_strength = config.confidence_reg_strength
        self.use_confidence_weighting = config.use_confidence_weighting
        self.ignore_index = config.ignore_index
        self.register_buffer("sums", torch.zeros(len(self.AVERAGES), dtype=torch.float32))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        additional_logits: Heads,  # [n_heads, batch, length, vocab_size], or a list
        targets: Tensor,  # [batch, length]
        row_weights: Tensor,  # [batch, length]
        segments: Tensor | None,  # [batch, length]
        head_loss: HeadLoss,
        *,
        confidence_scores: Tensor | None = None,  # [batch], [batch, 1], [batch, length] or [batch, length, 1]
        mtp_active: bool | Tensor | None = None,  # [] or [batch] bool
        per_row: bool = False,
    ) -> AdaptiveMTPTerms:
        """See adaptive_mtp_terms."""
        terms = adaptive_mtp_terms(
            additional_logits,
            targets,
            row_weights,
            segments,
            head_loss,
            confidence_scores=confidence_scores,
            mtp_active=mtp_active,
            mtp_weight=self.mtp_weight,
            confidence_reg_strength=self.confidence_reg_strength,
            use_confidence_weighting=self.use_confidence_weighting,
            ignore_index=self.ignore_index,
            per_row=per_row,
        )
        if self.training and torch.is_grad_enabled() and mtp_active is not False:
            with torch.no_grad():
                values = torch.stack([getattr(terms, name).sum().to(torch.float32) for name in self.AVERAGES])
                is_seen = (row_weights != 0).any() & values.isfinite().all()  # one nan would stay in the sums for ever
                if isinstance(mtp_active, Tensor):
                    is_seen = is_seen & mtp_active.any()
                self.sums.add_(torch.where(is_seen, values, 0.0))
                self.count.add_(is_seen.to(torch.int64))
        return terms

    def statistics(self) -> dict[str, Tensor]:
        """Averages per call since the last reset_statistics, and the number of calls as count;
        scalars on the device.
        """
        averages = self.sums / self.count.clamp_min(1)
        return dict(zip(self.AVERAGES, averages.unbind(), strict=True)) | {"count": self.count.clone()}

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """Clears averages and count."""
        self.sums.zero_()
        self.count.zero_()
