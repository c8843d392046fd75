"""The router's statistics, measured once for all parts that read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ava_ext.call import Call
from ava_ext.ops.arguments import check_is_tensor
from ava_ext.ops.router_layers import layered_gate_logits, layers_shape, stack_expert_indices
from ava_ext.ops.router_rows import RouterStatistics, router_statistics
from ava_ext.sequences import text_numbers


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
    texts: Tensor | None = None,  # [n_rows]
    n_texts: int = 1,
    owner: str,
) -> tuple[RouterStatistics, RouterStatistics]:  # of [n_layers], [n_layers * n_texts] groups
    """router_statistics of the layers and of the texts in them, for logits and choices in any of their usual forms.

    Args:
        gate_logits, expert_indices: see layered_gate_logits and stack_expert_indices.
        row_mask: True where a row counts; None: all.
        k: experts per row; None: the last size of expert_indices. Required without them.
        n_experts, n_layers: the numbers to expect; None: any.
        score: "softmax" or "sigmoid".
        expert_bias: added to the scores for a top-k of gate_logits.
        texts: a number below n_texts for each row; None: each layer is one text.
        owner: the first word of error messages.

    Raises:
        ValueError: shapes do not fit, or both k and expert_indices are missing.
        IndexError: an expert index is out of range.
    """
    layers = layered_gate_logits(gate_logits, n_layers)
    layer_count, n_rows, columns = layers_shape(layers)
    if n_experts is not None and n_experts != columns:
        raise ValueError(f"{owner}: expected gate_logits with num_experts = {n_experts} columns, got {columns}")
    if expert_indices is not None:
        expert_indices = stack_expert_indices(expert_indices, layer_count, n_rows, k)
    elif k is None:
        raise ValueError(
            f"{owner}: expected expert_indices, or num_experts_per_token for a top-k of the gate_logits, got neither"
        )
    if row_mask is not None:
        check_is_tensor(owner, "row_mask", row_mask)
        if row_mask.numel() != n_rows:
            raise ValueError(f"{owner}: expected row_mask of {n_rows} rows, got shape {list(row_mask.shape)}")
        row_mask = row_mask.reshape(n_rows)
    of_texts = router_statistics(
        layers,
        expert_indices,
        row_mask,
        k=k,
        score=score,
        expert_bias=expert_bias,
        segment_ids=texts,
        n_segments=n_texts,
    )
    if texts is None:
        return of_texts, of_texts
    return RouterStatistics(*(field.unflatten(0, (-1, n_texts)).sum(1) for field in of_texts)), of_texts


ROUTER_METRICS = ("moe_cv", "moe_max_violation")  # what load_variation gives


class RouterOfCall(NamedTuple):
    """The statistics of a call's router."""

    whole: RouterStatistics  # [n_layers, ...]
    texts: RouterStatistics  # [n_layers * n_texts, ...], where load_balancing_per_sequence tells texts apart
    row_mask: Tensor | None  # [n_rows] bool: the rows that are measured; None: all
    metrics: dict[str, Tensor]  # ROUTER_METRICS: how uneven its choices are


def router_of_call(
    call: Call,
    option: str,
    expert_bias: Tensor | None = None,  # [n_layers, n_experts]
) -> RouterOfCall:
    """The statistics of the call's router, measured for the first part that asks. option is the one that needs them."""
    if call.router is None:
        config = call.config
        gate_logits = call.required("gate_logits", option)
        n_rows = layers_shape(layered_gate_logits(gate_logits, config.num_moe_layers))[1]
        texts, n_texts, row_mask = None, 1, call.padding_free(n_rows)
        if config.use_auxiliary_loss and config.load_balancing_per_sequence:
            texts, n_texts = _texts_of_rows(call, n_rows)
        whole, of_texts = measure_router(
            gate_logits,
            call.expert_indices,
            row_mask,
            k=config.num_experts_per_token,
            n_experts=config.num_experts,
            n_layers=config.num_moe_layers,
            score=config.router_score,
            expert_bias=expert_bias,
            texts=texts,
            n_texts=n_texts,
            owner="unified_loss",
        )
        metrics = dict(zip(ROUTER_METRICS, load_variation(whole.counts), strict=True))
        call.router = RouterOfCall(whole, of_texts, row_mask, metrics)
    return call.router


def _texts_of_rows(call: Call, n_rows: int) -> tuple[Tensor, int]:  # [n_rows]
    """The text of each row of the router, and how many there are, or may be."""
    shape, segments = call.rows_shape, call.segments
    placement = call.placement
    if placement is not None and placement.rows is not None:  # the router's rows are those of this rank
        if placement.is_within_texts:
            raise ValueError(
                "unified_loss: load_balancing_per_sequence=True expected logits whose texts are whole on every rank, "
                f"got placements {placement.place.placements}: redistribute them"
            )
        shape = (placement.rows.sizes[0], placement.rows.sizes[1])
        segments = None if segments is None else placement.local(segments)
    if n_rows != shape[0] * shape[1]:
        raise ValueError(
            "unified_loss: load_balancing_per_sequence=True expected gate_logits with a row for each of the "
            f"{shape[0] * shape[1]} targets, got {n_rows}"
        )
    alone = call.segment_ids is None and call.position_ids is None
    return text_numbers(shape, segments, call.cu_seqlens if alone else None, call.targets.device)


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
