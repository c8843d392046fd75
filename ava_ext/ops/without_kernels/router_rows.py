"""Router rows as PyTorch operators; the formulas stand in csrc/router_rows.h. In float64 where the device has it: the
rows are short."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ava_ext.ops.linear_logits import without_autocast
from ava_ext.ops.row_fields import accumulation_dtype
from ava_ext.ops.without_kernels.dtypes import widest_dtype


def router_statistics(
    gate_logits: Sequence[Tensor],  # of [n_layers, ..., n_experts]
    expert_indices: Tensor | None,  # [n_layers, n_rows, k]
    row_mask: Tensor | None,  # [n_rows] or [n_layers, n_rows]
    segment_ids: Tensor | None,  # [n_rows]
    expert_bias: Tensor | None,  # [n_layers, n_experts]
    n_segments: int,
    k: int,
    is_sigmoid: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(probability_sum, importance_sum, lse_squared_sum, entropy_sum, counts, n_rows, choice); see csrc/library.cpp."""
    _check_layers("router_statistics", gate_logits)
    real = accumulation_dtype(gate_logits[0].dtype)
    counted = _counted(gate_logits, row_mask, segment_ids)
    z = _rows(gate_logits).masked_fill(~counted.unsqueeze(-1), 0)
    p, _, entropy = _measure(z, is_sigmoid)
    chosen = expert_indices
    if chosen is None:
        scores = z
        if expert_bias is not None:
            scores = (torch.sigmoid(z) if is_sigmoid else p).to(real) + expert_bias.unsqueeze(1)
        # stable: of equals the lowest index
        chosen = scores.sort(stable=True, dim=-1, descending=True).indices[..., :k]
    times_chosen = _times_chosen(z, chosen, counted)
    mask = counted.to(z.dtype)
    values = torch.cat(
        [
            p * mask.unsqueeze(-1),
            p * times_chosen,
            times_chosen,
            (torch.logsumexp(z, -1) ** 2 * mask).unsqueeze(-1),
            entropy * mask.unsqueeze(-1),
            mask.unsqueeze(-1),
        ],
        -1,
    )
    with without_autocast(z.device):
        sums = _segments(segment_ids, n_segments, z).T @ values  # a product, not an index_add: the order is fixed
    sums = sums.flatten(0, 1)  # [n_groups, ...]
    probability, importance, counts, scalars = sums.split([z.shape[-1]] * 3 + [3], -1)
    lse_squared, entropy_sum, n_rows = scalars.unbind(-1)
    # clones: views of one tensor would keep users from writing to them
    return (
        *(
            values.to(real).clone(memory_format=torch.contiguous_format)
            for values in (probability, importance, lse_squared, entropy_sum)
        ),
        counts.long().clone(memory_format=torch.contiguous_format),
        n_rows.long().clone(memory_format=torch.contiguous_format),
        _packed(times_chosen) if expert_indices is None else counts.new_empty(0, dtype=torch.uint8),
    )


def router_gradient(
    gate_logits: Sequence[Tensor],  # of [n_layers, ..., n_experts]
    expert_indices: Tensor | None,  # [n_layers, n_rows, k]
    expert_choice: Tensor | None,  # [n_layers, n_rows, n_bytes] uint8
    row_mask: Tensor | None,  # [n_rows] or [n_layers, n_rows]
    segment_ids: Tensor | None,  # [n_rows]
    grad_probability_sum: Tensor | None,  # [n_groups, n_experts]
    grad_importance_sum: Tensor | None,  # [n_groups, n_experts]
    grad_lse_squared_sum: Tensor | None,  # [n_groups]
    grad_entropy_sum: Tensor | None,  # [n_groups]
    n_segments: int,
    is_sigmoid: bool,
) -> Tensor:  # [n_layers, ..., n_experts]
    """(1) of csrc/router_rows.h."""
    _check_layers("router_gradient", gate_logits)
    first = gate_logits[0]
    counted = _counted(gate_logits, row_mask, segment_ids)
    z = _rows(gate_logits).masked_fill(~counted.unsqueeze(-1), 0)
    segments = _segments(segment_ids, n_segments, z)

    def of_rows(gradient: Tensor) -> Tensor:  # [n_groups, any] -> [n_layers, n_rows, any]
        with without_autocast(z.device):
            return segments @ gradient.to(z.dtype).view(z.shape[0], n_segments, -1)

    p, u_above_mean, _ = _measure(z, is_sigmoid)
    by_expert = torch.zeros_like(z)  # v
    if grad_probability_sum is not None:
        by_expert += of_rows(grad_probability_sum)
    if grad_importance_sum is not None and expert_indices is not None:
        by_expert += _times_chosen(z, expert_indices, counted) * of_rows(grad_importance_sum)
    if grad_importance_sum is not None and expert_choice is not None:
        by_expert += _unpacked(expert_choice, z) * of_rows(grad_importance_sum)
    # against the maximum's own: where a row is sure, the others' differences are all that is left
    centred = by_expert - by_expert.gather(-1, p.argmax(-1, keepdim=True))
    gradient = p * (centred - (p * centred).sum(-1, keepdim=True))
    if grad_entropy_sum is not None:
        gradient -= of_rows(grad_entropy_sum) * p * u_above_mean
    if is_sigmoid:
        gradient *= torch.sigmoid(-z)
    if grad_lse_squared_sum is not None:
        lse = torch.logsumexp(z, -1, keepdim=True)
        gradient += of_rows(grad_lse_squared_sum) * 2 * lse * torch.softmax(z, -1)
    gradient = gradient.masked_fill(~counted.unsqueeze(-1), 0).to(first.dtype)
    return gradient.view(z.shape[0], *first.shape[1:])


def _check_layers(op: str, gate_logits: Sequence[Tensor]) -> None:
    if not gate_logits:
        raise RuntimeError(f"{op}: expected at least one tensor of gate_logits, got none")


def _rows(gate_logits: Sequence[Tensor]) -> Tensor:  # [n_layers, n_rows, n_experts]
    return torch.cat([layers.flatten(1, -2) for layers in gate_logits]).to(widest_dtype(gate_logits[0].device))


def _measure(
    z: Tensor,  # [n_layers, n_rows, n_experts]
    is_sigmoid: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """p, u - B / (1 + R), and the entropy [n_layers, n_rows, 1]: no cancellation where a row is sure."""
    y = torch.nn.functional.logsigmoid(z) if is_sigmoid else z
    maximum, place = y.max(-1, keepdim=True)
    u = y - maximum
    exponential = u.exp()
    rest = exponential.scatter(-1, place, 0).sum(-1, keepdim=True)
    u = u.clamp_min(-800)  # of -inf, whose e^u is 0
    mean_u = (u * exponential).sum(-1, keepdim=True) / (1 + rest)
    return exponential / (1 + rest), u - mean_u, rest.log1p() - mean_u


def _counted(gate_logits: Sequence[Tensor], row_mask: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    """[n_layers, n_rows] bool."""
    first, n_layers = gate_logits[0], sum(layers.shape[0] for layers in gate_logits)
    counted = torch.ones(n_layers, first.shape[1:-1].numel(), dtype=torch.bool, device=first.device)
    if row_mask is not None:
        counted &= row_mask
    if segment_ids is not None:
        counted &= segment_ids >= 0
    return counted


def _segments(
    segment_ids: Tensor | None,  # [n_rows]
    n_segments: int,
    z: Tensor,  # [n_layers, n_rows, n_experts]
) -> Tensor:  # [n_rows, n_segments]: 1 where the row is in the segment
    if segment_ids is None:
        return z.new_ones(z.shape[1], 1)
    return (segment_ids.unsqueeze(-1) == torch.arange(n_segments, device=z.device)).to(z.dtype)


def _times_chosen(
    z: Tensor,  # [n_layers, n_rows, n_experts]
    chosen: Tensor,  # [n_layers, n_rows, k]; of rows that do not count, anything
    counted: Tensor,  # [n_layers, n_rows]
) -> Tensor:  # [n_layers, n_rows, n_experts]
    counted = counted.unsqueeze(-1)
    once = counted.to(z.dtype).expand(chosen.shape)
    return torch.zeros_like(z).scatter_add_(-1, chosen.long().masked_fill(~counted, 0), once)


def _packed(
    choice: Tensor,  # [n_layers, n_rows, n_experts]: 0 or 1
) -> Tensor:  # [n_layers, n_rows, n_bytes] uint8
    """Expert e as bit e % 8 of byte e // 8."""
    padded = torch.nn.functional.pad(choice.to(torch.uint8), (0, -choice.shape[-1] % 8))
    return (padded.unflatten(-1, (-1, 8)) * _bits(choice)).sum(-1).to(torch.uint8)


def _unpacked(
    packed: Tensor,  # [n_layers, n_rows, n_bytes] uint8
    z: Tensor,  # [n_layers, n_rows, n_experts]
) -> Tensor:  # like z
    return (packed.unsqueeze(-1) & _bits(z)).ne(0).flatten(-2)[..., : z.shape[-1]].to(z.dtype)


def _bits(beside: Tensor) -> Tensor:  # [8]
    return (2 ** torch.arange(8, device=beside.device)).to(torch.uint8)  # made there: a list would be waited for
