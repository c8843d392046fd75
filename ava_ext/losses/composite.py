"""A weighted sum of losses that take the same arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ava_ext.config import plain
from ava_ext.ops.arguments import check_constants


class CompositeLoss(nn.Module):
    """The weighted sum of several losses: sum_i weight_i * loss_i(*args, **kwargs).

    Args:
        losses: modules or functions by name. Each is called with the same arguments and returns a scalar, or a dict
            with "total_loss". Modules are registered, so that .to(), parameters() and state_dict() reach them.
        weights: factor of each name; 1 for names left out.

    Raises:
        ValueError: there is no loss, a loss is named "total_loss", or a weight has no loss, requires grad or is not a
            finite number.
        TypeError: losses have no names.

    Example:
        >>> losses = {"focal": FocalLoss(32000), "smooth": LabelSmoothingLoss(32000)}
        >>> loss_fn = CompositeLoss(losses, weights={"smooth": 0.5})
        >>> loss_fn(logits, targets).backward()
    """

    def __init__(self, losses: Mapping[str, Callable[..., Any]], weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        if not hasattr(losses, "items"):  # nn.ModuleDict is no Mapping
            raise TypeError(f"composite_loss: expected a dict of named losses, got {type(losses).__name__}")
        weights = weights or {}
        unknown = sorted(set(weights) - set(losses))
        if not losses or "total_loss" in losses:
            raise ValueError(f"composite_loss: expected named losses, none of them 'total_loss', got {list(losses)}")
        if unknown:
            raise ValueError(f"composite_loss: expected weights for {list(losses)}, got {unknown}")
        check_constants("composite_loss", **{f"weights[{name!r}]": weight for name, weight in weights.items()})
        self.weights = {name: _finite(name, weights.get(name, 1.0)) for name in losses}
        self.losses = nn.ModuleDict({name: loss for name, loss in losses.items() if isinstance(loss, nn.Module)})
        self.functions = {name: loss for name, loss in losses.items() if not isinstance(loss, nn.Module)}

    def forward(self, *args: Any, return_detailed: bool = False, **kwargs: Any) -> Tensor | dict[str, Tensor]:
        """The weighted sum.

        Args:
            args, kwargs: passed to every loss.
            return_detailed: return a dict of total_loss and of the weighted part of each name, detached.

        Returns:
            Scalar, or the dict.

        Raises:
            ValueError: a loss does not return a scalar.
        """
        parts: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            loss = self.functions[name] if name in self.functions else self.losses[name]
            value = loss(*args, **kwargs)
            value = value["total_loss"] if isinstance(value, dict) else value
            if not isinstance(value, Tensor) or value.dim() != 0:
                got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"composite_loss: expected a scalar from {name!r}, got {got}")
            parts[name] = weight * value
        first, *others = parts.values()
        total = first
        for part in others:
            total = total + part
        if not return_detailed:
            return total
        return {"total_loss": total} | {name: part.detach().clone() for name, part in parts.items()}


def _finite(name: str, weight: Any) -> float:
    is_number = hasattr(weight, "__float__") and not isinstance(plain(weight), bool)
    if not (is_number and math.isfinite(weight)):
        raise ValueError(f"composite_loss: expected weights[{name!r}] to be a finite number, got {weight!r}")
    return float(weight)
