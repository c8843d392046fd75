"""The operators as typed functions: what the losses are made of, and what a loss of one's own can be made of."""

from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.repeated_ngrams import repeated_ngram_mask
from ava_ext.ops.repetition import repetition_candidates, repetition_weights
from ava_ext.ops.router_rows import RouterStatistics, router_statistics
from ava_ext.ops.row_fields import TERM_NAMES, Candidates, RowFlags, RowLoss, row_options
from ava_ext.ops.softmax_rows import row_loss
from ava_ext.ops.softmax_statistics import SoftmaxStatistics, softmax_statistics, token_log_probs
from ava_ext.ops.token_metrics import TokenMetrics, token_metrics

__all__ = [
    "TERM_NAMES",
    "Candidates",
    "LinearLogits",
    "RouterStatistics",
    "RowFlags",
    "RowLoss",
    "SoftmaxStatistics",
    "TokenMetrics",
    "repeated_ngram_mask",
    "repetition_candidates",
    "repetition_weights",
    "router_statistics",
    "row_loss",
    "row_options",
    "softmax_statistics",
    "token_log_probs",
    "token_metrics",
]
