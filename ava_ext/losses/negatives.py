"""Given negatives: -w log(1 - p_c) for any tokens c that the caller chooses.

For example, tokens that a rollout repeated (sequence-level unlikelihood). The row's own target and -1 are left out.

Source: Welleck et al. 2019, "Neural text generation with unlikelihood training", section 5.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ava_ext.call import Call
from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.component import Addends, CandidateSource, Part
from ava_ext.ops.row_fields import Candidates
from ava_ext.sequences import shift_left


def from_config(config: UnifiedLossConfig) -> CandidateSource | None:
    """The penalty of every call that passes negative_ids, on rows that have a target."""
    if not config.negatives_need_target:
        return None
    return CandidateSource("negative_penalty", given=given_negatives, needs_sequences=False)


def given_negatives(call: Call) -> Candidates | None:
    """The call's negative_ids with their weights (default: 1), or None if it has none."""
    ids, weights, dtype = call.negative_ids, call.negative_weights, call.rows.weights.dtype
    if ids is None:
        return None
    weights = torch.ones_like(ids, dtype=dtype) if weights is None else weights.to(dtype)
    return Candidates(ids.long(), weights, (ids.shape[-1],))


def absent_target(
    ids: Tensor,  # [..., n_negatives] int64
) -> Tensor:
    """[...]: the lowest id that is none of the row's, so that the row kernel, which leaves out a row's own target,
    leaves out none of them; at most n_negatives.
    """
    numbers = torch.arange(ids.shape[-1] + 1, device=ids.device)
    is_free = (ids.unsqueeze(-1) != numbers).all(-2)
    return is_free.to(torch.int8).argmax(-1)


class NegativesWithoutTarget(Part):
    """sum_t w_t sum_c negative_weight_c (-log(1 - p_c)) / N over the rows t that have any negative.

    Such a row may have a target or none. N is the number of these rows (the sum of their token weights w, where given),
    or num_items_in_batch where given; 1 with reduction "sum" and "none". Padding does not count. A negative is absent
    if it is -1, the row's own target, or of weight 0. It takes one more pass over the logits: rows that have no target
    take no part in the other one.
    """

    name = "negatives"
    keys = ("negative_penalty",)

    @classmethod
    def from_config(cls, config: UnifiedLossConfig) -> NegativesWithoutTarget | None:
        """The part where rows count for their negatives alone."""
        return None if config.negatives_need_target else cls()

    def of_call(self, call: Call) -> Addends:
        """The penalty of the call's negative_ids; 0 without any."""
        rows, config = call.rows, call.config
        candidates = given_negatives(call)
        if candidates is None:
            return Addends({"negative_penalty": call.no_loss()})
        ids = candidates.ids
        if ids.shape[-1] >= config.vocab_size:
            raise ValueError(
                f"unified_loss: negatives_need_target=False expected fewer negative_ids than vocab_size = "
                f"{config.vocab_size}, got {ids.shape[-1]}"
            )
        has_target = rows.targets != config.ignore_index
        own = rows.targets.masked_fill(~has_target, -1).unsqueeze(-1)
        has_any = ((ids != -1) & (ids != own) & (candidates.weights != 0)).any(-1)
        if call.kept_rows is not None:
            has_any = has_any & call.kept_rows
        if not call.labels_are_shifted:  # behind the last label there is no row; those of other texts are not kept
            # not written into has_any: torch.func.linearize would lose that
            has_any = has_any & shift_left(torch.ones_like(has_any), 0)
        weights = has_any.to(rows.weights)
        if call.kept_weights is not None:
            weights = torch.where(has_any, call.kept_weights.to(weights), 0.0)
        if config.reduction == "mean":
            n = weights.sum() if rows.n_items is None or call.num_items_in_batch is None else rows.n_items
            weights = weights / torch.where(n == 0, 1.0, n)
        targets = torch.where(has_target, rows.targets, absent_target(ids))
        targets = targets.masked_fill(~has_any, -1)
        return Addends({"negative_penalty": call.candidate_loss(targets, weights, candidates).loss})
