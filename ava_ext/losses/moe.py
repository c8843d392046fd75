"""Balance of a mixture of experts: a term that steers the router, and DeepSeek-V3's bias that needs no loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.float32_buffers import Float32Buffers
from ava_ext.ops.copy_for_backward import copy_for_backward
from ava_ext.ops.router_layers import layered_gate_logits, layers_shape, stack_expert_indices
from ava_ext.ops.router_rows import RouterStatistics, router_statistics


class MoEBalance(NamedTuple):
    """What MoEBalancer returns; scalars, averaged over the layers."""

    term: Tensor  # []  gradient_balance_weight * steering term, with graph
    moe_cv: Tensor  # []  population std / mean of this call's counts; detached
    moe_max_violation: Tensor  # []  max / mean - 1 of this call's counts; detached


class MoEBalancer(Float32Buffers):
    """Steers a router against the running load of its experts.

    Per layer, then averaged over layers, with f the running share of rows of each expert and p the router's
    probabilities:

        term = gradient_balance_weight * n_experts * sum_e (f_e - 1 / n_experts) * mean_i p_ie

    It is 0 at balance, and its gradient moves probability away from experts that have been chosen too often. f is an
    exponential average over optimizer steps. In training with grad enabled a call adds its counts to those pending
    since the last `step()` and uses f as it will be with them; otherwise it uses the committed f and changes nothing.

    `step()`, once per optimizer step, commits f and moves `expert_bias` by the loss-free rule b_e += u sign(mean(c) -
    c_e) (Wang et al. 2024, "Auxiliary-loss-free load balancing"; DeepSeek-V3). The user's router adds `expert_bias` to
    its scores before its top-k (and not to the weights of the chosen experts) and gives the experts it chose as
    expert_indices; a router that does not add it may ignore it.

    Buffers: expert_load (f), expert_counts (since reset_statistics), expert_bias, all [n_layers, n_experts] float32;
    pending_counts (since the last step) is not part of state_dict.

    Args:
        config: num_experts, num_experts_per_token, num_moe_layers, gradient_balance_weight, moe_momentum,
            expert_bias_rate and router_score are used.

    Example:
        >>> config = UnifiedLossConfig(vocab_size=8, num_experts=4, use_moe_balancing=True)
        >>> balancer = MoEBalancer(config)
        >>> balancer(torch.zeros(6, 4)).term.shape
        torch.Size([])
    """

    expert_load: Tensor
    expert_counts: Tensor
    expert_bias: Tensor
    score_sum: Tensor
    total_tokens: Tensor
    pending_counts: Tensor

    def __init__(self, config: UnifiedLossConfig) -> None:
        super().__init__()
        if config.num_experts is None:
            raise ValueError("moe_balancer: expected num_experts to be an integer, got None")
        self.n_experts = config.num_experts
        self.n_layers = config.num_moe_layers
        self.k = config.num_experts_per_token
        self.weight = config.gradient_balance_weight
        self.momentum = config.moe_momentum
        self.bias_rate = config.expert_bias_rate
        self.score = config.router_score
        zeros = torch.zeros(self.n_layers, self.n_experts, dtype=torch.float32)
        self.register_buffer("expert_load", torch.full_like(zeros, 1 / self.n_experts))
        self.register_buffer("expert_counts", zeros.clone())
        self.register_buffer("expert_bias", zeros.clone())
        self.register_buffer("score_sum", zeros.clone())
        self.register_buffer("total_tokens", torch.zeros((), dtype=torch.int64))
        # gradients of a half-finished step are not in a checkpoint either
        self.register_buffer("pending_counts", zeros.clone(), persistent=False)

    def forward(
        self,
        gate_logits: Tensor | Sequence[Tensor],  # [n_rows, n_experts] per layer, see layered_gate_logits
        expert_indices: Tensor | Sequence[Tensor] | None = None,  # [n_rows, k] per layer
        row_mask: Tensor | None = None,  # n_rows elements, bool
    ) -> MoEBalance:
        """The steering term and the metrics of this call; see the class.

        Args:
            gate_logits: router logits in any form that layered_gate_logits takes.
            expert_indices: experts chosen by the router; None: the k largest gate_logits.
            row_mask: True where a row counts; None: all.

        Returns:
            MoEBalance of three scalars; zeros, and no state changed, where no row counts.

        Raises:
            ValueError: shapes that do not fit num_experts, num_moe_layers or num_experts_per_token.
            IndexError: an expert index out of range.
        """
        return self.balance(self.measure(gate_logits, expert_indices, row_mask))

    def measure(
        self,
        gate_logits: Tensor | Sequence[Tensor],  # [n_rows, n_experts] per layer
        expert_indices: Tensor | Sequence[Tensor] | None = None,  # [n_rows, k] per layer
        row_mask: Tensor | None = None,  # n_rows elements, bool
    ) -> RouterStatistics:
        """The statistics that `balance` needs, and that AuxiliaryLoss.terms can share."""
        layers = layered_gate_logits(gate_logits, self.n_layers)
        n_layers, n_rows, n_experts = layers_shape(layers)
        if n_experts != self.n_experts:
            raise ValueError(
                f"moe_balancer: expected gate_logits with num_experts = {self.n_experts} columns, got {n_experts}"
            )
        if expert_indices is not None:
            expert_indices = stack_expert_indices(expert_indices, n_layers, n_rows, self.k)
        if row_mask is not None:
            row_mask = row_mask.reshape(-1)
        return router_statistics(layers, expert_indices, row_mask, k=self.k, score=self.score)

    def balance(self, statistics: RouterStatistics) -> MoEBalance:
        """forward from statistics that are already there; updates the state as forward does."""
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.pending_counts.add_(statistics.counts)
                self.expert_counts.add_(statistics.counts)
                self.score_sum.add_(statistics.probability_sum)
                self.total_tokens.add_(statistics.n_rows[0].to(torch.int64))
                load = self._updated_load(self.pending_counts)
        else:
            load = self.expert_load
        load = copy_for_backward(load)  # step() writes over the buffers
        mean_probability = statistics.probability_sum / statistics.n_rows.clamp_min(1).unsqueeze(-1)
        steering = ((load - 1 / self.n_experts) * mean_probability).sum(dim=-1).mean()
        return MoEBalance(self.weight * self.n_experts * steering, *load_variation(statistics.counts))

    @torch.no_grad()
    def step(self, process_group: Any = None) -> None:
        """Commits the counts since the last step: the running load and the loss-free bias. Once per optimizer step.

        Args:
            process_group: counts are summed over it, so that every rank takes the same step; None: this process alone.
        """
        counts = self.pending_counts.clone()
        if process_group is not None:
            torch.distributed.all_reduce(counts, group=process_group)
        self.expert_load.copy_(self._updated_load(counts))
        self.expert_bias.add_(self.bias_rate * torch.sign(counts.mean(dim=-1, keepdim=True) - counts))
        self.pending_counts.zero_()

    def statistics(self) -> dict[str, Tensor]:
        """Since the last reset_statistics, per layer; copies on the device.

        Returns:
            expert_counts [n_layers, n_experts], expert_scores [n_layers, n_experts] (mean router probability),
            total_tokens [] (int64), max_violation [n_layers] (max / mean - 1 of expert_counts).
        """
        return {
            "expert_counts": self.expert_counts.clone(),
            "expert_scores": self.score_sum / self.total_tokens.clamp_min(1),
            "total_tokens": self.total_tokens.clone(),
            "max_violation": _max_violation(self.expert_counts),
        }

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """Clears counts, scores and the running load; expert_bias is part of the model's routing and stays."""
        self.expert_load.fill_(1 / self.n_experts)
        for statistic in (self.expert_counts, self.score_sum, self.total_tokens, self.pending_counts):
            statistic.zero_()

    def _updated_load(self, counts: Tensor) -> Tensor:  # counts [n_layers, n_experts]
        total = counts.sum(dim=-1, keepdim=True)
        share = counts / total.clamp_min(1)
        return torch.where(total > 0, self.momentum * self.expert_load + (1 - self.momentum) * share, self.expert_load)


def load_variation(
    counts: Tensor,  # [n_layers, n_experts]
) -> tuple[Tensor, Tensor]:
    """(population std / mean, max / mean - 1) of the experts' counts, averaged over layers; 0 at balance."""
    std, mean = torch.std_mean(counts, dim=-1, correction=0)
    return torch.where(mean > 0, std / mean, 0.0).mean(), _max_violation(counts).mean()


def _max_violation(counts: Tensor) -> Tensor:  # [n_layers, n_experts] -> [n_layers]
    mean = counts.mean(dim=-1)
    return torch.where(mean > 0, counts.amax(dim=-1) / mean - 1, 0.0)
