"""Terms of a batch that are none of a row or a router, and the adaptive temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ava_ext.config import UnifiedLossConfig


def diversity(
    expert_outputs: Tensor,  # [E, N, H]
    keep: Tensor,  # [N] bool
) -> Tensor:
    """Mean cosine similarity over the pairs of experts and the kept rows, [];
    0 for E < 2 and for vectors of length 0.
    """
    units = F.normalize(torch.where(keep.unsqueeze(-1), expert_outputs, 0.0), dim=-1)
    n_experts = len(units)
    pairs = [(units[i] * units[j]).sum(-1) for i in range(n_experts) for j in range(i)]
    if not pairs:
        return 0.0 * units.sum()
    return torch.stack(pairs).mean(0).sum() / keep.sum().clamp(min=1)


def info_nce(
    anchors: Tensor,  # [n, H]
    positives: Tensor,  # [n, H]
    temperature: float,
) -> Tensor:
    """Mean cross-entropy of cosine(a_i, b_j) / temperature with target j = i, []; 0 for n = 0.

    Both ways, from a to b and from b to a, averaged (Radford et al. 2021, CLIP).
    """
    similarity = F.normalize(anchors, dim=-1) @ F.normalize(positives, dim=-1).T / temperature
    partners = torch.arange(len(anchors))
    both = [F.cross_entropy(logits, partners, reduction="sum") for logits in (similarity, similarity.T)]
    return torch.stack(both).mean() / max(len(anchors), 1)


def simctg(
    hidden_states: Tensor,  # [B, T, H]
    keep: Tensor,  # [B, T] bool
    segments: Tensor,  # [B, T]
    margin: float = 0.5,
) -> Tensor:
    """Mean of max(0, margin - 1 + cosine(h_i, h_j)) over all pairs i != j of kept tokens of one segment,
    [] (Su et al. 2022).
    """
    units = F.normalize(torch.where(keep.unsqueeze(-1), hidden_states, 0.0), dim=-1)
    same = segments.unsqueeze(1) == segments.unsqueeze(2)
    pairs = same & keep.unsqueeze(1) & keep.unsqueeze(2) & ~torch.eye(keep.shape[1], dtype=torch.bool)
    hinge = torch.relu(margin - 1 + units @ units.transpose(1, 2))
    return torch.where(pairs, hinge, 0.0).sum() / pairs.sum().clamp(min=1)


def adaptive_temperature(
    config: UnifiedLossConfig,
    history: Sequence[float],  # the finite cross-entropies of the commits so far
) -> float:
    """T = clamp(T0 (1 + gain (cv - 0.075)), bounds) with cv = population std / mean of the last 100;
    T0 below 10 of them.
    """
    recent = list(history)[-100:]
    if len(recent) < 10:
        return config.initial_temperature
    mean = sum(recent) / len(recent)
    std = math.sqrt(sum((value - mean) ** 2 for value in recent) / len(recent))
    cv = std / mean if mean != 0 else 0.0
    low, high = config.temperature_bounds
    return min(max(config.initial_temperature * (1 + config.temperature_gain * (cv - 0.075)), low), high)
