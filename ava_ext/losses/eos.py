"""Early EOS: -w log(1 - p_eos) while fewer than min_sequence_length counted targets of the segment precede the row.

Not where the target itself is an EOS id. Counted targets, so that left padding, right padding and prompt masking do
not shift it.

Source: the unlikelihood form of the minimum length that text generation enforces.
"""

from __future__ import annotations

from typing import Any

from ava_ext.config import UnifiedLossConfig


def is_on(config: UnifiedLossConfig) -> bool:
    """Whether the configuration asks for the penalty."""
    return bool(config.eos_ids) and config.eos_penalty_weight > 0


def candidate_options(config: UnifiedLossConfig) -> tuple[int, dict[str, Any]]:
    """Slots of each row, and the arguments of repetition_candidates that fill them."""
    return len(config.eos_ids), {"eos_token_id": config.eos_ids, "min_sequence_length": config.min_sequence_length}
