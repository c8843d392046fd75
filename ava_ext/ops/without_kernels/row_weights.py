"""Which rows count as PyTorch operators; see csrc/row_weights.h. Nothing comes back to the host."""

from __future__ import annotations

import torch
from torch import Tensor


def count_rows(
    targets: Tensor,  # [batch_size, n_tokens] or [n_rows], int64
    keep: Tensor | None,  # as targets, bool
    token_weights: Tensor | None,  # as targets
    class_weights: Tensor | None,  # [n_classes]
    n_items: Tensor | None,  # []
    ignore_index: int,
    is_mean: bool,
    is_double: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(targets, n_counted, weights)."""
    counted = targets != ignore_index
    if keep is not None:
        counted = counted & keep
    targets = torch.where(counted, targets, ignore_index)
    weights = counted.to(torch.float64 if is_double else torch.float32)
    n_counted = weights.sum()
    if token_weights is not None:
        weights = torch.where(counted, token_weights, 0.0)
    if not is_mean:
        return targets, n_counted, weights
    if n_items is None:
        n_items = weights.sum()
        if class_weights is not None:
            of_classes = (weights * class_weights[targets.clamp(0, len(class_weights) - 1)]).sum()
            n_items = torch.where(of_classes == 0, n_items, of_classes)
    return targets, n_counted, weights / torch.where(n_items == 0, 1.0, n_items)
