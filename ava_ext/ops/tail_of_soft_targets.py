"""The tail of soft targets where the row kernels have none, on CUDA: from statistics, in two more passes over logits.

    w' (lse of all columns - lse of those that are not named)

of logits in which the named columns are masked. Both lse are exact, and their difference is large where the tail is
small. The kernels of the CPU take it in their one pass: tail_share in csrc/softmax_rows.h.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ava_ext._library import CUDA_VERSION
from ava_ext.ops.row_evaluation import smallest_rest
from ava_ext.ops.row_fields import N_TERMS, SUMMARY_NAMES, TAIL_ID, Candidates, RowFlags, RowLoss
from ava_ext.ops.row_statistics import row_statistics

LSE = SUMMARY_NAMES.index("lse")


def lacks_tail(logits: Any) -> bool:
    """Whether the kernels for such logits have no tail."""
    return logits.device.type == "cuda" and bool(CUDA_VERSION)


def without_tail(candidates: Candidates) -> Candidates:
    """The same soft targets, alone."""
    return candidates._replace(ids=candidates.ids.masked_fill(candidates.ids == TAIL_ID, -1))


def with_tail(
    of_rows: RowLoss,  # without the tail: of each row, or their sum
    logits: Tensor,  # [..., n_columns]
    targets: Tensor,  # [...]
    options: Tensor,  # [N_OPTIONS]
    flags: int,
    row_weights: Tensor | None,  # [...]
    candidates: Candidates,
    vocab_size: int | None,
    ignore_index: int,
) -> RowLoss:
    """The same and the tail of the last group of candidates."""
    ids, weights, groups = candidates
    first, counted = ids.shape[-1] - groups[-1], targets != ignore_index
    named = ids[..., first:].long().masked_fill(~counted.unsqueeze(-1), -1)
    left = torch.where(counted & (ids[..., first] == TAIL_ID), weights[..., first], 0)
    holes = named.new_zeros(logits.shape, dtype=torch.int32)
    holes.scatter_add_(-1, named.clamp_min(0), (named >= 0).int())
    size = logits.shape[-1] if vocab_size is None else vocab_size
    constants = (None, left != 0, options, int(RowFlags.ENTROPY | flags & RowFlags.SOFTCAP), size)
    masked = logits.masked_fill(holes > 0, -torch.inf)
    whole, others = (row_statistics("row_loss", of, *constants)[1 + LSE] for of in (logits, masked))
    most = -math.log(smallest_rest(weights.dtype))
    term = torch.where(left != 0, left * (whole - others).clamp(max=most), 0)
    of_loss = term if row_weights is None else term * row_weights
    terms = of_rows.terms.clone()
    terms[N_TERMS + len(groups) - 1] += term.detach()
    return RowLoss(of_rows.loss + (of_loss.sum() if of_rows.loss.dim() < targets.dim() else of_loss), terms)
