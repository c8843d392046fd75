"""A weighted sum of losses that share their arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


class CompositeLoss(nn.Module):
    """sum over losses of weight_i * loss_i(*args, **kwargs).

    Args:
        losses: modules or functions by name; each is called with the same arguments and returns a scalar (or a dict
            with
            "total_loss"). Modules are registered, so that .to(), parameters() and state_dict() reach them.
        weights: factor of each name; names left out have 1.

    Raises:
        ValueError: no loss, a name that is "total_loss", a weight without a loss.

    Example:
        >>> loss_fn = CompositeLoss({"focal": FocalLoss(), "smooth": LabelSmoothingLoss()}, weights={"smooth": 0.5})
        >>> loss_fn(logits, targets).backward()
    """

    def __init__(self, losses: Mapping[str, Callable[..., Any]], weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        weights = weights or {}
        unknown = sorted(set(weights) - set(losses))
        if not losses or "total_loss" in losses:
            raise ValueError(f"composite_loss: expected named losses, none of them 'total_loss', got {list(losses)}")
        if unknown:
            raise ValueError(f"composite_loss: expected weights for {list(losses)}, got {unknown}")
        self.weights = {name: float(weights.get(name, 1.0)) for name in losses}
        self.losses = nn.ModuleDict({name: loss for name, loss in losses.items() if isinstance(loss, nn.Module)})
        self.functions = {name: loss for name, loss in losses.items() if not isinstance(loss, nn.Module)}

    def forward(self, *args: Any, return_detailed: bool = False, **kwargs: Any) -> Tensor | dict[str, Tensor]:
        """The weighted sum.

        Args:
            args, kwargs: given to every loss.
            return_detailed: return total_loss, and every name's weighted part of it, detached.

        Returns:
            Scalar, or the dict.

        Raises:
            ValueError: a loss that does not return a scalar.
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
        return {"total_loss": total} | {name: part.detach() for name, part in parts.items()}
