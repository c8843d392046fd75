"""Committed state: what a forward may read, also when it is computed again inside a backward.

Activation checkpointing runs a forward twice: once, and once more inside the backward that follows. With auto_step the
state has moved in between. The second run must read what the first one read, and must not be counted again.
"""

from __future__ import annotations

import torch
from torch import Tensor

# private in torch, but what its own checkpointing asks; without it nothing is taken for a recomputation
_graph_task_id = getattr(torch._C, "_current_graph_task_id", lambda: -1)


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
torch.library.register_fake("ava_ext::committed", lambda value, previous: torch.empty_like(value))


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
    copy: bool = True,
) -> Tensor:  # [...]
    """A copy of value, or in a recomputation of previous. A backward may keep it: nobody writes over it.

    copy=False, for callers that copy it themselves: outside a traced graph the tensor itself.
    """
    if torch.compiler.is_compiling():
        return torch.ops.ava_ext.committed(value, previous)
    read = value if _graph_task_id() == -1 else previous
    return read.clone() if copy else read
