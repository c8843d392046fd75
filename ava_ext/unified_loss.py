"""UnifiedLoss: the configuration, one table of components, and their weighted sum."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ava_ext.config import UnifiedLossConfig
from ava_ext.losses import confidence_penalty, eos, focal, immediate_repetition, ngram, primary, z_loss
from ava_ext.losses.adaptive_mtp import AdaptiveMTP
from ava_ext.losses.auxiliary import AuxiliaryLoss
from ava_ext.losses.contrastive import ContrastiveLoss
from ava_ext.losses.diversity import DiversityLoss
from ava_ext.losses.moe import MoEBalancer
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
)
from ava_ext.reduction import Rows, count_rows, keep_rows
from ava_ext.sequences import segment_numbers, shift_left


class Component(NamedTuple):
    """One addend of the loss."""

    key: str  # its entry in the detailed dict
    module: str  # where it is defined, in ava_ext/losses
    is_on: Callable[[UnifiedLossConfig], bool]
    needs: str = ""  # "sequences": rows in order; "batch": not a sum over rows


def has_adaptive_heads(config: UnifiedLossConfig) -> bool:
    """Whether additional_logits are part of the loss."""
    return config.primary_loss_type == "adaptive_mtp" or (config.use_mtp and config.mtp_type == "adaptive")


def has_own_heads(config: UnifiedLossConfig) -> bool:
    """Whether the loss owns heads of multi-token prediction."""
    return config.use_mtp and not has_adaptive_heads(config)


COMPONENTS = (
    Component("main_loss", "primary", lambda config: True),
    Component("z_loss", "z_loss", lambda config: config.z_loss_weight > 0),
    Component("confidence_penalty", "confidence_penalty", lambda config: config.confidence_penalty_weight > 0),
    Component("immediate_repetition_penalty", "immediate_repetition", immediate_repetition.is_on, "sequences"),
    Component("eos_penalty", "eos", eos.is_on, "sequences"),
    Component("ngram_penalty", "ngram", ngram.is_on, "sequences"),
    Component("negative_penalty", "negatives", lambda config: True),
    Component("mtp_loss", "mtp", has_own_heads, "sequences"),
    Component("mtp_loss", "adaptive_mtp", has_adaptive_heads, "sequences"),
    Component("confidence_regularization", "adaptive_mtp", lambda config: has_adaptive_heads(config) and config.use_confidence_weighting and config.confidence_reg_strength > 0, "sequences"),
    Component("moe_balancing_term", "moe", lambda config: config.use_moe_balancing, "batch"),
    Component("diversity_loss", "diversity", lambda config: config.use_diversity_loss, "batch"),
    Component("aux_load_balancing", "auxiliary", lambda config: config.use_auxiliary_loss, "batch"),
    Component("aux_router_z", "auxiliary", lambda config: config.use_auxiliary_loss, "batch"),
    Component("contrastive_loss", "contrastive", lambda config: config.use_contrastive_loss, "batch"),
)
# entries of the detailed dict that are no addends; mtp_loss_depth_1..K as well
METRICS = frozenset(
    {"cross_entropy", "perplexity", "focal_loss", "n_tokens", "accuracy", "entropy", "temperature", "moe_cv", "moe_max_violation"}
    | {f"mtp_loss_depth_{depth}" for depth in range(1, 65)}
)
_DENSE = (primary, focal, z_loss, confidence_penalty)
_SPARSE = (("immediate_repetition_penalty", immediate_repetition), ("eos_penalty", eos), ("ngram_penalty", ngram))


class UnifiedLoss(nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int | None = None, **options: Any) -> None:
        super().__init__()
        UnifiedLossConfig.check_names(options)
        self.config = config = UnifiedLossConfig(vocab_size=vocab_size, hidden_size=hidden_size, **options)
        self.temperature = AdaptiveTemperature(config)
        self.mtp = MultiTokenPrediction(config) if has_own_heads(config) else None
        self.adaptive_mtp = AdaptiveMTP(config) if has_adaptive_heads(config) else None
        self.moe_balancer = MoEBalancer(config) if config.use_moe_balancing else None
        self.auxiliary = AuxiliaryLoss.from_config(config) if config.use_auxiliary_loss else None
        self.diversity = DiversityLoss() if config.use_diversity_loss else None
        self.contrastive = ContrastiveLoss(temperature=config.contrastive_temperature) if config.use_contrastive_loss else None

        self._terms, self._row_options = RowTerms(0), {}
        for module in _DENSE:
            terms, row_options = module.row_options(config)
            self._terms |= terms
            self._row_options |= row_options
        self._groups: list[int] = []
        self._penalties: list[str] = []
        self._candidate_options: dict[str, Any] = {}
        for key, module in _SPARSE:
            if module.is_on(config):
                n_slots, candidate_options = module.candidate_options(config)
                self._groups.append(n_slots)
                self._penalties.append(key)
                self._candidate_options |= candidate_options
        self._needs_sequences = [c.key for c in COMPONENTS if c.needs == "sequences" and c.is_on(config)]
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
