"""Logits that are DTensors: what this process holds of them, and which kind of part that is.

    Replicate                    all of them: plain logits
    Shard(a dimension of rows)   some rows: LocalRows. The loss is this rank's share, and the ranks' add up to the whole
    Shard(the last dimension)    some columns of the same rows: ShardedLogits. Every rank has the loss of the whole

Targets, weights and candidates are those of all rows, the same on every rank, or DTensors themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ava_ext.ops.arguments import check_are_tensors, check_has_columns, check_is_tensor
from ava_ext.ops.dtensors import is_dtensor, whole
from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.sharded_logits import LocalRows, RowShard, ShardedLogits

PlacedLogits = Tensor | LinearLogits | ShardedLogits | LocalRows


def local_logits(owner: str, logits: PlacedLogits) -> PlacedLogits:
    """Logits without DTensors: what this rank holds of them. owner begins the messages.

    Raises:
        ValueError: on a placement that has no such form, on parts of LinearLogits that do not fit each other.
    """
    if isinstance(logits, LinearLogits):
        return _local_linear_logits(owner, logits) if any(is_dtensor(part) for part in logits) else logits
    if is_dtensor(logits):
        return Place.of(owner, "logits", logits).part_of(_waited(logits.to_local()), logits.shape)
    return logits


def check_is_logits(owner: str, logits: object, name: str = "logits") -> None:
    """Raises TypeError for what is neither a tensor nor what logits are computed from; of LinearLogits, see `check`."""
    kinds = (Tensor, LinearLogits, ShardedLogits, LocalRows)
    check_is_tensor(owner, name, logits, kinds, "a torch.Tensor or LinearLogits")
    if isinstance(logits, LinearLogits):
        logits.check(owner)
    elif isinstance(logits, Tensor):
        check_has_columns(owner, name, logits)


def has_dtensor(logits: PlacedLogits) -> bool:
    """Whether the rows of these logits are those of a DTensor."""
    return is_dtensor(logits.hidden_states if isinstance(logits, LinearLogits) else logits)


def whole_beside(
    owner: str,
    logits: PlacedLogits,  # [..., n_columns]
    **values: Tensor | None,  # [...] or [..., n]
) -> list[Any]:
    """Values of all rows. They may be DTensors if the logits are one; anything but a tensor raises TypeError."""
    beside = has_dtensor(logits)
    check_are_tensors(owner, **values)
    return [whole(owner, name, given, beside) for name, given in values.items()]


class Place:
    """How rows and columns are spread over a mesh: placements by the dimensions of the logits [..., n_columns]."""

    def __init__(self, mesh: Any, placements: tuple[Any, ...], n_row_dimensions: int) -> None:
        self.mesh = mesh
        self.placements = placements
        self.is_of_rows = tuple(p.is_shard() and p.dim < n_row_dimensions for p in placements)
        self.is_of_columns = tuple(p.is_shard() and p.dim == n_row_dimensions for p in placements)

    @classmethod
    def of(cls, owner: str, name: str, tensor: Any, n_row_dimensions: int | None = None) -> Place:
        """Of a DTensor [..., n_columns]; n_row_dimensions: how many dimensions are of rows, if not all but the last."""
        _check_placements(owner, name, tensor, with_partial=False)
        placements = tuple(_without_negative(p, tensor.dim()) for p in tensor.placements)
        place = cls(tensor.device_mesh, placements, tensor.dim() - 1 if n_row_dimensions is None else n_row_dimensions)
        if sum(place.is_of_columns) > 1:
            raise ValueError(
                f"{owner}: expected {name} whose columns are spread over one dimension of the mesh, got "
                f"{tensor.placements}: flatten the mesh, or redistribute"
            )
        return place

    def row_shard(self, shape: torch.Size) -> RowShard | None:  # shape: [...] of all rows
        """The block of rows that this rank has; None: all."""
        if not any(self.is_of_rows):
            return None
        placements = self.of_rows()
        sizes, offsets = _local_shape_and_offset(shape, self.mesh, placements)
        return RowShard(shape, tuple(offsets), tuple(sizes), self.mesh, tuple(placements))

    def column_shard(self, n_columns: int) -> tuple[Any, int, int] | None:
        """Group, number and first of the columns that this rank has; None: all."""
        if not any(self.is_of_columns):
            return None
        from torch.distributed.tensor import Shard

        placements = [Shard(0) if is_column else _replicate() for is_column in self.is_of_columns]
        (n_local,), (first,) = _local_shape_and_offset(torch.Size([n_columns]), self.mesh, placements)
        return self.mesh.get_group(self.is_of_columns.index(True)), n_local, first

    def part_of(
        self,
        local: Tensor | LinearLogits,  # [local rows, n_local_columns]
        shape: torch.Size,  # [..., n_columns] of the whole logits
    ) -> PlacedLogits:
        """What local is of the whole logits."""
        part: Tensor | LinearLogits | ShardedLogits = local
        columns, rows = self.column_shard(shape[-1]), self.row_shard(shape[:-1])
        if columns is not None:
            group, n_local, first = columns
            if local.shape[-1] != n_local:
                raise ValueError(
                    f"sharded_logits: expected {n_local} of {shape[-1]} columns on this rank, got {local.shape[-1]}"
                )
            part = ShardedLogits(local, group, first, shape[-1])
        return part if rows is None else LocalRows(part, rows)

    def of_rows(self) -> list[Any]:
        """The placements of what has a value for each row, such as the hidden states that logits are computed from."""
        return [p if is_row else _replicate() for p, is_row in zip(self.placements, self.is_of_rows, strict=True)]


def _without_negative(placement: Any, n_dimensions: int) -> Any:
    if placement.is_shard() and placement.dim < 0:
        return type(placement)(placement.dim + n_dimensions)
    return placement


def _check_placements(owner: str, name: str, tensor: Any, with_partial: bool) -> None:
    """Raises ValueError where a rank's part is not a block: a sum in parts, or rows of several texts that were
    flattened while each was spread, which are _StridedShard.
    """
    for dimension, placement in enumerate(tensor.placements):
        if not (placement.is_replicate() or placement.is_shard() or (with_partial and placement.is_partial())):
            raise ValueError(
                f"{owner}: expected {name} in placements Replicate or Shard, got {placement} on dimension "
                f"{dimension} of the mesh: call {name}.redistribute(placements=...) first, or give [batch_size, "
                "n_tokens, ...] as it was before flatten"
            )


def _replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


def _local_shape_and_offset(shape: torch.Size, mesh: Any, placements: list[Any]) -> tuple[list[int], list[int]]:
    """Sizes and beginning of this rank's block. torch's own function makes tensors, which a compiled graph cannot read.

    A dimension is cut as by torch.chunk; one that several dimensions of the mesh share, by each in turn.
    """
    sizes, offsets = list(shape), [0] * len(shape)
    for mesh_dimension, placement in enumerate(placements):
        if placement.is_shard():
            size = sizes[placement.dim]
            chunk = -(-size // mesh.size(mesh_dimension))
            first = min(mesh.get_local_rank(mesh_dimension) * chunk, size)
            sizes[placement.dim] = min(chunk, size - first)
            offsets[placement.dim] += first
    return sizes, offsets


class _Arrived(torch.autograd.Function):
    """What an AsyncCollectiveTensor becomes, whose own wait() gives it without its graph."""

    @staticmethod
    def forward(ctx: Any, local: Any) -> Tensor:
        arrived = local.wait()
        return arrived.view_as(arrived)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _waited(local: Tensor) -> Tensor:
    """A local tensor that has arrived."""
    return _Arrived.apply(local) if hasattr(local, "wait") else local


def _local_linear_logits(owner: str, logits: LinearLogits) -> PlacedLogits:  # [..., n_columns]
    hidden_states, weight, bias = logits
    if not is_dtensor(hidden_states):
        return LinearLogits(hidden_states, gathered_weight(weight), gathered_weight(bias))
    place = linear_place(owner, logits)
    states = hidden_states.redistribute(placements=place.of_rows()).to_local()
    bias = None if bias is None else local_weight(owner, bias, place)
    return place.part_of(LinearLogits(_waited(states), local_weight(owner, weight, place), bias), logits.shape)


def linear_place(owner: str, logits: LinearLogits) -> Place:  # [..., n_columns]
    """Where the logits of hidden states that are a DTensor come to be: the rows of the one, the columns of the other.

    Where both are sharded over the same ranks (sequence and tensor parallel), hidden states are gathered there.
    """
    hidden_states: Any = logits.hidden_states
    _check_placements(owner, "hidden_states", hidden_states, with_partial=True)
    mesh, n_row_dimensions = hidden_states.device_mesh, hidden_states.dim() - 1
    of_states = tuple(_without_negative(p, hidden_states.dim()) for p in hidden_states.placements)
    if logits.bias is not None and is_dtensor(logits.bias) != is_dtensor(logits.weight):
        raise ValueError(
            f"{owner}: expected weight and bias to be DTensors or torch.Tensors both, got "
            f"{type(logits.weight).__name__} and {type(logits.bias).__name__}"
        )
    of_weight = [_replicate()] * mesh.ndim
    if is_dtensor(logits.weight):
        of_weight = [logits.weight.placements[d] for d in _dimensions(owner, logits.weight, mesh)]
    elif any(p.is_shard() and p.dim < n_row_dimensions for p in of_states):
        raise ValueError(
            f"{owner}: expected the weight as a DTensor beside hidden states in placements {of_states}, got a "
            "torch.Tensor, whose gradient would be that of this rank's rows: pass "
            "DTensor.from_local(weight, mesh, [Replicate()]), or local hidden states and num_items_in_batch"
        )
    from torch.distributed.tensor import Shard

    placements = []
    for states, weight in zip(of_states, of_weight, strict=True):
        if weight.is_shard() and weight.dim == 0:
            placements.append(Shard(n_row_dimensions))
        elif states.is_shard() and states.dim < n_row_dimensions:
            placements.append(states)
        else:
            placements.append(_replicate())
    return Place(mesh, tuple(placements), n_row_dimensions)


def _dimensions(owner: str, weight: Any, mesh: Any) -> list[int]:
    """Which dimensions of the weight's mesh those of `mesh` are."""
    if weight.device_mesh == mesh:
        return list(range(mesh.ndim))
    names, wanted = weight.device_mesh.mesh_dim_names or (), mesh.mesh_dim_names or ()
    if not wanted or any(name not in names for name in wanted):
        raise ValueError(
            f"{owner}: expected the weight on the mesh of the hidden states {mesh}, or on one with more dimensions of "
            f"which these are named, got {weight.device_mesh}"
        )
    return [names.index(name) for name in wanted]


def local_weight(
    owner: str,
    weight: Any,  # [n_columns, hidden_size] or [n_columns]
    place: Place,
) -> Tensor:  # [n_local_columns, hidden_size] or [n_local_columns]
    """What this rank needs of a weight for its part of the logits.

    The gradient is added up over the ranks that have other rows, and averaged over a dimension of the mesh that the
    logits are not on: that of FSDP2, which averages.
    """
    if not is_dtensor(weight):
        return weight
    from torch.distributed.tensor import Partial, Shard

    placements = [_replicate()] * weight.device_mesh.ndim
    of_gradient: list[Any] = [Partial("avg")] * weight.device_mesh.ndim
    for own, is_row, is_column in zip(
        _dimensions(owner, weight, place.mesh), place.is_of_rows, place.is_of_columns, strict=True
    ):
        placements[own] = Shard(0) if is_column else _replicate()
        of_gradient[own] = Shard(0) if is_column else Partial() if is_row else _replicate()
    return _waited(weight.redistribute(placements=placements).to_local(grad_placements=of_gradient))


def gathered_weight(
    weight: Any,  # [n_columns, hidden_size], [n_columns] or None
) -> Any:
    """The whole of a weight beside hidden states that are not a DTensor: each rank's own rows, as under FSDP2.

    The gradient is averaged over the ranks, as FSDP2 does with every other one; that is right for hidden states that
    are the same on every rank, too. full_tensor() alone would take each rank's gradient for that of all.
    """
    if not is_dtensor(weight):
        return weight
    from torch.distributed.tensor import Partial

    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
