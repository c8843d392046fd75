"""The main term: temperature-scaled, soft-capped cross-entropy with label smoothing.

    z = softcap(logits) / T        n = -log softmax(z)_target        V columns that are not masked
    uniform:         (1 - e) n - e mean_j log softmax(z)_j                (torch.nn.functional.cross_entropy's
        label_smoothing)
    exclude_target:  (1 - e) n - e mean_{j != target} log softmax(z)_j    (computed as uniform with e V / (V - 1))

Sources: Szegedy et al. 2016, "Rethinking the Inception architecture" (smoothing); Gemma 2, 2024 (soft cap).
"""

from __future__ import annotations

from ava_ext.config import UnifiedLossConfig
from ava_ext.ops.softmax_rows import RowFlags


def row_options(config: UnifiedLossConfig) -> tuple[RowFlags, dict[str, float]]:
    """The kernel's flags and coefficients of the main term."""
    terms = RowFlags.CROSS_ENTROPY
    if config.label_smoothing > 0:
        terms |= RowFlags.LABEL_SMOOTHING
        if config.smoothing_mode == "exclude_target":
            terms |= RowFlags.EXCLUDE_TARGET
    if config.logit_softcap is not None:
        terms |= RowFlags.SOFTCAP
    return terms, {
        "temperature": config.initial_temperature,
        "label_smoothing": config.label_smoothing,
        "logit_softcap": config.logit_softcap or 0.0,
    }
