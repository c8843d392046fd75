"""Balancing and z-loss of a router and their gradient on a GPU: ours, composed in PyTorch, the time of the bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import Outcome, measure
from row_loss import DTYPES, Variant
from targets import Verdict
from torch import Tensor

from ava_ext import AuxiliaryLoss
from ava_ext.ops.router_rows import router_statistics

# n_layers, n_rows, n_experts, k: like OLMoE, DeepSeek-V3, Mixtral
SIZES = ((16, 65536, 64, 8), (58, 16384, 256, 8), (32, 65536, 8, 2))
_LOAD_BALANCING_WEIGHT, _ROUTER_Z_WEIGHT = 0.01, 0.001
_BYTES_SHARE = 0.7
_COPY_BYTES = 1 << 30  # the copy that says how fast bytes go; larger than any cache


class Case:
    """Router logits of all layers, the experts that the model chose, and a buffer to copy."""

    def __init__(
        self, n_layers: int, n_rows: int, n_experts: int, k: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        logits = torch.empty(n_layers, n_rows, n_experts, dtype=dtype, device=device)
        self.gate_logits = logits.normal_(0, 2, generator=generator).requires_grad_()
        self.expert_indices = self.gate_logits.detach().topk(k, dim=-1).indices
        self.k = k
        self.copied = torch.ones((_COPY_BYTES if self.gate_logits.is_cuda else 1 << 20) // 4, device=device)

    @property
    def bytes(self) -> int:
        """What has to move: the logits are read twice, their gradient is written, the choices are read once."""
        of_logits = self.gate_logits.numel() * self.gate_logits.element_size()
        return 3 * of_logits + self.expert_indices.numel() * self.expert_indices.element_size()


def composed_loss(
    gate_logits: Tensor,  # [n_layers, n_rows, n_experts]
    expert_indices: Tensor,  # [n_layers, n_rows, k]
) -> Tensor:
    """The same as one writes it in PyTorch; counts by scatter, so that nothing is [n_rows, k, n_experts]."""
    z = gate_logits.float() if gate_logits.dtype in (torch.bfloat16, torch.float16) else gate_logits
    n_layers, _, n_experts = z.shape
    lse = z.logsumexp(-1, keepdim=True)
    probability = (z - lse).exp()
    chosen = expert_indices.flatten(1)
    counts = z.new_zeros(n_layers, n_experts).scatter_add(1, chosen, torch.ones_like(chosen, dtype=z.dtype))
    share = counts / chosen.shape[1]
    balance = n_experts * (share * probability.mean(1)).sum(-1).mean()
    return _LOAD_BALANCING_WEIGHT * balance + _ROUTER_Z_WEIGHT * lse.square().mean()


def make_variants(case: Case, with_compiled: bool) -> tuple[dict[str, Variant], dict[str, str]]:
    """Variants by name, and the absent ones with the reason."""
    logits, indices = case.gate_logits, case.expert_indices
    n_layers, n_rows, n_experts = logits.shape
    loss_fn = AuxiliaryLoss(
        case.k,
        num_moe_layers=n_layers,
        load_balancing_weight=_LOAD_BALANCING_WEIGHT,
        router_z_weight=_ROUTER_Z_WEIGHT,
    )
    destination = torch.zeros_like(case.copied)

    def with_gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def call() -> tuple[Tensor, Tensor]:
            value = loss(logits, indices)
            return value, torch.autograd.grad(value, logits)[0]

        return call

    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    upstream = [
        torch.rand(n_layers, n_experts, dtype=real, device=logits.device) / n_rows,
        torch.full((n_layers,), 1 / n_rows, dtype=real, device=logits.device),
    ]

    def operator() -> tuple[Tensor, ...]:
        statistics = router_statistics(logits, indices, None, k=case.k)
        outputs = [statistics.probability_sum, statistics.lse_squared_sum]
        return *outputs, torch.autograd.grad(outputs, logits, upstream)[0]

    variants = {
        "copy": Variant("copy_ of a large buffer", lambda: (destination, destination.copy_(case.copied))),
        "eager": Variant("composed", with_gradient(composed_loss)),
        "compiled": Variant(
            "composed, compiled",
            with_gradient(torch.compile(composed_loss, dynamic=False, fullgraph=True)),
            is_compiled=True,
        ),
        "ours": Variant("AuxiliaryLoss", with_gradient(loss_fn)),
        "ours_operator": Variant("router_statistics and its backward alone", operator),
    }
    if with_compiled:
        return variants, {}
    del variants["compiled"]
    return variants, {"compiled": "left out: --no-compile"}


def run_case(
    n_layers: int,
    n_rows: int,
    n_experts: int,
    k: int,
    dtype: str,
    device: torch.device,
    *,
    rounds: int,
    with_compiled: bool,
    on_progress: Callable[[Outcome], None] = lambda outcome: None,
) -> tuple[Outcome, dict[str, Variant], float]:
    """What was measured, the variants, and the bytes that have to move, as a fraction of those of the copy."""
    if with_compiled:
        torch.compiler.reset()
    case = Case(n_layers, n_rows, n_experts, k, DTYPES[dtype], device)
    variants, absent = make_variants(case, with_compiled)
    references = {name: "eager" for name in ("compiled", "ours")}
    outcome = measure(variants, device, rounds=rounds, references=references, on_progress=on_progress)
    outcome.absent.update(absent)
    return outcome, variants, case.bytes / (2 * case.copied.numel() * case.copied.element_size())


def share_of_bytes_time(outcome: Outcome, name: str, bytes_over_copy: float) -> float | None:
    """The time that the bytes take at the speed of the copy, over the time measured."""
    ran = outcome.times.milliseconds
    return outcome.times.ratio("copy", name) * bytes_over_copy if "copy" in ran and name in ran else None


def table(outcome: Outcome, variants: dict[str, Variant], bytes_over_copy: float) -> list[str]:
    """Lines: time, share of the time of the bytes, and over ours."""
    times = outcome.times
    lines = [f"{'forward + backward':54}{'ms':>9}{'quartiles':>19}  bytes' time  / ours"]
    for name, variant in variants.items():
        if name in outcome.absent:
            continue
        lower, upper = times.quartiles(name)
        share = None if name == "copy" else share_of_bytes_time(outcome, name, bytes_over_copy)
        of_bytes = "-" if share is None else f"{share:.0%}"
        over_ours = f"{times.ratio(name, 'ours'):.2f}" if "ours" in times.milliseconds else "-"
        quartiles = f"{lower:.3f} .. {upper:.3f}"
        lines.append(f"{variant.label:54}{times.median(name):9.3f}{quartiles:>19}{of_bytes:>13}{over_ours:>8}")
    return lines


def verdicts(outcome: Outcome, size: dict[str, Any], bytes_over_copy: float) -> list[Verdict]:
    """Targets of one case, of the variants that ran."""
    at = f"{size['dtype']} {size['n_layers']} x [{size['n_rows']}, {size['n_experts']}]"
    shares = {name: share_of_bytes_time(outcome, name, bytes_over_copy) for name in ("ours", "ours_operator")}
    return [
        Verdict(f"{at} {name}: bytes' time over time", share, ">=", _BYTES_SHARE)
        for name, share in shares.items()
        if share is not None
    ]
