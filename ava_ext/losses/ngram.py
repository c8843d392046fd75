"""n-gram repetition: -w log(1 - p_c) for each token c that followed an earlier occurrence of the last n - 1 tokens.

These are the tokens that no_repeat_ngram bans in generation: at most ngram_slots distinct ones, most recent first. With
ngram_window_size W, only followers among the last W context tokens are taken. n = 1 is token-level unlikelihood.

Source: Welleck et al. 2019, "Neural text generation with unlikelihood training".
"""

from __future__ import annotations

from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.component import CandidateSource


def from_config(config: UnifiedLossConfig) -> CandidateSource | None:
    """The penalty where use_ngram_penalty is set."""
    if not config.use_ngram_penalty:
        return None
    return CandidateSource(
        "ngram_penalty",
        {
            "use_ngram_penalty": True,
            "ngram_size": config.ngram_size,
            "ngram_window_size": config.ngram_window_size,
            "ngram_slots": config.ngram_slots,
        },
        {"ngram_penalty_weight": config.ngram_penalty_weight},
    )
