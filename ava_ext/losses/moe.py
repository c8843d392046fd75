"""Balancing of a mixture of experts: a term that steers the router, and the loss-free bias of DeepSeek-V3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ava_ext.call import Call
from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.component import Addends, Part
from ava_ext.losses.learned_state import LearnedState
from ava_ext.losses.quantile_balancing import N_BINS, count_required_bias, quantile_bias
from ava_ext.losses.router import (
    ROUTER_METRICS,
    RouterOptions,
    load_variation,
    max_violation,
    measure_router,
    router_of_call,
)
from ava_ext.ops.router_layers import layered_gate_logits, layers_shape, stack_expert_indices, with_router
from ava_ext.ops.router_rows import RouterStatistics


class MoEBalance(NamedTuple):
    """What MoEBalancer returns; scalars, averaged over the layers."""

    term: Tensor  # []  gradient_balance_weight * steering term, with graph
    moe_cv: Tensor  # []  population std / mean of this call's counts; detached
    moe_max_violation: Tensor  # []  max / mean - 1 of this call's counts; detached


class MoEBalancer(LearnedState, Part):
    """Keeps the experts of a router equally busy, by a term that steers the router and by a bias on its scores.

    The term: let f be the running share of rows of each expert and p the router's probabilities. For each layer, then
    averaged over layers:

        term = gradient_balance_weight * n_experts * sum_e (f_e - 1 / n_experts) * mean_i p_ie

    The term is 0 at balance, and its gradient moves probability away from experts that were chosen too often. f is an
    exponential average over optimizer steps; a call reads what was committed before it. In training with grad enabled,
    a call adds its counts to those pending since the last `step()`.

    The bias: `step()`, once per optimizer step, commits f and moves `expert_bias` by the loss-free rule b_e += u
    sign(mean(c) - c_e) with c the counts (Wang et al. 2024, "Auxiliary-loss-free load balancing"; DeepSeek-V3). Your
    router adds `expert_bias` to its scores before its top-k, but not to the weights of the chosen experts. Where its
    layer is checkpointed, call `step()` after backward, which runs the router again: auto_step=False. You pass the
    experts that it chose as expert_indices. With a sigmoid router you may leave them out; the choice is then the k
    largest of score + expert_bias. If your model chooses among groups of experts first, you must pass them.

    With expert_bias_update="quantile", `step()` sets the bias to the one with which each expert would have been chosen
    by its share of the rows since the last step; see losses.quantile_balancing. This follows the scores, not the
    choices, so it is for a router that chooses the k largest of score + expert_bias, without groups. It costs a top-k
    of the scores in each call, and [n_layers, n_experts, 1000] counts.

    Buffers: expert_load (f), expert_counts (since reset_statistics), expert_bias, all [n_layers, n_experts] float32.

    Args:
        num_experts: experts of each layer.
        num_experts_per_token: k of the router's top-k; None: the last size of expert_indices.
        num_moe_layers: layers with a router.
        gradient_balance_weight: weight of the steering term.
        moe_momentum: momentum of the running load.
        expert_bias_rate: u; 0 does without the bias.
        expert_bias_update: "sign", the rule above, or "quantile", which does not read u; sigmoid routers only.
        expert_bias_centered: step() takes the mean of each layer off expert_bias, so that the bias does not drift where
            experts above and below the mean are not as many. No choice changes.
        router_score: "softmax" or "sigmoid" (normalised).

    Example:
        >>> balancer = MoEBalancer(num_experts=4, num_experts_per_token=1, router_score="sigmoid")
        >>> balancer(torch.zeros(6, 4)).term.shape
        torch.Size([])
    """

    name = "moe_balancer"
    keys = ("moe_balancing_term",)
    METRICS = ROUTER_METRICS
    statistics_name = "moe_balancing"
    PENDING = ("pending_counts", "pending_scores", "pending_tokens", "pending_required_bias")
    READ = ("expert_load", "expert_bias")

    expert_load: Tensor
    expert_counts: Tensor
    expert_bias: Tensor
    score_sum: Tensor
    total_tokens: Tensor

    def __init__(
        self,
        num_experts: int,
        num_experts_per_token: int | None = UnifiedLossConfig.num_experts_per_token,
        *,
        num_moe_layers: int = UnifiedLossConfig.num_moe_layers,
        gradient_balance_weight: float = UnifiedLossConfig.gradient_balance_weight,
        moe_momentum: float = UnifiedLossConfig.moe_momentum,
        expert_bias_rate: float = UnifiedLossConfig.expert_bias_rate,
        expert_bias_update: str = UnifiedLossConfig.expert_bias_update,
        expert_bias_centered: bool = UnifiedLossConfig.expert_bias_centered,
        router_score: str = UnifiedLossConfig.router_score,
    ) -> None:
        super().__init__()
        UnifiedLossConfig.checked(
            "moe_balancer",
            num_experts=num_experts,
            num_experts_per_token=num_experts_per_token,
            num_moe_layers=num_moe_layers,
            gradient_balance_weight=gradient_balance_weight,
            moe_momentum=moe_momentum,
            expert_bias_rate=expert_bias_rate,
            expert_bias_update=expert_bias_update,
            expert_bias_centered=expert_bias_centered,
            router_score=router_score,
        )
        if expert_bias_update == "quantile" and router_score != "sigmoid":
            raise ValueError(
                f"moe_balancer: expert_bias_update='quantile' needs router_score='sigmoid', got {router_score!r}"
            )
        self.n_experts = num_experts
        self.n_layers = num_moe_layers
        self.k = num_experts_per_token
        self.weight = gradient_balance_weight
        self.momentum = moe_momentum
        self.bias_rate = expert_bias_rate
        self.centers_bias = expert_bias_centered
        self.has_quantiles = expert_bias_update == "quantile" and expert_bias_rate > 0
        self.score = router_score
        shape = (num_moe_layers, num_experts)
        for buffer in ("expert_load", "expert_counts", "expert_bias", "score_sum"):
            self.register_buffer(buffer, torch.empty(shape, dtype=torch.float32))
        self.register_buffer("total_tokens", torch.empty((), dtype=torch.int64))
        # what a half-finished step has learned is not in a checkpoint; neither are its gradients
        self.pending_counts = torch.empty(shape, dtype=torch.float32)
        self.pending_scores = torch.empty(shape, dtype=torch.float32)
        self.pending_tokens = torch.empty((), dtype=torch.int64)
        n_bins = N_BINS if self.has_quantiles else 0
        self.pending_required_bias = torch.empty((*shape, n_bins), dtype=torch.int32)
        self.previous_expert_load = torch.empty(shape, dtype=torch.float32)
        self.previous_expert_bias = torch.empty(shape, dtype=torch.float32)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: UnifiedLossConfig) -> MoEBalancer | None:
        """The balancer where use_moe_balancing is set."""
        if not config.use_moe_balancing or config.num_experts is None:
            return None
        return cls(
            config.num_experts,
            config.num_experts_per_token,
            num_moe_layers=config.num_moe_layers,
            gradient_balance_weight=config.gradient_balance_weight,
            moe_momentum=config.moe_momentum,
            expert_bias_rate=config.expert_bias_rate,
            expert_bias_update=config.expert_bias_update,
            expert_bias_centered=config.expert_bias_centered,
            router_score=config.router_score,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets all state to that of a new module, expert_bias included."""
        self.expert_bias.zero_()
        self.reset_statistics()

    def of_call(self, call: Call) -> Addends:
        """The steering term of the call's router."""
        gate_logits, expert_indices = call.required("gate_logits", "use_moe_balancing"), call.expert_indices
        router = router_of_call(call, "use_moe_balancing", self.bias_of_choice(expert_indices))
        if call.recording is not False:
            learned = self._learned_from(router.whole, gate_logits, expert_indices, router.row_mask)
            call.learned.append(lambda recording: self.record(recording, **learned))
        return Addends({"moe_balancing_term": call.rows.batch_share * self.steering_term(router.whole)}, router.metrics)

    def forward(
        self,
        gate_logits: Tensor | Sequence[Tensor | None],  # [n_rows, n_experts] per layer, see layered_gate_logits
        expert_indices: Tensor | Sequence[Tensor | None] | None = None,  # [n_rows, k] per layer
        row_mask: Tensor | None = None,  # n_rows elements, bool
    ) -> MoEBalance:
        """The steering term and the metrics of this call; see the class.

        Args:
            gate_logits: router logits in any form that layered_gate_logits takes.
            expert_indices: experts chosen by the router. With a sigmoid router they may be left out; see the class.
            row_mask: True where a row counts; None: all.

        Returns:
            MoEBalance of three scalars. If no row counts, they are zeros and no state changes.

        Raises:
            ValueError: shapes do not fit num_experts, num_moe_layers or num_experts_per_token, or expert_indices are
                missing though they are required.
            IndexError: an expert index is out of range.
        """
        layers = [gate_logits] if isinstance(gate_logits, Tensor) else with_router("gate_logits", gate_logits)
        recording = self.begin(layers[0], layers[0], "moe_balancer") if layers else False
        options = RouterOptions("moe_balancer", self.k, self.n_experts, self.n_layers, self.score)
        bias = self.bias_of_choice(expert_indices)
        statistics, _ = measure_router(options, gate_logits, expert_indices, row_mask, expert_bias=bias)
        if recording is not False:
            self.record(recording, **self._learned_from(statistics, gate_logits, expert_indices, row_mask))
        return MoEBalance(self.steering_term(statistics), *load_variation(statistics.counts))

    def bias_of_choice(
        self,
        expert_indices: Tensor | Sequence[Tensor | None] | None,  # [n_rows, k] per layer
    ) -> Tensor | None:  # [n_layers, n_experts]
        """What the module's own top-k adds to the scores: expert_bias, or None if the choices are given.

        Raises:
            ValueError: the choices are missing, and a top-k of gate_logits would not see the bias that they move.
        """
        if expert_indices is not None or self.bias_rate == 0:
            return None
        if self.score != "sigmoid":
            raise ValueError(
                "moe_balancer: expected expert_indices: expert_bias follows what the router chose, and the top-k of a "
                "softmax router's gate_logits does not see it; got None (expert_bias_rate=0 does without the bias)"
            )
        return self.read("expert_bias")

    @torch.no_grad()
    def _learned_from(
        self,
        statistics: RouterStatistics,
        gate_logits: Tensor | Sequence[Tensor | None],  # [n_rows, n_experts] per layer
        expert_indices: Tensor | Sequence[Tensor | None] | None,  # [n_rows, k] per layer
        row_mask: Tensor | None,  # n_rows elements, bool
    ) -> dict[str, Tensor]:
        """What a call adds to the pending tensors, once its arguments have been checked."""
        scores, n_rows = statistics.probability_sum.detach(), statistics.n_rows[0].to(torch.int64)
        is_sound = scores.isfinite().all()  # one nan would stay in the sums for ever
        learned = {
            "pending_counts": statistics.counts,
            "pending_scores": torch.where(is_sound, scores, 0.0),
            "pending_tokens": torch.where(is_sound, n_rows, 0),
        }
        if self.has_quantiles:
            learned["pending_required_bias"] = self._count_required_bias(gate_logits, expert_indices, row_mask)
        return learned

    def _count_required_bias(
        self,
        gate_logits: Tensor | Sequence[Tensor | None],  # [n_rows, n_experts] per layer
        expert_indices: Tensor | Sequence[Tensor | None] | None,  # [n_rows, k] per layer
        row_mask: Tensor | None,  # n_rows elements, bool
    ) -> Tensor:  # [n_layers, n_experts, N_BINS] int32
        layers = layered_gate_logits(gate_logits, self.n_layers)
        n_layers, n_rows, _ = layers_shape(layers)
        k = self.k
        if k is None and expert_indices is not None:
            k = stack_expert_indices(expert_indices, n_layers, n_rows, None).shape[-1]
        if k is None or k >= self.n_experts:
            raise ValueError(
                f"moe_balancer: expert_bias_update='quantile' expected k below num_experts = {self.n_experts}, got {k}"
            )
        mask = None if row_mask is None else row_mask.reshape(n_rows).to(torch.bool)
        return count_required_bias(layers, mask, self.read("expert_bias"), k)

    def steering_term(self, statistics: RouterStatistics) -> Tensor:  # []
        """The term, from statistics that have been measured."""
        load = self.read("expert_load")
        mean_probability = statistics.probability_sum / statistics.n_rows.clamp_min(1).unsqueeze(-1)
        steering = ((load - 1 / self.n_experts) * mean_probability).sum(dim=-1).mean()
        return self.weight * self.n_experts * steering

    @torch.no_grad()
    def step(self, process_group: Any = None, recording: bool | Tensor = True) -> None:
        """Commits the counts since the last step, and moves the running load and the bias. Once per optimizer step.

        Args:
            process_group: counts are summed over it, so that all ranks take the same step; None: this process alone.
            recording: see LearnedState.step; nothing pending moves nothing.
        """
        self.reduce_pending(process_group)
        counts = self.pending_counts
        total = counts.sum(dim=-1, keepdim=True)
        moved = self.momentum * self.expert_load + (1 - self.momentum) * counts / total
        self.expert_load.copy_(torch.where(total > 0, moved, self.expert_load))
        if self.has_quantiles:
            self.expert_bias.copy_(quantile_bias(self.pending_required_bias, self.expert_bias, counts.mean(dim=-1)))
        else:
            self.expert_bias.add_(self.bias_rate * torch.sign(counts.mean(dim=-1, keepdim=True) - counts))
        if self.centers_bias:
            self.expert_bias.sub_(self.expert_bias.mean(dim=-1, keepdim=True))
        self.expert_counts.add_(counts)
        self.score_sum.add_(self.pending_scores)
        self.total_tokens.add_(self.pending_tokens)
        self.clear_pending()

    def statistics(self) -> dict[str, Tensor]:
        """What was committed since the last reset_statistics, per layer; copies on the device.

        Returns:
            expert_counts [n_layers, n_experts], expert_scores [n_layers, n_experts] (mean router probability),
            total_tokens [] (int64), max_violation [n_layers] (max / mean - 1 of expert_counts).
        """
        return {
            "expert_counts": self.expert_counts.clone(),
            "expert_scores": self.score_sum / self.total_tokens.clamp_min(1),
            "total_tokens": self.total_tokens.clone(),
            "max_violation": max_violation(self.expert_counts),
        }

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """Clears counts, scores and the running load. expert_bias stays, because it is part of the model's routing."""
        self.expert_load.fill_(1 / self.n_experts)
        for statistic in (self.expert_counts, self.score_sum, self.total_tokens):
            statistic.zero_()
        self.settle()
