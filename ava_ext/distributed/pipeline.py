"""The loss of a pipeline's last stage."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ava_ext.meter import LossMeter

# A schedule's first step begins with a call that only asks for the shape of the gradient, and does not say so.
_SHAPE_INFERENCE = "_backward_metadata_inference"


def pipeline_loss(
    loss_fn: nn.Module,
    n_items: float | Tensor | Callable[[], float | Tensor],
    meter: LossMeter | None = None,
    **arguments: Any,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss_fn of a schedule of torch.distributed.pipelining: (logits, targets) of a micro-batch -> its share.

    The shares of all micro-batches add up to the loss of the whole batch, so the schedule has to add their gradients
    up: give it scale_grads=False. With its default, True, it divides them by the number of micro-batches.

    Args:
        loss_fn: a UnifiedLoss.
        n_items: N, the rows that count in all micro-batches of a step (and ranks): a number, a tensor of one element
            that is overwritten before each step, or a function that is asked for every micro-batch.
        meter: gets the parts of every micro-batch; LossMeter("world") can be read on the other stages too.
        arguments: further keywords of loss_fn, the same for every micro-batch.

    Example:
        >>> n_items = torch.zeros(())
        >>> schedule = ScheduleGPipe(stage, 4, loss_fn=pipeline_loss(loss_fn, n_items), scale_grads=False)
        >>> n_items.fill_((targets != -100).sum())
        >>> schedule.step(input_ids, target=targets)
    """

    def share(
        logits: Tensor,  # [micro_batch_size, n_tokens, n_columns]
        targets: Tensor,  # [micro_batch_size, n_tokens]
    ) -> Tensor:  # []
        if sys._getframe(1).f_code.co_name == _SHAPE_INFERENCE:
            return logits.sum()  # of memory that nobody has written to; neither state nor meter may see it
        n = n_items() if callable(n_items) else n_items
        if meter is None:
            return loss_fn(logits, targets, num_items_in_batch=n, **arguments)
        parts = loss_fn(logits, targets, num_items_in_batch=n, return_detailed=True, **arguments)
        meter.update(parts)
        return parts["total_loss"]

    return share
