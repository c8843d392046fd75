"""Presets of UnifiedLoss, and single parts of it to add to a loss of your own.

Presets take the options of UnifiedLoss, except those that they have their own arguments for.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ava_ext.config import UnifiedLossConfig, check_weights, plain
from ava_ext.losses import effective_logits, immediate_repetition, ngram
from ava_ext.losses.depths import depth_metrics
from ava_ext.losses.learned_state import LearnedState
from ava_ext.losses.moe import MoEBalancer
from ava_ext.losses.mtp import MultiTokenPrediction
from ava_ext.ops.arguments import check_are_tensors, check_constants, check_integers, check_is_tensor, check_shape
from ava_ext.ops.row_fields import RowFlags, RowLoss, accumulation_dtype, row_options
from ava_ext.ops.softmax_rows import row_loss
from ava_ext.reduction import count_rows, keep_rows
from ava_ext.unified_loss import UnifiedLoss


def _renamed(owner: str, options: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """The options, and those that the class has its own arguments for.

    Raises:
        TypeError: one of the latter was also given by the option's name, so one of the two values would be lost.
    """
    for name in arguments:
        if name in options:
            raise TypeError(f"{owner}: expected this class's own argument for {name}, got {name}={options[name]!r}")
    return {**options, **arguments}


class DeepSeekLoss(UnifiedLoss):
    """Cross-entropy with an adaptive temperature and, with use_mtp, heads that predict further tokens.

    Args:
        vocab_size, hidden_size: as in UnifiedLoss; hidden_size is needed with use_mtp.
        use_mtp: also predict num_future_tokens further tokens from hidden_states.
        options: any option of `UnifiedLossConfig`.

    Example:
        >>> loss = DeepSeekLoss(32000, 512, use_mtp=True)(logits, targets, hidden_states=hidden_states)
    """

    def __init__(
        self, vocab_size: int, hidden_size: int | None = None, *, use_mtp: bool = False, **options: Any
    ) -> None:
        super().__init__(vocab_size, hidden_size, **{"primary_loss_type": "deepseek", "use_mtp": use_mtp, **options})


class TemperatureScaledCrossEntropy(UnifiedLoss):
    """Cross-entropy of logits / T, with a temperature T that rises while training is volatile; see losses.temperature.

    Args:
        vocab_size: size of the vocabulary.
        initial_temperature: T0.
        adaptive_temperature: if False, the temperature stays T0.
        options: any option of `UnifiedLossConfig`.

    Example:
        >>> loss = TemperatureScaledCrossEntropy(32000, initial_temperature=1.5)(logits, targets)
    """

    def __init__(
        self, vocab_size: int, initial_temperature: float = 1.0, adaptive_temperature: bool = True, **options: Any
    ) -> None:
        own = {"initial_temperature": initial_temperature, "adaptive_temperature": adaptive_temperature}
        super().__init__(vocab_size, **{"primary_loss_type": "standard", **own, **options})


class AdaptiveMTPLoss(UnifiedLoss):
    """Cross-entropy of the primary logits, plus confidence-weighted cross-entropy of the model's further heads.

    Args:
        vocab_size: size of the vocabulary.
        options: any option of `UnifiedLossConfig`.

    Example:
        >>> loss_fn = AdaptiveMTPLoss(32000, num_future_tokens=2)
        >>> loss = loss_fn(logits, targets, additional_logits=heads, confidence_scores=confidence)
    """

    def __init__(self, vocab_size: int, **options: Any) -> None:
        super().__init__(vocab_size, **{"primary_loss_type": "adaptive_mtp", **options})


class FocalLoss(UnifiedLoss):
    """alpha (1 - p_target)^gamma times the cross-entropy: tokens that the model is sure of weigh less. Lin et al. 2017.

    Args:
        vocab_size: size of the vocabulary.
        alpha, gamma: factor and exponent.
        options: any option of `UnifiedLossConfig`.

    Example:
        >>> loss = FocalLoss(32000, gamma=2.0)(logits, targets)
    """

    def __init__(self, vocab_size: int, alpha: float = 1.0, gamma: float = 2.0, **options: Any) -> None:
        options = _renamed("focal_loss", options, use_focal_loss=True, focal_alpha=alpha, focal_gamma=gamma)
        super().__init__(vocab_size, **{"primary_loss_type": "standard", **options})


class LabelSmoothingLoss(UnifiedLoss):
    """Cross-entropy against a target that keeps 1 - smoothing of its mass. Szegedy et al. 2016.

    Args:
        vocab_size: size of the vocabulary.
        smoothing: mass spread over the vocabulary.
        smoothing_mode: "uniform" (over all columns, as torch.nn.functional) or "exclude_target" (over the others).
        options: any option of `UnifiedLossConfig`.

    Example:
        >>> loss = LabelSmoothingLoss(32000, smoothing=0.1)(logits, targets)
    """

    def __init__(
        self, vocab_size: int, smoothing: float = 0.1, smoothing_mode: str = "uniform", **options: Any
    ) -> None:
        options = _renamed("label_smoothing_loss", options, label_smoothing=smoothing)
        super().__init__(vocab_size, **{"primary_loss_type": "standard", "smoothing_mode": smoothing_mode, **options})


class AntiRepetitionLoss(UnifiedLoss):
    """Cross-entropy, and unlikelihood penalties on repeated n-grams, the previous token and an early end.

    The penalties look at the training text; `SequenceUnlikelihoodLoss` is for text that the model generated. Welleck et
    al. 2019.

    Args:
        vocab_size: size of the vocabulary.
        eos_token_id: the id, or ids, that end a text; None: no penalty on an early end.
        pad_token_id: rows with this target do not count, unless it is an EOS id.
        options: any option of `UnifiedLossConfig`.

    Example:
        >>> loss = AntiRepetitionLoss(32000, eos_token_id=2, ngram_penalty_weight=1.0)(logits, targets)
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        **options: Any,
    ) -> None:
        ids = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        both = {"use_ngram_penalty": True, "use_immediate_repetition_penalty": True}
        super().__init__(vocab_size, **{"primary_loss_type": "standard", **ids, **both, **options})


class PenaltySchedule(LearnedState):
    """A factor that moves from initial to final over the first optimizer steps.

        factor = initial + (final - initial) min(steps / warmup_steps, 1)

    Buffers: steps [], optimizer steps so far.

    Args:
        initial_weight, final_weight: the factor before the first and after the last step of the warm-up.
        warmup_steps: its length.

    Example:
        >>> schedule = PenaltySchedule(0.0, 4.0, warmup_steps=8)
        >>> schedule.step()
        >>> schedule.factor()
        tensor(0.5000)
    """

    statistics_name = "penalty_schedule"
    PENDING = ()
    READ = ("steps",)

    steps: Tensor

    def __init__(self, initial_weight: float, final_weight: float, warmup_steps: int) -> None:
        super().__init__()
        self.initial_weight = initial_weight
        self.final_weight = final_weight
        self.warmup_steps = warmup_steps
        self.register_buffer("steps", torch.empty((), dtype=torch.int64))
        self.previous_steps = torch.empty((), dtype=torch.int64)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begins the schedule again."""
        self.steps.zero_()
        self.settle()

    def factor(self) -> Tensor:
        """[]: the present factor; on the device, so that the schedule neither recompiles nor waits."""
        # of integers, the quotient would have the default type, which may be one that ends at 65504
        progress = (self.read("steps").to(torch.float32) / self.warmup_steps).clamp_max(1.0)
        return self.initial_weight + (self.final_weight - self.initial_weight) * progress

    def step(self, process_group: Any = None, recording: bool | Tensor = True) -> None:
        """Counts a step."""
        self.steps.add_(recording)

    def statistics(self) -> dict[str, Tensor]:
        """steps and factor; scalars on the device."""
        return {"steps": self.steps.clone(), "factor": self.factor()}

    def reset_statistics(self) -> None:
        """Nothing: the schedule is not a statistic."""


class AdaptiveAntiRepetitionLoss(AntiRepetitionLoss):
    """AntiRepetitionLoss whose penalty weights change over the first optimizer steps.

        factor = initial + (final - initial) min(steps / warmup_steps, 1)

    This factor multiplies the three weights of the configuration. Call `step()` once per optimizer step to advance it.
    auto_step is off by default here, so that the schedule counts optimizer steps and not micro-batches.

    Args:
        vocab_size, eos_token_id, pad_token_id, options: as in AntiRepetitionLoss.
        initial_weight, final_weight: factors of the penalties at the start and after the warm-up.
        warmup_steps: length of the warm-up, at least 1.

    Attributes:
        schedule: a module whose buffer steps [] counts optimizer steps.

    Raises:
        ValueError: warmup_steps is below 1, or a weight is negative, beyond the range of float32, or requires grad.

    Example:
        >>> loss_fn = AdaptiveAntiRepetitionLoss(32000, initial_weight=0.0, final_weight=4.0, warmup_steps=1000)
        >>> loss_fn(logits, targets).backward(); optimizer.step(); loss_fn.step()
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        *,
        initial_weight: float = 0.0,
        final_weight: float = 1.0,
        warmup_steps: int = 1000,
        **options: Any,
    ) -> None:
        super().__init__(vocab_size, eos_token_id, pad_token_id, **{"auto_step": False, **options})
        owner = "adaptive_anti_repetition_loss"
        check_constants(owner, initial_weight=initial_weight, final_weight=final_weight)
        initial_weight, final_weight, warmup_steps = plain((initial_weight, final_weight, warmup_steps))
        check_weights(owner, initial_weight=initial_weight, final_weight=final_weight)
        if not (type(warmup_steps) is int and warmup_steps >= 1):
            raise ValueError(f"{owner}: expected warmup_steps to be an integer >= 1, got {warmup_steps!r}")
        self.schedule = PenaltySchedule(initial_weight, final_weight, warmup_steps)
        self._find_states()

    @property
    def steps(self) -> Tensor:
        """[]: optimizer steps so far."""
        return self.schedule.steps

    def penalty_factor(self) -> Tensor:
        """[]: the present factor of the penalties."""
        return self.schedule.factor()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        if f"{prefix}steps" in state_dict:  # its name in older checkpoints
            state_dict[f"{prefix}schedule.steps"] = state_dict.pop(f"{prefix}steps")
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class _PenaltyAlone(UnifiedLoss):
    """One penalty of UnifiedLoss: what would turn on another component, or is for one, raises."""

    ROW_TERMS = (effective_logits,)
    PARTS = ()
    owner: ClassVar[str]

    def __init__(self, vocab_size: int, **options: Any) -> None:
        super().__init__(vocab_size, **{"primary_loss_type": "standard", **options})
        config = self.config
        # class weights change N, and so this penalty too
        bare = UnifiedLossConfig(vocab_size, primary_loss_type="standard", class_weights=config.class_weights)
        left_out = [
            component
            for component in (*UnifiedLoss.ROW_TERMS, *UnifiedLoss.CANDIDATES, *UnifiedLoss.PARTS)
            if component not in (*self.ROW_TERMS, *self.CANDIDATES)
            and component.from_config(config) not in (None, component.from_config(bare))
        ]
        if left_out:
            names = ", ".join(getattr(component, "__module__", component.__name__) for component in left_out)
            raise ValueError(
                f"{self.owner}: expected options of this penalty alone, got {config.changed_options()}, which turn on "
                f"or change {names}"
            )

    def forward(self, *arguments: Any, **given: Any) -> Tensor | dict[str, Tensor]:
        for name in ("negative_ids", "soft_target_ids", "target_probabilities"):
            if given.get(name) is not None:
                raise ValueError(f"{self.owner}: expected no {name}, which this penalty does not read")
        return super().forward(*arguments, **given)


functools.update_wrapper(_PenaltyAlone.forward, UnifiedLoss.forward)  # its signature and documentation


class NGramRepetitionPenalty(_PenaltyAlone):
    """The n-gram penalty alone, to add to your own loss; see losses.ngram.

    Args:
        ngram_size: n.
        penalty_weight: weight of each candidate.
        vocab_size: size of the vocabulary.
        ignore_index: target of a row that does not count.
        options: any option of `UnifiedLossConfig` that the penalty reads.

    Raises:
        ValueError: an option turns on or changes another component (such as label_smoothing, or eos_token_id without
            eos_penalty_weight=0), or a call gets negative_ids, soft_target_ids or target_probabilities.

    Example:
        >>> loss = loss + NGramRepetitionPenalty(3, vocab_size=32000)(logits, targets)
    """

    CANDIDATES = (ngram,)
    owner = "ngram_repetition_penalty"

    def __init__(
        self,
        ngram_size: int = 3,
        penalty_weight: float = UnifiedLossConfig.ngram_penalty_weight,
        vocab_size: int = 50257,
        ignore_index: int = UnifiedLossConfig.ignore_index,
        **options: Any,
    ) -> None:
        options = _renamed(self.owner, options, use_ngram_penalty=True, ngram_penalty_weight=penalty_weight)
        super().__init__(vocab_size, **{"ngram_size": ngram_size, "ignore_index": ignore_index, **options})


class SequenceRepetitionDetector(_PenaltyAlone):
    """The penalty on the previous token alone, to add to your own loss; see losses.immediate_repetition.

    Args:
        penalty_weight: weight of the previous token.
        vocab_size: size of the vocabulary.
        ignore_index: target of a row that does not count.
        options: any option of `UnifiedLossConfig` that the penalty reads.

    Raises:
        ValueError: an option turns on or changes another component (such as label_smoothing, or eos_token_id without
            eos_penalty_weight=0), or a call gets negative_ids, soft_target_ids or target_probabilities.

    Example:
        >>> loss = loss + SequenceRepetitionDetector(vocab_size=32000)(logits, targets)
    """

    CANDIDATES = (immediate_repetition,)
    owner = "sequence_repetition_detector"

    def __init__(
        self,
        penalty_weight: float = 1.0,
        vocab_size: int = 50257,
        ignore_index: int = UnifiedLossConfig.ignore_index,
        **options: Any,
    ) -> None:
        own = {"use_immediate_repetition_penalty": True, "immediate_repetition_weight": penalty_weight}
        super().__init__(vocab_size, **{"ignore_index": ignore_index, **_renamed(self.owner, options, **own)})


class MultiTokenPredictionLoss(nn.Module):
    """Multi-token prediction with its own heads, to add to your own loss; see losses.mtp.

    Args:
        vocab_size, hidden_size: those of the heads.
        num_future_tokens: how many further tokens are predicted.
        mtp_weight: weight of the term.
        ignore_index: target of a row that does not count.

    Example:
        >>> loss = loss + MultiTokenPredictionLoss(32000, 512)(hidden_states, targets)
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_future_tokens: int = UnifiedLossConfig.num_future_tokens,
        mtp_weight: float = UnifiedLossConfig.mtp_weight,
        *,
        ignore_index: int = UnifiedLossConfig.ignore_index,
    ) -> None:
        super().__init__()
        self.config = UnifiedLossConfig(
            vocab_size,
            hidden_size,
            use_mtp=True,
            num_future_tokens=num_future_tokens,
            mtp_weight=mtp_weight,
            ignore_index=ignore_index,
        )
        self.mtp = MultiTokenPrediction(self.config)

    def forward(
        self,
        hidden_states: Tensor,  # [batch_size, n_tokens, hidden_size]
        targets: Tensor,  # [batch_size, n_tokens]
        attention_mask: Tensor | None = None,  # [batch_size, n_tokens]
        return_detailed: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The term; with return_detailed a dict of "total_loss" and, detached, "mtp_loss" and metrics of each depth.

        Raises:
            ValueError: shapes do not fit.
        """
        check_is_tensor("multi_token_prediction_loss", "hidden_states", hidden_states)
        check_is_tensor("multi_token_prediction_loss", "targets", targets)
        check_are_tensors("multi_token_prediction_loss", attention_mask=attention_mask)
        check_integers("multi_token_prediction_loss", "targets", targets, "[batch_size, n_tokens]")
        check_shape("multi_token_prediction_loss", targets.shape, attention_mask=attention_mask)
        dtype = accumulation_dtype(self.mtp.heads[0].weight.dtype)  # type: ignore[arg-type]
        targets = targets.long()
        rows = count_rows(self.config, targets, keep_rows(self.config, targets, attention_mask), None, None, dtype)

        def head_loss(logits: Any, targets: Tensor, row_weights: Tensor) -> RowLoss:
            return row_loss(
                logits,
                targets,
                row_options(row_weights),
                flags=int(RowFlags.CROSS_ENTROPY),
                row_weights=row_weights,
                ignore_index=self.config.ignore_index,
                reduction="sum",
            )

        output = self.mtp(hidden_states, rows.targets, rows.weights, None, head_loss)
        if not return_detailed:
            return output.loss
        return {"total_loss": output.loss, "mtp_loss": output.loss.detach().clone(), **depth_metrics(output.depths)}


class AuxiliaryFreeMoEBalancer(MoEBalancer):
    """Balancing of a mixture of experts without an auxiliary loss, to use in your own loop; see losses.moe.

    Call it once for each training forward of the router, and `step()` once per optimizer step. Add `expert_bias` to the
    router's scores before its top-k. It takes the options of `losses.moe.MoEBalancer`.

    Example:
        >>> balancer = AuxiliaryFreeMoEBalancer(num_experts=8)
        >>> loss = loss + balancer(gate_logits, expert_indices)
        >>> loss.backward(); optimizer.step(); balancer.step()
    """

    def forward(  # type: ignore[override]  # a scalar, as the other losses that stand by themselves
        self,
        gate_logits: Tensor | Sequence[Tensor],  # [n_rows, n_experts] per layer
        expert_indices: Tensor | Sequence[Tensor] | None = None,  # [n_rows, k] per layer
        row_mask: Tensor | None = None,  # n_rows elements, bool
        return_detailed: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The steering term; with return_detailed a dict.

        The dict has "total_loss" and, detached, "moe_balancing_term", "moe_cv" and "moe_max_violation".

        Raises:
            ValueError: shapes do not fit, or expert_indices are missing.
            IndexError: an expert index is out of range.
        """
        balance = super().forward(gate_logits, expert_indices, row_mask)
        if not return_detailed:
            return balance.term
        metrics = {"moe_cv": balance.moe_cv, "moe_max_violation": balance.moe_max_violation}
        return {"total_loss": balance.term, "moe_balancing_term": balance.term.detach().clone(), **metrics}
