"""Second derivatives do not exist: a gradient that is differentiated again raises instead of passing for a constant."""

from __future__ import annotations

import torch
from torch import Tensor

# private in torch, but what its own donated buffers rely on; without it we keep the graph's memory intact, at the
# price of a copy
graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def without_second_derivative(
    gradient: Tensor,  # [..., n_columns]
    origin: Tensor | None,
) -> Tensor:  # [..., n_columns]
    """Inside backward(create_graph=True): a gradient that raises when it is differentiated.

    origin is a tensor that autograd reaches the logits by: autograd.grad(penalty, parameters) goes only where a
    parameter can be, and would pass by a gradient that leads nowhere.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradient  # compiled: row_gradient's own autograd raises
    raise_later = torch._C._functions.DelayedError(b"ava_ext: double backward is not supported", 2)
    return raise_later(gradient.detach(), gradient.new_empty(0).requires_grad_() if origin is None else origin)[0]


def raise_double_backward(ctx, *grads):
    """The backward of an operator that computes a gradient; without it, torch would take that for a constant."""
    raise RuntimeError("ava_ext: double backward is not supported")
