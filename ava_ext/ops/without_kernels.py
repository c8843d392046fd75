"""The operators on CUDA tensors where the library has no CUDA kernels: plain PyTorch, with one warning.

Right, but with the passes over memory and the memory itself that the kernels are there to save. The formulas are those
of csrc/*.h, in float32 (float64 for float64 logits).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ava_ext.ops import torch_repetition, torch_router_rows, torch_softmax_rows, torch_temperature

WARNING = (
    "ava_ext: this library was built without CUDA kernels, so CUDA tensors take a slow PyTorch path. Install a CUDA "
    "toolkit (nvcc on PATH, or CUDA_HOME) and build again: AVA_CUDA=1 pip install --force-reinstall --no-deps ."
)
OPERATORS: dict[str, Callable[..., Any]] = {
    "row_loss": torch_softmax_rows.row_loss,
    "row_loss_": torch_softmax_rows.row_loss_,
    "row_statistics": torch_softmax_rows.row_statistics,
    "row_gradient": torch_softmax_rows.row_gradient,
    "row_gradient_": torch_softmax_rows.row_gradient_,
    "scale_rows_": torch_softmax_rows.scale_rows_,
    "router_statistics": torch_router_rows.router_statistics,
    "router_gradient": torch_router_rows.router_gradient,
    "repetition_candidates": torch_repetition.repetition_candidates,
    "temperature_step_": torch_temperature.temperature_step_,
}


@functools.cache
def _warn_once() -> None:
    warnings.warn(WARNING, stacklevel=5)


def _with_warning(operator: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operator)
    def warned(*arguments: Any, **options: Any) -> Any:
        _warn_once()
        return operator(*arguments, **options)

    return warned


_KERNELS = torch.library.Library("ava_ext", "IMPL")


def register(dispatch_key: str) -> list[str]:
    """Gives these to the operators that have no kernel for this dispatch key, such as "CUDA"; returns their names."""
    missing = [
        name
        for name in OPERATORS
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"ava_ext::{name}", dispatch_key)
    ]
    for name in missing:
        _KERNELS.impl(name, _with_warning(OPERATORS[name]), dispatch_key)
    return missing


REGISTERED = register("CUDA")
