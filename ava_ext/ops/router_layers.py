"""The forms in which router logits and choices of experts come, brought into the ones the operator takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def layered_gate_logits(
    gate_logits: Tensor | Sequence[Tensor | None], num_layers: int | None = None
) -> list[Tensor]:  # of [n_layers, ..., n_experts], one after another
    """Router logits in any of their usual forms, as router_statistics takes them; nothing is copied.

    Args:
        gate_logits: a list or tuple with one [n_rows, n_experts] or [batch_size, n_tokens, n_experts] per layer (what a
            Hugging Face model returns as router_logits; None, of a layer without a router, is left out), or a tensor:
            [n_rows, n_experts] or [batch_size, n_tokens, n_experts] of one layer, [n_layers, n_rows, n_experts] or
            [n_layers, batch_size, n_tokens, n_experts] of several.
        num_layers: how many layers are expected. With 1, three dimensions are [batch_size, n_tokens, n_experts]. None:
            as many as there are, and three dimensions are [n_layers, n_rows, n_experts].

    Returns:
        A list: the tensor [n_layers, ..., n_experts], or [1, ..., n_experts] of every layer.

    Raises:
        ValueError: another number of layers, layers of different shapes, a shape that is none of these.

    Example:
        >>> [layer.shape for layer in layered_gate_logits((torch.zeros(6, 8), torch.zeros(6, 8)), num_layers=2)]
        [torch.Size([1, 6, 8]), torch.Size([1, 6, 8])]
    """
    if not isinstance(gate_logits, Tensor):
        layers = with_router("gate_logits", gate_logits)
        if not layers or num_layers not in (None, len(layers)):
            expected = "at least 1 layer" if num_layers is None else f"num_moe_layers = {num_layers} layers"
            raise ValueError(f"gate_logits: expected {expected}, got {len(layers)}")
        first = layers[0]
        for number, layer in enumerate(layers):
            if layer.dim() not in (2, 3) or layer.shape != first.shape:
                shape = str(list(first.shape)) if first.dim() in (2, 3) else "[n_rows, n_experts]"
                raise ValueError(
                    f"gate_logits: expected {shape} in every layer, got {list(layer.shape)} in layer {number}"
                )
        return [layer.unsqueeze(0) for layer in layers]
    sizes = list(gate_logits.shape)
    is_one_layer = len(sizes) == 2 or (len(sizes) == 3 and num_layers == 1)
    if len(sizes) not in (2, 3, 4):
        raise ValueError(f"gate_logits: expected [n_rows, n_experts] or [n_layers, n_rows, n_experts], got {sizes}")
    n_layers = 1 if is_one_layer else sizes[0]
    if num_layers not in (None, n_layers):
        raise ValueError(f"gate_logits: expected num_moe_layers = {num_layers} layers, got shape {sizes}")
    return [gate_logits.unsqueeze(0) if is_one_layer else gate_logits]


def with_router(
    name: str,
    layers: Sequence[Tensor | None],  # of [n_rows, any]
) -> list[Tensor]:
    """The layers that have a router: mixed models give None for the others.

    Raises:
        TypeError: a layer that is neither a tensor nor None.
    """
    for number, layer in enumerate(layers):
        if not (layer is None or isinstance(layer, Tensor)):
            got = type(layer).__name__
            raise TypeError(f"{name}: expected a torch.Tensor or None in every layer, got {got} in layer {number}")
    return [layer for layer in layers if layer is not None]


def layers_shape(
    layers: Sequence[Tensor],  # of [n_layers, ..., n_experts]
) -> tuple[int, int, int]:
    """(n_layers, n_rows, n_experts) of them all."""
    first = layers[0]
    return sum(layer.shape[0] for layer in layers), math.prod(first.shape[1:-1]), first.shape[-1]


def stack_expert_indices(
    expert_indices: Tensor | Sequence[Tensor | None], n_layers: int, n_rows: int, k: int | None
) -> Tensor:  # [n_layers, n_rows, k]
    """The chosen experts in the forms of layered_gate_logits (last dimension k; it may be left out where k = 1).

    Args:
        k: experts per row; None: as many as the last dimension has.

    Raises:
        ValueError: a shape that does not fit n_layers, n_rows and k.

    Example:
        >>> stack_expert_indices([torch.zeros(6, 2, dtype=torch.long)] * 4, n_layers=4, n_rows=6, k=2).shape
        torch.Size([4, 6, 2])
    """
    if not isinstance(expert_indices, Tensor):
        layers = with_router("expert_indices", expert_indices)
        if len(layers) != n_layers:
            raise ValueError(f"expert_indices: expected {n_layers} layers, got {len(layers)}")
        return torch.cat([stack_expert_indices(layer, 1, n_rows, k) for layer in layers])
    shape = list(expert_indices.shape)
    if k is None:
        n_choices, n_all_rows = expert_indices.numel(), n_layers * n_rows
        k = 1 if n_choices == n_all_rows or not shape else shape[-1]
    ends_in_k = (len(shape) > 1 and shape[-1] == k) or k == 1
    starts_with_layers = n_layers == 1 or (len(shape) > 1 and shape[0] == n_layers)
    if expert_indices.numel() != n_layers * n_rows * k or not ends_in_k or not starts_with_layers:
        raise ValueError(f"expert_indices: expected shape [{n_layers}, {n_rows}, {k}], got {shape}")
    return expert_indices.reshape(n_layers, n_rows, k)
