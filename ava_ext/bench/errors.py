"""How far a loss and its gradients are from float64 on the same inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ava_ext.bench.variants import LOGITS, Case, Variant


def exact(case: Case) -> tuple[Tensor, ...]:
    """The mean cross-entropy [] and the gradient of each of case.leaves(), float64, in closed form.

    With z the float64 logits and rest = sum over j != t of exp(z_j - z_t): loss log1p(rest), gradient of the target
    -rest / (1 + rest). Autograd in float64 would subtract p_t from 1.
    """
    with torch.no_grad():
        leaves = [leaf.detach().double() for leaf in case.leaves()]
        logits = leaves[0] if case.problem == LOGITS else leaves[0] @ leaves[1].T
        targets = case.targets.unsqueeze(-1)
        others = logits.scatter(-1, targets, -torch.inf)
        log_rest = others.logsumexp(-1, keepdim=True) - logits.gather(-1, targets)  # of each row
        loss = torch.nn.functional.softplus(log_rest).mean()
        lse = logits.logsumexp(-1, keepdim=True)
        gradient = (others - lse).exp().scatter(-1, targets, -torch.sigmoid(log_rest)) / len(logits)
        if case.problem == LOGITS:
            return loss, gradient
        return loss, gradient @ leaves[1], gradient.T @ leaves[0]


def errors(variant: Variant, case: Case, expected: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative errors: of the loss, and L2 of each gradient; from logits, of entries at targets and of all others."""
    case.refill()
    loss, *gradients = (value.detach().double() for value in variant.call(case))
    found = {"loss": float((loss - expected[0]).abs() / expected[0].abs())}
    if case.problem == LOGITS:
        at_target = torch.zeros_like(expected[1], dtype=torch.bool).scatter_(-1, case.targets.unsqueeze(-1), True)
        for name, part in (("targets", at_target), ("others", ~at_target)):
            found[name] = relative_error(gradients[0][part], expected[1][part])
        return found
    for name, gradient, wanted in zip(("states", "weight"), gradients, expected[1:], strict=True):
        found[name] = relative_error(gradient, wanted)
    return found


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, L2."""
    return float((actual - expected).norm() / expected.norm())
