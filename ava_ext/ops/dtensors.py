"""What is to be known of torch.distributed.tensor.DTensor, which is not imported here: a DTensor only comes from a
program that has imported it."""

from __future__ import annotations

import sys
from typing import Any, TypeGuard

from torch import Tensor, nn

DTENSOR = "torch.distributed.tensor"  # in sys.modules, once there may be a DTensor


def is_dtensor(value: Any) -> TypeGuard[Any]:
    """Whether value is a torch.distributed.tensor.DTensor."""
    if type(value) is Tensor or type(value) is nn.Parameter or not isinstance(value, Tensor):
        return False
    module = sys.modules.get(DTENSOR)
    return module is not None and isinstance(value, module.DTensor)


def whole(
    owner: str,
    name: str,
    values: Any,  # aligned with the rows
    beside_dtensor: bool,
    beside: str = "logits",
) -> Any:
    """Targets, a mask or ids of all rows, where they may be a DTensor. owner begins the message.

    Raises:
        ValueError: a shard of them beside something (logits, tokens) that is not a DTensor.
    """
    if not is_dtensor(values):
        return values
    if not beside_dtensor and not all(p.is_replicate() for p in values.placements):
        raise ValueError(
            f"{owner}: expected {name} as a torch.Tensor beside {beside} that are one, got a DTensor in placements "
            f"{values.placements}: pass {name}.to_local(), or {beside} as a DTensor"
        )
    return values.full_tensor()


def summed(
    values: Tensor,  # [...]: sums over this rank's rows
    mesh: Any,
    is_of_rows: tuple[bool, ...],  # which dimensions of the mesh the rows are spread over
) -> Any:
    """A DTensor of the sums over all rows: in Partial, until it is read."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial() if is_row else Replicate() for is_row in is_of_rows]
    return DTensor.from_local(values, mesh, placements, run_check=False)
