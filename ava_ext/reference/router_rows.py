"""Mixture of experts: one layer, the rows of one router."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ava_ext.config import UnifiedLossConfig
from ava_ext.reference.rows import Terms
from ava_ext.reference.softmax_rows import z_loss


def router_probabilities(
    gate_logits: Tensor,  # [N, E]
    router_score: str,
) -> Tensor:
    """softmax, or sigmoid divided by its sum; [N, E]."""
    if router_score == "softmax":
        return torch.softmax(gate_logits, -1)
    scores = torch.sigmoid(gate_logits)
    return scores / scores.sum(-1, keepdim=True)


class RouterStatistics(NamedTuple):
    """Sums over the rows of one router, or of several added up."""

    counts: Tensor  # [E] choices of each expert
    probability: Tensor  # [E]
    lse_squared: Tensor  # []
    n_rows: Tensor  # []


def router_statistics(
    config: UnifiedLossConfig,
    gate_logits: Tensor,  # [N, E]
    keep: Tensor,  # [N] bool, False for padding
    expert_indices: Tensor | None = None,  # [N, k]
    expert_bias: Tensor | None = None,  # [E]
) -> RouterStatistics:
    """Sums over the kept rows.

    Without expert_indices: the top num_experts_per_token of the scores (probabilities, or sigmoid before it is
    normalised) + expert_bias, ties to the lowest index.
    """
    gate_logits = torch.where(keep.unsqueeze(-1), gate_logits, 0.0)
    probabilities = router_probabilities(gate_logits, config.router_score)
    if expert_indices is None:
        scores = probabilities if config.router_score == "softmax" else torch.sigmoid(gate_logits)
        scores = scores.detach() + (0.0 if expert_bias is None else expert_bias)
        expert_indices = torch.argsort(scores, dim=-1, descending=True, stable=True)[:, : config.num_experts_per_token]
    counts = F.one_hot(expert_indices[keep].long(), gate_logits.shape[-1]).sum((0, 1)).to(gate_logits.dtype)
    probability = torch.where(keep.unsqueeze(-1), probabilities, 0.0).sum(0)
    return RouterStatistics(counts, probability, torch.where(keep, z_loss(gate_logits), 0.0).sum(), keep.sum())


def moe_steering(
    statistics: RouterStatistics,
    expert_load: Tensor,  # [E] running load f, sums to 1
) -> Tensor:
    """E sum_e (f_e - 1/E) P_e, []: 0 at balance; pushes the mean probability P away from overloaded experts."""
    n_experts = expert_load.numel()
    mean_probability = statistics.probability / statistics.n_rows.clamp(min=1)
    return n_experts * ((expert_load.detach() - 1 / n_experts) * mean_probability).sum()


def updated_expert_load(
    expert_load: Tensor,  # [E]
    counts: Tensor,  # [E]
    momentum: float,
) -> Tensor:
    """f <- momentum f + (1 - momentum) c / sum c, [E]; unchanged without a choice."""
    if counts.sum() == 0:
        return expert_load
    return momentum * expert_load + (1 - momentum) * counts / counts.sum()


def updated_expert_bias(
    expert_bias: Tensor,  # [E]
    counts: Tensor,  # [E]
    rate: float,
) -> Tensor:
    """b <- b + rate sign(mean(c) - c), [E] (loss-free balancing, DeepSeek-V3)."""
    return expert_bias + rate * torch.sign(counts.mean() - counts)


def load_balancing(statistics: RouterStatistics, convention: str) -> Tensor:
    """E sum_e f_e P_e, []; P = mean probability. 0 without rows.

    "switch": f = c / (k N), so 1 at balance (Fedus et al. 2021). "huggingface": f = c / N, k times that.
    """
    n = statistics.n_rows.clamp(min=1)
    fractions = statistics.counts / (statistics.counts.sum().clamp(min=1) if convention == "switch" else n)
    return statistics.counts.numel() * (fractions * statistics.probability / n).sum()


def global_load_balancing(
    config: UnifiedLossConfig,
    gates: Sequence[Tensor],  # one [N, E] per layer
    keeps: Sequence[Tensor],  # one [N] bool per layer
    chosen: Sequence[Tensor | None],  # one [N, k] per layer
    counts: Tensor,  # [layers, E] of the global batch
) -> Tensor:
    """weight E sum_e (C_e / sum C) sum_i p_ie / n, n = sum C / k: the mean over layers, or with "huggingface" k times
    that of the layers added up. []
    """
    k = config.num_experts_per_token
    layers = [router_statistics(config, *layer) for layer in zip(gates, keeps, chosen, strict=True)]
    probability = torch.stack([layer.probability for layer in layers])
    if config.load_balancing_convention == "huggingface":
        probability, counts = probability.sum(0, keepdim=True), counts.sum(0, keepdim=True)
    values = [
        c.numel() * (c / c.sum() * p / (c.sum() / k)).sum()
        for p, c in zip(probability, counts, strict=True)
        if c.sum() > 0
    ]
    mean = torch.stack(values).mean() if values else 0 * probability.sum()
    return config.load_balancing_weight * mean * (k if config.load_balancing_convention == "huggingface" else 1)


def load_variation(counts: Tensor) -> tuple[Tensor, Tensor]:  # [E] -> [], []
    """Population std / mean of the counts, and max / mean - 1 (MaxVio); 0, 0 without a choice."""
    mean = counts.mean()
    if mean == 0:
        return mean, mean
    return counts.std(correction=0) / mean, counts.max() / mean - 1


def router_terms(
    config: UnifiedLossConfig,
    gates: Sequence[Tensor],  # one [N, E] per layer
    keeps: Sequence[Tensor],  # one [N] bool per layer, False for padding
    chosen: Sequence[Tensor | None],  # one [N, k] per layer
    expert_load: Tensor | None,  # [layers, E], default 1/E
    expert_bias: Tensor | None,  # [layers, E]
    texts: Tensor | None = None,  # [N] the text of each row, with load_balancing_per_sequence
) -> Terms:
    """Each term per layer, then averaged over layers; "huggingface" load balancing adds the layers' rows up first.

    load_balancing_per_sequence: the mean over every text of every layer that has a row.
    """
    n_layers, n_experts = len(gates), gates[0].shape[-1]
    load = gates[0].new_full((n_layers, n_experts), 1 / n_experts) if expert_load is None else expert_load
    bias = [None] * n_layers if expert_bias is None else expert_bias
    layers = [router_statistics(config, *layer) for layer in zip(gates, keeps, chosen, bias, strict=True)]
    addends = {}
    if config.use_moe_balancing:
        steering = [moe_steering(layer, f.to(gates[0].dtype)) for layer, f in zip(layers, load, strict=True)]
        addends["moe_balancing_term"] = config.gradient_balance_weight * torch.stack(steering).mean()
    if config.use_auxiliary_loss:
        convention, routers = config.load_balancing_convention, layers
        if convention == "huggingface":
            routers = [RouterStatistics(*(torch.stack(field).sum(0) for field in zip(*layers, strict=True)))]
        balance = torch.stack([load_balancing(router, convention) for router in routers]).mean()
        if texts is not None:
            of_texts = [
                load_balancing(router_statistics(config, gate, keep & (texts == text), indices, b), convention)
                for gate, keep, indices, b in zip(gates, keeps, chosen, bias, strict=True)
                for text in texts.unique()
                if (keep & (texts == text)).any()
            ]
            balance = torch.stack(of_texts).mean() if of_texts else 0 * balance
        router_z = torch.stack([layer.lse_squared / layer.n_rows.clamp(min=1) for layer in layers]).mean()
        addends["aux_load_balancing"] = config.load_balancing_weight * balance
        addends["aux_router_z"] = config.router_z_weight * router_z
    variation = torch.stack([torch.stack(load_variation(layer.counts)) for layer in layers]).mean(0)
    return addends, {"moe_cv": variation[0], "moe_max_violation": variation[1]}
