# ruff: noqa: F401  the functions that tests call, under one name
"""The executable specification: what every component computes, in plain PyTorch, slow and without any kernel.

Only tests, benchmarks and the self-check import this package. It runs in the dtype of its inputs (float64 where it
serves as an oracle), autograd differentiates it, and it loops over tokens in Python: inputs are tiny. One module per
family of kernels, then the rows of one call, the terms of a batch, and everything together.
"""

from ava_ext.reference.batch_terms import adaptive_temperature, diversity, info_nce, simctg
from ava_ext.reference.repetition import (
    early_eos_weights,
    immediate_repetition_weights,
    negative_weights_dense,
    ngram_weights,
)
from ava_ext.reference.router_rows import (
    router_probabilities,
    router_statistics,
    updated_expert_bias,
    updated_expert_load,
)
from ava_ext.reference.sequences import counted_rows, segment_numbers
from ava_ext.reference.softmax_rows import (
    confidence_penalty,
    cross_entropy,
    effective_logits,
    focal,
    log_normaliser,
    log_odds,
    negative_log_likelihood,
    reweighted,
    smoothed,
    soft_targets,
    softmax_statistics,
    softplus,
    token_entropy,
    token_weight,
    unlikelihood,
    z_loss,
)
from ava_ext.reference.unified_loss import unified_loss

# entries of unified_loss() that are not weighted contributions; those of the depths of mtp_terms() belong to them too
METRICS = (
    "cross_entropy", "perplexity", "focal_loss", "n_tokens", "accuracy", "entropy", "temperature", "teacher_kl",
    "moe_cv", "moe_max_violation",
)  # fmt: skip
