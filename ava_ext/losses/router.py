"""The router's statistics, measured once for all parts that read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ava_ext.call import Call
from ava_ext.ops.router_layers import layered_gate_logits, layers_shape, stack_expert_indices
from ava_ext.ops.router_rows import RouterStatistics, router_statistics


def measure_router(
    gate_logits: Tensor | Sequence[Tensor | None],  # [n_rows, n_experts] per layer
    expert_indices: Tensor | Sequence[Tensor | None] | None,  # [n_rows, k] per layer
    row_mask: Tensor | None,  # n_rows elements, bool
    *,
    k: int | None,
    n_experts: int | None,
    n_layers: int | None,
    score: str,
    expert_bias: Tensor | None = None,  # [n_layers, n_experts]
    owner: str,
) -> RouterStatistics:
    """router_statistics, for logits and choices in any of their usual forms.

    Args:
        gate_logits, expert_indices: see layered_gate_logits and stack_expert_indices.
        row_mask: True where a row counts; None: all.
        k: experts per row; None: the last size of expert_indices. Required without them.
        n_experts, n_layers: the numbers to expect; None: any.
        score: "softmax" or "sigmoid".
        expert_bias: added to the scores for a top-k of gate_logits.
        owner: the first word of error messages.

    Raises:
        ValueError: shapes do not fit, or both k and expert_indices are missing.
        IndexError: an expert index is out of range.
    """
    layers = layered_gate_logits(gate_logits, n_layers)
    layer_count, n_rows, columns = layers_shape(layers)
    if n_experts not in (None, columns):
        raise ValueError(f"{owner}: expected gate_logits with num_experts = {n_experts} columns, got {columns}")
    if expert_indices is not None:
        expert_indices = stack_expert_indices(expert_indices, layer_count, n_rows, k)
    elif k is None:
        raise ValueError(
            f"{owner}: expected expert_indices, or num_experts_per_token for a top-k of the gate_logits, got neither"
        )
    if row_mask is not None:
        if row_mask.numel() != n_rows:
            raise ValueError(f"{owner}: expected row_mask of {n_rows} rows, got shape {list(row_mask.shape)}")
        row_mask = row_mask.reshape(n_rows)
    return router_statistics(layers, expert_indices, row_mask, k=k, score=score, expert_bias=expert_bias)


def router_of_call(
    call: Call,
    option: str,
    expert_bias: Tensor | None = None,  # [n_layers, n_experts]
) -> RouterStatistics:
    """The statistics of the call's router, measured for the first part that asks. option is the one that needs them."""
    if "router" not in call.made:
        config = call.config
        gate_logits = call.required("gate_logits", option)
        layers = layered_gate_logits(gate_logits, config.num_moe_layers)
        call.made["router"] = measure_router(
            gate_logits,
            call.expert_indices,
            call.padding_free(layers_shape(layers)[1]),
            k=config.num_experts_per_token,
            n_experts=config.num_experts,
            n_layers=config.num_moe_layers,
            score=config.router_score,
            expert_bias=expert_bias,
            owner="unified_loss",
        )
    return call.made["router"]


def load_variation(
    counts: Tensor,  # [n_layers, n_experts]
) -> tuple[Tensor, Tensor]:
    """(population std / mean, max / mean - 1) of the experts' counts, averaged over layers; 0 at balance."""
    std, mean = torch.std_mean(counts, dim=-1, correction=0)
    return torch.where(mean > 0, std / mean, 0.0).mean(), max_violation(counts).mean()


def max_violation(
    counts: Tensor,  # [n_layers, n_experts]
) -> Tensor:  # [n_layers]
    """max / mean - 1 of the experts' counts; 0 at balance."""
    mean = counts.mean(dim=-1)
    return torch.where(mean > 0, counts.amax(dim=-1) / mean - 1, 0.0)
