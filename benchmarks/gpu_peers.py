"""Other libraries' losses, where they are installed: liger-kernel, quack-kernels, cut-cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from row_loss import Variant
from torch import Tensor

PACKAGES = ("liger-kernel", "quack-kernels", "cut-cross-entropy")
Found = tuple[dict[str, Variant], dict[str, str]]  # variants; names of the absent ones and why


def versions() -> dict[str, str]:
    """Version of each package, or that it is not installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _take(module: str, function: str) -> Callable[..., Any] | str:
    """The function, or why there is none."""
    try:
        return getattr(import_module(module), function)
    except Exception as error:  # a package that is there but does not fit this torch fails in many ways
        return "not installed" if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: {error}"[:200]


def _variants(
    module: str, function: str, labels: Mapping[str, tuple[str, dict[str, Any]]], bind: Callable[..., Callable]
) -> Found:
    """Variants of one function, by name: label and options."""
    taken = _take(module, function)
    if isinstance(taken, str):
        return {}, {name: taken for name in labels}
    return {name: Variant(label, bind(taken, options)) for name, (label, options) in labels.items()}, {}


def _together(*found: Found) -> Found:
    variants: dict[str, Variant] = {}
    absent: dict[str, str] = {}
    for some, missing in found:
        variants |= some
        absent |= missing
    return variants, absent


def row_losses(
    targets: Tensor,  # [n_rows]
    with_gradient: Callable[[Callable[[Tensor], Tensor]], Callable[[], Any]],
) -> Found:
    """Cross-entropy of logits [n_rows, vocab_size]; with_gradient makes a measured call of a loss of the logits."""

    def bind(function: Callable[..., Any], options: dict[str, Any]) -> Callable[[], Any]:
        return with_gradient(lambda logits: function(logits, targets, **options))

    return _together(
        _variants(
            "liger_kernel.transformers.functional",
            "liger_cross_entropy",
            {"liger": ("liger-kernel (gradient over the logits)", {})},
            bind,
        ),
        _variants(
            "quack.cross_entropy",
            "cross_entropy",
            {
                "quack": ("quack-kernels", {}),
                "quack_inplace": ("quack-kernels, inplace_backward", {"inplace_backward": True}),
            },
            bind,
        ),
    )


def linear_losses(
    targets: Tensor,  # [n_rows]
    with_gradients: Callable[[Callable[[Tensor, Tensor], Tensor]], Callable[[], Any]],
) -> Found:
    """Linear layer and cross-entropy in one, of hidden states [n_rows, hidden_size] and weight [vocab_size, ...]."""
    import torch

    def bind(function: Callable[..., Any], options: dict[str, Any]) -> Callable[[], Any]:
        return with_gradients(lambda states, weight: function(states, weight, targets, **options))

    return _together(
        _variants(
            "liger_kernel.transformers.functional",
            "liger_fused_linear_cross_entropy",
            {
                "liger": ("liger-kernel", {}),
                "liger_float32": ("liger-kernel, accum_dtype float32", {"accum_dtype": torch.float32}),
            },
            bind,
        ),
        _variants(
            "cut_cross_entropy",
            "linear_cross_entropy",
            {
                "cut_cce": ("cut-cross-entropy, cce", {"impl": "cce"}),
                "cut_exact": ("cut-cross-entropy, cce without filtering", {"impl": "cce", "filter_eps": None}),
            },
            bind,
        ),
    )
