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
    """The weighted sum of every loss component that the configuration turns on.

        total = main (focal-modulated where focal is on) + z + confidence + immediate + eos + ngram + negative
              + mtp + moe + diversity + auxiliary + contrastive

    Everything that looks at a row of logits is computed in one pass over it, gradient included. Each component is defined in its
    module of `ava_ext.losses` (the table COMPONENTS names it). `UnifiedLoss(V, primary_loss_type="standard")` equals
    torch.nn.functional.cross_entropy, but that a batch without a counted row gives 0, not nan.

    Every token term is divided by the same N (see `ava_ext.reduction.count_rows`). Data-parallel averaging of gradients is not
    undone here: with num_items_in_batch counted over all ranks, multiply the loss by the world size.

    State: `step()`, once per optimizer step, commits the adaptive temperature, the expert load and the expert bias;
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
        self.batch_terms = BatchTerms(config)

        self._on = tuple(dict.fromkeys(component.key for component in COMPONENTS if component.is_on(config)))
        self._needs_sequences = [c.key for c in COMPONENTS if c.needs_sequences and c.is_on(config)]
        terms, self._row_options = RowTerms(0), {}
        for module in _DENSE:
            flags, row_options = module.row_options(config)
            terms |= flags
            self._row_options |= row_options
        self._terms = int(terms)
        self._groups: tuple[int, ...] = ()
        self._penalties: tuple[str, ...] = ()
        self._candidate_options: dict[str, Any] = {}
        for key, module in _SPARSE:
            if module.is_on(config):
                n_slots, candidate_options = module.candidate_options(config)
                self._groups += (n_slots,)
                self._penalties += (key,)
                self._candidate_options |= candidate_options
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @property
    def moe_balancer(self):
        return self.batch_terms.moe_balancer
