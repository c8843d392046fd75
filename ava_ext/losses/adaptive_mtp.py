"""Multi-token prediction from logits that the model provides, weighted by a calibrated confidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ava_ext.call import Call, HeadLoss, Logits
from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.component import Addends, Part
from ava_ext.losses.depths import (
    DepthMeans,
    active_rows,
    additional_heads,
    connected,
    depth_means,
    depth_metrics,
    depth_rows,
    losses_of_heads,
    parts_of_heads,
    switched_off,
)
from ava_ext.losses.learned_state import LearnedState
from ava_ext.ops.arguments import has_shape
from ava_ext.ops.row_fields import TERM_NAMES, accumulation_dtype
from ava_ext.sequences import shift_left

CROSS_ENTROPY = TERM_NAMES.index("cross_entropy")

# log(confidence) and log(1 - confidence) stay above log(1e-6): a confidence of exactly 0 or 1 costs 13.8, not infinity
CONFIDENCE_MARGIN = 1e-6


class AdaptiveMTPTerms(NamedTuple):
    """What adaptive_mtp_terms returns."""

    mtp_loss: Tensor  # []  with graph; [batch_size, n_tokens] with reduction="none"
    confidence_regularization: Tensor  # []  with graph; [batch_size, n_tokens] with reduction="none"
    depths: DepthMeans  # of [n_heads]: loss, accuracy and acceptance of each head; detached
    mean_confidence: Tensor  # []  over rows whose head 1 has a target; detached
    mean_target_probability: Tensor  # []  over the same rows, what head 1 gives its target; detached
    n_targets: Tensor  # []  int64, number of these rows


def adaptive_mtp_terms(
    config: UnifiedLossConfig,
    heads: Sequence[Logits],  # n_heads of [batch_size, n_tokens, n_columns]
    targets: Tensor,  # [batch_size, n_tokens]
    row_weights: Tensor,  # [batch_size, n_tokens]
    segments: Tensor | None,  # [batch_size, n_tokens]
    head_loss: HeadLoss,
    *,
    confidence_scores: Tensor
    | None = None,  # [batch_size], [batch_size, 1], [batch_size, n_tokens] or [batch_size, n_tokens, 1]
    mtp_active: bool | Tensor | None = None,  # [] or [batch_size] bool; not False
    depth_weights: Tensor | None = None,  # [n_heads]
) -> AdaptiveMTPTerms:
    """Losses of the heads, weighted by the confidence, and the term that calibrates the confidence.

        mtp_loss = mtp_weight * mean over heads k of sum_t w_{t+k} c_t CE(head k's logits at t, targets[t + k])
        confidence_regularization = strength * sum_t w_{t+1} BCE(c_t, q_t)

    w is row_weights. c is the confidence, or 1 without one; mtp_loss detaches it, so that a model cannot lower the
    heads' losses by giving up. q is the probability, detached, that head 1 gives its target. The second term is lowest
    at c = q.

    Args:
        config: its options of multi-token prediction, ignore_index and reduction; n_heads is num_future_tokens.
        heads: the logits of the heads k = 1..n_heads; row t of head k predicts targets[:, t + k].
        targets: the target of each row at depth 0 (the next token); ignore_index where the row does not count.
        row_weights: token weight / N of each row at depth 0, and 0 where it does not count. No gradient.
        segments: contiguous documents of packed rows; None: each batch row is one segment.
        head_loss: the cross-entropy of the main term, (logits, targets, row_weights) -> RowLoss: the sum over rows, or
            with reduction="none" the loss of each row, which is 0 where the target is ignore_index.
        confidence_scores: in [0, 1], per sequence or per row. None: c = 1 and no confidence term.
        mtp_active: a tensor switches the heads off on the device, for all or per sequence: a sequence that is off
            counts as one whose rows have no target. None or True: on.
        depth_weights: of the heads' loss; see `depths.depth_rows`.

    Returns:
        AdaptiveMTPTerms, float32 (float64 for float64 logits).

    Raises:
        ValueError: mtp_active, depth_weights or confidence_scores of a shape that does not fit.

    Example:
        >>> config = UnifiedLossConfig(vocab_size=32000, primary_loss_type="adaptive_mtp", num_future_tokens=len(heads))
        >>> weights = torch.full(targets.shape, 1 / targets.numel())
        >>> terms = adaptive_mtp_terms(config, heads, targets, weights, None, head_loss, confidence_scores=confidence)
        >>> loss = loss + terms.mtp_loss + terms.confidence_regularization
    """
    (batch_size, n_tokens), ignore_index = targets.shape, config.ignore_index
    dtype = accumulation_dtype(heads[0].dtype)
    targets, weights = active_rows(targets, row_weights.detach().to(dtype), mtp_active, ignore_index)
    confidence = None
    if confidence_scores is not None:
        confidence = _rows(confidence_scores, batch_size, n_tokens).to(dtype)
    factor = None if confidence is None else confidence.detach()
    rows = depth_rows(config, targets, weights, segments, depth_weights, factor)
    loss, of_heads = losses_of_heads(heads, rows, head_loss)
    probability = of_heads[CROSS_ENTROPY, 0].neg().exp().to(dtype)
    is_target = rows.targets[0] != ignore_index
    regularization = torch.zeros_like(weights)
    if confidence is not None:
        certainty = torch.where(is_target, confidence, 0.5)  # what is not looked at may be nan
        # the value is bounded, its derivative stays: a head that is too sure of itself has to learn it
        certainty = certainty + (certainty.clamp(CONFIDENCE_MARGIN, 1 - CONFIDENCE_MARGIN) - certainty).detach()
        cross_entropy = -(probability * certainty.log() + (1 - probability) * torch.log1p(-certainty))
        row_weight = config.confidence_reg_strength * shift_left(weights, 0, segments=segments)
        regularization = torch.where(is_target, cross_entropy, 0.0) * row_weight
    seen = torch.ones_like(weights) if confidence is None else confidence.detach()
    return AdaptiveMTPTerms(
        mtp_loss=loss,
        confidence_regularization=regularization if config.reduction == "none" else regularization.sum(),
        depths=depth_means(of_heads, rows.targets, ignore_index),
        mean_confidence=_mean_of(seen, is_target),
        mean_target_probability=_mean_of(probability, is_target),
        n_targets=is_target.sum(),
    )


def _rows(values: Tensor, batch_size: int, n_tokens: int) -> Tensor:  # [batch_size, n_tokens]
    shape = list(values.shape)
    if shape == [batch_size, n_tokens, 1]:
        return values.squeeze(-1)
    if has_shape(values, (batch_size,), (batch_size, 1)):
        return values.reshape(batch_size, 1).expand(batch_size, n_tokens)
    if shape == [batch_size, n_tokens]:
        return values
    raise ValueError(
        f"adaptive_mtp: expected confidence_scores of shape [{batch_size}], [{batch_size}, 1], "
        f"[{batch_size}, {n_tokens}] or [{batch_size}, {n_tokens}, 1], got {shape}"
    )


def _mean_of(values: Tensor, mask: Tensor) -> Tensor:  # [batch_size, n_tokens], [batch_size, n_tokens] -> []
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp_min(1)


class AdaptiveMTP(LearnedState, Part):
    """adaptive_mtp_terms with the options of the call, and running averages for get_loss_statistics().

    In training with grad enabled, what a call adds to the averages is committed by the next step(). A call that is
    switched off adds nothing, nor does one in which head 1 has no target or whose values are not finite.

    Args:
        calibrates: whether it also adds confidence_regularization.

    Example:
        >>> from ava_ext.losses.adaptive_mtp import adaptive_mtp_terms
        >>> config = UnifiedLossConfig(vocab_size=32000, primary_loss_type="adaptive_mtp", num_future_tokens=len(heads))
        >>> adaptive = AdaptiveMTP()
        >>> weights = torch.full(targets.shape, 1 / targets.numel())
        >>> certain = torch.full(targets.shape, 0.75)
        >>> terms = adaptive_mtp_terms(config, heads, targets, weights, None, head_loss, confidence_scores=certain)
        >>> adaptive.record_averages(True, terms)
        >>> adaptive.step()
        >>> adaptive.statistics()["mean_confidence"]
        tensor(0.7500)
    """

    name = "adaptive_mtp"
    needs_sequences = True
    statistics_name = "adaptive_mtp"
    AVERAGES = ("mtp_loss", "confidence_regularization", "mean_confidence", "mean_target_probability")
    PENDING = ("pending_sums", "pending_count")

    sums: Tensor
    count: Tensor

    def __init__(self, calibrates: bool = True) -> None:
        super().__init__()
        self.calibrates = calibrates
        self.keys = ("mtp_loss", "confidence_regularization") if calibrates else ("mtp_loss",)
        self.register_buffer("sums", torch.empty(len(self.AVERAGES), dtype=torch.float32))
        self.register_buffer("count", torch.empty((), dtype=torch.int64))
        self.pending_sums = torch.empty(len(self.AVERAGES), dtype=torch.float32)
        self.pending_count = torch.empty((), dtype=torch.int64)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: UnifiedLossConfig) -> AdaptiveMTP | None:
        """The part where the configuration asks for heads of the model."""
        if config.mtp_heads != "adaptive":
            return None
        return cls(config.use_confidence_weighting and config.confidence_reg_strength > 0)

    def of_call(self, call: Call) -> Addends:
        """The terms of the heads that the call gives; with mtp_active=False zeros, in the graph of the heads."""
        config, rows, active, confidence = call.config, call.rows, call.mtp_active, call.confidence_scores
        heads = additional_heads(call)
        if call.is_flat and confidence is not None and confidence.shape[:1] == (rows.targets.numel(),):
            confidence = confidence.unsqueeze(0)
        if active is False or not heads:
            off = switched_off(call, parts_of_heads(heads))
            if not self.calibrates:
                return off
            return off._replace(terms={**off.terms, self.keys[1]: connected(call.no_loss(), [confidence])})
        if config.use_confidence_weighting and confidence is None:
            raise ValueError("unified_loss: use_confidence_weighting=True needs confidence_scores, got None")
        terms = adaptive_mtp_terms(
            config,
            heads,
            rows.targets,
            rows.weights,
            call.segments,
            call.head_loss,
            confidence_scores=confidence if config.use_confidence_weighting else None,
            mtp_active=active,
            depth_weights=call.mtp_depth_weights,
        )
        call.learned.append(lambda recording: self.record_averages(recording, terms))
        addends = {"mtp_loss": terms.mtp_loss}
        if self.calibrates:
            addends["confidence_regularization"] = terms.confidence_regularization
        return Addends(addends, depth_metrics(terms.depths))

    @torch.no_grad()
    def record_averages(
        self,
        recording: bool | Tensor,  # [] bool
        terms: AdaptiveMTPTerms,
    ) -> None:
        """Adds the terms of a call to what is pending; see LearnedState.record."""
        values = torch.stack([getattr(terms, name).detach().sum().to(torch.float32) for name in self.AVERAGES])
        is_seen = (terms.n_targets > 0) & values.isfinite().all()  # one nan would stay in the sums for ever
        seen_values = torch.where(is_seen, values, 0.0)
        self.record(recording, pending_sums=seen_values, pending_count=is_seen.to(torch.int64))

    @torch.no_grad()
    def step(self, process_group: Any = None, recording: bool | Tensor = True) -> None:
        """Adds what is pending to the averages."""
        self.reduce_pending(process_group)
        self.sums.add_(self.pending_sums)
        self.count.add_(self.pending_count)
        self.clear_pending()

    def statistics(self) -> dict[str, Tensor]:
        """Averages over calls since the last reset_statistics, and count, the number of calls. On the device."""
        averages = self.sums / self.count.clamp_min(1)
        return dict(zip(self.AVERAGES, averages.unbind(), strict=True)) | {"count": self.count.clone()}

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """Clears averages and count."""
        self.sums.zero_()
        self.count.zero_()
        self.settle()
