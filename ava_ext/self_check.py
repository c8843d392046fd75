"""A few losses and gradients against `ava_ext.reference` in float64: does this build compute what it says?

The test suite checks far more. This is for a machine, a driver or a wheel that the tests have never seen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ava_ext.reference.unified_loss import unified_loss as reference_loss
from ava_ext.unified_loss import UnifiedLoss

VOCAB_SIZE, HIDDEN_SIZE, BATCH_SIZE, N_TOKENS = 1031, 16, 2, 12
N_EXPERTS, EXPERTS_PER_TOKEN = 8, 2
# keeps the small gradients of float16 above its subnormal numbers, as a GradScaler does
UPSTREAM = 256.0
EVERY_TERM: dict[str, Any] = {
    "label_smoothing": 0.1,
    "use_focal_loss": True,
    "z_loss_weight": 1e-3,
    "confidence_penalty_weight": 0.1,
    "logit_softcap": 30.0,
    "use_ngram_penalty": True,
    "ngram_size": 2,
    "use_immediate_repetition_penalty": True,
    "eos_token_id": 1,
}
ROUTER: dict[str, Any] = {"num_experts": N_EXPERTS, "use_auxiliary_loss": True, "load_balancing_weight": 1.0}
# (relative error of the loss, of the gradient) that is allowed. A gradient is rounded once to its dtype, which costs
# at most half a unit in the last place: 2^-9 in bfloat16, 2^-12 in float16
BOUNDS = {torch.float32: (2e-6, 2e-5), torch.bfloat16: (2e-6, 2.0**-8), torch.float16: (2e-6, 2.0**-11)}


class Check(NamedTuple):
    """One loss and its gradients, and how far they are from float64."""

    name: str
    device: str
    dtype: str
    value_error: float  # |loss - reference| / |reference|
    gradient_error: float  # the greatest relative L2 error of: a gradient's entries at targets, its other entries
    value_bound: float
    gradient_bound: float

    @property
    def passes(self) -> bool:
        """nan passes no comparison."""
        return self.value_error <= self.value_bound and self.gradient_error <= self.gradient_bound


def _inputs(name: str, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(leaves that get a gradient, other arguments of UnifiedLoss)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 2.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype).to(device).requires_grad_()

    words = torch.randint(2, VOCAB_SIZE, (6,), generator=generator)  # few: the text repeats itself
    targets = words[torch.randint(6, (BATCH_SIZE, N_TOKENS), generator=generator)]
    targets[0, :3] = -100
    others = {"targets": targets.to(device)}
    if name == "hidden states":
        states = normal(BATCH_SIZE, N_TOKENS, HIDDEN_SIZE)
        return {"hidden_states": states, "lm_head_weight": normal(VOCAB_SIZE, HIDDEN_SIZE, scale=0.3)}, others
    leaves = {"logits": normal(BATCH_SIZE, N_TOKENS, VOCAB_SIZE)}
    if name == "router":
        leaves["gate_logits"] = normal(BATCH_SIZE * N_TOKENS, N_EXPERTS)
        others["expert_indices"] = leaves["gate_logits"].detach().topk(EXPERTS_PER_TOKEN).indices
    return leaves, others


def _check(name: str, dtype: torch.dtype, device: str, **options: Any) -> Check:
    loss_fn = UnifiedLoss(VOCAB_SIZE, primary_loss_type="standard", reduction="sum", **options).to(device)
    leaves, others = _inputs(name, dtype, device)
    loss = loss_fn(**leaves, **others)
    gradients = torch.autograd.grad(loss * UPSTREAM, list(leaves.values()))

    exact = {key: leaf.detach().double().cpu().requires_grad_() for key, leaf in leaves.items()}
    others = {key: value.cpu() for key, value in others.items()}
    given = dict(exact)
    if "lm_head_weight" in given:
        given["logits"] = given.pop("hidden_states") @ given.pop("lm_head_weight").T
    expected = reference_loss(loss_fn.config, **given, **others)["total_loss"]  # type: ignore[arg-type]
    expected_gradients = torch.autograd.grad(expected * UPSTREAM, list(exact.values()))

    errors = []
    for key, gradient, wanted in zip(exact, gradients, expected_gradients, strict=True):
        at_target = torch.zeros_like(wanted, dtype=torch.bool)
        if key == "logits":
            at_target.scatter_(-1, others["targets"].clamp_min(0).unsqueeze(-1), True)
        for part in (at_target, ~at_target):
            if part.any():
                difference = gradient.double().cpu()[part] - wanted[part]
                errors.append(float(difference.norm() / wanted[part].norm()))
    value_error = float((loss.detach().double().cpu() - expected.detach()).abs() / expected.detach().abs())
    gradient_error = max(errors, key=lambda error: float("inf") if error != error else error)
    return Check(name, device, str(dtype).removeprefix("torch."), value_error, gradient_error, *BOUNDS[dtype])


def self_check(device: str = "cpu") -> list[Check]:
    """Losses and gradients on a device.

    Args:
        device: "cpu", "cuda" or what else torch has.

    Returns:
        One Check for each case: `passes` says whether it is within its bounds.
    """
    checks = [_check("cross-entropy", dtype, device) for dtype in BOUNDS]
    checks.append(_check("every row term", torch.float32, device, **EVERY_TERM))
    checks.append(_check("hidden states", torch.float32, device, **EVERY_TERM))
    checks.append(_check("router", torch.float32, device, **ROUTER))
    return checks
