"""The gradient of a linear layer's weight from bfloat16, added up in float32, where the processor has products for it.

How, how exact and why: csrc/cpu/weight_gradient.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ava_ext import _library  # noqa: F401  the operators exist once it is imported
from ava_ext.ops.arguments import check_devices, with_dense_rows

_ops = torch.ops.ava_ext


def has_bfloat16_products() -> bool:
    """Whether `add_weight_gradient_` works here: on AVX512-BF16, unless AVA_CPU_CAPABILITY is below avx512."""
    return _ops.has_bfloat16_products()


def add_weight_gradient_(
    grad_weight: Tensor,  # [n_columns, hidden_size] float32, contiguous
    grad_logits: Tensor,  # [n_rows, n_columns] bfloat16
    hidden_states: Tensor,  # [n_rows, hidden_size] bfloat16
) -> None:
    """grad_weight += grad_logits.T @ hidden_states, with float32 sums, in place.

    Bitwise the same for every number of threads. Subnormal numbers count as 0.

    Args:
        grad_weight: [n_columns, hidden_size], float32, contiguous, on the CPU; no autograd passes through here.
        grad_logits: [n_rows, n_columns], bfloat16, any row stride; copied where the last stride is not 1.
        hidden_states: [n_rows, hidden_size], bfloat16, likewise.

    Raises:
        RuntimeError: on wrong shapes and types, and where `has_bfloat16_products()` is False.

    Example:
        >>> grad_weight = torch.zeros(100, 8)
        >>> add_weight_gradient_(grad_weight, torch.randn(4, 100).bfloat16(), torch.randn(4, 8).bfloat16())
        >>> grad_weight.norm()
    """
    _ops.add_weight_gradient_(grad_weight, with_dense_rows(grad_logits), with_dense_rows(hidden_states))


@torch.library.register_fake("ava_ext::add_weight_gradient_")
def _(grad_weight, grad_logits, hidden_states):
    others = {"grad_logits": grad_logits, "hidden_states": hidden_states}
    check_devices("add_weight_gradient_", grad_weight, **others)
    return None
