"""Rows of logits: softmax statistics, from which a new loss is made in a few lines of PyTorch.

Their vector-Jacobian product is the gradient kernel of the fused loss; the formulas stand in csrc/softmax_rows.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ava_ext.ops.arguments import (
    as_ids,
    as_mask,
    check_are_integers,
    check_constants,
    check_is_tensor,
    check_positive,
    check_real,
    check_several_of_rows,
    check_shape,
)
from ava_ext.ops.dtensor_logits import check_is_logits, local_logits, whole_beside
from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.linear_statistics import linear_row_statistics
from ava_ext.ops.row_fields import IDS_ARE_PRESENT, RowFlags, row_options
from ava_ext.ops.row_statistics import row_statistics
from ava_ext.ops.sharded_logits import LocalRows, ShardedLogits
from ava_ext.ops.vocabulary_parallel import vocabulary_parallel_statistics

_PLAIN = (Tensor, type(None))


class SoftmaxStatistics(NamedTuple):
    """Centred quantities of each row, which do not cancel. See `softmax_statistics`."""

    log_probs: Tensor  # [..., n_ids]
    entropy: Tensor  # [...]
    lse: Tensor  # [...]
    log_rest: Tensor  # [...]
    mean_log_prob: Tensor  # [...]


def softmax_statistics(
    logits: Tensor | LinearLogits | ShardedLogits,  # [..., n_columns]
    ids: Tensor | None,  # [..., n_ids]
    *,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    row_mask: Tensor | None = None,  # [...]
    chunk_bytes: int | None = None,
    max_counted_rows: int | None = None,
) -> SoftmaxStatistics:
    """Softmax statistics of each row, differentiable at kernel speed, for a loss of your own.

    The rest of such a loss is a few lines of PyTorch on [n_rows] vectors. With z = softcap(logit_scale logits) /
    temperature over the columns that are not masked (raw logit -inf, or beyond vocab_size), the statistics are

        log_probs      z_id - lse, of each of the ids
        entropy        -sum p log p
        lse            log sum exp z
        log_rest       log sum_{j != argmax} exp(z_j - max z)
        mean_log_prob  mean of log p

    log_rest gives log(1 - max p) = log_rest - log1p(exp(log_rest)) where 1 - max p would be 0. It is exact up to a gap
    of 87 (float64: 708) between max z and the next z. Beyond, exp leaves the range of normal numbers: log_rest loses
    digits, and from a gap of 104 (746) on, or from 88 (709) where subnormal numbers are flushed, it is -inf. Where
    exp(log_rest) is below 1e-37 (float64: 1e-300), its gradient fades to 0.

    Args:
        logits: [..., n_columns], float32, bfloat16, float16 or float64. Or LinearLogits(hidden_states, weight, bias),
            of which a few rows exist at a time; backward computes them again. Or ShardedLogits, or a DTensor: see
            `ava_ext.distributed` for what a rank gets.
        ids: [..., n_ids] integers in [0, vocab_size); -1 gives 0. None: no log_probs.
        temperature: a number > 0, or a 0-dim tensor on the logits' device that does not require grad. The value of a
            tensor is not checked: that would wait for a GPU.
        logit_softcap: c of c tanh(logits / c).
        logit_scale: factor of the logits, before the soft cap.
        vocab_size: columns beyond it are padding. Default: n_columns.
        row_mask: [...] bool or integers; rows where it is False or 0 give zeros and get a zero gradient, whatever they
            hold.
        chunk_bytes: what the logits of one chunk of LinearLogits may take. Default: 64 MB, on CUDA 1 GB.
        max_counted_rows: see `row_loss`; of LinearLogits, the rows of row_mask.

    Returns:
        SoftmaxStatistics, float32 (float64 for float64 logits).

    Raises:
        ValueError: on a temperature, a soft cap or a scale that is not above 0 in the range of float32 or requires
            grad, ids that are not integers, a mask of floats, ids or a mask of other rows, or LinearLogits that do not
            fit.
        TypeError: on an argument that is not a tensor, or not an integer.
        IndexError: on ids out of range.
        RuntimeError: on other wrong shapes and types; on double backward.
        NotImplementedError: on forward-mode derivatives.

    Example:
        >>> s = softmax_statistics(logits, targets.unsqueeze(-1))
        >>> margin_loss = torch.relu(1 + s.log_rest + s.entropy - s.log_probs[..., 0]).mean()
        >>> margin_loss.backward()
    """
    check_is_logits("softmax_statistics", logits)
    if ids is not None:
        check_is_tensor("softmax_statistics", "ids", ids)
        ids = as_ids("softmax_statistics", "ids", ids, "[..., n_ids]")
        check_several_of_rows("softmax_statistics", logits.shape[:-1], "ids", ids, "n_ids")
    if row_mask is not None:
        check_is_tensor("softmax_statistics", "row_mask", row_mask)
        check_shape("softmax_statistics", logits.shape[:-1], row_mask=row_mask)
        row_mask = as_mask("softmax_statistics", row_mask)
    options = statistics_options("softmax_statistics", logits, temperature, logit_softcap, logit_scale)
    limits = (vocab_size, chunk_bytes, max_counted_rows)
    return _statistics("softmax_statistics", logits, ids, row_mask, *options, *limits)


def _statistics(
    owner: str,
    logits: Tensor | LinearLogits | ShardedLogits,  # [..., n_columns]
    ids: Tensor | None,  # [..., n_ids]
    row_mask: Tensor | None,  # [...] bool
    options: Tensor,  # [N_OPTIONS]
    flags: int,
    vocab_size: int | None,
    chunk_bytes: int | None,
    max_counted_rows: int | None,
) -> SoftmaxStatistics:
    """softmax_statistics for owner, whose name begins the messages."""
    check_are_integers(owner, vocab_size=vocab_size, chunk_bytes=chunk_bytes, max_counted_rows=max_counted_rows)
    placed, rows = local_logits(owner, logits), None
    if isinstance(placed, LocalRows):
        placed, rows = placed
        ids, row_mask = (None if given is None else rows.local(given) for given in (ids, row_mask))
    elif not (type(logits) is Tensor and type(ids) in _PLAIN and type(row_mask) in _PLAIN):  # a DTensor is a Tensor too
        ids, row_mask = whole_beside(owner, logits, ids=ids, row_mask=row_mask)
    size = placed.shape[-1] if vocab_size is None else vocab_size
    arguments, limits = (ids, row_mask, options, flags, size), (chunk_bytes, max_counted_rows)
    found: Sequence[Tensor]
    if isinstance(placed, ShardedLogits):
        log_probs, summaries = vocabulary_parallel_statistics(owner, placed, *arguments, *limits)
        found = (log_probs, *summaries.unbind(0))
    elif isinstance(placed, LinearLogits):
        found = linear_row_statistics(owner, placed, *arguments, *limits)
    else:
        found = row_statistics(owner, placed, *arguments)
    return SoftmaxStatistics(*(found if rows is None else map(rows.spread, found)))


def statistics_options(
    owner: str,
    logits: Tensor | LinearLogits | ShardedLogits,  # [..., n_columns]
    temperature: float | Tensor,
    logit_softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, int]:  # [N_OPTIONS], flags
    """What the row operators read of these; owner begins the messages."""
    flags = int(RowFlags.ENTROPY if logit_softcap is None else RowFlags.ENTROPY | RowFlags.SOFTCAP)
    like = torch.empty(0, dtype=logits.dtype, device=logits.device)
    check_constants(owner, temperature=temperature, logit_softcap=logit_softcap, logit_scale=logit_scale)
    check_positive(owner, logit_scale=logit_scale)
    if logit_softcap is not None:
        check_positive(owner, logit_softcap=logit_softcap)
    if not isinstance(temperature, Tensor):
        check_positive(owner, temperature=temperature)
        options = row_options(like, temperature=temperature, logit_softcap=logit_softcap, logit_scale=logit_scale)
        return options, flags
    check_real(owner, "temperature", temperature)
    options = row_options(like, logit_softcap=logit_softcap, logit_scale=logit_scale)
    return torch.cat([temperature.reshape(1).to(options) / logit_scale, options[1:]]), flags


def token_log_probs(
    logits: Tensor | LinearLogits | ShardedLogits,  # [..., n_columns]
    targets: Tensor,  # [...]
    *,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    max_counted_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log p of each target, and each row's entropy: what policy gradients need, in one pass over the logits.

    Args:
        logits, temperature, logit_softcap, logit_scale, vocab_size, chunk_bytes, max_counted_rows: as in
            `softmax_statistics`.
        targets: [...], integers in [0, vocab_size), or ignore_index: such rows give (0, 0) and get a zero gradient.

    Returns:
        (log_prob [...], entropy [...]), float32 (float64 for float64 logits), differentiable in the logits.

    Raises:
        As `softmax_statistics`.

    Example:
        >>> log_prob, entropy = token_log_probs(logits, actions)
        >>> loss = -(advantages * log_prob).mean() - 0.01 * entropy.mean()
        >>> loss.backward()
    """
    check_is_logits("token_log_probs", logits)
    check_is_tensor("token_log_probs", "targets", targets)
    check_are_integers("token_log_probs", ignore_index=ignore_index)
    targets = as_ids("token_log_probs", "targets", targets, "[...]")
    check_shape("token_log_probs", logits.shape[:-1], targets=targets)
    counted = targets != ignore_index
    options, flags = statistics_options("token_log_probs", logits, temperature, logit_softcap, logit_scale)
    arguments = (logits, targets.unsqueeze(-1), counted, options, flags | IDS_ARE_PRESENT)
    statistics = _statistics("token_log_probs", *arguments, vocab_size, chunk_bytes, max_counted_rows)
    return statistics.log_probs.squeeze(-1), statistics.entropy
