"""Immediate repetition: -w log(1 - p_c) for the previous token c, unless it is the target or may repeat.

    w = immediate_repetition_weight * min(growth^(run - 1), 4)

with run the number of equal tokens that end the context; nothing below immediate_repetition_threshold.

Source: unlikelihood training, Welleck et al. 2019, "Neural text generation with unlikelihood training".
"""

from __future__ import annotations

from typing import Any

from ava_ext.config import UnifiedLossConfig


def is_on(config: UnifiedLossConfig) -> bool:
    """Whether the configuration asks for the penalty."""
    return config.use_immediate_repetition_penalty


def candidate_options(config: UnifiedLossConfig) -> tuple[int, dict[str, Any]]:
    """Slots of each row, and the arguments of repetition_candidates that fill them."""
    return 1, {
        "use_immediate_repetition_penalty": True,
        "immediate_repetition_threshold": config.immediate_repetition_threshold,
    }
