"""Immediate repetition: -w log(1 - p_c) for the previous token c, unless c is the target or allowed to repeat.

    w = immediate_repetition_weight * min(growth^(run - 1), 4)

run is the number of equal tokens at the end of the context. Runs below immediate_repetition_threshold cost nothing.

Source: unlikelihood training, Welleck et al. 2019, "Neural text generation with unlikelihood training".
"""

from __future__ import annotations

from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.component import CandidateSource


def from_config(config: UnifiedLossConfig) -> CandidateSource | None:
    """The penalty where use_immediate_repetition_penalty is set."""
    if not config.use_immediate_repetition_penalty:
        return None
    return CandidateSource(
        "immediate_repetition_penalty",
        {
            "use_immediate_repetition_penalty": True,
            "immediate_repetition_threshold": config.immediate_repetition_threshold,
        },
        {
            "immediate_repetition_weight": config.immediate_repetition_weight,
            "immediate_repetition_growth": config.immediate_repetition_growth,
        },
    )
