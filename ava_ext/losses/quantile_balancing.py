"""Quantile balancing: the bias with which each expert would have been chosen by its share of a step's rows.

For one layer, with s_ie the score of expert e for row i (the sigmoid of its logit), b the bias that the router adds
before its top-k, n_experts = E, and

    a_i = the (k + 1)-th largest of s_ie + b_e over e        what an expert of row i has to exceed
    r_ie = a_i - s_ie                                        the bias above which expert e is chosen for row i

the next bias is the k / E quantile of r_ie over the rows i of the step, less its mean over e. It has no step size.

The rows of a step come in several calls and on several ranks, and the quantile of all is not the mean of theirs. So
each call counts its r_ie in N_BINS equal bins over [min b - 1, max b + 1], outside of which none can be. Counts add up,
and the quantile is interpolated within its bin. Micro-batches and ranks therefore give bit for bit the bias of the
whole batch; it is off by at most the width of a bin, 0.002 where the biases are alike. Every call of a step reads the
bias that was committed before it, so that all count the same bins.

Sources: Kimi K3 technical report, section 2.3.3, equations 13 and 14, and appendix D, as TransformerEngine (#3395) and
Megatron-LM (#6637) describe it; the rule is Su's (2026, kexue.fm/archives/11619).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ava_ext.ops.router_layers import layers_shape

N_BINS = 1000


def count_required_bias(
    layers: list[Tensor],  # of [n_layers, ..., n_experts], one after another
    row_mask: Tensor | None,  # [n_rows] bool
    expert_bias: Tensor,  # [n_layers, n_experts]
    k: int,
) -> Tensor:  # [n_layers, n_experts, N_BINS] int32
    """How many rows have their r_ie in each bin."""
    _, n_rows, n_experts = layers_shape(layers)
    lowest, width = _bins(expert_bias)
    mask = expert_bias.new_ones(n_rows, dtype=torch.bool) if row_mask is None else row_mask
    ones = mask.to(torch.int32).expand(n_experts, n_rows)
    counts = []
    of_layers = (layer for part in layers for layer in part)
    for layer, bias, first, size in zip(of_layers, expert_bias, lowest, width, strict=True):
        scores = torch.sigmoid(layer.reshape(n_rows, n_experts).to(bias.dtype)).masked_fill(~mask.unsqueeze(-1), 0)
        threshold = (scores + bias).topk(k + 1, dim=-1).values[:, k:]
        bins = ((threshold - scores - first) / size).long().clamp(0, N_BINS - 1)
        counts.append(ones.new_zeros(n_experts, N_BINS).scatter_add_(1, bins.t(), ones))
    return torch.stack(counts)


def quantile_bias(
    counts: Tensor,  # [n_layers, n_experts, N_BINS] int32, made with expert_bias
    expert_bias: Tensor,  # [n_layers, n_experts]
    mean_load: Tensor,  # [n_layers]: k / E times the rows
) -> Tensor:  # [n_layers, n_experts]
    """The next bias; that of a layer without rows stays."""
    cumulative, wanted = counts.cumsum(-1, dtype=torch.int32), mean_load.double().view(-1, 1, 1)
    reached = wanted.ceil().to(torch.int32).expand(*counts.shape[:2], 1).contiguous()
    place = torch.searchsorted(cumulative, reached).clamp(max=N_BINS - 1)  # the first bin that reaches it
    in_bin = counts.gather(-1, place).double()
    before = cumulative.gather(-1, place) - in_bin
    position = (place + (wanted - before) / in_bin.clamp_min(1)).squeeze(-1)
    position = position - position.mean(-1, keepdim=True)
    moved = (position * _bins(expert_bias)[1].double().unsqueeze(-1)).to(expert_bias.dtype)
    return torch.where(cumulative[..., -1] > 0, moved, expert_bias)


def _bins(
    expert_bias: Tensor,  # [n_layers, n_experts]
) -> tuple[Tensor, Tensor]:  # [n_layers], [n_layers]: where the first begins, and the width of each
    least, greatest = expert_bias.aminmax(dim=-1)
    return least - 1, (greatest - least + 2) / N_BINS
