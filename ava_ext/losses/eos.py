"""Early EOS: -w log(1 - p_eos) while fewer than min_sequence_length counted targets of the segment precede the row.

A row whose own target is an EOS id is not penalised. Targets that do not count are left out of the number, so padding
on either side and prompt masking do not shift it.

Source: the unlikelihood form of the minimum length that text generation enforces.
"""

from __future__ import annotations

from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.component import CandidateSource


def from_config(config: UnifiedLossConfig) -> CandidateSource | None:
    """The penalty if there is an eos_token_id and the weight is above 0."""
    if not config.eos_ids or config.eos_penalty_weight == 0:
        return None
    return CandidateSource(
        "eos_penalty",
        {"eos_token_id": config.eos_ids, "min_sequence_length": config.min_sequence_length},
        {"eos_penalty_weight": config.eos_penalty_weight},
    )
