"""Given negatives: -w log(1 - p_c) for any tokens c that the caller wants pushed down.

For example those that a rollout repeated (sequence-level unlikelihood). The row's own target and -1 are left out.

Source: Welleck et al. 2019, "Neural text generation with unlikelihood training", section 5.2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def given_negatives(
    targets: Tensor,  # [...]
    negative_ids: Tensor,  # [..., n_negatives]
    negative_weights: Tensor | None,  # [..., n_negatives]
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The candidates (ids int32, weights), both [..., n_negatives]. Default weight: 1.

    Raises:
        ValueError: on shapes that do not fit, or weights that require grad.
    """
    if negative_ids.shape[:-1] != targets.shape or negative_ids.dim() != targets.dim() + 1:
        raise ValueError(
            f"unified_loss: expected negative_ids of shape {list(targets.shape)} + [n_negatives], "
            f"got {list(negative_ids.shape)}"
        )
    if negative_weights is None:
        return negative_ids.to(torch.int32), torch.ones_like(negative_ids, dtype=dtype)
    if negative_weights.shape != negative_ids.shape:
        raise ValueError(
            f"unified_loss: expected negative_weights of shape {list(negative_ids.shape)}, "
            f"got {list(negative_weights.shape)}"
        )
    return negative_ids.to(torch.int32), negative_weights.to(dtype)
