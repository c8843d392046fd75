"""Which rows count, their weights, and what their sum is divided by; see csrc/row_weights.h."""

from __future__ import annotations

import torch
from torch import Tensor

from ava_ext.ops.arguments import check_devices

_count_rows = torch.ops.ava_ext.count_rows.default


def count_rows(
    targets: Tensor,  # [batch_size, n_tokens] or [n_rows], int64
    keep: Tensor | None,  # as targets, bool; None: all
    token_weights: Tensor | None,  # as targets, of dtype; None: 1
    class_weights: Tensor | None,  # [n_classes] of dtype; None: 1
    n_items: Tensor | None,  # [] of dtype
    ignore_index: int,
    is_mean: bool,
    dtype: torch.dtype,  # float32 or float64
) -> tuple[Tensor, Tensor, Tensor]:
    """(targets, n_counted, weights): as targets, with ignore_index where a row does not count; []; as targets.

    A weight is the token weight over N, and 0 where the row does not count. Nothing comes back to the host.
    """
    is_double = dtype == torch.float64
    return _count_rows(targets, keep, token_weights, class_weights, n_items, ignore_index, is_mean, is_double)


@torch.library.register_fake("ava_ext::count_rows")
def _(targets, keep, token_weights, class_weights, n_items, ignore_index, is_mean, is_double):
    others = {"keep": keep, "token_weights": token_weights, "class_weights": class_weights, "n_items": n_items}
    check_devices("count_rows", targets, **others)
    dtype = torch.float64 if is_double else torch.float32
    shape = targets.shape
    return targets.new_empty(shape), targets.new_empty((), dtype=dtype), targets.new_empty(shape, dtype=dtype)
