"""Functions of rows that are not logits, of DTensors: texts whose repetitions are looked for, and rows of a router.

Each rank looks at its own rows, and nothing is gathered but what is given in other placements. Where every rank has all
rows the results are torch.Tensors; where rows are spread they are DTensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ava_ext.ops.dtensor_logits import Place
from ava_ext.ops.dtensors import is_dtensor, whole
from ava_ext.ops.sharded_logits import RowShard


def of_whole_texts(
    owner: str,
    function: Callable[..., tuple[Tensor, ...]],
    tokens: Any,  # [batch_size, n_tokens]
    **of_rows: Any,  # [batch_size or 1, n_tokens]
) -> tuple[Any, ...]:  # of [batch_size, n_tokens, ...]
    """function(tokens, **of_rows), tensors of tokens that are DTensors in Shard(0) or Replicate.

    Raises:
        ValueError: tokens in other placements; a DTensor beside tokens that are none.
    """
    if not is_dtensor(tokens):
        return function(tokens, **{name: whole(owner, name, given, False, "tokens") for name, given in of_rows.items()})
    place = Place.of(owner, "tokens", tokens, n_row_dimensions=2)
    if any(p.is_shard() and p.dim > 0 for p in place.placements):
        raise ValueError(
            f"{owner}: expected tokens whose texts are whole on every rank, Shard(0) or Replicate, got placements "
            f"{tokens.placements}: call tokens.redistribute(placements=...), or pass the tokens before this shard "
            "as prefix_ids to UnifiedLoss"
        )
    rows = place.row_shard(tokens.shape)
    if rows is None:
        return function(tokens.to_local(), **{name: whole(owner, name, given, True) for name, given in of_rows.items()})
    local = {name: _local_text(given, rows) for name, given in of_rows.items()}
    return tuple(rows.spread(values) for values in function(tokens.to_local(), **local))


def _local_text(
    values: Any,  # [batch_size or 1, n_tokens]
    rows: RowShard,
) -> Any:
    if not isinstance(values, Tensor) or len(values) == rows.shape[0]:
        return None if values is None else rows.local(values)
    return values.full_tensor() if is_dtensor(values) else values  # one for all texts


class RouterPlace:
    """Where the rows of a router's logits [n_layers, ..., n_experts] are, the same of all layers.

    Raises:
        ValueError: layers in different places, or whose experts or layers are spread.
    """

    def __init__(self, owner: str, layers: list[Any]) -> None:
        self.owner = owner
        first = next(layer for layer in layers if is_dtensor(layer))
        place = Place.of(owner, "gate_logits", first)
        for layer in layers:
            if not is_dtensor(layer) or layer.device_mesh != place.mesh or layer.placements != first.placements:
                got = f"a DTensor in {layer.placements}" if is_dtensor(layer) else "a torch.Tensor"
                raise ValueError(
                    f"{owner}: expected gate_logits of every layer as a DTensor in placements {first.placements}, got "
                    f"{got}: pass gate_logits.to_local() of every layer, or DTensors alike"
                )
        if any(place.is_of_columns) or any(p.is_shard() and p.dim == 0 for p in place.placements):
            raise ValueError(
                f"{owner}: expected gate_logits whose rows are spread, with every layer and expert on every rank, got "
                f"placements {first.placements}: call gate_logits.redistribute(placements=...) first"
            )
        self.mesh, self.is_of_rows = place.mesh, place.is_of_rows
        self.rows = place.row_shard(first.shape[:-1])  # of [n_layers, ...]

    def local(
        self,
        name: str,
        values: Any,  # [n_layers, n_rows] or [n_rows]; expert_...: [n_layers, n_rows, any]; segment_ids: of any shape
    ) -> Any:
        """Those of this rank's rows.

        Raises:
            ValueError: values of other rows.
        """
        if is_dtensor(values):
            values = values.full_tensor()
        if values is None or self.rows is None:
            return values
        if name == "segment_ids":
            values = values.flatten()
        n_before = values.dim() - (2 if name.startswith("expert_") else 1)
        shape, offsets, sizes = self.rows.shape[1:], self.rows.offsets[1:], self.rows.sizes[1:]
        before, after = values.shape[:n_before], values.shape[n_before + 1 :]
        if values.shape[n_before] != shape.numel():
            raise ValueError(
                f"{self.owner}: expected {name} of all {shape.numel()} rows, on every rank the same, beside "
                f"gate_logits whose rows are spread over ranks, got shape {list(values.shape)}"
            )
        block = RowShard(torch.Size((*before, *shape)), (0,) * n_before + offsets, (*before, *sizes))
        return block.local(values.reshape(*block.shape, *after)).flatten(n_before, n_before + len(shape) - 1)
