"""Fused losses for training language models: forward and backward in one pass over the logits."""

from ava_ext.losses import *  # noqa: F403, I001  first: the table of components refers to its modules
from ava_ext.losses import __all__ as _losses
from ava_ext._library import build_info
from ava_ext.components import METRICS
from ava_ext.config import UnifiedLossConfig
from ava_ext.functional import linear_unified_loss
from ava_ext.ops.linear_rows import LinearLogits
from ava_ext.ops import without_kernels as _without_kernels  # noqa: F401  registers what is missing
from ava_ext.ops.repetition import repetition_candidates, repetition_weights
from ava_ext.ops.router_rows import RouterStatistics, router_statistics
from ava_ext.ops.softmax_rows import Candidates, RowFlags, row_loss, row_options
from ava_ext.ops.softmax_statistics import SoftmaxStatistics, softmax_statistics, token_log_probs

__all__ = [
    "METRICS",
    "Candidates",
    "LinearLogits",
    "RouterStatistics",
    "RowFlags",
    "SoftmaxStatistics",
    "UnifiedLossConfig",
    "build_info",
    "linear_unified_loss",
    "repetition_candidates",
    "repetition_weights",
    "router_statistics",
    "row_loss",
    "row_options",
    "softmax_statistics",
    "token_log_probs",
    *_losses,
]
