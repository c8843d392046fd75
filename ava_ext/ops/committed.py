"""Committed state: what a forward may read, also when it is computed again inside a backward.

Activation checkpointing runs a forward twice: once, and once more inside the backward that follows. The state may have
moved in between. The second run must read what the first one read, and must not be counted again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ava_ext.ops.arguments import check_devices

# private in torch, but what its own checkpointing asks; without it nothing is taken for a recomputation
_graph_task_id = getattr(torch._C, "_current_graph_task_id", lambda: -1)
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)


def is_checkpointed() -> bool:
    """Whether this forward may be computed again: then checkpointing hooks into what autograd saves."""
    return _saved_tensors_hooks(False) is not None


def _is_recomputation(like: Tensor) -> Tensor:
    return torch.full((), _graph_task_id() != -1, dtype=torch.bool, device=like.device)


def _committed(value: Tensor, previous: Tensor) -> Tensor:
    return (value if _graph_task_id() == -1 else previous).clone()


# For torch.compile, which cannot ask while it traces whether the graph will run inside a backward. It saves what these
# return for the backward: it never computes an operator again that it does not know, and so never reads a buffer after
# the same call has written over it.
_LIBRARY = torch.library.Library("ava_ext", "FRAGMENT")
_LIBRARY.define("is_recomputation(Tensor like) -> Tensor")
_LIBRARY.define("committed(Tensor value, Tensor previous) -> Tensor")
_LIBRARY.impl("is_recomputation", _is_recomputation, "CompositeExplicitAutograd")
_LIBRARY.impl("committed", _committed, "CompositeExplicitAutograd")
torch.library.register_fake("ava_ext::is_recomputation", lambda like: like.new_empty((), dtype=torch.bool))


@torch.library.register_fake("ava_ext::committed")
def _(value, previous):
    check_devices("committed", value, previous=previous)
    return torch.empty_like(value)


def is_first_run(
    like: Tensor,
) -> bool | Tensor:  # [] bool
    """Whether this forward is not a recomputation inside a backward; while a graph is traced, a tensor that tells."""
    if torch.compiler.is_compiling():
        return ~torch.ops.ava_ext.is_recomputation(like)
    return _graph_task_id() == -1


def committed(
    value: Tensor,  # [...]
    previous: Tensor,  # [...]
) -> Tensor:  # [...]
    """value, or in a recomputation previous. Copy it where a backward needs it: step() writes over it."""
    if torch.compiler.is_compiling():
        return torch.ops.ava_ext.committed(value, previous)
    # reentrant checkpointing runs first without grad: no such call moves the state
    return value if _graph_task_id() == -1 or not is_checkpointed() else previous


class CallMemory(WeakTensorKeyDictionary):
    """What calls under activation checkpointing have read, by a tensor that each was given.

    It lasts as long as that tensor, which checkpointing keeps for the second run; of a tensor that the checkpointed
    function itself makes, the second run is another. A copied or pickled module has none.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> CallMemory:
        return CallMemory()

    def __reduce__(self) -> tuple[Any, ...]:
        return CallMemory, ()
