"""What a model says of each target, without a gradient: log-probability, rank, entropy, the likeliest token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ava_ext.ops.arguments import as_ids, check_is_tensor, check_shape
from ava_ext.ops.dtensor_logits import check_is_logits, local_logits
from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.row_fields import N_RANKS, TERM_NAMES
from ava_ext.ops.sharded_logits import LocalRows
from ava_ext.ops.softmax_rows import row_loss
from ava_ext.ops.softmax_statistics import statistics_options

_NLL, _ENTROPY = TERM_NAMES.index("cross_entropy"), TERM_NAMES.index("entropy")


class TokenMetrics(NamedTuple):
    """See `token_metrics`."""

    log_prob: Tensor  # [...]
    entropy: Tensor  # [...]
    rank: Tensor  # [...] int64
    argmax: Tensor  # [...] int64


@torch.no_grad()
def token_metrics(
    logits: Tensor | LinearLogits,  # [..., n_columns]
    targets: Tensor,  # [...]
    *,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    max_counted_rows: int | None = None,
) -> TokenMetrics:
    """log p and rank of each target, each row's entropy and likeliest token, in one pass over the logits.

    For evaluation, filtering of data and speculative decoding: nothing here has a gradient.

    The rank is how many logits are greater than the target's: 0 for the likeliest token, and for each of several that
    are equally likely. So (rank < k) is whether fewer than k tokens are likelier than the target. torch.topk, which
    returns exactly k tokens, may leave out one that is equal to the last of them. The rank compares the logits as they
    are stored: a soft cap or a temperature changes none. A target whose logit is nan has rank vocab_size.

    argmax is taken after the soft cap. If the cap makes several logits equal, the first is returned, and it may differ
    from a target of rank 0.

    Args:
        logits, temperature, logit_softcap, logit_scale, vocab_size, chunk_bytes, max_counted_rows: as in
            `softmax_statistics`. If the rows of the logits are spread over ranks (DTensors), the results are DTensors
            too.
        targets: [...], integers in [0, vocab_size), or ignore_index.

    Returns:
        TokenMetrics: log_prob and entropy float32 (float64 for float64 logits), 0 where the target is ignore_index;
        rank and argmax int64, -1 there. Of several greatest logits argmax is the lowest, and nan is none of them.

    Raises:
        As `row_loss`.
        NotImplementedError: the columns are spread over ranks.

    Example:
        >>> metrics = token_metrics(logits, targets)
        >>> top_5_accuracy = ((metrics.rank >= 0) & (metrics.rank < 5)).sum() / (targets != -100).sum()
    """
    check_is_logits("token_metrics", logits)
    check_is_tensor("token_metrics", "targets", targets)
    targets = as_ids("token_metrics", "targets", targets, "[...]")
    check_shape("token_metrics", logits.shape[:-1], targets=targets)
    placed, rows = local_logits("token_metrics", logits), None
    if isinstance(placed, LocalRows):
        logits, rows = placed  # type: ignore[assignment]
        targets = rows.local(targets)
    options, flags = statistics_options("token_metrics", logits, temperature, logit_softcap, logit_scale)
    terms = row_loss(
        logits,
        targets,
        options,
        flags=flags,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        chunk_bytes=chunk_bytes,
        max_counted_rows=max_counted_rows,
        with_ranks=True,
    ).terms
    rank, argmax = (terms[-N_RANKS:].long() - 1).unbind()
    found = TokenMetrics(-terms[_NLL], terms[_ENTROPY], rank, argmax)
    return found if rows is None else TokenMetrics(*map(rows.spread, found))
