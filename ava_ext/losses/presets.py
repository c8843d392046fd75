"""UnifiedLoss under names that say what they are about; each takes every other option of UnifiedLoss too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ava_ext.unified_loss import UnifiedLoss


class DeepSeekLoss(UnifiedLoss):
    """Cross-entropy with adaptive temperature, and with use_mtp heads that predict further tokens.

    Args:
        vocab_size, hidden_size: as in UnifiedLoss; hidden_size is needed with use_mtp.
        use_mtp: predict num_future_tokens further tokens from hidden_states.
        options: any option of `UnifiedLossConfig`.

    Example:
        >>> loss = DeepSeekLoss(32000, 512, use_mtp=True)(logits, targets, hidden_states=hidden_states)
    """

    def __init__(
        self, vocab_size: int, hidden_size: int | None = None, *, use_mtp: bool = False, **options: Any
    ) -> None:
        super().__init__(vocab_size, hidden_size, **{"primary_loss_type": "deepseek", "use_mtp": use_mtp, **options})


class AdaptiveMTPLoss(UnifiedLoss):
    """Cross-entropy of the primary logits, and confidence-weighted cross-entropy of the model's further heads.

    Args:
        vocab_size: real columns of the logits.
        options: any option of `UnifiedLossConfig`.

    Example:
        >>> loss_fn = AdaptiveMTPLoss(32000, num_future_tokens=2)
        >>> loss = loss_fn(logits, targets, additional_logits=heads, confidence_scores=confidence)
    """

    def __init__(self, vocab_size: int, **options: Any) -> None:
        super().__init__(vocab_size, **{"primary_loss_type": "adaptive_mtp", **options})


class FocalLoss(UnifiedLoss):
    """alpha (1 - p_target)^gamma times the cross-entropy. Lin et al. 2017.

    Args:
        vocab_size: real columns of the logits.
        alpha, gamma: factor and exponent.
        options: any option of `UnifiedLossConfig`.

    Example:
        >>> loss = FocalLoss(32000, gamma=2.0)(logits, targets)
    """

    def __init__(self, vocab_size: int, alpha: float = 1.0, gamma: float = 2.0, **options: Any) -> None:
        focal = {"use_focal_loss": True, "focal_alpha": alpha, "focal_gamma": gamma}
        super().__init__(vocab_size, **{"primary_loss_type": "standard", **focal, **options})


class LabelSmoothingLoss(UnifiedLoss):
    """Cross-entropy against a target that keeps 1 - smoothing of its mass. Szegedy et al. 2016.

    Args:
        vocab_size: real columns of the logits.
        smoothing: mass spread over the vocabulary.
        smoothing_mode: "uniform" (over all columns, as torch.nn.functional) or "exclude_target" (over the others).
        options: any option of `UnifiedLossConfig`.

    Example:
        >>> loss = LabelSmoothingLoss(32000, smoothing=0.1)(logits, targets)
    """

    def __init__(
        self, vocab_size: int, smoothing: float = 0.1, smoothing_mode: str = "uniform", **options: Any
    ) -> None:
        smoothed = {"label_smoothing": smoothing, "smoothing_mode": smoothing_mode}
        super().__init__(vocab_size, **{"primary_loss_type": "standard", **smoothed, **options})


class AntiRepetitionLoss(UnifiedLoss):
    """Cross-entropy, and unlikelihood of repeated n-grams, of the previous token and of an early end. Welleck et al.
    2019.

    Args:
        vocab_size: real columns of the logits.
        eos_token_id: ends a text; None: no penalty of an early end.
        pad_token_id: rows with this target do not count, unless it is an EOS id.
        options: any option of `UnifiedLossConfig`.

    Example:
        >>> loss = AntiRepetitionLoss(32000, eos_token_id=2, ngram_penalty_weight=1.0)(logits, targets)
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_id: int | tuple[int, ...] | None = None,
        pad_token_id: int | None = None,
        **options: Any,
    ) -> None:
        ids = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        both = {"use_ngram_penalty": True, "use_immediate_repetition_penalty": True}
        super().__init__(vocab_size, **{"primary_loss_type": "standard", **ids, **both, **options})


class AdaptiveAntiRepetitionLoss(AntiRepetitionLoss):
    """AntiRepetitionLoss whose penalty weights move from initial to final over the first optimizer steps.

        weight = initial + (final - initial) min(steps / warmup_steps, 1)

    The three weights of the configuration are multiplied by it. `step()` once per optimizer step moves it on; here
    auto_step is off by default, so that the schedule counts optimizer steps and not micro-batches.

    Args:
        vocab_size, eos_token_id, pad_token_id, options: as in AntiRepetitionLoss.
        initial_weight, final_weight: factors of the penalties before the first and after the last step of the warm-up.
        warmup_steps: its length, at least 1.

    Buffers: steps [], optimizer steps so far.

    Raises:
        ValueError: on warmup_steps below 1, or negative weights.

    Example:
        >>> loss_fn = AdaptiveAntiRepetitionLoss(32000, initial_weight=0.0, final_weight=4.0, warmup_steps=1000)
        >>> loss_fn(logits, targets).backward(); optimizer.step(); loss_fn.step()
    """

    steps: Tensor

    def __init__(
        self,
        vocab_size: int,
        eos_token_id: int | tuple[int, ...] | None = None,
        pad_token_id: int | None = None,
        *,
        initial_weight: float = 0.0,
        final_weight: float = 1.0,
        warmup_steps: int = 1000,
        **options: Any,
    ) -> None:
        super().__init__(vocab_size, eos_token_id, pad_token_id, **{"auto_step": False, **options})
        if warmup_steps < 1 or initial_weight < 0 or final_weight < 0:
            raise ValueError(
                "adaptive_anti_repetition_loss: expected warmup_steps >= 1 and weights >= 0, got "
                f"{warmup_steps}, initial_weight={initial_weight} and final_weight={final_weight}"
            )
        self.initial_weight = initial_weight
        self.final_weight = final_weight
        self.warmup_steps = warmup_steps
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def penalty_factor(self) -> Tensor:
        """[]: the present factor of the penalties; on the device, so that the schedule neither recompiles nor waits."""
        progress = (self.steps / self.warmup_steps).clamp_max(1.0)
        return self.initial_weight + (self.final_weight - self.initial_weight) * progress

    def _row_tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        coefficients, penalty_weights = super()._row_tensors(like)
        factor = self.penalty_factor().to(like.dtype)
        growth = penalty_weights[1:2]  # no weight: it stays
        return coefficients, torch.cat([penalty_weights[:1] * factor, growth, penalty_weights[2:] * factor])

    def step(self) -> None:
        """Moves the schedule on, and commits what UnifiedLoss commits. Once per optimizer step."""
        super().step()
        self.steps.add_(1)
