"""UnifiedLoss: the weighted sum of every component that a configuration turns on."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ava_ext.components import (
    CANDIDATE_MODULES,
    COMPONENTS,
    DENSE_ROW_MODULES,
    has_adaptive_heads,
    has_own_heads,
)
from ava_ext.config import UnifiedLossConfig
from ava_ext.further_terms import (
    Terms,
    adaptive_heads,
    contrastive_term,
    diversity_term,
    own_heads,
    router_terms,
)
from ava_ext.inputs import Inputs, given_logits, prepare
from ava_ext.losses.adaptive_mtp import AdaptiveMTP, Heads
from ava_ext.losses.auxiliary import AuxiliaryLoss
from ava_ext.losses.contrastive import ContrastiveLoss
from ava_ext.losses.diversity import DiversityLoss
from ava_ext.losses.moe import MoEBalancer
from ava_ext.losses.mtp import HeadLoss, MultiTokenPrediction
from ava_ext.losses.negatives import given_negatives
from ava_ext.losses.temperature import AdaptiveTemperature
from ava_ext.ops.linear_rows import LinearLogits
from ava_ext.ops.repetition import repetition_candidates, repetition_weights
from ava_ext.ops.softmax_rows import (
    TERM_NAMES,
    Candidates,
    RowFlags,
    RowLoss,
    accumulation_dtype,
    row_loss,
    row_options,
)

_CROSS_ENTROPY = TERM_NAMES.index("cross_entropy")
_STATEFUL = ("temperature", "mtp", "adaptive_mtp", "moe_balancer")


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
        terms = RowFlags(0)
        self._row_options: dict[str, float] = {}
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
        self._may_repeat = config.repetition_allow_list
        if config.pad_token_id is not None and config.pad_token_id not in config.eos_ids:
            self._may_repeat += (config.pad_token_id,)
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(
        self,
        logits: Tensor | LinearLogits | None = None,  # [batch_size, n_tokens, n_columns] or [n_rows, n_columns]
        targets: Tensor | None = None,  # [batch_size, n_tokens] or [n_rows]
        attention_mask: Tensor | None = None,  # as targets
        hidden_states: Tensor | None = None,  # [batch_size, n_tokens, hidden_size] or [n_rows, hidden_size]
        primary_logits: Tensor | LinearLogits | None = None,  # as logits
        additional_logits: Heads = None,  # num_future_tokens of logits' shape
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
            hidden_states, lm_head_weight, lm_head_bias: logits = hidden_states @ weight.T + bias, computed a few rows
                at a time (`row_loss`): they never exist as a whole. hidden_states are also read by multi-token
                prediction and, without contrastive_pair, by the contrastive term.
            additional_logits, confidence_scores, mtp_active: adaptive multi-token prediction, see
                `losses.adaptive_mtp`; mtp_active=False switches heads of either kind off for this call. A head may be
                LinearLogits(hidden_states, weight, bias), and so may logits and primary_logits.
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
        output = self._row_loss(
            inputs.logits,
            rows.targets,
            coefficients,
            self._terms | RowFlags.ENTROPY if return_detailed else self._terms,
            rows.weights,
            self._candidates(inputs, penalty_weights),
            inplace_gradient=config.inplace_gradient,
        )
        total = output.loss
        further: Terms = {}  # what the one pass over the rows does not give
        metrics: Terms = {}
        if self.mtp is not None:
            head = (lm_head_weight, lm_head_bias) if config.mtp_share_head else (None, None)
            own_heads(self.mtp, config, inputs, self._head_loss(coefficients), *head, mtp_active, further, metrics)
        if self.adaptive_mtp is not None:
            adaptive_heads(
                self.adaptive_mtp,
                config,
                inputs,
                self._head_loss(coefficients),
                additional_logits,
                confidence_scores,
                mtp_active,
                further,
                metrics,
            )
        if self.moe_balancer is not None or self.auxiliary is not None:
            router_terms(
                self.moe_balancer, self.auxiliary, config, inputs, gate_logits, expert_indices, further, metrics
            )
        if self.diversity is not None:
            further["diversity_loss"] = diversity_term(self.diversity, inputs, expert_outputs)
        if self.contrastive is not None:
            further["contrastive_loss"] = contrastive_term(self.contrastive, config, inputs, contrastive_pair)
        for addend in further.values():
            total = total + addend
        if config.reduction == "none":
            total = inputs.like_targets(total, config)
        result = self._detailed(total, output, inputs, further, metrics, coefficients) if return_detailed else total
        if self.training and torch.is_grad_enabled():
            if config.temperature_adapts:
                self.temperature.observe(output.terms[_CROSS_ENTROPY].sum(), rows.n_counted)
            if config.auto_step:
                self.step()
        return result

    def _row_tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The kernel's coefficients [7] and the weights [4] of repetition_candidates, of the device
        and type of `like`.
        """
        key = (like.device, like.dtype)
        if key not in self._constants:
            config = self.config
            with torch.inference_mode(False):  # training may follow an evaluation
                coefficients = row_options(like, **self._row_options)
                self._constants[key] = (
                    coefficients[1:] if config.temperature_adapts else coefficients,
                    repetition_weights(
                        like,
                        immediate_repetition_weight=config.immediate_repetition_weight,
                        immediate_repetition_growth=config.immediate_repetition_growth,
                        eos_penalty_weight=config.eos_penalty_weight,
                        ngram_penalty_weight=config.ngram_penalty_weight,
                    ),
                )
        coefficients, penalty_weights = self._constants[key]
        if self.config.temperature_adapts:
            coefficients = torch.cat([self.temperature.value.view(1).to(like.dtype), coefficients])
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
                    repetition_allow_list=self._may_repeat,
                    **self._candidate_options,
                )
            )
        groups = self._groups
        if inputs.negative_ids is not None:
            negatives = given_negatives(rows.targets, inputs.negative_ids, inputs.negative_weights, rows.weights.dtype)
            found.append(Candidates(*negatives, (negatives[0].shape[-1],)))
            groups = (*groups, inputs.negative_ids.shape[-1])
        if not found:
            return None
        if len(found) == 1:
            return found[0]
        ids, weights = (torch.cat(parts, -1) for parts in list(zip(*found, strict=True))[:2])
        return Candidates(ids, weights, groups)

    def _row_loss(
        self,
        logits: Tensor | LinearLogits,  # [batch_size, n_tokens, n_columns]
        targets: Tensor,  # [batch_size, n_tokens]
        coefficients: Tensor,  # [7]
        terms: int,
        row_weights: Tensor,  # [batch_size, n_tokens]
        candidates: Candidates | None = None,
        inplace_gradient: bool = False,
    ) -> RowLoss:
        """row_loss of logits of either kind: the sum [], or that of each row with reduction="none"."""
        config, per_row = self.config, self.config.reduction == "none"
        options: dict[str, Any] = {
            "flags": terms,
            "row_weights": row_weights,
            "candidates": candidates,
            "vocab_size": config.vocab_size,
            "ignore_index": config.ignore_index,
        }
        return row_loss(
            logits,
            targets,
            coefficients,
            reduction="none" if per_row else "sum",
            inplace_gradient=inplace_gradient,
            chunk_bytes=config.linear_chunk_bytes,
            **options,
        )

    def _head_loss(self, coefficients: Tensor) -> HeadLoss:  # [7]
        """The main term without focal, for the logits of a head."""
        terms = self._terms & int(
            RowFlags.CROSS_ENTROPY | RowFlags.LABEL_SMOOTHING | RowFlags.EXCLUDE_TARGET | RowFlags.SOFTCAP
        )

        def loss(logits: Tensor | LinearLogits, targets: Tensor, row_weights: Tensor) -> RowLoss:
            real = accumulation_dtype(logits.dtype)  # a head may be of another precision than the main logits
            return self._row_loss(logits, targets, coefficients.to(real), terms, row_weights.to(real))

        return loss

    @torch.no_grad()
    def _detailed(
        self,
        total: Tensor,
        output: RowLoss,
        inputs: Inputs,
        further: dict[str, Tensor],
        metrics: dict[str, Tensor],
        coefficients: Tensor,  # [7]
    ) -> dict[str, Tensor]:
        """The dict of return_detailed; its keys depend on the configuration only."""
        config, rows = self.config, inputs.rows
        penalties = self._penalties if inputs.negative_ids is None else (*self._penalties, "negative_penalty")
        weighted = output.terms * rows.weights  # [n_terms, batch_size, n_tokens]
        if config.reduction == "none":
            weighted = inputs.like_targets(weighted, config)
            further = {key: inputs.like_targets(addend, config) for key, addend in further.items()}
        else:
            weighted = weighted.flatten(1).sum(1)
        addends = dict(zip((*TERM_NAMES, *penalties), weighted.unbind(), strict=True)) | further
        zero = torch.zeros_like(addends["main_loss"])
        first = _CROSS_ENTROPY
        cross_entropy, entropy, accuracy = (
            output.terms[first : first + 3].flatten(1).sum(1) / rows.n_counted.clamp_min(1)
        ).unbind()
        result = {"total_loss": total} | {key: addends.get(key, zero).detach() for key in self._keys}
        if config.use_focal_loss:
            result["focal_loss"] = result["main_loss"]
        return result | {
            "cross_entropy": cross_entropy,
            "perplexity": cross_entropy.exp(),
            "n_tokens": rows.n_counted.long(),
            "accuracy": accuracy,
            "entropy": entropy,
            "temperature": coefficients[0].clone(),
            **{key: metric.detach() for key, metric in metrics.items()},
        }

    def step(self) -> None:
        """Commits what training calls have gathered: temperature, expert load and bias. Once per optimizer step.

        With auto_step=True every training forward with grad enabled does so itself. Averages over process_group if
        given.
        """
        if self.config.temperature_adapts:
            self.temperature.step(self.config.process_group)
        if self.moe_balancer is not None:
            self.moe_balancer.step(self.config.process_group)

    def get_loss_statistics(self) -> dict[str, dict[str, Tensor]]:
        """Running statistics of the components that keep some, on the device.

        Returns:
            {"temperature": {value, count, mean_loss}} and, where they are on, "adaptive_mtp" (averages, count) and
            "moe_balancing" (expert_counts, expert_scores, total_tokens, max_violation).
        """
        statistics = {"temperature": self.temperature.statistics()}
        if self.adaptive_mtp is not None:
            statistics["adaptive_mtp"] = self.adaptive_mtp.statistics()
        if self.moe_balancer is not None:
            statistics["moe_balancing"] = self.moe_balancer.statistics()
        return statistics

    def reset_statistics(self) -> None:
        """Clears averages, counts and recorded losses, and the temperature with them; not expert_bias."""
        for module in (self.temperature, self.adaptive_mtp, self.moe_balancer):
            if module is not None:
                module.reset_statistics()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # a checkpoint of a configuration with a component more or less loads strictly: its state is left out, or kept
        # as it is
        own = {prefix + name: value for name, value in self.state_dict().items()}
        for component in _STATEFUL:
            begin = f"{prefix}{component}."
            given = [name for name in state_dict if name.startswith(begin)]
            if not given:
                state_dict.update({name: value for name, value in own.items() if name.startswith(begin)})
            elif getattr(self, component) is None:
                for name in given:
                    del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        return self.config.changed_options()


def create_unified_loss(options: dict[str, Any]) -> UnifiedLoss:
    """UnifiedLoss from a dict of options, as it stands in a configuration file.

    Raises:
        TypeError: on an unknown option. ValueError: on an option out of range.

    Example:
        >>> create_unified_loss({"vocab_size": 32000, "label_smoothing": 0.1})
    """
    return UnifiedLoss(**options)


def _signature() -> inspect.Signature:
    kinds = inspect.Parameter
    return inspect.Signature(
        [
            kinds(
                option.name,
                kinds.POSITIONAL_OR_KEYWORD if option.name in ("vocab_size", "hidden_size") else kinds.KEYWORD_ONLY,
                default=kinds.empty if option.default is dataclasses.MISSING else option.default,
                annotation=option.type,
            )
            for option in dataclasses.fields(UnifiedLossConfig)
        ]
    )


# what help() and editors show is the configuration's own list
UnifiedLoss.__signature__ = _signature()  # type: ignore[attr-defined]
