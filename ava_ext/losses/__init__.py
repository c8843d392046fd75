"""Every component of UnifiedLoss, in one list for each kind. A component exists because it is in a list here.

You can import the public loss classes from here as well as from `ava_ext`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ava_ext.losses import (
    confidence_penalty,
    distillation,
    effective_logits,
    eos,
    focal,
    immediate_repetition,
    negatives,
    ngram,
    primary,
    reweighting,
    z_loss,
)
from ava_ext.losses.adaptive_mtp import AdaptiveMTP
from ava_ext.losses.auxiliary import AuxiliaryLoss
from ava_ext.losses.component import METRICS_OF_PARTS
from ava_ext.losses.contrastive import ContrastiveLoss
from ava_ext.losses.depths import DEPTH_METRICS
from ava_ext.losses.diversity import DiversityLoss
from ava_ext.losses.moe import MoEBalancer
from ava_ext.losses.mtp import MultiTokenPrediction
from ava_ext.losses.mtp_hidden_states import HiddenStatesMTP
from ava_ext.losses.negatives import NegativesWithoutTarget

if TYPE_CHECKING:
    from ava_ext.losses.component import Part

# modules whose from_config gives a RowTerm: flags and options of the row kernel
ROW_TERMS = (effective_logits, primary, focal, reweighting, z_loss, confidence_penalty)
# modules whose from_config gives a CandidateSource; the first three in the order of repetition_candidates' groups, soft
# targets last
CANDIDATES = (immediate_repetition, eos, ngram, negatives, distillation)
# what is computed beside the rows, in the order in which it is added; the balancer measures the router for both
PARTS: tuple[type[Part], ...] = (
    NegativesWithoutTarget,
    MultiTokenPrediction,
    AdaptiveMTP,
    HiddenStatesMTP,
    MoEBalancer,
    AuxiliaryLoss,
    DiversityLoss,
    ContrastiveLoss,
)


TOP_K_ACCURACY = "accuracy_top_"  # and k


class _MetricNames(frozenset[str]):
    """Names of metrics. Those of the depths of multi-token prediction and of accuracy_top_k are open-ended; parts of a
    user's own have others.
    """

    def __contains__(self, name: object) -> bool:
        is_known = super().__contains__(name) or name in METRICS_OF_PARTS
        return is_known or str(name).startswith((*DEPTH_METRICS, TOP_K_ACCURACY))


METRICS = _MetricNames(
    ["cross_entropy", "perplexity", "n_tokens", "accuracy", "entropy", "temperature", "focal_loss", "teacher_kl"]
    + [name for part in PARTS for name in part.METRICS]
)
"""Names of the entries of the detailed dict that do not add up to total_loss. mtp_loss_depth_k and accuracy_top_k are
among them for every k."""

METRICS_THAT_ADD_UP = frozenset({"n_tokens", "focal_loss"})
"""Those of METRICS that add up over micro-batches, as components do. Most others are means over the rows of a call;
moe_cv, moe_max_violation, temperature and perplexity are not, and those of a depth are means over its own rows."""

__all__ = [
    "AdaptiveAntiRepetitionLoss",
    "AdaptiveLossScaling",
    "AdaptiveMTPLoss",
    "AntiRepetitionLoss",
    "AuxiliaryFreeMoEBalancer",
    "AuxiliaryLoss",
    "CompositeLoss",
    "ConsistencyLoss",
    "ContrastiveLoss",
    "DeepSeekLoss",
    "DiversityLoss",
    "FocalLoss",
    "LabelSmoothingLoss",
    "MultiTokenPredictionLoss",
    "NGramRepetitionPenalty",
    "PerplexityLoss",
    "SequenceRepetitionDetector",
    "SequenceUnlikelihoodLoss",
    "TemperatureScaledCrossEntropy",
    "UnifiedLoss",
    "create_unified_loss",
]


def __getattr__(name: str) -> Any:
    # the classes that are built on this package: an import at the top would run upwards
    if name in __all__:
        import ava_ext

        return getattr(ava_ext, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
