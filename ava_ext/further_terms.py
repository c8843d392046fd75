"""What the pass over the rows does not give: terms of other heads, of routers, experts and representations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ava_ext.components import calibrates_confidence
from ava_ext.config import UnifiedLossConfig
from ava_ext.inputs import Inputs
from ava_ext.losses.adaptive_mtp import AdaptiveMTP, Heads
from ava_ext.losses.auxiliary import AuxiliaryLoss
from ava_ext.losses.contrastive import ContrastiveLoss
from ava_ext.losses.diversity import DiversityLoss
from ava_ext.losses.moe import MoEBalancer, load_variation
from ava_ext.losses.mtp import HeadLoss, MultiTokenPrediction
from ava_ext.ops.linear_rows import LinearLogits

Terms = dict[str, Tensor]  # by key of the detailed dict


def own_heads(
    mtp: MultiTokenPrediction,
    config: UnifiedLossConfig,
    inputs: Inputs,
    head_loss: HeadLoss,
    lm_head_weight: Tensor | None,  # [n_columns, hidden_size]
    lm_head_bias: Tensor | None,  # [n_columns]
    mtp_active: bool | Tensor | None,
    further: Terms,
    metrics: Terms,
) -> None:
    """Adds multi-token prediction with heads of the loss."""
    per_row = config.reduction == "none"
    if mtp_active is False:
        loss = torch.zeros_like(inputs.rows.weights) if per_row else inputs.rows.weights.new_zeros(())
        depth_losses = inputs.rows.weights.new_zeros(config.num_future_tokens)
    else:
        hidden_states = required(inputs.hidden_states, "hidden_states", "use_mtp")
        rows = (inputs.rows.targets, inputs.rows.weights, inputs.segments)
        loss, depth_losses = mtp(hidden_states, *rows, head_loss, lm_head_weight, lm_head_bias)
        if isinstance(mtp_active, Tensor):
            loss, depth_losses = torch.where(mtp_active, loss, 0.0), torch.where(mtp_active, depth_losses, 0.0)
    further["mtp_loss"] = loss
    _add_depths(metrics, depth_losses)


def adaptive_heads(
    adaptive_mtp: AdaptiveMTP,
    config: UnifiedLossConfig,
    inputs: Inputs,
    head_loss: HeadLoss,
    additional_logits: Heads,  # num_future_tokens of logits' shape
    confidence_scores: Tensor | None,  # [batch_size], [batch_size, 1], [batch_size, n_tokens] or with 1
    mtp_active: bool | Tensor | None,
    further: Terms,
    metrics: Terms,
) -> None:
    """Adds multi-token prediction on heads of the model, and the calibration of its confidence."""
    heads: list[Any] = []
    if mtp_active is not False:
        heads = required(additional_logits, "additional_logits", "adaptive multi-token prediction")
        heads = [heads] if isinstance(heads, LinearLogits) else list(heads)
        if len(heads) != config.num_future_tokens:
            raise ValueError(
                f"unified_loss: expected num_future_tokens = {config.num_future_tokens} additional_logits, "
                f"got {len(heads)}"
            )
        if config.use_confidence_weighting:
            required(confidence_scores, "confidence_scores", "use_confidence_weighting=True")
    if inputs.is_flat:
        heads = [head.unsqueeze(0) for head in heads]
        if confidence_scores is not None and len(confidence_scores) == inputs.rows.targets.numel():
            confidence_scores = confidence_scores.unsqueeze(0)
    terms = adaptive_mtp(
        heads,
        inputs.rows.targets,
        inputs.rows.weights,
        inputs.segments,
        head_loss,
        confidence_scores=confidence_scores if config.use_confidence_weighting else None,
        mtp_active=mtp_active,
        per_row=config.reduction == "none",
    )
    further["mtp_loss"] = terms.mtp_loss
    if calibrates_confidence(config):
        further["confidence_regularization"] = terms.confidence_regularization
    _add_depths(metrics, terms.depth_losses if heads else inputs.rows.weights.new_zeros(config.num_future_tokens))


def router_terms(
    moe_balancer: MoEBalancer | None,
    auxiliary: AuxiliaryLoss | None,
    config: UnifiedLossConfig,
    inputs: Inputs,
    gate_logits: Tensor | Sequence[Tensor] | None,  # [n, n_experts] per layer
    expert_indices: Tensor | Sequence[Tensor] | None,  # [n, k] per layer
    further: Terms,
    metrics: Terms,
) -> None:
    """Adds the terms of the router, all from one pass over its logits."""
    option = "use_moe_balancing" if moe_balancer is not None else "use_auxiliary_loss"
    gate_logits = required(gate_logits, "gate_logits", option)
    if isinstance(gate_logits, Tensor):
        n_rows = gate_logits.numel() // (gate_logits.shape[-1] * config.num_moe_layers)
    else:
        n_rows = gate_logits[0].numel() // gate_logits[0].shape[-1]
    router: Any = moe_balancer if moe_balancer is not None else auxiliary
    statistics = router.measure(gate_logits, expert_indices, inputs.padding_free(n_rows))
    share = inputs.rows.batch_share
    if moe_balancer is not None:
        further["moe_balancing_term"] = share * moe_balancer.balance(statistics).term
    if auxiliary is not None:
        load_balancing, router_z = auxiliary.terms(statistics)
        further["aux_load_balancing"] = share * load_balancing
        further["aux_router_z"] = share * router_z
    metrics["moe_cv"], metrics["moe_max_violation"] = load_variation(statistics.counts)


def diversity_term(
    diversity: DiversityLoss,
    inputs: Inputs,
    expert_outputs: Tensor | Sequence[Tensor] | None,  # [n_experts, n, hidden_size]
) -> Tensor:  # []
    """The similarity of the experts' outputs."""
    expert_outputs = required(expert_outputs, "expert_outputs", "use_diversity_loss")
    n_rows = expert_outputs[0].numel() // expert_outputs[0].shape[-1]
    return inputs.rows.batch_share * diversity(expert_outputs, inputs.padding_free(n_rows))


def contrastive_term(
    contrastive: ContrastiveLoss,
    config: UnifiedLossConfig,
    inputs: Inputs,
    contrastive_pair: tuple[Tensor, Tensor] | None,  # two of [n_pairs, hidden_size]
) -> Tensor:  # []
    """InfoNCE of the pair, or SimCTG of the hidden states."""
    if contrastive_pair is not None:
        return inputs.rows.batch_share * contrastive(*contrastive_pair)
    tokens = required(inputs.hidden_states, "contrastive_pair or hidden_states", "use_contrastive_loss")
    segments = inputs.segments
    if not config.labels_are_shifted:  # the row behind the last label is none
        tokens, segments = tokens[:, :-1], None if segments is None else segments[:, :-1]
    loss = contrastive(tokens, attention_mask=inputs.keep_targets, segment_ids=segments)
    return inputs.rows.batch_share * loss


def required(value: Any, argument: str, option: str) -> Any:
    """value, or a ValueError that names what is missing and who wants it."""
    if value is None:
        raise ValueError(f"unified_loss: {option} needs {argument}, got None")
    return value


def _add_depths(
    metrics: Terms,
    depth_losses: Tensor,  # [num_future_tokens]
) -> None:
    metrics |= {f"mtp_loss_depth_{depth}": loss for depth, loss in enumerate(depth_losses.unbind(), start=1)}
