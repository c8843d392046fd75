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


class RouterOptions(NamedTuple):
    """What a router is expected to be, and how it chooses."""

    owner: str  # the first word of error messages
    k: int | None  # experts per row; None: the last size of expert_indices. Required without them
    n_experts: int | None  # None: any number
    n_layers: int | None  # None: any number
    score: str  # "softmax" or "sigmoid"


def measure_router(
    options: RouterOptions,
    gate_logits: Tensor | Sequence[Tensor | None],  # [n_rows, n_experts] per layer
    expert_indices: Tensor | Sequence[Tensor | None] | None,  # [n_rows, k] per layer
    row_mask: Tensor | None,  # n_rows elements, bool
    *,
    expert_bias: Tensor | None = None,  # [n_layers, n_experts]
    texts: tuple[Tensor, int] | None = None,  # [n_rows], from text_numbers
) -> tuple[RouterStatistics, RouterStatistics]:  # of [n_layers], [n_layers * n_texts] groups
    """router_statistics of the layers and of the texts in them, for logits and choices in any of their usual forms.

    Args:
        gate_logits, expert_indices: see layered_gate_logits and stack_expert_indices.
        row_mask: True where a row counts; None: all.
        expert_bias: added to the scores for a top-k of gate_logits.
        texts: a number for each row, and a bound n_texts of these; None: each layer is one text.

    Raises:
        ValueError: shapes do not fit, or both k and expert_indices are missing.
        IndexError: an expert index is out of range.
    """
    owner, k = options.owner, options.k
    layers = layered_gate_logits(gate_logits, options.n_layers)
    n_layers, n_rows, n_experts = layers_shape(layers)
    if options.n_experts is not None and options.n_experts != n_experts:
        raise ValueError(
            f"{owner}: expected gate_logits with num_experts = {options.n_experts} columns, got {n_experts}"
        )
    if expert_indices is not None:
        expert_indices = stack_expert_indices(expert_indices, n_layers, n_rows, k)
    elif k is None:
        raise ValueError(
            f"{owner}: expected expert_indices, or num_experts_per_token for a top-k of the gate_logits, got neither"
        )
    if row_mask is not None:
        check_is_tensor(owner, "row_mask", row_mask)
        if row_mask.numel() != n_rows:
            raise ValueError(f"{owner}: expected row_mask of {n_rows} rows, got shape {list(row_mask.shape)}")
        row_mask = row_mask.reshape(n_rows)
    segment_ids, n_texts = texts or (None, 1)
    of_texts = router_statistics(
        layers,
        expert_indices,
        row_mask,
        k=k,
        score=options.score,
        expert_bias=expert_bias,
        segment_ids=segment_ids,
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
        row_mask, texts = call.padding_free(n_rows), None
        if config.use_auxiliary_loss and config.load_balancing_per_sequence:
            texts = _texts_of_rows(call, n_rows)
        options = RouterOptions(
            "unified_loss", config.num_experts_per_token, config.num_experts, config.num_moe_layers, config.router_score
        )
        given = (gate_logits, call.expert_indices, row_mask)
        whole, of_texts = measure_router(options, *given, expert_bias=expert_bias, texts=texts)
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
