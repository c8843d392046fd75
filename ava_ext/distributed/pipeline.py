"""The loss of a pipeline's last stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def pipeline_loss(
    loss_fn: nn.Module,
    n_items: float | Tensor | Callable[[], float | Tensor],
    **arguments: Any,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss_fn of a schedule of torch.distributed.pipelining: (logits, targets) of a micro-batch -> its share.

    The shares of all micro-batches add up to the loss of the whole batch, so the schedule has to add their gradients
    up: give it scale_grads=False. With its default, True, it divides them by the number of micro-batches.

    Args:
        loss_fn: a UnifiedLoss.
        n_items: N, the rows that count in all micro-batches of a step (and ranks): a number, a tensor of one element
            that is overwritten before each step, or a function that is asked for every micro-batch.
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
        n = n_items() if callable(n_items) else n_items
        return loss_fn(logits, targets, num_items_in_batch=n, **arguments)

    return share
