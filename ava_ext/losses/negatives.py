"""Given negatives: -w log(1 - p_c) for any tokens c that the caller chooses.

For example, tokens that a rollout repeated (sequence-level unlikelihood). The row's own target and -1 are left out.

Source: Welleck et al. 2019, "Neural text generation with unlikelihood training", section 5.2.
"""

from __future__ import annotations

import torch

from ava_ext.call import Call
from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.component import CandidateSource
from ava_ext.ops.row_fields import Candidates


def from_config(config: UnifiedLossConfig) -> CandidateSource:
    """The penalty of every call that passes negative_ids."""
    return CandidateSource("negative_penalty", given=given_negatives, needs_sequences=False)


def given_negatives(call: Call) -> Candidates | None:
    """The call's negative_ids with their weights (default: 1), or None if it has none."""
    ids, weights, dtype = call.negative_ids, call.negative_weights, call.rows.weights.dtype
    if ids is None:
        return None
    weights = torch.ones_like(ids, dtype=dtype) if weights is None else weights.to(dtype)
    return Candidates(ids.long(), weights, (ids.shape[-1],))
