"""Which rows count, and what their sum is divided by. N is decided only here."""

from __future__ import annotations

import dataclasses
import math
from numbers import Real

import torch
from torch import Tensor

from ava_ext.config import UnifiedLossConfig
from ava_ext.ops import row_weights
from ava_ext.ops.arguments import check_real
from ava_ext.ops.counted_rows import kept_by
from ava_ext.ops.derivatives import refuse_tangents
from ava_ext.ops.dtensors import whole


@dataclasses.dataclass(eq=False)  # dynamo of torch 2.10 cannot read a property of a NamedTuple
class Rows:
    """The rows of one call."""

    targets: Tensor  # [...] int64; ignore_index where a row does not count
    n_counted: Tensor  # [], of the type of weights
    weights: Tensor  # [...]: token weight / N, 0 where a row does not count; float32, or float64 beside float64 logits
    n_items: Tensor | None  # []: N, where it is that of several micro-batches

    @property
    def batch_share(self) -> Tensor:
        """[]: factor of terms of the whole batch: n_counted / n_items; without n_items 1, or 0 if no row counts."""
        return self.n_counted.clamp_max(1) if self.n_items is None else self.n_counted / self.n_items


def keep_rows(
    config: UnifiedLossConfig,
    targets: Tensor,  # [...]
    attention_mask: Tensor | None,  # [...]
) -> Tensor | None:
    """[...] bool: the rows that are not padding; None: all.

    A row is padding if its attention_mask is 0, or if its target is the pad id and that is not also an EOS id.
    """
    keep = None if attention_mask is None else kept_by("unified_loss", attention_mask)
    if config.padding_id is not None:
        no_pad = targets != config.padding_id
        keep = no_pad if keep is None else keep & no_pad
    return keep


def count_rows(
    config: UnifiedLossConfig,
    targets: Tensor,  # [...]
    keep: Tensor | None,  # [...] bool, from keep_rows
    token_weights: Tensor | None,  # [...]
    num_items_in_batch: float | Tensor | None,
    dtype: torch.dtype,
    class_weights: Tensor | None = None,  # [vocab_size] of dtype
) -> Rows:
    """Decides which rows count, and their weights.

    A row counts unless its target is ignore_index or it is padding. Under "mean", N is num_items_in_batch if given,
    else the sum over the rows that count of token weight times class weight, as in PyTorch; without either, their
    number. If all their classes have weight 0, N is as without class weights. If it is 0, N is 1; the loss is then 0
    and still connected to the graph. Under "sum" and "none", N is 1.

    Terms of the whole batch are multiplied by n_counted / N if num_items_in_batch is given, so that micro-batches add
    up to the whole batch, and by 0 if no row counts. They are means over rows: where N is a sum of class or token
    weights, they are the larger the smaller the mean weight is.

    Raises:
        TypeError: num_items_in_batch is no number.
        ValueError: it is negative, not finite, has several elements, or is of half precision, or the reduction is not
            "mean". The value of a tensor is not read, because that would wait for the device; nor that of a float in a
            graph of torch.compile.
        NotImplementedError: on forward-mode derivatives by a weight or num_items_in_batch.
    """
    if token_weights is not None:
        token_weights = token_weights.to(dtype)
    is_mean = config.reduction == "mean"
    n_items = None
    if num_items_in_batch is not None:
        check_is_mean("unified_loss", config)
        n_items = items_of(num_items_in_batch, targets.device, dtype)
    refuse_tangents("unified_loss", (token_weights, class_weights, n_items))
    targets, n_counted, weights = row_weights.count_rows(
        targets, keep, token_weights, class_weights, n_items, config.ignore_index, is_mean, dtype
    )
    return Rows(targets, n_counted, weights, n_items)


def classes_of(
    targets: Tensor,  # [...]
    class_weights: Tensor,  # [vocab_size]
) -> Tensor:  # [...]
    """The weight of each row's target; of a row that does not count, that of any class."""
    return class_weights[targets.clamp(0, len(class_weights) - 1)]


def check_is_mean(owner: str, config: UnifiedLossConfig) -> None:
    """Raises ValueError where num_items_in_batch is given to a loss that divides by nothing."""
    if config.reduction != "mean":
        raise ValueError(
            f"{owner}: num_items_in_batch needs reduction='mean', got {config.reduction!r}, which divides by nothing"
        )


def items_of(
    num_items_in_batch: float | Tensor,
    device: torch.device,
    dtype: torch.dtype,
    owner: str = "unified_loss",
) -> Tensor:  # []
    """num_items_in_batch as a tensor, and 1 where it is 0. owner begins the messages."""
    if isinstance(num_items_in_batch, bool) or not isinstance(num_items_in_batch, (Tensor, Real)):
        if not hasattr(num_items_in_batch, "__array__"):
            got = type(num_items_in_batch).__name__
            raise TypeError(f"{owner}: expected num_items_in_batch to be a number or a torch.Tensor, got {got}")
        num_items_in_batch = torch.as_tensor(num_items_in_batch)
    if isinstance(num_items_in_batch, float) and torch.compiler.is_compiling():
        # compared, or given to torch.full, it would make a graph for every N
        n_items = torch.ones((), dtype=dtype, device=device) * num_items_in_batch
        return torch.where(n_items == 0, 1.0, n_items)
    if not isinstance(num_items_in_batch, Tensor):
        n = float(num_items_in_batch)
        if not 0 <= n < math.inf:
            raise ValueError(f"{owner}: expected num_items_in_batch to be >= 0, got {num_items_in_batch}")
        return torch.full((), n or 1.0, dtype=dtype, device=device)
    if num_items_in_batch.numel() != 1:
        raise ValueError(
            f"{owner}: expected num_items_in_batch of one element, got shape {list(num_items_in_batch.shape)}"
        )
    if num_items_in_batch.is_meta and device.type != "meta":
        raise ValueError(f"{owner}: expected num_items_in_batch on {device}, got meta")
    check_real(owner, "num_items_in_batch", num_items_in_batch)
    if num_items_in_batch.dtype == torch.bool:
        raise TypeError(f"{owner}: expected num_items_in_batch to be a number or a torch.Tensor, got one of bools")
    if num_items_in_batch.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"{owner}: expected num_items_in_batch of integers, float32 or float64, got {num_items_in_batch.dtype}, "
            "which rounds it, as FSDP2's mixed precision rounds every tensor on its way into a module: pass float(n)"
        )
    given = whole(owner, "num_items_in_batch", num_items_in_batch, True)  # of a DTensor: maybe not added up yet
    n_items = given.reshape(()).to(device, dtype)
    return torch.where(n_items == 0, 1.0, n_items)
