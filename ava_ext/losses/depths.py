"""Depths of multi-token prediction: which row predicts what, their losses and metrics.

Their heads take as few passes as there are weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ava_ext.call import Call, HeadLoss, Logits
from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.component import Addends
from ava_ext.ops.arguments import check_constants, check_shape, has_shape
from ava_ext.ops.dtensor_logits import check_is_logits
from ava_ext.ops.dtensors import is_dtensor
from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.row_fields import TERM_NAMES
from ava_ext.ops.sharded_logits import ShardedLogits
from ava_ext.sequences import shift_left

MAIN_LOSS, CORRECT = TERM_NAMES.index("main_loss"), TERM_NAMES.index("correct")
# each is followed by the number of a depth, from 1 on
DEPTH_METRICS = ("mtp_loss_depth_", "mtp_accuracy_depth_", "mtp_acceptance_depth_")


class DepthRows(NamedTuple):
    """What the depths k = 1..n_depths predict at each row."""

    targets: Tensor  # [n_depths, batch_size, n_tokens]; ignore_index where a depth has none
    weights: Tensor  # [n_depths, batch_size, n_tokens]; of the rows that are predicted, 0 where there is none


def depth_rows(
    config: UnifiedLossConfig,
    targets: Tensor,  # [batch_size, n_tokens]
    row_weights: Tensor,  # [batch_size, n_tokens]
    segments: Tensor | None,  # [batch_size, n_tokens]
    depth_weights: Tensor | None,  # [n_depths]
    factor: Tensor | None = None,  # [batch_size, n_tokens]
) -> DepthRows:
    """Targets and weights of every depth; row t of depth k predicts targets[:, t + k].

    The weights are multiplied by mtp_weight / n_depths. With mtp_own_denominator, those of depth k also by
    sum_t w_t / sum_t w_{t+k}: what was divided by the number of all rows is then divided by that of the rows which have
    a target at depth k. Both sums are those of this call, so micro-batches of a batch of N rows do not add up to it.

    Args:
        config: its num_future_tokens says how many depths there are.
        targets, row_weights: of depth 0; ignore_index and 0 where a row does not count.
        segments: contiguous documents of packed rows; None: each batch row is one segment.
        depth_weights: factor of each depth; None: 1.
        factor: of the weights of every depth, by row; None: 1.

    Raises:
        ValueError: depth_weights of another shape, or that require grad.
    """
    n_depths = config.num_future_tokens
    depths = range(1, n_depths + 1)
    shifted = torch.stack([shift_left(targets, config.ignore_index, k, segments) for k in depths])
    weights = torch.stack([shift_left(row_weights, 0, k, segments) for k in depths])
    if config.mtp_own_denominator:
        sums = weights.sum((1, 2))
        weights = weights * torch.where(sums == 0, 0.0, row_weights.sum() / sums).view(-1, 1, 1)
    if depth_weights is not None:
        check_shape("multi_token_prediction", (n_depths,), mtp_depth_weights=depth_weights)
        check_constants("multi_token_prediction", mtp_depth_weights=depth_weights)
        weights = weights * depth_weights.to(weights).view(-1, 1, 1)
    scale = config.mtp_weight / n_depths
    return DepthRows(shifted, weights * (scale if factor is None else scale * factor))


def active_rows(
    targets: Tensor,  # [batch_size, n_tokens]
    row_weights: Tensor,  # [batch_size, n_tokens]
    mtp_active: bool | Tensor | None,  # [] or [batch_size] bool, or numbers that are 0 where it is off
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Targets and weights of the rows whose heads are on; the others have ignore_index and 0: no depth counts them.

    Returns:
        [batch_size, n_tokens] twice.

    Raises:
        ValueError: mtp_active of another shape.

    Example:
        >>> targets, weights = torch.tensor([[5, 6], [7, 8]]), torch.tensor([[0.5, 0.5], [1.0, 1.0]])
        >>> active_rows(targets, weights, torch.tensor([True, False]), -100)[0]
        tensor([[   5,    6],
                [-100, -100]])
    """
    if not isinstance(mtp_active, Tensor):
        return targets, row_weights
    shape, batch_size = list(mtp_active.shape), row_weights.shape[0]
    if not has_shape(mtp_active, (), (batch_size,)):
        raise ValueError(f"multi_token_prediction: expected mtp_active of shape [] or [{batch_size}], got {shape}")
    is_active = mtp_active.bool().unsqueeze(1) if shape else mtp_active.bool()
    return torch.where(is_active, targets, ignore_index), torch.where(is_active, row_weights, 0.0)


def additional_heads(
    call: Call,
    needed: str = "additional_logits",  # for the message
) -> list[Logits]:  # num_future_tokens of [batch_size, n_tokens, n_columns]
    """The call's additional_logits; [] if it has none, as it may unless mtp_active switches them on.

    Raises:
        ValueError: there are none although mtp_active asks for them, another number of them, or other rows.
        TypeError: one of them is not logits.
    """
    given, active = call.additional_logits, call.mtp_active
    if given is None:
        if not (active is None or active is False):
            raise ValueError(f"unified_loss: mtp_active needs {needed}, got None")
        return []
    heads = [given] if isinstance(given, (LinearLogits, ShardedLogits)) else list(given)
    if not heads and active is False:
        return []
    for number, head in enumerate(heads):
        check_is_logits(f"unified_loss: additional_logits[{number}]", head)
    n_depths = call.config.num_future_tokens
    if [list(head.shape[:-1]) for head in heads] != [list(call.targets_shape)] * n_depths:
        raise ValueError(
            f"unified_loss: expected additional_logits of num_future_tokens = {n_depths} times "
            f"{[*call.targets_shape, call.config.vocab_size]}, got {[list(head.shape) for head in heads]}"
        )
    return [head.unsqueeze(0) for head in heads] if call.is_flat else heads


class DepthLosses(NamedTuple):
    """What the heads of all depths give."""

    loss: Tensor  # []: the weighted sum over depths; [batch_size, n_tokens] where head_loss gives that of the rows
    terms: Tensor  # [n_terms, n_depths, batch_size, n_tokens]: TERM_NAMES, unweighted, without graph


def losses_of_heads(
    heads: LinearLogits | Sequence[Logits],  # n_depths of [batch_size, n_tokens, n_columns], or one with n_depths ahead
    rows: DepthRows,
    head_loss: HeadLoss,
) -> DepthLosses:
    """The losses of every depth. Heads that share a weight go as one batch of rows: one gradient of it, not several."""
    if isinstance(heads, LinearLogits):
        output = head_loss(heads, *rows)
        return DepthLosses(output.loss.sum(0) if output.loss.dim() else output.loss, output.terms)
    groups: list[list[int]] = []
    for number, head in enumerate(heads):
        for group in groups:
            if _share_a_weight(heads[group[0]], head):
                group.append(number)
                break
        else:
            groups.append([number])
    losses: list[Tensor] = []
    terms: dict[int, Tensor] = {}
    for group in groups:
        head = heads[group[0]]
        if len(group) == 1:
            output = head_loss(head, rows.targets[group[0]], rows.weights[group[0]])
            losses.append(output.loss)
            terms[group[0]] = output.terms
            continue
        states = torch.stack([heads[number].hidden_states for number in group])  # type: ignore[union-attr]
        of_group = (torch.stack([values[number] for number in group]) for values in rows)
        output = head_loss(head._replace(hidden_states=states), *of_group)  # type: ignore[union-attr, call-arg]
        losses.append(output.loss.sum(0) if output.loss.dim() else output.loss)
        terms |= dict(zip(group, output.terms.unbind(1), strict=True))
    return DepthLosses(torch.stack(losses).sum(0), torch.stack([terms[number] for number in range(len(heads))], 1))


def _share_a_weight(one: Logits, other: Logits) -> bool:
    if not (isinstance(one, LinearLogits) and isinstance(other, LinearLogits)):
        return False
    return (
        one.weight is other.weight and one.bias is other.bias and one.hidden_states.dtype == other.hidden_states.dtype
    )


class DepthMeans(NamedTuple):
    """Means of each depth over the rows that have a target at it; [n_depths], without graph."""

    losses: Tensor  # unweighted
    accuracies: Tensor  # how often the head's likeliest token is the target
    # how often the heads 1..k are all right, over the rows that have a target at each: how many drafted tokens a greedy
    # speculative decoder accepts is 1 + the sum over k
    acceptances: Tensor


def depth_means(
    terms: Tensor,  # [n_terms, n_depths, batch_size, n_tokens]
    targets: Tensor,  # [n_depths, batch_size, n_tokens]
    ignore_index: int,
    own_rows: Tensor | None = None,  # [batch_size, n_tokens] bool: whose terms there are; None: all
) -> DepthMeans:
    """Loss, accuracy and acceptance of each depth; 0 where no row has a target."""
    is_target = (targets != ignore_index).to(terms.dtype)
    if own_rows is not None:
        is_target = is_target * own_rows
    n_counted, n_chains = (count.sum((1, 2)).clamp_min(1) for count in (is_target, is_target.cumprod(0)))
    correct = terms[CORRECT]  # 0 where there is no target
    return DepthMeans(
        terms[MAIN_LOSS].sum((1, 2)) / n_counted,
        correct.sum((1, 2)) / n_counted,
        correct.cumprod(0).sum((1, 2)) / n_chains,
    )


def depth_metrics(means: DepthMeans) -> dict[str, Tensor]:
    """The metrics of each depth: mtp_loss_depth_1, mtp_accuracy_depth_1, mtp_acceptance_depth_1 and so on."""
    return {
        f"{name}{depth}": value
        for name, values in zip(DEPTH_METRICS, means, strict=True)
        for depth, value in enumerate(values.unbind(), start=1)
    }


def parts_of_heads(heads: LinearLogits | Sequence[Logits]) -> list[Tensor | None]:
    """The tensors that the heads are made of."""
    several = [heads] if isinstance(heads, LinearLogits) else heads
    local = [head.logits if isinstance(head, ShardedLogits) else head for head in several]
    return [part for head in local for part in (head if isinstance(head, LinearLogits) else (head,))]


def connected(
    zeros: Tensor,  # [] or [batch_size, n_tokens]
    parts: Iterable[Tensor | None],  # [...]
) -> Tensor:
    """The zeros of heads that are off, in the graph of what they would have read: each gets a gradient of zeros.

    DistributedDataParallel raises where a parameter gets none. Sums of nothing are added: of nan, too, they are 0.

    Returns:
        As zeros.

    Example:
        >>> weight = torch.full((2, 3), torch.nan, requires_grad=True)
        >>> connected(torch.zeros(()), [weight]).backward()
        >>> weight.grad
        tensor([[0., 0., 0.],
                [0., 0., 0.]])
    """
    for part in parts:
        if part is not None:
            local = part.to_local() if is_dtensor(part) else part
            zeros = zeros + local.unsqueeze(-1)[..., :0].sum().to(zeros.dtype)
    return zeros


def switched_off(
    call: Call,
    parts: Iterable[Tensor | None],  # what the heads would have read
) -> Addends:
    """The zeros of a part whose heads are off in this call."""
    means = DepthMeans(*(call.rows.weights.new_zeros(call.config.num_future_tokens) for _ in DepthMeans._fields))
    return Addends({"mtp_loss": connected(call.no_loss(), parts)}, depth_metrics(means))
