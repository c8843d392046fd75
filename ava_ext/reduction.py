"""Which rows count, and what their sum is divided by: the one place where N is decided."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ava_ext.config import UnifiedLossConfig


class Rows(NamedTuple):
    """The rows of one call."""

    targets: Tensor  # [...] int64; ignore_index where a row does not count
    counted: Tensor  # [...] bool
    n_counted: Tensor  # [], of the type of weights
    weights: Tensor  # [...]: token weight / N, 0 where a row does not count; float32, or float64 beside float64 logits
    n_items: Tensor | None  # []: N, where it is that of several micro-batches

    @property
    def batch_share(self) -> Tensor:
        """[]: the factor of terms of the whole batch, n_counted / n_items;
        without n_items 1, and 0 where no row counts.
        """
        return self.n_counted.clamp_max(1) if self.n_items is None else self.n_counted / self.n_items


def keep_rows(
    config: UnifiedLossConfig,
    targets: Tensor,  # [...]
    attention_mask: Tensor | None,  # [...]
) -> Tensor | None:
    """[...] bool: the rows that are no padding (attention_mask 0, or a pad target where pad is no EOS id);
    None: all.
    """
    keep = None if attention_mask is None else attention_mask != 0
    if config.pad_token_id is not None and config.pad_token_id not in config.eos_ids:
        no_pad = targets != config.pad_token_id
        keep = no_pad if keep is None else keep & no_pad
    return keep


def count_rows(
    config: UnifiedLossConfig,
    targets: Tensor,  # [...]
    attention_mask: Tensor | None,  # [...]
    token_weights: Tensor | None,  # [...]
    num_items_in_batch: float | Tensor | None,
    dtype: torch.dtype,
) -> Rows:
    """Decides which rows count and their weights.

    A row counts unless its target is ignore_index or it is padding. Under "mean", N is num_items_in_batch, else the
    sum of the token weights of the rows that count, else their number, and 1 where that is 0: the loss is 0 then, and
        still in the graph.
    Under "sum" and "none" N is 1.

    Terms of the whole batch are multiplied by n_counted / N where num_items_in_batch is given (micro-batches then add
    up to the whole batch), and by 0 where no row counts.
    """
    counted = targets != config.ignore_index
    keep = keep_rows(config, targets, attention_mask)
    if keep is not None:
        counted = counted & keep
        targets = torch.where(counted, targets, config.ignore_index)
    weights = counted.to(dtype)
    n_counted = weights.sum()
    if token_weights is not None:
        weights = torch.where(counted, token_weights.to(dtype), 0.0)
    n_items = None
    if config.reduction == "mean":
        if num_items_in_batch is not None:
            n = torch.as_tensor(num_items_in_batch, device=targets.device).to(dtype)
            n = n_items = torch.where(n == 0, 1.0, n)
        elif token_weights is not None:
            n = weights.sum()
            n = torch.where(n == 0, 1.0, n)
        else:
            n = n_counted.clamp_min(1)
        weights = weights / n
    return Rows(targets, counted, n_counted, weights, n_items)
