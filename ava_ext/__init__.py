"""Fused losses for training language models: forward and backward in one pass over the logits.

`UnifiedLoss` is the loss for a training loop; `functional.cross_entropy` and `functional.linear_cross_entropy` have the
signatures of torch.nn.functional. `python -m ava_ext` shows what is installed and checks it.
"""

from ava_ext import functional
from ava_ext._library import build_info, empty_cache
from ava_ext._version import __version__ as __version__
from ava_ext.config import UnifiedLossConfig
from ava_ext.losses import METRICS
from ava_ext.losses.auxiliary import AuxiliaryLoss
from ava_ext.losses.composite import CompositeLoss
from ava_ext.losses.consistency import ConsistencyLoss
from ava_ext.losses.contrastive import ContrastiveLoss
from ava_ext.losses.diversity import DiversityLoss
from ava_ext.losses.perplexity import PerplexityLoss
from ava_ext.losses.scaling import AdaptiveLossScaling
from ava_ext.losses.sequence_unlikelihood import SequenceUnlikelihoodLoss
from ava_ext.meter import LossMeter
from ava_ext.ops import (
    LinearLogits,
    repeated_ngram_mask,
    repetition_candidates,
    router_statistics,
    softmax_statistics,
    token_log_probs,
    token_metrics,
)
from ava_ext.ops import without_kernels as _without_kernels  # noqa: F401  registers what is missing
from ava_ext.presets import (
    AdaptiveAntiRepetitionLoss,
    AdaptiveMTPLoss,
    AntiRepetitionLoss,
    AuxiliaryFreeMoEBalancer,
    DeepSeekLoss,
    FocalLoss,
    LabelSmoothingLoss,
    MultiTokenPredictionLoss,
    NGramRepetitionPenalty,
    SequenceRepetitionDetector,
    TemperatureScaledCrossEntropy,
)
from ava_ext.unified_loss import UnifiedLoss, create_unified_loss

__all__ = [  # noqa: RUF022  in groups
    # the loss, its options, what it reports
    "UnifiedLoss",
    "UnifiedLossConfig",
    "create_unified_loss",
    "METRICS",
    "LossMeter",
    # the loss under names that say what it is about
    "AdaptiveAntiRepetitionLoss",
    "AdaptiveMTPLoss",
    "AntiRepetitionLoss",
    "DeepSeekLoss",
    "FocalLoss",
    "LabelSmoothingLoss",
    "TemperatureScaledCrossEntropy",
    # parts of it, to add to a loss of one's own
    "AuxiliaryFreeMoEBalancer",
    "AuxiliaryLoss",
    "ContrastiveLoss",
    "DiversityLoss",
    "MultiTokenPredictionLoss",
    "NGramRepetitionPenalty",
    "SequenceRepetitionDetector",
    # other losses, and what combines losses
    "AdaptiveLossScaling",
    "CompositeLoss",
    "ConsistencyLoss",
    "PerplexityLoss",
    "SequenceUnlikelihoodLoss",
    # functions: functional has cross_entropy and linear_cross_entropy, ops the pass over the rows itself
    "LinearLogits",
    "functional",
    "repeated_ngram_mask",
    "repetition_candidates",
    "router_statistics",
    "softmax_statistics",
    "token_log_probs",
    "token_metrics",
    # what this build is, and the memory it keeps
    "build_info",
    "empty_cache",
]
