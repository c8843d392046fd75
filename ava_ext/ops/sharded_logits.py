"""Logits of which this process holds a part: some of the columns, or some of the rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ava_ext.ops.dtensors import is_dtensor
from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.process_group import resolve


class ShardedLogits(NamedTuple):
    """Logits [..., n_columns] whose columns are spread over the ranks of a group: what this rank holds of them.

    Every rank of the group gives the same rows, targets and candidates, and gets the loss of the whole logits and the
    gradient of its own columns. Forward gathers a few numbers per row once, backward gathers nothing. The part may be
    LinearLogits(hidden_states, weight of these columns). hidden_states are then the same on every rank too, and
    backward adds up their gradient over the group.

    With shards of one size (a padded vocabulary, as Megatron has it) group is enough; vocab_size says which columns
    are real. Other shards say where they begin and how many columns there are in all.

    Example:
        >>> logits = ShardedLogits(hidden_states @ weight_shard.T, tensor_parallel_group)
        >>> loss = UnifiedLoss(vocab_size, primary_loss_type="standard")(logits, targets)
    """

    logits: Tensor | LinearLogits  # [..., n_local_columns]
    group: Any  # a process group, or "world"
    first_column: int | None = None  # where the local columns begin; None: rank * n_local_columns
    n_columns: int | None = None  # of all ranks together; None: world size * n_local_columns

    @property
    def shape(self) -> torch.Size:
        """[..., n_columns]: the shape of the whole logits."""
        return torch.Size((*self.logits.shape[:-1], self.place()[1]))

    @property
    def dtype(self) -> torch.dtype:
        """What they are computed in."""
        return self.logits.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.logits.device

    def unsqueeze(self, dim: int) -> ShardedLogits:
        """The logits with one more leading dimension."""
        return self._replace(logits=self.logits.unsqueeze(dim))

    def place(self) -> tuple[int, int]:
        """first_column and n_columns.

        Raises:
            ValueError: no process group, a group without this rank, a shard that does not fit into n_columns.
        """
        n_local = self.logits.shape[-1]
        group = self.process_group()
        rank, world_size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        first = rank * n_local if self.first_column is None else self.first_column
        n_columns = world_size * n_local if self.n_columns is None else self.n_columns
        if first < 0 or first + n_local > n_columns:
            raise ValueError(
                f"sharded_logits: expected the {n_local} columns from {first} on to lie within n_columns = "
                f"{n_columns}; shards of different sizes need first_column and n_columns"
            )
        return first, n_columns

    def process_group(self) -> Any:
        """The group; see `place`."""
        group = resolve(self.group)
        if group is None:
            raise ValueError(
                "sharded_logits: expected a process group that holds the other columns, got "
                f"{self.group!r}{' before torch.distributed.init_process_group' if self.group == 'world' else ''}"
            )
        if torch.distributed.get_rank(group) < 0:
            raise ValueError("sharded_logits: expected a process group with this rank in it, got one without")
        return group


class RowShard(NamedTuple):
    """Which rows of [batch_size, n_tokens], or of any shape, this process has: a block of them."""

    shape: torch.Size  # [...]: of all rows
    offsets: tuple[int, ...]  # where the block begins
    sizes: tuple[int, ...]  # of the block
    mesh: Any = None  # of the DTensor whose rows these are
    placements: tuple[Any, ...] = ()  # of the rows on it

    def local(
        self,
        values: Tensor,  # [*shape, ...], or a DTensor of that shape
    ) -> Tensor:  # [*sizes, ...]
        """The block of values that are aligned with all rows.

        Raises:
            ValueError: values of other rows.
        """
        if values.shape[: len(self.shape)] != self.shape:
            raise ValueError(
                f"ava_ext: expected values of all rows {list(self.shape)}, on every rank the same, beside logits whose "
                f"rows are spread over ranks, got shape {list(values.shape)}"
            )
        if is_dtensor(values):
            if values.device_mesh == self.mesh and tuple(values.placements) == self.placements:
                return values.to_local()
            values = values.full_tensor()
        for axis, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            values = values.narrow(axis, offset, size)
        return values

    def among_all(
        self,
        values: Tensor,  # [..., *sizes]
    ) -> Tensor:  # [..., *shape]
        """The block among all rows, zeros elsewhere."""
        padding: list[int] = []
        for whole, offset, size in zip(self.shape, self.offsets, self.sizes, strict=True):
            padding = [offset, whole - offset - size, *padding]
        return pad(values, padding)

    def spread(
        self,
        values: Tensor,  # [..., *sizes, ...]
        n_before: int = 0,
    ) -> Any:  # [..., *shape, ...]
        """A DTensor of all rows, of which values are this block; n_before: dimensions before those of the rows."""
        from torch.distributed.tensor import DTensor, Shard

        end = n_before + len(self.shape)
        shape = torch.Size((*values.shape[:n_before], *self.shape, *values.shape[end:]))
        placements = [Shard(p.dim + n_before) if p.is_shard() else p for p in self.placements]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(values, self.mesh, placements, run_check=False, shape=shape, stride=stride)


class LocalRows(NamedTuple):
    """Logits of which this process holds some rows, maybe with some columns of them."""

    logits: Tensor | LinearLogits | ShardedLogits  # [*rows.sizes, n_columns]
    rows: RowShard

    @property
    def shape(self) -> torch.Size:
        """[..., n_columns]: the shape of all."""
        return torch.Size((*self.rows.shape, self.logits.shape[-1]))

    @property
    def dtype(self) -> torch.dtype:
        """What they are computed in."""
        return self.logits.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.logits.device
