"""The table of components: what can be an addend of UnifiedLoss, under which key, and where it is defined."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ava_ext.config import UnifiedLossConfig
from ava_ext.losses import confidence_penalty, eos, focal, immediate_repetition, ngram, primary, z_loss


def has_adaptive_heads(config: UnifiedLossConfig) -> bool:
    """Whether additional_logits are part of the loss."""
    return config.primary_loss_type == "adaptive_mtp" or (config.use_mtp and config.mtp_type == "adaptive")


def has_own_heads(config: UnifiedLossConfig) -> bool:
    """Whether the loss owns heads of multi-token prediction."""
    return config.use_mtp and not has_adaptive_heads(config)


def calibrates_confidence(config: UnifiedLossConfig) -> bool:
    """Whether the confidence of adaptive heads has a term of its own."""
    return has_adaptive_heads(config) and config.use_confidence_weighting and config.confidence_reg_strength > 0


class Component(NamedTuple):
    """One addend of the loss."""

    key: str  # its entry in the detailed dict
    module: str  # where it is defined, in ava_ext/losses
    is_on: Callable[[UnifiedLossConfig], bool]
    needs_sequences: bool = False  # rows in the order of the text


COMPONENTS = (
    Component("main_loss", "primary", lambda config: True),
    Component("z_loss", "z_loss", lambda config: config.z_loss_weight > 0),
    Component("confidence_penalty", "confidence_penalty", lambda config: config.confidence_penalty_weight > 0),
    Component("immediate_repetition_penalty", "immediate_repetition", immediate_repetition.is_on, True),
    Component("eos_penalty", "eos", eos.is_on, True),
    Component("ngram_penalty", "ngram", ngram.is_on, True),
    Component("negative_penalty", "negatives", lambda config: True),
    Component("mtp_loss", "mtp", has_own_heads, True),
    Component("mtp_loss", "adaptive_mtp", has_adaptive_heads, True),
    Component("confidence_regularization", "adaptive_mtp", calibrates_confidence, True),
    Component("moe_balancing_term", "moe", lambda config: config.use_moe_balancing),
    Component("diversity_loss", "diversity", lambda config: config.use_diversity_loss),
    Component("aux_load_balancing", "auxiliary", lambda config: config.use_auxiliary_loss),
    Component("aux_router_z", "auxiliary", lambda config: config.use_auxiliary_loss),
    Component("contrastive_loss", "contrastive", lambda config: config.use_contrastive_loss),
)
# modules whose row_options() set flags and coefficients of the row kernel
DENSE_ROW_MODULES = (primary, focal, z_loss, confidence_penalty)
# key and module whose candidate_options() fill slots of candidates, in the order of the slots
CANDIDATE_MODULES = (
    ("immediate_repetition_penalty", immediate_repetition),
    ("eos_penalty", eos),
    ("ngram_penalty", ngram),
)


class _MetricNames(frozenset[str]):
    """Names of metrics; the depths of multi-token prediction have no last one."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or str(name).startswith("mtp_loss_depth_")


METRICS = _MetricNames(
    (
        "cross_entropy",
        "perplexity",
        "focal_loss",
        "n_tokens",
        "accuracy",
        "entropy",
        "temperature",
        "moe_cv",
        "moe_max_violation",
        "mtp_loss_depth_1",
    )
)
"""Entries of the detailed dict that are no addends of total_loss (and mtp_loss_depth_k for every k)."""
