"""UnifiedLoss: the weighted sum of every component that a configuration turns on."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ava_ext.components import (
    CANDIDATE_MODULES,
    COMPONENTS,
    DENSE_ROW_MODULES,
    calibrates_confidence,
    has_adaptive_heads,
    has_own_heads,
)
from ava_ext.config import UnifiedLossConfig
from ava_ext.inputs import Inputs, given_logits, prepare
from ava_ext.losses.adaptive_mtp import AdaptiveMTP
from ava_ext.losses.auxiliary import AuxiliaryLoss
from ava_ext.losses.contrastive import ContrastiveLoss
from ava_ext.losses.diversity import DiversityLoss
from ava_ext.losses.moe import MoEBalancer, load_variation
from ava_ext.losses.mtp import MultiTokenPrediction
from ava_ext.losses.negatives import given_negatives
from ava_ext.losses.temperature import AdaptiveTemperature
from ava_ext.ops.repetition import repetition_candidates
from ava_ext.ops.softmax_rows import (
    TERM_NAMES,
    Candidates,
    RowLoss,
    RowTerms,
    accumulation_dtype,
    row_coefficients,
    row_loss,
    token_log_probs,
)

_CROSS_ENTROPY = TERM_NAMES.index("cross_entropy")


class UnifiedLoss(nn.Module):
    """The weighted sum of every loss component that the configuration turns on.

        total = main (focal-modulated where focal is on) + z + confidence + immediate + eos + ngram + negative
              + mtp + moe + diversity + auxiliary + contrastive

    Everything that looks at a row of logits is computed in one pass over it, gradient included. Each component is
    defined in its module of `ava_ext.losses`; the table in components.py names it.
    `UnifiedLoss(V, primary_loss_type="standard")` equals torch.nn.functional.cross_entropy, but that a batch without a
    counted row gives 0, not nan.

    Every token term is divided by the same N (`ava_ext.reduction.count_rows`). Data-parallel averaging of gradients is
    not undone here: with num_items_in_batch counted over all ranks, multiply the loss by the world size.

    `step()`, once per optimizer step, commits the adaptive temperature, the expert load and the expert bias;
    auto_step=True does so after every training forward with grad enabled.

    Args:
        vocab_size: real columns of the logits; columns beyond it are padding.
        hidden_size: width of hidden_states, for the heads of multi-token prediction.
        options: see `UnifiedLossConfig`, which documents each.

    Raises:
        TypeError: on an unknown option. ValueError: on an option out of range, or two that contradict each other.

    Example:
        >>> loss_fn = UnifiedLoss(32000, primary_loss_type="standard", use_ngram_penalty=True)
        >>> loss = loss_fn(model(input_ids), targets)
        >>> loss.backward()
    """

    def __init__(self, vocab_size: int, hidden_size: int | None = None, **options: Any) -> None:
        super().__init__()
        UnifiedLossConfig.check_names(options)
        self.config = config = UnifiedLossConfig(vocab_size=vocab_size, hidden_size=hidden_size, **options)
        self.temperature = AdaptiveTemperature(config)
        self.mtp = MultiTokenPrediction(config) if has_own_heads(config) else None
        self.adaptive_mtp = AdaptiveMTP(config) if has_adaptive_heads(config) else None
        self.moe_balancer = MoEBalancer(config) if config.use_moe_balancing else None
        self.auxiliary = AuxiliaryLoss.from_config(config) if config.use_auxiliary_loss else None
        self.diversity = DiversityLoss(config.diversity_weight) if config.use_diversity_loss else None
        self.contrastive = None
        if config.use_contrastive_loss:
            self.contrastive = ContrastiveLoss(config.contrastive_temperature, weight=config.contrastive_weight)

        on = [component for component in COMPONENTS if component.is_on(config)]
        self._keys = tuple(dict.fromkeys(component.key for component in on))
        self._sequence_keys = tuple(component.key for component in on if component.needs_sequences)
        terms, self._row_options = RowTerms(0), {}
        for module in DENSE_ROW_MODULES:
            flags, row_options = module.row_options(config)
            terms |= flags
            self._row_options |= row_options
        self._terms = int(terms)
        self._penalties: tuple[str, ...] = ()
        self._groups: tuple[int, ...] = ()
        self._candidate_options: dict[str, Any] = {}
        for key, module in CANDIDATE_MODULES:
            if module.is_on(config):
                n_slots, candidate_options = module.candidate_options(config)
                self._penalties += (key,)
                self._groups += (n_slots,)
                self._candidate_options |= candidate_options
        pad_may_repeat = config.pad_token_id is None or config.pad_token_id in config.eos_ids
        self._may_repeat = config.repetition_allow_list + (() if pad_may_repeat else (config.pad_token_id,))
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(
        self,
        logits: Tensor | None = None,  # [batch_size, n_tokens, n_columns] or [n_rows, n_columns]
        targets: Tensor | None = None,  # [batch_size, n_tokens] or [n_rows]
        attention_mask: Tensor | None = None,  # as targets
        hidden_states: Tensor | None = None,  # [batch_size, n_tokens, hidden_size] or [n_rows, hidden_size]
        primary_logits: Tensor | None = None,  # as logits
        additional_logits: Tensor | Sequence[Tensor] | None = None,  # num_future_tokens of logits' shape
        confidence_scores: Tensor | None = None,  # [batch_size], [batch_size, 1], [batch_size, n_tokens] or with 1
        mtp_active: bool | Tensor | None = None,
        gate_logits: Tensor | Sequence[Tensor] | None = None,  # [n, n_experts] per layer
        expert_indices: Tensor | Sequence[Tensor] | None = None,  # [n, k] per layer
        expert_outputs: Tensor | Sequence[Tensor] | None = None,  # [n_experts, n, hidden_size]
        return_detailed: bool = False,
        *,
        lm_head_weight: Tensor | None = None,  # [n_columns, hidden_size]
        lm_head_bias: Tensor | None = None,  # [n_columns]
        token_weights: Tensor | None = None,  # as targets
        input_ids: Tensor | None = None,  # as targets
        position_ids: Tensor | None = None,  # as targets, or [1, n_tokens]
        segment_ids: Tensor | None = None,  # as targets, or [1, n_tokens]
        cu_seqlens: Tensor | None = None,  # [n_segments + 1]
        num_items_in_batch: float | Tensor | None = None,
        negative_ids: Tensor | None = None,  # as targets, and [n_negatives]
        negative_weights: Tensor | None = None,  # as negative_ids
        contrastive_pair: tuple[Tensor, Tensor] | None = None,  # two of [n_pairs, hidden_size]
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with return_detailed a dict of it and its parts.

        Args:
            logits: at row t they predict targets[t]. primary_logits (with primary_loss_type="adaptive_mtp"), or
                hidden_states and lm_head_weight, may stand in their place.
            targets: the token each row predicts; with labels_are_shifted=False, the token read at that row.
            attention_mask: rows where it is 0 do not count (with labels_are_shifted=False: labels).
            hidden_states, lm_head_weight, lm_head_bias: logits = hidden_states @ weight.T + bias. hidden_states are
                also read by multi-token prediction and, without contrastive_pair, by the contrastive term.
            additional_logits, confidence_scores, mtp_active: adaptive multi-token prediction, see
                `losses.adaptive_mtp`; mtp_active=False switches heads of either kind off for this call.
            gate_logits, expert_indices, expert_outputs: mixture of experts, see `losses.moe`, `losses.auxiliary` and
                `losses.diversity`. Padding is left out where their number of rows is that of the targets.
            token_weights: multiply every token term of their row; must not require grad.
            input_ids: the tokens the model read; row t's context is input_ids[:, : t + 1] instead of targets[:, :t].
            segment_ids, position_ids, cu_seqlens: texts packed into one row; nothing leaks across them.
            num_items_in_batch: N, where the batch is one of several micro-batches.
            negative_ids, negative_weights: further tokens to push down (-1: absent), and how strongly (1).
            contrastive_pair: two views of the same things, for InfoNCE.

        Returns:
            A scalar; with reduction="none", of the shape of targets (without the last column where labels are not
            shifted). With return_detailed a dict: total_loss, with graph; every component that is on, detached and
            weighted, so that they add up to it; and the metrics named in `METRICS`.

        Raises:
            ValueError: on an input that is missing, superfluous, or of a shape that does not fit.
            IndexError: on a counted target out of range (CPU).
        """
        config = self.config
        logits = given_logits(config, logits, primary_logits, hidden_states, lm_head_weight, lm_head_bias)
        inputs = prepare(
            config,
            logits,
            targets,
            needs_sequences=self._sequence_keys,
            attention_mask=attention_mask,
            hidden_states=hidden_states,
            token_weights=token_weights,
            input_ids=input_ids,
            position_ids=position_ids,
            segment_ids=segment_ids,
            cu_seqlens=cu_seqlens,
            num_items_in_batch=num_items_in_batch,
            negative_ids=negative_ids,
            negative_weights=negative_weights,
        )
        rows = inputs.rows
        coefficients, penalty_weights = self._row_tensors(rows.weights)
        output = row_loss(
            inputs.logits,
            rows.targets,
            coefficients,
            terms=self._terms | RowTerms.ENTROPY if return_detailed else self._terms,
            row_weights=rows.weights,
            candidates=self._candidates(inputs, penalty_weights),
            vocab_size=config.vocab_size,
            ignore_index=config.ignore_index,
            inplace_gradient=config.inplace_gradient,
        )
        per_row = config.reduction == "none"
        total = output.row_loss if per_row else output.row_loss.sum()
        addends: dict[str, Tensor] = {}  # what the rows' one pass does not give
        metrics: dict[str, Tensor] = {}
        if self.mtp is not None:
            self._add_own_heads(addends, metrics, inputs, coefficients, lm_head_weight, lm_head_bias, mtp_active)
        if self.adaptive_mtp is not None:
            self._add_adaptive_heads(
                addends, metrics, inputs, coefficients, additional_logits, confidence_scores, mtp_active
            )
        self._add_batch_terms(
            addends, metrics, inputs, gate_logits, expert_indices, expert_outputs, contrastive_pair
        )
        for addend in addends.values():
            total = total + addend
        if per_row:
            total = inputs.like_targets(total, config)
        result = self._detailed(total, output, inputs, addends, metrics, coefficients) if return_detailed else total
        if self.training and torch.is_grad_enabled():
            if config.temperature_adapts:
                self.temperature.observe(output.row_terms[_CROSS_ENTROPY].sum(), rows.n_counted)
            if config.auto_step:
                self.step()
        return result

    def _row_tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The kernel's coefficients [7] and the weights [4] of repetition_candidates, of the device and type of `like`."""
        key = (like.device, like.dtype)
        if key not in self._constants:
            config = self.config
            weights = [
                config.immediate_repetition_weight,
                config.immediate_repetition_growth,
                config.eos_penalty_weight,
                config.ngram_penalty_weight,
            ]
            self._constants[key] = (row_coefficients(like, **self._row_options), like.new_tensor(weights))
        coefficients, penalty_weights = self._constants[key]
        if self.config.temperature_adapts:
            coefficients = torch.cat([self.temperature.value.reshape(1).to(like.dtype), coefficients[1:]])
        return coefficients, penalty_weights

    def _candidates(
        self,
        inputs: Inputs,
        penalty_weights: Tensor,  # [4]
    ) -> Candidates | None:
        """Every token that the rows push down, in one list of slots."""
        config, rows = self.config, inputs.rows
        found = []
        if self._groups:
            found.append(
                repetition_candidates(
                    rows.targets if inputs.context is None else inputs.context,
                    rows.targets,
                    weights=penalty_weights,
                    vocab_size=config.vocab_size,
                    segments=inputs.segments,
                    tokens_include_row=inputs.context is not None,
                    ignore_index=config.ignore_index,
                    excluded_ids=self._may_repeat,
                    **self._candidate_options,
                )
            )
        groups = self._groups
        if inputs.negative_ids is not None:
            found.append(
                given_negatives(rows.targets, inputs.negative_ids, inputs.negative_weights, rows.weights.dtype)
            )
            groups = (*groups, inputs.negative_ids.shape[-1])
        if not found:
            return None
        if len(found) == 1:
            return Candidates(*found[0], groups)
        ids, weights = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
        return Candidates(ids, weights, groups)

    def _add_own_heads(
        self,
        addends: dict[str, Tensor],
        metrics: dict[str, Tensor],
        inputs: Inputs,
        coefficients: Tensor,  # [7]
        lm_head_weight: Tensor | None,  # [n_columns, hidden_size]
        lm_head_bias: Tensor | None,  # [n_columns]
        mtp_active: bool | Tensor | None,
    ) -> None:
        per_row = self.config.reduction == "none"
        if mtp_active is False:
            zero = inputs.rows.weights * 0
            addends["mtp_loss"] = zero if per_row else zero.sum()
            depth_losses = zero.new_zeros(self.config.num_future_tokens)
        else:
            mtp = self.mtp(
                _required(inputs.hidden_states, "hidden_states", "use_mtp"),
                inputs.rows.targets,
                inputs.rows.weights,
                inputs.segments,
                self._head_loss(coefficients),
                lm_head_weight if self.config.mtp_share_head else None,
                lm_head_bias if self.config.mtp_share_head else None,
                per_row=per_row,
            )
            addends["mtp_loss"], depth_losses = mtp.loss, mtp.depth_losses
            if isinstance(mtp_active, Tensor):
                addends["mtp_loss"] = torch.where(mtp_active, mtp.loss, 0.0)
                depth_losses = torch.where(mtp_active, depth_losses, 0.0)
        metrics |= {f"mtp_loss_depth_{k}": loss for k, loss in enumerate(depth_losses.unbind(), start=1)}

    def _add_adaptive_heads(
        self,
        addends: dict[str, Tensor],
        metrics: dict[str, Tensor],
        inputs: Inputs,
        coefficients: Tensor,  # [7]
        additional_logits: Tensor | Sequence[Tensor] | None,  # num_future_tokens of logits' shape
        confidence_scores: Tensor | None,
        mtp_active: bool | Tensor | None,
    ) -> None:
        config = self.config
        heads = [] if mtp_active is False else list(_required(additional_logits, "additional_logits", "adaptive multi-token prediction"))
        if mtp_active is not False:
            if len(heads) != config.num_future_tokens:
                raise ValueError(
                    f"unified_loss: expected num_future_tokens = {config.num_future_tokens} additional_logits, "
                    f"got {len(heads)}"
                )
            if config.use_confidence_weighting:
                _required(confidence_scores, "confidence_scores", "use_confidence_weighting")
        if inputs.is_flat:
            heads = [head.unsqueeze(0) for head in heads]
        terms = self.adaptive_mtp(
            heads,
            inputs.rows.targets,
            inputs.rows.weights,
            inputs.segments,
            self._head_loss(coefficients),
            confidence_scores=confidence_scores if config.use_confidence_weighting else None,
            mtp_active=mtp_active,
            target_probability=self._target_probability(coefficients),
            per_row=config.reduction == "none",
        )
        addends["mtp_loss"] = terms.mtp_loss
        if calibrates_confidence(config):
            addends["confidence_regularization"] = terms.confidence_regularization
        depth_losses = terms.depth_losses if heads else inputs.rows.weights.new_zeros(config.num_future_tokens)
        metrics |= {f"mtp_loss_depth_{k}": loss for k, loss in enumerate(depth_losses.unbind(), start=1)}
