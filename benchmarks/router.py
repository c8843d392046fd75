"""A router's losses in one pass over its logits against the same composed in PyTorch; the diversity of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ava_ext import DiversityLoss
from ava_ext.bench.timing import Times, interleave
from ava_ext.losses.auxiliary import AuxiliaryLoss, load_balancing_loss, router_z_loss
from ava_ext.ops.router_rows import router_statistics

LOAD_BALANCING_WEIGHT, Z_WEIGHT = 1e-2, 1e-3


class Variant(NamedTuple):
    """One way to a loss; returns it and its gradient, or what a yardstick returns."""

    label: str
    call: Callable[[], Any]
    is_slow: bool = False


class RouterCase:
    """Logits of one router and the experts that it chose. The logits are no leaf's own memory: any step's output."""

    def __init__(self, n_rows: int, n_experts: int, k: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.k = k
        self.logits = torch.randn(n_rows, n_experts, generator=generator, dtype=torch.float32).to(dtype)
        self.logits.requires_grad_()
        self.expert_indices = self.logits.detach().topk(k).indices


def composed_router_loss(
    logits: Tensor,  # [n_rows, n_experts]
    expert_indices: Tensor,  # [n_rows, k]
) -> Tensor:
    """Switch load balancing and router z-loss as they are written in PyTorch."""
    n_experts, k = logits.shape[-1], expert_indices.shape[-1]
    probability = torch.softmax(logits, dim=-1)
    share = F.one_hot(expert_indices, n_experts).sum(dim=1).to(probability.dtype).mean(dim=0) / k
    load_balancing = n_experts * (share * probability.mean(dim=0)).sum()
    return LOAD_BALANCING_WEIGHT * load_balancing + Z_WEIGHT * torch.logsumexp(logits, dim=-1).square().mean()


def router_variants(case: RouterCase) -> dict[str, Variant]:
    """All variants, by the name they have in the JSON."""
    loss_fn = AuxiliaryLoss(case.k, load_balancing_weight=LOAD_BALANCING_WEIGHT, router_z_weight=Z_WEIGHT)
    compiled = torch.compile(composed_router_loss, dynamic=False, fullgraph=True)

    def both(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def call() -> tuple[Tensor, Tensor]:
            value = loss(case.logits, case.expert_indices)
            return value.detach(), torch.autograd.grad(value, case.logits)[0]

        return call

    def forward() -> Tensor:
        with torch.no_grad():
            statistics = router_statistics(case.logits, case.expert_indices.unsqueeze(0))
            return load_balancing_loss(statistics, k=case.k) + router_z_loss(statistics)

    return {
        "eager": Variant("composed", both(composed_router_loss), is_slow=True),
        "compiled": Variant("composed, compiled", both(compiled)),
        "ours": Variant("AuxiliaryLoss", both(loss_fn)),
        "ours_forward": Variant("AuxiliaryLoss, forward alone", forward),
        "read": Variant("sum of the logits: reading them once", lambda: case.logits.detach().sum()),
    }


class ExpertsCase:
    """Outputs of all experts for the same tokens."""

    def __init__(self, n_experts: int, n_rows: int, hidden_size: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        outputs = torch.randn(n_experts, n_rows, hidden_size, generator=generator, dtype=torch.float32)
        self.outputs = outputs.to(dtype).requires_grad_()


def pairwise_diversity(
    outputs: Sequence[Tensor] | Tensor,  # n_experts of [n_rows, hidden_size]
) -> Tensor:
    """Mean cosine similarity of every pair of experts, pair by pair."""
    n_experts = len(outputs)
    pairs = [(first, second) for first in range(n_experts) for second in range(first)]
    return sum(
        (F.cosine_similarity(outputs[first], outputs[second], dim=-1).mean() for first, second in pairs),
        torch.zeros((), dtype=outputs[0].dtype),
    ) / len(pairs)


def diversity_variants(case: ExpertsCase) -> dict[str, Variant]:
    """All variants, by the name they have in the JSON."""

    def both(loss: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def call() -> tuple[Tensor, Tensor]:
            value = loss(case.outputs)
            return value.detach(), torch.autograd.grad(value, case.outputs)[0]

        return call

    return {
        "pairwise": Variant("pair by pair", both(pairwise_diversity), is_slow=True),
        "ours": Variant("DiversityLoss", both(DiversityLoss())),
    }


def _measure(variants: dict[str, Variant], rounds: int, slow_every: int) -> Times:
    return interleave(
        {name: variant.call for name, variant in variants.items()},
        rounds=rounds,
        every={name: slow_every for name, variant in variants.items() if variant.is_slow},
    )


def measure_router(
    n_rows: int, n_experts: int, k: int, *, rounds: int, slow_every: int
) -> tuple[Times, dict[str, Variant]]:
    """Times of every variant on one router in float32; the eager composition runs in every slow_every-th round only."""
    torch.compiler.reset()  # sizes of earlier cases would count against the limit of recompilations
    variants = router_variants(RouterCase(n_rows, n_experts, k))
    return _measure(variants, rounds, slow_every), variants


def measure_diversity(
    n_experts: int, n_rows: int, hidden_size: int, *, rounds: int, slow_every: int
) -> tuple[Times, dict[str, Variant]]:
    """Times of both variants on outputs [n_experts, n_rows, hidden_size] in float32."""
    variants = diversity_variants(ExpertsCase(n_experts, n_rows, hidden_size))
    return _measure(variants, rounds, slow_every), variants
