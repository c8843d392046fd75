"""A user's code, for the type checker alone: `make lint` runs mypy over it."""

from torch import Tensor

from ava_ext import AntiRepetitionLoss, LossMeter, UnifiedLoss

loss_fn = UnifiedLoss(50, num_experts=4, use_moe_balancing=True)
smoothing: float = 2 * loss_fn.label_smoothing
bias: Tensor = loss_fn.moe_balancer.expert_bias[0]  # that the router adds
temperature: Tensor = loss_fn.temperature.value
allowed = AntiRepetitionLoss(50, eos_token_id=[1, 2])


def average(batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    meter = LossMeter()
    for logits, targets in batches:
        meter.update(loss_fn(logits, targets, return_detailed=True))
    return meter.compute()
