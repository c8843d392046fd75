"""A forward of UnifiedLoss whose logits or hidden states are spread over ranks: what its parts are given.

Targets, masks and token ids are those of all rows, so that candidates, shifted targets and N are those of one process.
Where a rank has some of the rows, the call is to it as one micro-batch of a batch of N: its terms are shares.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ava_ext.config import UnifiedLossConfig
from ava_ext.ops.dtensor_logits import Place, PlacedLogits, linear_place, local_weight
from ava_ext.ops.dtensors import is_dtensor
from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.sharded_logits import LocalRows, RowShard, ShardedLogits
from ava_ext.reduction import Rows


def check_is_local(name: str, values: Any) -> None:
    """Raises ValueError where an argument that parts read is a DTensor."""
    for value in values if isinstance(values, (tuple, list)) else (values,):
        if is_dtensor(value):
            raise ValueError(
                f"unified_loss: expected {name} of this rank's rows as a torch.Tensor, got a DTensor in placements "
                f"{value.placements}: pass its to_local(), in the placements of the logits' rows"
            )


def check_is_whole(name: str, weight: Any) -> None:
    """Raises ValueError where a wrapper has taken a weight's values away."""
    if isinstance(weight, Tensor) and weight.numel() == 0:
        shape = list(getattr(weight, "ds_shape", [])) or "unknown"
        raise ValueError(
            f"unified_loss: expected {name} of shape [vocab_size, hidden_size], got an empty tensor (whole: {shape}): "
            "its values are on other ranks. Under DeepSpeed ZeRO 3 call forward and backward within "
            "deepspeed.zero.GatheredParameters([weight]); under FullyShardedDataParallel call the loss in the forward "
            "of the wrapped module, or use ava_ext.distributed.FusedHead"
        )


class CallPlacement:
    """Where the rows [batch_size, n_tokens] of a call are."""

    def __init__(self, place: Place, rows: RowShard | None) -> None:
        self.place = place
        self.rows = rows

    @classmethod
    def of(cls, config: UnifiedLossConfig, logits: PlacedLogits) -> CallPlacement | None:
        """Of logits [batch_size, n_tokens, n_columns]; None: this rank has all rows, and no DTensor."""
        if isinstance(logits, LinearLogits):
            if not is_dtensor(logits.hidden_states):
                return None
            place = linear_place("unified_loss", logits)
        elif is_dtensor(logits):
            place = Place.of("unified_loss", "logits", logits)
        else:
            return None
        rows = place.row_shard(logits.shape[:-1])
        if rows is not None and config.mtp_heads == "adaptive":
            raise ValueError(
                "unified_loss: expected logits of which every rank has all rows beside adaptive heads, got placements "
                f"{place.placements}: redistribute them, or pass local tensors and num_items_in_batch"
            )
        return cls(place, rows)

    @property
    def is_within_texts(self) -> bool:
        """Whether the tokens of a batch row are spread over ranks."""
        return any(p.is_shard() and p.dim == 1 for p in self.place.placements)

    def local(
        self,
        values: Tensor,  # [batch_size, n_tokens]
    ) -> Tensor:
        """Those of this rank's rows."""
        return values if self.rows is None else self.rows.local(values)

    def check_has_last_rows(self, n_rows: int) -> None:
        """Raises ValueError where a router or an expert has a row less for each text than this rank's logits.

        However n_tokens - 1 rows of a text are spread, that is so on one rank at least.
        """
        batch_size, n_tokens = self.rows.sizes if self.rows is not None else (0, 0)
        if 0 < n_rows == batch_size * (n_tokens - 1):
            raise ValueError(
                "unified_loss: expected gate_logits or expert_outputs of all the tokens whose logits this rank has, "
                f"{batch_size * n_tokens} rows, beside labels_are_shifted=False and logits in placements "
                f"{self.place.placements}, got {n_rows}: do not cut off the row behind the last label"
            )

    def share(self, rows: Rows, ignore_index: int) -> Rows:
        """Rows of all ranks, counted as this rank's share of them."""
        if self.rows is None:
            return rows
        n_counted = (self.rows.local(rows.targets) != ignore_index).sum().to(rows.n_counted)
        n_items = rows.n_counted.clamp_min(1) if rows.n_items is None else rows.n_items
        return Rows(rows.targets, n_counted, rows.weights, n_items)

    def hidden_states(
        self,
        hidden_states: Any,  # [batch_size, n_tokens, hidden_size]
    ) -> Any:
        """Those of all rows, for parts that read them; of other rows they get no gradient here."""
        if not is_dtensor(hidden_states):
            if isinstance(hidden_states, Tensor) and self.rows is not None:
                raise ValueError(
                    "unified_loss: expected hidden_states as a DTensor beside logits whose rows are spread over ranks, "
                    "got a torch.Tensor: pass DTensor.from_local(hidden_states, mesh, placements)"
                )
            return hidden_states
        from torch.distributed.tensor import Partial, Replicate

        of_gradient = [Partial() if is_row else Replicate() for is_row in self.place.is_of_rows]
        return hidden_states.full_tensor(grad_placements=of_gradient)

    def head(
        self,
        logits: PlacedLogits,  # [..., batch_size, n_tokens, n_columns]
    ) -> PlacedLogits:
        """This rank's part of a further head, of whose hidden states it has all rows."""
        if is_dtensor(logits) or isinstance(logits, (ShardedLogits, LocalRows)):
            return logits
        if isinstance(logits, LinearLogits) and is_dtensor(logits.hidden_states):
            return logits
        shape, rows = logits.shape, self.rows
        if rows is not None:
            n_further = len(shape) - 1 - len(rows.shape)  # depths, in front
            further = tuple(shape[:n_further])
            rows = RowShard(shape[:-1], (0,) * n_further + rows.offsets, further + rows.sizes)
        if isinstance(logits, LinearLogits):
            is_sharded = is_dtensor(logits.weight)
            states = logits.hidden_states if rows is None else rows.local(logits.hidden_states)
            weight, bias = (
                None if part is None else local_weight("unified_loss", part, self.place) for part in logits[1:]
            )
            local: Any = LinearLogits(states, weight, bias)  # type: ignore[arg-type]
            columns = self.place.column_shard(shape[-1]) if is_sharded else None
            if columns is not None:
                local = ShardedLogits(local, columns[0], columns[2], shape[-1])
        else:
            local = logits if rows is None else rows.local(logits)
        return local if rows is None else LocalRows(local, rows)
