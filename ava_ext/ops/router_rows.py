"""Column statistics of router logits: what every balancing loss of a mixture of experts is made of.

The formulas stand in csrc/router_rows.h. The forms in which logits and choices may come are in ops/router_layers.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ava_ext import _library  # noqa: F401  the operators exist once it is imported
from ava_ext.ops.arguments import (
    as_ids,
    as_mask,
    check_are_integers,
    check_are_tensors,
    check_devices,
    check_is_tensor,
    check_real,
    check_shape,
    has_shape,
    with_dense_rows,
)
from ava_ext.ops.derivatives import (
    is_batched,
    raise_double_backward,
    refuse_tangents,
    refuse_transforms,
    without_second_derivative,
)
from ava_ext.ops.dtensor_rows import RouterPlace
from ava_ext.ops.dtensors import DTENSOR, is_dtensor, summed, whole
from ava_ext.ops.router_layers import layers_shape
from ava_ext.ops.row_fields import accumulation_dtype

_ops = torch.ops.ava_ext
_router_statistics = _ops.router_statistics.default  # looked up once: each look-up costs a microsecond
SCORES = ("softmax", "sigmoid")


class RouterStatistics(NamedTuple):
    """Sums over the counted rows of each group (a layer, or a segment of one); float32, or float64 for float64 logits.

    With z the router's logits of a row, p its probabilities (softmax, or sigmoid scores divided by their sum) and
    lse = log sum_e exp(z_e).
    """

    counts: Tensor  # [n_groups, n_experts]  how often each expert was chosen; no gradient
    probability_sum: Tensor  # [n_groups, n_experts]  sum of p
    importance_sum: Tensor  # [n_groups, n_experts]  sum of p where the expert was chosen
    lse_squared_sum: Tensor  # [n_groups]  sum of lse^2
    entropy_sum: Tensor  # [n_groups]  sum of - sum_e p_e log p_e
    n_rows: Tensor  # [n_groups]  counted rows; no gradient


def router_statistics(
    gate_logits: Tensor | Sequence[Tensor],  # [n_layers, n_rows, n_experts], one or several
    expert_indices: Tensor | None = None,  # [n_layers, n_rows, k]
    row_mask: Tensor | None = None,  # [n_rows] or [n_layers, n_rows] bool
    *,
    k: int | None = None,
    score: str = "softmax",
    expert_bias: Tensor | None = None,  # [n_layers, n_experts]
    segment_ids: Tensor | None = None,  # [n_rows]
    n_segments: int = 1,
) -> RouterStatistics:
    """Counts, probabilities and other sums of each expert, in one pass over the router's logits: for balancing losses.

    Differentiable in gate_logits, in another pass. Counts are exact. Sums of blocks of 64 rows are added in float64, in
    an order that does not depend on threads, so that results are repeatable bit by bit.

    Args:
        gate_logits: router logits, [n_layers, n_rows, n_experts], or [n_rows, n_experts] of one layer, or a list of
            such tensors, layers one after another. n_rows may be several dimensions, behind the layers. float32,
            bfloat16, float16 or float64, any leading strides; nothing is copied.
        expert_indices: the experts that each row was sent to, [n_layers, n_rows, k]; None: the k best by probability
            (by score + expert_bias where a bias is given, as DeepSeek-V3 chooses), the lowest index among equals.
        row_mask: True where a row counts, [n_rows] or [n_layers, n_rows]; None: all. What the other rows hold (nan,
            indices out of range) is not looked at.
        k: experts per row; may be left out beside expert_indices.
        score: "softmax", or "sigmoid" (p_e = sigmoid(z_e) / sum sigmoid(z)).
        expert_bias: added to the scores for the choice alone, [n_layers, n_experts].
        segment_ids: the segment of each row, [n_rows] integers below n_segments; negative: the row does not count.
            Then every segment of every layer is a group of its own, [n_layers * n_segments], layers first.
        n_segments: how many segments there are.

    Returns:
        RouterStatistics; a group without a counted row has zeros.

    Raises:
        ValueError: shapes that do not fit, neither expert_indices nor k, k > n_experts, an unknown score, indices that
            are no integers, a row_mask of floats.
        TypeError: k or n_segments is no integer.
        IndexError: an expert index of a counted row outside [0, n_experts), a segment not below n_segments.
        RuntimeError: on double backward.
        NotImplementedError: on forward-mode derivatives.

    Example:
        >>> statistics = router_statistics(torch.zeros(1, 6, 4), torch.arange(6).remainder(4)[None, :, None], None, k=1)
        >>> statistics.counts
        tensor([[2., 2., 1., 1.]])
    """
    layers = [gate_logits] if isinstance(gate_logits, Tensor) else list(gate_logits)
    check_are_tensors(
        "router_statistics",
        expert_indices=expert_indices,
        row_mask=row_mask,
        segment_ids=segment_ids,
        expert_bias=expert_bias,
    )
    for number, layer in enumerate(layers):
        check_is_tensor("router_statistics", f"gate_logits[{number}]", layer)
    layers = [layer.unsqueeze(0) if layer.dim() == 2 else layer for layer in layers]
    check_are_integers("router_statistics", k=k, n_segments=n_segments)
    if k is None:
        if expert_indices is None:
            raise ValueError("router_statistics: expected expert_indices or k, got neither")
        k = expert_indices.shape[-1]
    if expert_indices is not None:
        expert_indices = as_ids("router_statistics", "expert_indices", expert_indices, "[n_layers, n_rows, k]")
    if segment_ids is not None:
        segment_ids = as_ids("router_statistics", "segment_ids", segment_ids, "[n_rows]")
    _check(layers, expert_indices, row_mask, k, score, expert_bias)
    place = None
    if DTENSOR in sys.modules:
        of_rows = (("expert_indices", expert_indices), ("row_mask", row_mask), ("segment_ids", segment_ids))
        if any(map(is_dtensor, layers)):
            place = RouterPlace("router_statistics", layers)
            local = (place.local(name, given) for name, given in of_rows)
            layers = [layer.to_local() for layer in layers]  # type: ignore[attr-defined]
        else:
            local = (whole("router_statistics", name, given, False, "gate_logits") for name, given in of_rows)
        expert_indices, row_mask, segment_ids = local
    refuse_transforms("router_statistics", (*layers, expert_bias))
    layers = [with_dense_rows(layer) for layer in layers]
    dtype = accumulation_dtype(layers[0].dtype)
    tensors = (
        expert_indices,
        None if row_mask is None else as_mask("router_statistics", row_mask),
        None if segment_ids is None else segment_ids.reshape(-1).to(torch.int64),
        None if expert_bias is None else expert_bias.detach().to(dtype),
    )
    options = (n_segments, k, score == "sigmoid")
    if torch.compiler.is_compiling():
        outputs = _router_statistics(layers, *tensors, *options)
    elif torch.is_grad_enabled() and any(layer.requires_grad for layer in layers):
        outputs = _RouterStatistics.apply(*tensors, options, *layers)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = _router_statistics(layers, *tensors, *options)
    probability_sum, importance_sum, lse_squared_sum, entropy_sum, counts, n_rows, _ = outputs
    found = RouterStatistics(
        counts.to(dtype), probability_sum, importance_sum, lse_squared_sum, entropy_sum, n_rows.to(dtype)
    )
    if place is None or place.rows is None:
        return found
    # where other ranks have other rows
    return RouterStatistics(*(summed(statistic, place.mesh, place.is_of_rows) for statistic in found))


def _check(
    layers: list[Tensor],  # of [n_layers, ..., n_experts]
    expert_indices: Tensor | None,
    row_mask: Tensor | None,
    k: int,
    score: str,
    expert_bias: Tensor | None,
) -> None:
    if not layers:
        raise ValueError("router_statistics: expected gate_logits of at least one layer, got none")
    for layer in layers:
        if layer.dim() < 3 or not layer.is_floating_point() or layer.shape[1:] != layers[0].shape[1:]:
            raise ValueError(
                "router_statistics: expected floating gate_logits [n_layers, n_rows, n_experts], layers of one shape, "
                f"got {[list(layer.shape) for layer in layers]} of {layer.dtype}"
            )
    n_layers, n_rows, n_experts = layers_shape(layers)
    if not 1 <= k <= n_experts:
        raise ValueError(f"router_statistics: expected k between 1 and n_experts = {n_experts}, got {k}")
    if score not in SCORES:
        raise ValueError(f"router_statistics: expected score to be one of {SCORES}, got {score!r}")
    check_shape("router_statistics", (n_layers, n_rows, k), expert_indices=expert_indices)
    if row_mask is not None and not has_shape(row_mask, (n_rows,), (n_layers, n_rows)):
        raise ValueError(f"router_statistics: expected row_mask of shape [{n_rows}], got {list(row_mask.shape)}")
    check_shape("router_statistics", (n_layers, n_experts), expert_bias=expert_bias)
    if expert_bias is not None:
        check_real("router_statistics", "expert_bias", expert_bias)


def _check_devices(owner, gate_logits, **others):
    layers = {f"gate_logits[{layer}]": logits for layer, logits in enumerate(gate_logits)}
    check_devices(owner, gate_logits[0], **layers, **others)


@torch.library.register_fake("ava_ext::router_statistics")
def _(gate_logits, expert_indices, row_mask, segment_ids, expert_bias, n_segments, k, is_sigmoid):
    others = {"expert_indices": expert_indices, "row_mask": row_mask, "segment_ids": segment_ids}
    _check_devices("router_statistics", gate_logits, **others, expert_bias=expert_bias)
    n_layers, n_rows, n_experts = layers_shape(gate_logits)
    first, real = gate_logits[0], accumulation_dtype(gate_logits[0].dtype)
    vector, scalar = (n_layers * n_segments, n_experts), (n_layers * n_segments,)
    return (
        first.new_empty(vector, dtype=real),
        first.new_empty(vector, dtype=real),
        first.new_empty(scalar, dtype=real),
        first.new_empty(scalar, dtype=real),
        first.new_empty(vector, dtype=torch.int64),
        first.new_empty(scalar, dtype=torch.int64),
        first.new_empty((n_layers, n_rows, -(-n_experts // 8)) if expert_indices is None else (0,), dtype=torch.uint8),
    )


@torch.library.register_fake("ava_ext::router_gradient")
def _(
    gate_logits,
    expert_indices,
    expert_choice,
    row_mask,
    segment_ids,
    grad_probability_sum,
    grad_importance_sum,
    grad_lse_squared_sum,
    grad_entropy_sum,
    n_segments,
    is_sigmoid,
):
    _check_devices(
        "router_gradient",
        gate_logits,
        expert_indices=expert_indices,
        expert_choice=expert_choice,
        row_mask=row_mask,
        segment_ids=segment_ids,
        grad_probability_sum=grad_probability_sum,
        grad_importance_sum=grad_importance_sum,
        grad_lse_squared_sum=grad_lse_squared_sum,
        grad_entropy_sum=grad_entropy_sum,
    )
    first = gate_logits[0]
    return first.new_empty((layers_shape(gate_logits)[0], *first.shape[1:]))


def _save_router_statistics(ctx, inputs, output):
    gate_logits, expert_indices, row_mask, segment_ids, _, ctx.n_segments, _, ctx.is_sigmoid = inputs
    counts, n_rows, choice = output[4:]
    ctx.mark_non_differentiable(counts, n_rows, choice)
    ctx.set_materialize_grads(False)
    chosen = (None, choice) if expert_indices is None else (expert_indices, None)
    ctx.save_for_backward(*chosen, row_mask, segment_ids, *gate_logits)


def _router_statistics_backward(
    ctx,
    grad_probability_sum,  # [n_groups, n_experts]
    grad_importance_sum,  # [n_groups, n_experts]
    grad_lse_squared_sum,  # [n_groups]
    grad_entropy_sum,  # [n_groups]
    *_,
):
    expert_indices, expert_choice, row_mask, segment_ids, *gate_logits = ctx.saved_tensors
    gradients = (grad_probability_sum, grad_importance_sum, grad_lse_squared_sum, grad_entropy_sum)
    nothing = (None,) * 7
    if all(gradient is None for gradient in gradients):
        return [None] * len(gate_logits), *nothing
    refuse_tangents("router_statistics", gradients)
    if is_batched(*gradients):
        raise NotImplementedError(
            "router_statistics: is_grads_batched=True, a batch of gradients from above, is not supported here; "
            "expected a backward for each"
        )
    grad_logits = _ops.router_gradient(
        [layers.detach() for layers in gate_logits],
        None if grad_importance_sum is None else expert_indices,
        None if grad_importance_sum is None else expert_choice,
        row_mask,
        segment_ids,
        *gradients,
        ctx.n_segments,
        ctx.is_sigmoid,
    )
    parts = grad_logits.split([layers.shape[0] for layers in gate_logits])
    pairs = zip(parts, gate_logits, strict=True)
    return [without_second_derivative(part, layers, *gradients) for part, layers in pairs], *nothing


class _RouterStatistics(torch.autograd.Function):
    """`router_statistics` of the eager mode: torch.library's own autograd, below, costs three times as much Python.

    The arguments that are not tensors come as one: torch looks at each.
    """

    @staticmethod
    def forward(ctx, expert_indices, row_mask, segment_ids, expert_bias, options, *layers):
        inputs = (layers, expert_indices, row_mask, segment_ids, expert_bias, *options)
        with torch._C._AutoDispatchBelowAutograd():
            output = _router_statistics(*inputs)
        _save_router_statistics(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, None, None, *_router_statistics_backward(ctx, *grads)[0]


torch.library.register_autograd(
    "ava_ext::router_statistics", _router_statistics_backward, setup_context=_save_router_statistics
)
torch.library.register_autograd("ava_ext::router_gradient", raise_double_backward)
