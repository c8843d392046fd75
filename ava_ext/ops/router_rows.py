"""Column statistics of router logits: what every balancing loss of a mixture of experts is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SCORES = ("softmax", "sigmoid")

# torch.compile saves what backward needs or computes it again from its inputs. Where an input is a buffer that the same
# call updates, that would be the updated value: silently another gradient. An operator it does not know is saved.
_LIBRARY = torch.library.Library("ava_ext", "FRAGMENT")
_LIBRARY.define("copy_for_backward(Tensor value) -> Tensor")
_LIBRARY.impl("copy_for_backward", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake("ava_ext::copy_for_backward", torch.empty_like)


def copy_for_backward(
    value: Tensor,  # [...]
) -> Tensor:  # [...]
    """A copy without grad that a backward may keep, also when `value` or what it was computed from changes in place."""
    return torch.ops.ava_ext.copy_for_backward(value.detach())


class RouterStatistics(NamedTuple):
    """Sums over the counted rows of each layer; float32, or float64 for float64 logits.

    With z the router's logits of a row, p its probabilities (softmax, or sigmoid scores divided by their sum) and
    lse = log sum_e exp(z_e).
    """

    counts: Tensor  # [n_layers, n_experts]  rows routed to each expert; no gradient
    probability_sum: Tensor  # [n_layers, n_experts]  sum of p
    importance_sum: Tensor  # [n_layers, n_experts]  sum of p where the expert was chosen
    lse_squared_sum: Tensor  # [n_layers]  sum of lse^2
    entropy_sum: Tensor  # [n_layers]  sum of - sum_e p_e log p_e
    n_rows: Tensor  # [n_layers]  counted rows; no gradient


def router_statistics(
    gate_logits: Tensor,  # [n_layers, n_rows, n_experts]
    expert_indices: Tensor | None,  # [n_layers, n_rows, k]
    row_mask: Tensor | None,  # [n_rows] or [n_layers, n_rows] bool
    *,
    k: int,
    score: str = "softmax",
    expert_bias: Tensor | None = None,  # [n_layers, n_experts]
) -> RouterStatistics:
    """Column statistics of the router's logits, differentiable in gate_logits.

    Args:
        gate_logits: router logits, [n_layers, n_rows, n_experts], any floating dtype.
        expert_indices: the experts that each row was sent to, [n_layers, n_rows, k]; None: the k best by probability
            (by score + expert_bias where a bias is given, as DeepSeek-V3 chooses).
        row_mask: True where a row counts, [n_rows] or [n_layers, n_rows]; None: all. What the other rows hold (nan,
            indices out of range) is not looked at.
        k: experts per row.
        score: "softmax", or "sigmoid" (p_e = sigmoid(z_e) / sum sigmoid(z)).
        expert_bias: added to the scores for the choice alone, [n_layers, n_experts].

    Returns:
        RouterStatistics; a layer without a counted row has zeros.

    Raises:
        ValueError: shapes that do not fit, k > n_experts, an unknown score.
        IndexError: an expert index of a counted row outside [0, n_experts) (eager, CPU; elsewhere a device assert).

    Example:
        >>> statistics = router_statistics(torch.zeros(1, 6, 4), torch.arange(6).remainder(4)[None, :, None], None, k=1)
        >>> statistics.counts
        tensor([[2., 2., 1., 1.]])
    """
    _check(gate_logits, expert_indices, row_mask, k, score, expert_bias)
    n_layers, n_rows, n_experts = gate_logits.shape
    dtype = torch.float64 if gate_logits.dtype == torch.float64 else torch.float32
    if row_mask is None:
        mask = torch.ones((), dtype=torch.bool, device=gate_logits.device).expand(n_layers, n_rows)
    else:
        mask = row_mask.to(torch.bool).expand(n_layers, n_rows)
    logits = gate_logits.to(dtype)
    if row_mask is not None:  # before any arithmetic: 0 * nan would reach the sums and the gradient
        logits = torch.where(mask.unsqueeze(-1), logits, 0.0)
    weight = mask.to(dtype)

    # sigmoid / sum sigmoid = softmax of log sigmoid, which also holds where every sigmoid underflows
    log_score = torch.nn.functional.logsigmoid(logits) if score == "sigmoid" else logits
    log_probability = torch.log_softmax(log_score, dim=-1)
    probability = log_probability.exp()
    finite_log_probability = log_probability.masked_fill(probability == 0, 0.0)  # 0 log 0 = 0
    entropy = -(probability * finite_log_probability).sum(dim=-1)
    lse = torch.logsumexp(logits, dim=-1)

    if expert_indices is None:
        indices = _choose(logits.detach(), probability.detach(), score, expert_bias, k)
    else:
        _check_indices(expert_indices, mask, n_experts)
        indices = torch.where(mask.unsqueeze(-1), expert_indices.to(torch.int64), 0)
    columns = indices.reshape(n_layers, n_rows * k)
    # integers: exact however many rows, and repeatable with atomics
    chosen_mask = mask.unsqueeze(-1).expand(n_layers, n_rows, k).reshape(n_layers, n_rows * k)
    no_counts = torch.zeros(n_layers, n_experts, dtype=torch.int64, device=logits.device)
    counts = no_counts.scatter_add(1, columns, chosen_mask.to(torch.int64)).to(dtype)
    chosen_probability = (probability.gather(2, indices) * weight.unsqueeze(-1)).reshape(n_layers, n_rows * k)
    importance_sum = torch.zeros(n_layers, n_experts, dtype=dtype, device=logits.device).scatter_add(
        1, columns, chosen_probability
    )
    return RouterStatistics(
        counts=counts,
        probability_sum=(probability * weight.unsqueeze(-1)).sum(dim=1),
        importance_sum=importance_sum,
        lse_squared_sum=(lse.square() * weight).sum(dim=1),
        entropy_sum=(entropy * weight).sum(dim=1),
        n_rows=weight.sum(dim=1),
    )


def _choose(logits: Tensor, probability: Tensor, score: str, expert_bias: Tensor | None, k: int) -> Tensor:
    if expert_bias is None:  # both scores are monotonic in the logit, and logits do not saturate
        return logits.topk(k, dim=-1).indices
    scores = torch.sigmoid(logits) if score == "sigmoid" else probability
    return (scores + expert_bias.detach().to(scores.dtype).unsqueeze(1)).topk(k, dim=-1).indices


def stack_gate_logits(
    gate_logits: Tensor | Sequence[Tensor], num_layers: int | None = None
) -> Tensor:  # [n_layers, n_rows, n_experts]
    """Router logits in any of their usual forms, as one tensor.

    Args:
        gate_logits: a list or tuple with one [n_rows, n_experts] or [batch, length, n_experts] per layer (what a
            Hugging Face model returns as router_logits), or a tensor: [n_rows, n_experts] or [batch, length, n_experts]
            of one layer, [n_layers, n_rows, n_experts] or [n_layers, batch, length, n_experts] of several.
        num_layers: how many layers are expected. With 1, three dimensions are [batch, length, n_experts]. None:
            as many as there are, and three dimensions are [n_layers, n_rows, n_experts].

    Returns:
        [n_layers, n_rows, n_experts], rows of a batch one after another.

    Raises:
        ValueError: another number of layers, layers of different shapes, a shape that is none of these.

    Example:
        >>> stack_gate_logits([torch.zeros(2, 3, 8)] * 4, num_layers=4).shape
        torch.Size([4, 6, 8])
    """
    layers = layered_gate_logits(gate_logits, num_layers)
    return layers.reshape(layers.shape[0], -1, layers.shape[-1])


def layered_gate_logits(
    gate_logits: Tensor | Sequence[Tensor], num_layers: int | None = None
) -> Tensor:  # [n_layers, n_rows, n_experts] or [n_layers, batch, length, n_experts]
    """As stack_gate_logits, with batch and length kept apart where they were."""
    if not isinstance(gate_logits, Tensor):
        if len(gate_logits) == 0 or num_layers not in (None, len(gate_logits)):
            expected = "at least 1 layer" if num_layers is None else f"num_moe_layers = {num_layers} layers"
            raise ValueError(f"gate_logits: expected {expected}, got {len(gate_logits)}")
        first = gate_logits[0]
        for number, layer in enumerate(gate_logits):
            if layer.dim() not in (2, 3) or layer.shape != first.shape:
                shape = str(list(first.shape)) if first.dim() in (2, 3) else "[n_rows, n_experts]"
                raise ValueError(
                    f"gate_logits: expected {shape} in every layer, got {list(layer.shape)} in layer {number}"
                )
        return torch.stack(tuple(gate_logits))
    sizes = list(gate_logits.shape)
    is_one_layer = len(sizes) == 2 or (len(sizes) == 3 and num_layers == 1)
    if len(sizes) not in (2, 3, 4):
        raise ValueError(f"gate_logits: expected [n_rows, n_experts] or [n_layers, n_rows, n_experts], got {sizes}")
    n_layers = 1 if is_one_layer else sizes[0]
    if num_layers not in (None, n_layers):
        raise ValueError(f"gate_logits: expected num_moe_layers = {num_layers} layers, got shape {sizes}")
    return gate_logits.unsqueeze(0) if is_one_layer else gate_logits


def stack_expert_indices(
    expert_indices: Tensor | Sequence[Tensor], n_layers: int, n_rows: int, k: int
) -> Tensor:  # [n_layers, n_rows, k]
    """The chosen experts in the forms of stack_gate_logits (last dimension k; it may be left out where k = 1).

    Raises:
        ValueError: a shape that does not fit n_layers, n_rows and k.

    Example:
        >>> stack_expert_indices([torch.zeros(6, 2, dtype=torch.long)] * 4, n_layers=4, n_rows=6, k=2).shape
        torch.Size([4, 6, 2])
    """
    if not isinstance(expert_indices, Tensor):
        if len(expert_indices) != n_layers:
            raise ValueError(f"expert_indices: expected {n_layers} layers, got {len(expert_indices)}")
        layers = [stack_expert_indices(layer, 1, n_rows, k) for layer in expert_indices]
        return torch.cat(layers)
    shape = list(expert_indices.shape)
    ends_in_k = (len(shape) > 1 and shape[-1] == k) or k == 1
    starts_with_layers = n_layers == 1 or (len(shape) > 1 and shape[0] == n_layers)
    if expert_indices.numel() != n_layers * n_rows * k or not ends_in_k or not starts_with_layers:
        raise ValueError(f"expert_indices: expected shape [{n_layers}, {n_rows}, {k}], got {shape}")
    return expert_indices.reshape(n_layers, n_rows, k)


def _check(
    gate_logits: Tensor,
    expert_indices: Tensor | None,
    row_mask: Tensor | None,
    k: int,
    score: str,
    expert_bias: Tensor | None,
) -> None:
    if gate_logits.dim() != 3 or not gate_logits.is_floating_point():
        raise ValueError(
            "router_statistics: expected floating gate_logits [n_layers, n_rows, n_experts], got "
            f"{list(gate_logits.shape)} of {gate_logits.dtype}"
        )
    n_layers, n_rows, n_experts = gate_logits.shape
    if not 1 <= k <= n_experts:
        raise ValueError(f"router_statistics: expected k between 1 and n_experts = {n_experts}, got {k}")
    if score not in SCORES:
        raise ValueError(f"router_statistics: expected score to be one of {SCORES}, got {score!r}")
    if expert_indices is not None and list(expert_indices.shape) != [n_layers, n_rows, k]:
        raise ValueError(
            f"router_statistics: expected expert_indices of shape [{n_layers}, {n_rows}, {k}], "
            f"got {list(expert_indices.shape)}"
        )
    if row_mask is not None and list(row_mask.shape) not in ([n_rows], [n_layers, n_rows]):
        raise ValueError(f"router_statistics: expected row_mask of shape [{n_rows}], got {list(row_mask.shape)}")
    if expert_bias is not None and list(expert_bias.shape) != [n_layers, n_experts]:
        raise ValueError(
            f"router_statistics: expected expert_bias of shape [{n_layers}, {n_experts}], got {list(expert_bias.shape)}"
        )


def _check_indices(expert_indices: Tensor, mask: Tensor, n_experts: int) -> None:
    # reading values stops a trace and synchronises a GPU, so only where neither can happen
    if torch.compiler.is_compiling() or expert_indices.device.type != "cpu":
        return
    outside = ((expert_indices < 0) | (expert_indices >= n_experts)) & mask.unsqueeze(-1)
    if outside.any():
        layer, row, slot = outside.nonzero()[0].tolist()
        raise IndexError(
            f"router_statistics: expected expert_indices in [0, {n_experts}), "
            f"got {int(expert_indices[layer, row, slot])} "
            f"in layer {layer}, row {row}"
        )
