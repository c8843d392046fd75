"""The words of the row kernels: flags, options, terms, candidates, and how many numbers each tensor holds for a row.

The same fields stand in csrc/softmax_rows.h. ops/softmax_rows.py and ops/softmax_statistics.py are made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntFlag
from typing import NamedTuple

import torch
from torch import Tensor

from ava_ext.ops.arguments import check_not_negative, check_positive, check_several_of_rows, check_shape


class RowFlags(IntFlag):
    """Which terms the row kernel computes. Their weights come in the tensor of options."""

    CROSS_ENTROPY = 1
    FOCAL = 2
    LABEL_SMOOTHING = 4
    EXCLUDE_TARGET = 8
    Z_LOSS = 16
    CONFIDENCE_PENALTY = 32
    SOFTCAP = 64
    ENTROPY = 128
    # beside IDS_ARE_PRESENT = 256
    DFT = 512
    EAFT = 1024
    # the last group of candidates are soft targets
    SOFT_TARGETS = 2048
    # the first group of candidates is one absent id, whose weight is that of the target's term
    TARGET_WEIGHTS = 4096
    # the first of the soft targets is TAIL_ID, whose weight is that of their tail
    TAIL = 16384


# in place of a soft target's id, the first of its group: all columns but those of the ids behind it
TAIL_ID = -2

# beside RowFlags, of the operators that take ids: an id of -1 is out of range, not absent
IDS_ARE_PRESENT = 256
# beside RowFlags, where a weight q_j of every column comes with the row (column_weights of the operators):
# probabilities in place of the target, or what weighs the columns under LABEL_SMOOTHING
TARGET_PROBABILITIES = 8192
SMOOTHING_WEIGHTS = 32768
COLUMN_WEIGHT_FLAGS = TARGET_PROBABILITIES | SMOOTHING_WEIGHTS

# beside RowFlags: report ranks
RANKS = 65536
N_RANKS = 2  # rank of the target, argmax: the last rows of the operators' terms

# the first rows of RowLoss.terms; the groups of candidates follow
TERM_NAMES = ("main_loss", "z_loss", "confidence_penalty", "cross_entropy", "entropy", "correct")
STATISTIC_NAMES = ("max", "argmax", "rest", "weighted", "sum", "count")  # of the tensor statistics: RowStatistics
SUMMARY_NAMES = ("entropy", "lse", "log_rest", "mean_log_prob")  # of the tensor summaries
OPTION_NAMES = (  # of the tensor options: RowOptions
    "temperature",
    "label_smoothing",
    "focal_alpha",
    "focal_gamma",
    "z_loss_weight",
    "confidence_penalty_weight",
    "logit_softcap",
    "reweighting_exponent",
)
# what row_options makes them of
_GIVEN_NAMES = ("temperature / logit_scale", *OPTION_NAMES[1:6], "logit_softcap / logit_scale", *OPTION_NAMES[7:])
N_TERMS, N_STATISTICS, N_SUMMARIES, N_OPTIONS = map(len, (TERM_NAMES, STATISTIC_NAMES, SUMMARY_NAMES, OPTION_NAMES))
# of p, p log p, 1 and the one-hot of the maximum (beside column_weights: of these); those of the one-hots of the ids
# follow
N_ROW_COEFFICIENTS = 4


class RowLoss(NamedTuple):
    """What `row_loss` returns."""

    # row_weights times the sum of the terms and penalties: the differentiable output
    loss: Tensor  # [...], or [] with reduction="sum"
    # each separately, unweighted, without graph. The entropy is measured only with RowFlags.ENTROPY, LABEL_SMOOTHING,
    # CONFIDENCE_PENALTY, EAFT or SOFTCAP.
    # With with_ranks the last two are, both counted from 1, and 0 in a row that does not count: 1 and how many logits
    # are greater than the target's; 1 and the column of the greatest logit, the lowest of equals.
    terms: Tensor  # [N_TERMS + n_groups, ...]


class Candidates(NamedTuple):
    """Tokens that a row pushes down: -sum_c weight_c log(1 - p_c).

    Candidates come in groups, whose terms are reported separately. The row's own target is left out of them. Three
    flags give a group another meaning:

    - RowFlags.SOFT_TARGETS: the tokens of the last group are pulled up, -sum_c weight_c log p_c. The row's own target
      may be among them.
    - RowFlags.TAIL: the first of the soft targets may be TAIL_ID, of weight w'. It stands for all columns that the
      others do not name, -w' log(1 - sum_c p_c).
    - RowFlags.TARGET_WEIGHTS: the first group is one absent id (-1), whose weight multiplies the target's term.
    """

    ids: Tensor  # [..., n_candidates] int32 or int64; -1: absent
    weights: Tensor  # [..., n_candidates] float32 (float64 beside float64 logits)
    groups: tuple[int, ...]  # sizes that add up to n_candidates; each group is reported separately


class RowInputs(NamedTuple):
    """What `row_loss` reads beside the logits; see there."""

    targets: Tensor  # [...] int64
    options: Tensor  # [N_OPTIONS]
    flags: int
    row_weights: Tensor | None  # [...]
    candidates: Candidates | None
    vocab_size: int
    ignore_index: int

    def with_rows(
        self,
        choose: Callable[[Tensor], Tensor],  # [...] or [..., n_candidates]
    ) -> RowInputs:
        """Of the rows that `choose` makes of these."""
        row_weights = None if self.row_weights is None else choose(self.row_weights)
        candidates = self.candidates
        if candidates is not None:
            candidates = candidates._replace(ids=choose(candidates.ids), weights=choose(candidates.weights))
        return self._replace(targets=choose(self.targets), row_weights=row_weights, candidates=candidates)

    def in_one_dimension(
        self,
        rows: torch.Size,  # the shape of the rows of the logits
    ) -> RowInputs:
        """Of [n_rows], also where there is one row, [].

        Raises:
            ValueError: something is of other rows than the logits: a row would get what is another row's.
        """
        check_shape("row_loss", rows, targets=self.targets, row_weights=self.row_weights)
        if self.candidates is not None:
            ids, weights, _ = self.candidates
            check_several_of_rows("row_loss", rows, "candidate_ids", ids, "n_candidates")
            check_shape("row_loss", ids.shape, candidate_weights=weights)
        return self.with_rows(lambda values: values.flatten(0, len(rows) - 1) if rows else values.unsqueeze(0))


def target_weights(
    of_targets: Tensor,  # [...] float32 or float64
) -> Candidates:
    """The first group of candidates with RowFlags.TARGET_WEIGHTS: what multiplies the term of each row's target."""
    absent = torch.full_like(of_targets, -1, dtype=torch.int64)
    return Candidates(absent.unsqueeze(-1), of_targets.unsqueeze(-1), (1,))


def n_terms(groups: Sequence[int] | None, flags: int) -> int:
    """Rows of the operators' terms."""
    return N_TERMS + len(groups or ()) + (N_RANKS if flags & RANKS else 0)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of statistics, terms and weights beside logits of this type: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_options(
    like: Tensor,
    *,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    focal_alpha: float = 1.0,
    focal_gamma: float = 2.0,
    z_loss_weight: float = 0.0,
    confidence_penalty_weight: float = 0.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    reweighting_exponent: float = 1.0,
) -> Tensor:  # [N_OPTIONS]
    """The small tensor of options that the row kernels read, on the device of `like` and in its accumulation type.

    A schedule may change the values of such a tensor: nothing is recompiled and nothing synchronises. The scale of the
    logits is not a value of its own: c tanh(s x / c) / T = c' tanh(x / c') / T' with c' = c / s and T' = T / s. So the
    first value is temperature / logit_scale, and the soft cap's is logit_softcap / logit_scale.

    Raises:
        ValueError: temperature, logit_softcap, logit_scale or one of these two quotients is not above 0 in the range of
            float32, another option is below 0 or beyond that range, label_smoothing is above 1, or one requires grad.

    Example:
        >>> row_options(torch.zeros(1), temperature=0.5, logit_softcap=30.0)
        tensor([ 0.5000,  0.0000,  1.0000,  2.0000,  0.0000,  0.0000, 30.0000,  1.0000])
    """
    # of floats with a scale above 0 the quotient tells
    if not (isinstance(temperature, float) and isinstance(logit_scale, float) and logit_scale > 0):
        check_positive("row_options", temperature=temperature, logit_scale=logit_scale)
    check_positive("row_options", **{"temperature / logit_scale": temperature / logit_scale})
    if logit_softcap is not None:
        check_positive("row_options", logit_softcap=logit_softcap)
        check_positive("row_options", **{"logit_softcap / logit_scale": logit_softcap / logit_scale})
    if label_smoothing > 1:
        raise ValueError(f"row_options: expected label_smoothing to be a number in [0, 1], got {label_smoothing}")
    values = (
        temperature / logit_scale,
        label_smoothing,
        focal_alpha,
        focal_gamma,
        z_loss_weight,
        confidence_penalty_weight,
        (logit_softcap or 0.0) / logit_scale,
        reweighting_exponent,
    )
    return numbers_like("row_options", like, _GIVEN_NAMES, values)


def numbers_like(
    owner: str,
    like: Tensor,
    names: tuple[str, ...],
    values: tuple[float, ...],
) -> Tensor:  # [len(values)]
    """A tensor of these numbers, constants >= 0, on the device of `like`, in its accumulation type."""
    check_not_negative(owner, names, values)
    dtype, device = accumulation_dtype(like.dtype), like.device
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype, device=device)
    # filled there: a copy of numbers from the host waits for the GPU, and no CUDA graph can capture it
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
