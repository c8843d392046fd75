"""Soft targets: weight Td^2 sum_c -q_c log p_c over a few tokens c of each row, with p = softmax(z / Td).

For the most likely tokens of a teacher, tokens sampled from it, or several right targets of a row. z are the effective
logits of the main term, Td is distillation_temperature, and q are the given probabilities, which need not add up to 1:
what the other tokens have is dropped. Td^2 keeps the size of the gradient, which softmax(z / Td) divides by Td^2.
With Td = 1 the tokens are one more group of candidates in the pass over the row; another Td costs a pass of its own.

With distillation_tail, all tokens that are not named are one more target:

    weight Td^2 (sum_c -q_c log p_c - (1 - sum_c q_c) log(1 - sum_c p_c))

where 1 - sum q is taken for 0 if it is negative. This is least where the model gives the named tokens what the teacher
gives them; without the tail it is least where they have everything. 1 - sum p is the sum of the other tokens' own
probabilities, so that value and gradient are right however sure the model is.

The metric teacher_kl is sum_c q_c (log q_c - log p_c), the tail included where it is on: the mean over the rows that
count, without weight and Td^2.

Source: Hinton et al. 2015, "Distilling the knowledge in a neural network".
"""

from __future__ import annotations

import torch
from torch import Tensor

from ava_ext.call import Call
from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.component import CandidateMetric, CandidateSource
from ava_ext.ops.row_fields import TAIL_ID, Candidates, RowFlags


def from_config(config: UnifiedLossConfig) -> CandidateSource | None:
    """The term of every call that passes soft_target_ids, where its weight is above 0."""
    if config.distillation_weight == 0:
        return None
    tail = RowFlags.TAIL if config.distillation_tail else 0
    return CandidateSource(
        "distillation_loss",
        given=soft_targets,
        needs_sequences=False,
        flags=int(RowFlags.SOFT_TARGETS | tail),
        temperature=config.distillation_temperature,
        metric=CandidateMetric("teacher_kl", teacher_kl),
    )


def _factor(config: UnifiedLossConfig) -> float:
    return config.distillation_weight * config.distillation_temperature**2


def soft_targets(call: Call) -> Candidates | None:
    """The call's soft_target_ids with their weights, or None if it has none."""
    ids, weights = call.soft_target_ids, call.soft_target_weights
    if ids is None or weights is None:
        return None
    ids, weights = ids.long(), weights.to(call.rows.weights.dtype)
    if call.config.distillation_tail:
        weights = torch.cat([_left_over(ids, weights), weights], -1)
        given = ids.masked_fill(ids == TAIL_ID, TAIL_ID - 1)  # out of range, as it is without a tail
        ids = torch.cat([ids.new_full((*ids.shape[:-1], 1), TAIL_ID), given], -1)
    return Candidates(ids, weights * _factor(call.config), (ids.shape[-1],))


def _left_over(
    ids: Tensor,  # [..., n_soft_targets]
    weights: Tensor,  # as ids
) -> Tensor:  # [..., 1]
    """What the soft targets leave of a probability of 1."""
    return (1 - weights.masked_fill(ids < 0, 0).sum(-1, keepdim=True)).clamp_min(0)


def teacher_kl(
    call: Call,
    term: Tensor,  # [batch_size, n_tokens]: sum_c -q_c log p_c of each row, times weight and Td^2
) -> Tensor:  # []
    """Mean of sum_c q_c (log q_c - log p_c) over the rows of this call that count."""
    ids, weights = call.soft_target_ids, call.soft_target_weights
    assert ids is not None and weights is not None  # else there is no term
    given = weights.to(term.dtype).masked_fill(ids < 0, 0)
    if call.config.distillation_tail:
        given = torch.cat([_left_over(ids, given), given], -1)
    negative_entropy = given.xlogy(given).sum(-1)
    counted = call.rows.targets != call.config.ignore_index
    negative_entropy = torch.where(counted, negative_entropy, 0)
    of_rows = negative_entropy if call.placement is None else call.placement.local(negative_entropy)
    return (term.sum() / _factor(call.config) + of_rows.sum()) / call.rows.n_counted.clamp_min(1)
