"""Every loss class, one module per component; presets.py has those that are UnifiedLoss with fewer options."""

from ava_ext.losses.adaptive_mtp import AdaptiveMTP
from ava_ext.losses.auxiliary import AuxiliaryLoss
from ava_ext.losses.composite import CompositeLoss
from ava_ext.losses.consistency import ConsistencyLoss
from ava_ext.losses.contrastive import ContrastiveLoss
from ava_ext.losses.diversity import DiversityLoss
from ava_ext.losses.moe import MoEBalancer
from ava_ext.losses.mtp import MultiTokenPrediction
from ava_ext.losses.perplexity import PerplexityLoss
from ava_ext.losses.presets import (
    AdaptiveAntiRepetitionLoss,
    AdaptiveMTPLoss,
    AntiRepetitionLoss,
    DeepSeekLoss,
    FocalLoss,
    LabelSmoothingLoss,
)
from ava_ext.losses.scaling import AdaptiveLossScaling
from ava_ext.losses.temperature import AdaptiveTemperature
from ava_ext.unified_loss import UnifiedLoss, create_unified_loss

__all__ = [
    "AdaptiveAntiRepetitionLoss",
    "AdaptiveLossScaling",
    "AdaptiveMTP",
    "AdaptiveMTPLoss",
    "AdaptiveTemperature",
    "AntiRepetitionLoss",
    "AuxiliaryLoss",
    "CompositeLoss",
    "ConsistencyLoss",
    "ContrastiveLoss",
    "DeepSeekLoss",
    "DiversityLoss",
    "FocalLoss",
    "LabelSmoothingLoss",
    "MoEBalancer",
    "MultiTokenPrediction",
    "PerplexityLoss",
    "UnifiedLoss",
    "create_unified_loss",
]
