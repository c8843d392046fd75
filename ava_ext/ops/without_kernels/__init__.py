"""The operators on devices for which the library has no kernels: plain PyTorch, with one warning.

That is every device but the CPU and, in a library built with nvcc, CUDA. Right, but with the passes over memory and the
memory itself that the kernels exist to save. The formulas are those of csrc/*.h, in float32 (float64 for float64
logits).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ava_ext.ops.without_kernels import repetition, router_rows, row_weights, softmax_rows, temperature

WARNING = "ava_ext: this library has no kernels for {} tensors, which take a slow PyTorch path."
REBUILD = (
    " Install a CUDA toolkit (nvcc on PATH, or CUDA_HOME) and build again: "
    "AVA_CUDA=1 pip install --force-reinstall --no-deps ."
)
OPERATORS: dict[str, Callable[..., Any]] = {
    "row_loss": softmax_rows.row_loss,
    "row_loss_": softmax_rows.row_loss_,
    "row_statistics": softmax_rows.row_statistics,
    "row_gradient": softmax_rows.row_gradient,
    "row_gradient_": softmax_rows.row_gradient_,
    "scale_rows_": softmax_rows.scale_rows_,
    "router_statistics": router_rows.router_statistics,
    "router_gradient": router_rows.router_gradient,
    "repetition_candidates": repetition.repetition_candidates,
    "count_rows": row_weights.count_rows,
    "temperature_step_": temperature.temperature_step_,
}
# Of every device that has none of its own. Kernels for one device (the library's for CPU and CUDA, the fakes' for meta)
# come before it.
DISPATCH_KEY = "CompositeExplicitAutograd"


_warned: list[torch.device] = []  # the device of the first call


def _warn_once(device: torch.device) -> None:
    if _warned:
        return
    _warned.append(device)
    warnings.warn(WARNING.format(device.type) + REBUILD * (device.type == "cuda"), stacklevel=5)


def _with_warning(operator: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operator)
    def warned(first: Tensor | list[Tensor], *arguments: Any, **options: Any) -> Any:
        tensors = [first] if isinstance(first, Tensor) else first
        if tensors:
            _warn_once(tensors[0].device)
        return operator(first, *arguments, **options)

    return warned


_KERNELS = torch.library.Library("ava_ext", "IMPL")
for _name, _operator in OPERATORS.items():
    _KERNELS.impl(_name, _with_warning(_operator), DISPATCH_KEY)
