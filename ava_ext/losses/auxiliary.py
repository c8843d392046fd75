"""Auxiliary losses of a router: load balancing, z-loss, entropies, coefficient of variation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ava_ext.call import Call
from ava_ext.config import UnifiedLossConfig, check_weights
from ava_ext.losses.component import Addends, Part
from ava_ext.losses.router import ROUTER_METRICS, RouterOptions, measure_router, router_of_call
from ava_ext.ops.arguments import check_shape
from ava_ext.ops.router_layers import layered_gate_logits
from ava_ext.ops.router_rows import RouterStatistics
from ava_ext.process_group import GroupReference, resolve
from ava_ext.sequences import text_numbers

CONVENTIONS = ("switch", "huggingface")


def load_balancing_loss(
    statistics: RouterStatistics, *, k: int | None = None, convention: str = "switch", process_group: Any = None
) -> Tensor:
    """Switch Transformer's load balancing loss, n_experts * sum_e f_e P_e: 1 at perfect balance, larger without it.

    f_e = counts_e / (k n_rows) is the share of choices that fell on an expert (no gradient), and P_e its mean
    probability. The loss is computed per layer, then averaged over the layers that have rows.

    Args:
        statistics: from router_statistics. To balance each sequence, make every sequence of every layer a layer.
        k: experts per row, for the huggingface convention; None: computed from the counts.
        convention: "switch", or "huggingface" for the value of transformers' load_balancing_loss_func: f_e = counts_e /
            n_rows (so k at perfect balance), over the rows of all layers together (so layers can hide each other's
            imbalance).
        process_group: counts are summed over it, so f is that of the global batch (Qiu et al. 2025). The mean of the
            ranks' losses, gradients included, is then the loss of the global batch if all ranks have as many rows;
            otherwise use `global_load_balancing_loss`, whose addends are exact.

    Returns:
        Scalar; 0 where no row counts.

    Raises:
        ValueError: an unknown convention.

    Example:
        >>> statistics = router_statistics(torch.zeros(1, 8, 4), torch.arange(8).remainder(4)[None, :, None], None, k=1)
        >>> load_balancing_loss(statistics, k=1)
        tensor(1.)

    Source: Fedus et al. 2021, "Switch Transformers", equations 4-6; DeepSeek-V3, equations 17-20, for k > 1.
    """
    counts, group = statistics.counts, resolve(process_group)
    if group is not None:
        counts = counts.clone()
        torch.distributed.all_reduce(counts, group=group)
    return _load_balancing("load_balancing_loss", statistics, counts, statistics.n_rows, k, convention)


def global_load_balancing_loss(
    statistics: RouterStatistics,
    global_counts: Tensor,  # [n_layers, n_experts]
    *,
    k: int | None = None,
    convention: str = "switch",
) -> Tensor:
    """This batch's addend of the load balancing loss of a global batch, of which it is a micro-batch or a rank's share.

    n_experts * sum_e F_e sum_i p_ie / n, with F_e = C_e / sum C the share of choices in the global batch, i over the
    rows of this batch alone, and n = sum C / k the rows of the global batch. So the addends of all micro-batches and
    ranks add up to `load_balancing_loss` of the global batch, gradients included, however their rows are spread.

    Args:
        statistics: from router_statistics, of this batch.
        global_counts: C, the counts of all micro-batches and ranks, added up. No gradient.
        k, convention: as in load_balancing_loss.

    Returns:
        Scalar; 0 where no row counts.

    Raises:
        ValueError: an unknown convention, or counts of another shape.

    Example:
        >>> parts = [router_statistics(torch.randn(n, 4), k=2) for n in (3, 5)]  # two micro-batches
        >>> counts = parts[0].counts + parts[1].counts
        >>> loss = sum(global_load_balancing_loss(statistics, counts, k=2) for statistics in parts)

    Source: Qiu et al. 2025, "Demons in the detail: on implementing load balancing loss for training specialized
    mixture-of-expert models" (arXiv 2501.11873), equation 4.
    """
    owner = "global_load_balancing_loss"
    check_shape(owner, statistics.counts.shape, global_counts=global_counts)
    counts = global_counts.detach().to(statistics.counts)
    n_rows = counts.sum(dim=-1) / _choices_of_a_row(statistics, k)
    return _load_balancing(owner, statistics, counts, n_rows, k, convention)


def _load_balancing(
    owner: str,
    statistics: RouterStatistics,
    counts: Tensor,  # [n_layers, n_experts]
    n_rows: Tensor,  # [n_layers]
    k: int | None,
    convention: str,
) -> Tensor:  # []
    """n_experts * sum_e f_e P_e: f is the share of the counts, P what the statistics give of the mean over n_rows."""
    if convention not in CONVENTIONS:
        raise ValueError(f"{owner}: expected convention to be one of {CONVENTIONS}, got {convention!r}")
    probability_sum = statistics.probability_sum
    factor: int | Tensor = 1
    if convention == "huggingface":
        factor = _choices_of_a_row(statistics, k)
        counts, probability_sum, n_rows = (
            value.sum(dim=0, keepdim=True) for value in (counts, probability_sum, n_rows)
        )
    share = counts / counts.sum(dim=-1, keepdim=True).clamp_min(1)
    mean_probability = probability_sum / n_rows.clamp_min(1).unsqueeze(-1)
    loss = counts.shape[-1] * (share * mean_probability).sum(dim=-1)
    return _mean_over_layers(loss, n_rows) * factor


def _choices_of_a_row(statistics: RouterStatistics, k: int | None) -> int | Tensor:  # []
    return (statistics.counts.sum() / statistics.n_rows.sum().clamp_min(1)).clamp_min(1) if k is None else k


def router_z_loss(statistics: RouterStatistics) -> Tensor:
    """Mean of lse^2 over the rows, averaged over layers. It keeps the router's logits small.

    Returns:
        Scalar; 0 where no row counts.

    Example:
        >>> router_z_loss(router_statistics(torch.zeros(1, 3, 4), None, None, k=1))  # log(4)^2
        tensor(1.9218)

    Source: Zoph et al. 2022, "ST-MoE", equation 5.
    """
    return _mean_over_layers(statistics.lse_squared_sum / statistics.n_rows.clamp_min(1), statistics.n_rows)


def token_entropy(statistics: RouterStatistics) -> Tensor:
    """Mean over rows of the entropy of the router's probabilities, averaged over layers, in nats; [0, log n_experts].

    It is low where the router is sure of each token. To get decisions that are sure and spread over the experts,
    minimise it and maximise marginal_entropy (Mustafa et al. 2022, "LIMoE": local and global entropy).

    Returns:
        Scalar; 0 where no row counts.

    Example:
        >>> token_entropy(router_statistics(torch.zeros(1, 3, 4), None, None, k=1))  # log(4)
        tensor(1.3863)
    """
    return _mean_over_layers(statistics.entropy_sum / statistics.n_rows.clamp_min(1), statistics.n_rows)


def marginal_entropy(statistics: RouterStatistics) -> Tensor:
    """Entropy of the mean probabilities P_e, averaged over layers, in nats; log n_experts at balance.

    Returns:
        Scalar; 0 where no row counts.

    Example:
        >>> marginal_entropy(router_statistics(torch.eye(4)[None] * 1e3, None, None, k=1))  # sure rows, all experts
        tensor(1.3863)
    """
    probability = statistics.probability_sum / statistics.n_rows.clamp_min(1).unsqueeze(-1)
    log_probability = torch.where(probability > 0, probability, 1.0).log()  # 0 log 0 = 0, and no infinite gradient
    return _mean_over_layers(-(probability * log_probability).sum(dim=-1), statistics.n_rows)


def squared_variation(
    values: Tensor,  # [n_layers, n_experts]
) -> Tensor:
    """CV^2: variance / mean^2 over the experts (population variance), averaged over layers; 0 at balance.

    Args:
        values: statistics.importance_sum (differentiable: Shazeer et al. 2017, "Outrageously large neural networks",
            equation 7) or statistics.counts (a metric).

    Returns:
        Scalar; 0 where a layer's mean is 0.

    Example:
        >>> squared_variation(torch.tensor([[1.0, 3.0]]))
        tensor(0.2500)
    """
    mean = values.mean(dim=-1)
    safe_mean = torch.where(mean > 0, mean, 1.0)
    return (values.var(dim=-1, correction=0) / safe_mean.square()).mean()


def _mean_over_layers(values: Tensor, n_rows: Tensor) -> Tensor:  # [n_layers], [n_layers] -> []
    has_rows = (n_rows > 0).to(values.dtype)
    return (values * has_rows).sum() / has_rows.sum().clamp_min(1)


class AuxiliaryLoss(Part):
    """load_balancing_weight * load balancing + router_z_weight * router z-loss, from router logits alone.

    See load_balancing_loss and router_z_loss for the formulas and sources.

    Args:
        num_experts_per_token: k of the router's top-k; None: the last size of expert_indices.
        num_experts: checked against gate_logits; None: not checked.
        num_moe_layers: expected number of layers, see layered_gate_logits; None: not checked, and a tensor of three
            dimensions is [n_layers, n_rows, n_experts].
        load_balancing_weight: alpha.
        router_z_weight: weight of the mean squared lse.
        load_balancing_convention: "switch" or "huggingface" (k times larger, layers concatenated).
        router_score: "softmax" or "sigmoid" (normalised).
        per_sequence: balance every sequence separately, then average (DeepSeek-V3, equations 17-20); gate_logits must
            then be [batch_size, n_tokens, n_experts] per layer. Not with the huggingface convention.
        process_group: take the loads f of the global batch, see load_balancing_loss. Not with per_sequence.

    Example:
        >>> loss_fn = AuxiliaryLoss(num_experts_per_token=2, load_balancing_weight=0.01)
        >>> loss = loss + loss_fn(gate_logits, row_mask=attention_mask.bool())
    """

    name = "auxiliary"
    keys = ("aux_load_balancing", "aux_router_z")
    METRICS = ROUTER_METRICS

    def __init__(
        self,
        num_experts_per_token: int | None = UnifiedLossConfig.num_experts_per_token,
        *,
        num_experts: int | None = None,
        num_moe_layers: int | None = None,
        load_balancing_weight: float = UnifiedLossConfig.load_balancing_weight,
        router_z_weight: float = UnifiedLossConfig.router_z_weight,
        load_balancing_convention: str = UnifiedLossConfig.load_balancing_convention,
        router_score: str = UnifiedLossConfig.router_score,
        per_sequence: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        UnifiedLossConfig.checked(
            "auxiliary_loss",
            num_experts_per_token=num_experts_per_token,
            num_experts=num_experts,
            load_balancing_convention=load_balancing_convention,
            router_score=router_score,
            process_group=process_group,
        )
        check_weights("auxiliary_loss", load_balancing_weight=load_balancing_weight, router_z_weight=router_z_weight)
        if per_sequence and (load_balancing_convention == "huggingface" or process_group is not None):
            raise ValueError(
                "auxiliary_loss: per_sequence=True needs load_balancing_convention='switch' and process_group=None, "
                f"got {load_balancing_convention!r} and {process_group!r}"
            )
        self.k = num_experts_per_token
        self.n_experts = num_experts
        self.n_layers = num_moe_layers
        self.load_balancing_weight = load_balancing_weight
        self.router_z_weight = router_z_weight
        self.convention = load_balancing_convention
        self.score = router_score
        self.per_sequence = self.needs_sequences = per_sequence
        self.group = GroupReference(process_group)

    @classmethod
    def from_config(cls, config: UnifiedLossConfig) -> AuxiliaryLoss | None:
        """The loss where use_auxiliary_loss is set."""
        if not config.use_auxiliary_loss:
            return None
        return cls(
            config.num_experts_per_token,
            num_experts=config.num_experts,
            num_moe_layers=config.num_moe_layers,
            load_balancing_weight=config.load_balancing_weight,
            router_z_weight=config.router_z_weight,
            load_balancing_convention=config.load_balancing_convention,
            router_score=config.router_score,
            per_sequence=config.load_balancing_per_sequence,
        )

    def of_call(self, call: Call) -> Addends:
        """Both terms of the call's router, and metrics of how uneven its choices are."""
        router = router_of_call(call, "use_auxiliary_loss")
        share = call.rows.batch_share
        terms = {key: share * term for key, term in zip(self.keys, self.terms(router.whole, router.texts), strict=True)}
        if call.global_expert_counts is not None:
            if self.per_sequence:
                raise ValueError("unified_loss: expected no global_expert_counts with load_balancing_per_sequence=True")
            addend = global_load_balancing_loss(
                router.whole, call.global_expert_counts, k=self.k, convention=self.convention
            )
            terms[self.keys[0]] = self.load_balancing_weight * addend
        return Addends(terms, router.metrics)

    def forward(
        self,
        gate_logits: Tensor | Sequence[Tensor | None],  # [n_rows, n_experts] per layer, see layered_gate_logits
        expert_indices: Tensor | Sequence[Tensor | None] | None = None,  # [n_rows, k] per layer
        row_mask: Tensor | None = None,  # n_rows elements, bool
        return_detailed: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The weighted sum.

        Args:
            gate_logits: router logits in any form that layered_gate_logits takes.
            expert_indices: experts chosen by the router; None: the k largest gate_logits.
            row_mask: True where a row counts; None: all.
            return_detailed: return {"total_loss", "aux_load_balancing", "aux_router_z"}. The last two are weighted,
                detached and add up to the first.

        Returns:
            Scalar, or the dict; zeros where no row counts.

        Raises:
            ValueError: shapes that do not fit, k > n_experts.
            IndexError: an expert index out of range.
        """
        texts = None
        if self.per_sequence:
            first = layered_gate_logits(gate_logits, self.n_layers)[0]
            if first.dim() != 4:
                raise ValueError(
                    "auxiliary_loss: per_sequence=True expects gate_logits [batch_size, n_tokens, n_experts] per "
                    f"layer, got {list(first.shape[1:])}"
                )
            texts = text_numbers((first.shape[1], first.shape[2]), None, None, first.device)
        options = RouterOptions("auxiliary_loss", self.k, self.n_experts, self.n_layers, self.score)
        terms = self.terms(*measure_router(options, gate_logits, expert_indices, row_mask, texts=texts))
        total = terms[0] + terms[1]
        if not return_detailed:
            return total
        return {"total_loss": total} | {key: term.detach() for key, term in zip(self.keys, terms, strict=True)}

    def terms(self, whole: RouterStatistics, texts: RouterStatistics) -> tuple[Tensor, Tensor]:
        """(load balancing, router z-loss), both weighted, from what measure_router returns.

        The latter is a mean over rows, not over sequences: padding must not change the weight of a row.
        """
        load_balancing = load_balancing_loss(
            texts, k=self.k, convention=self.convention, process_group=self.group.process_group
        )
        return self.load_balancing_weight * load_balancing, self.router_z_weight * router_z_loss(whole)
