"""Learned weights for a sum of losses."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from ava_ext.ops.arguments import check_is_tensor


class AdaptiveLossScaling(nn.Module):
    """Uncertainty weighting: sum over losses of exp(-s_i) L_i + s_i / 2, with a learned s_i (log variance) for each.

    For a fixed L_i, the best s_i is log(2 L_i), where exp(-s_i) L_i = 1/2. So losses of any scale end up with the same
    pull. The s_i / 2 keeps the weights from going to 0. (Weights normalised by a softmax lack such a term, and collapse
    onto the smallest loss.) The losses must be positive. Give s_i to the optimizer, without weight decay.

    Args:
        names: those of the losses.
        initial_log_variance: s_i at the start; 0: every weight is 1.

    Attributes:
        log_variance: ParameterDict, a scalar s_i for each name.

    Example:
        >>> scaling = AdaptiveLossScaling(["main", "auxiliary"])
        >>> scaling({"main": torch.tensor(2.0), "auxiliary": torch.tensor(0.5)})
        tensor(2.5000, grad_fn=<SumBackward0>)

    Source: Kendall, Gal and Cipolla 2018, "Multi-task learning using uncertainty to weigh losses", equation 10.
    """

    def __init__(self, names: Sequence[str], initial_log_variance: float = 0.0) -> None:
        super().__init__()
        several = () if isinstance(names, str) or not isinstance(names, Collection) else names
        taken = {"total_loss", *(f"weight_{name}" for name in several)}  # by other entries of the dict
        if not several or len(set(several)) != len(several) or taken & set(several):
            raise ValueError(
                "adaptive_loss_scaling: expected names to be a list of different names, none of them 'total_loss' or "
                f"weight_<another name>, got {names!r}"
            )
        self.initial_log_variance = float(initial_log_variance)
        if not math.isfinite(self.initial_log_variance):
            raise ValueError(
                f"adaptive_loss_scaling: expected initial_log_variance to be finite, got {initial_log_variance}"
            )
        self.log_variance = nn.ParameterDict({name: nn.Parameter(torch.empty(())) for name in names})
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets every s_i to its initial value."""
        for log_variance in self.log_variance.values():
            log_variance.fill_(self.initial_log_variance)

    def forward(
        self,
        losses: Mapping[str, Tensor],  # scalars
        return_detailed: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The weighted sum.

        Args:
            losses: a scalar for every name.
            return_detailed: return a dict: total_loss and, detached, the part of each name and weight_<name> = exp(-s).

        Returns:
            Scalar, or the dict.

        Raises:
            ValueError: a name is missing or unknown, or a loss is not a scalar.
            TypeError: a loss is not a tensor.
        """
        if set(losses) != set(self.log_variance.keys()):
            raise ValueError(
                f"adaptive_loss_scaling: expected losses {sorted(self.log_variance.keys())}, got {sorted(losses)}"
            )
        parts: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        for name, log_variance in self.log_variance.items():
            check_is_tensor("adaptive_loss_scaling", name, losses[name])
            if losses[name].dim() != 0:
                raise ValueError(
                    f"adaptive_loss_scaling: expected a scalar for {name!r}, got shape {list(losses[name].shape)}"
                )
            weight = torch.exp(-log_variance)
            parts[name] = weight * losses[name] + 0.5 * log_variance
            weights[f"weight_{name}"] = weight.detach()
        total = torch.stack(tuple(parts.values())).sum()
        if not return_detailed:
            return total
        return {"total_loss": total} | {name: part.detach() for name, part in parts.items()} | weights
