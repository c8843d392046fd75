"""The loss of a pipeline's last stage."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ava_ext.meter import LossMeter

# A schedule's first step begins with a call that only asks for the shape of the gradient, and does not say so.
_SHAPE_INFERENCE = "_backward_metadata_inference"


def pipeline_loss(
    loss_fn: nn.Module,
    n_items: float | Tensor | Callable[[], float | Tensor],
    meter: LossMeter | None = None,
    outputs: Sequence[str] = ("logits",),
    **arguments: Any,
) -> Callable[[Any, Tensor], Tensor]:
    """The loss_fn of a schedule of torch.distributed.pipelining: (outputs, targets) of a micro-batch -> its share.

    The shares of all micro-batches add up to the loss of the whole batch, so the schedule has to add up their
    gradients: give it scale_grads=False. With its default, True, it divides them by the number of micro-batches.

    Args:
        loss_fn: a UnifiedLoss. One with parameters (heads of its own) must be a submodule of the last stage's module:
            zero-bubble schedules compute the gradients of the stages' own parameters, and of no others.
        n_items: N, the rows that count in all micro-batches of a step (and ranks): a number, a tensor of one element
            that is overwritten before each step, or a function that is asked for every micro-batch.
        meter: gets the parts of every micro-batch; LossMeter("world") can be read on the other stages too.
        outputs: the names of the arguments of loss_fn that the last stage gives, in the order of its outputs. A stage
            that gives hidden states, with lm_head_weight among the arguments here, never has logits. A stage can hand
            on what it gets as a keyword from schedule.step (input_ids, negative_ids, ...).
        arguments: further keywords of loss_fn, the same for every micro-batch.

    Raises:
        ValueError: when called: another number of outputs.

    Example:
        >>> n_items = torch.zeros(())
        >>> schedule = ScheduleGPipe(stage, 4, loss_fn=pipeline_loss(loss_fn, n_items), scale_grads=False)
        >>> n_items.fill_((targets != -100).sum())
        >>> schedule.step(input_ids, target=targets)
    """
    outputs = tuple(outputs)

    def share(
        given: Tensor | tuple[Tensor, ...],  # of a micro-batch
        targets: Tensor,  # [micro_batch_size, n_tokens]
    ) -> Tensor:  # []
        tensors = given if isinstance(given, (tuple, list)) else (given,)
        if len(tensors) != len(outputs):
            raise ValueError(
                f"pipeline_loss: expected {len(outputs)} outputs of the last stage, {outputs}, got {len(tensors)}: "
                "name all that it gives in outputs="
            )
        if sys._getframe(1).f_code.co_name == _SHAPE_INFERENCE:
            # of memory that nobody has written to; neither state nor meter may see it
            return torch.stack([tensor.sum() for tensor in tensors if tensor.requires_grad]).sum()
        call = dict(zip(outputs, tensors, strict=True)) | arguments
        call |= {"targets": targets, "num_items_in_batch": n_items() if callable(n_items) else n_items}
        if meter is None:
            return loss_fn(**call)
        parts = loss_fn(**call, return_detailed=True)
        meter.update(parts)
        return parts["total_loss"]

    return share
