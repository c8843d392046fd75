"""Which targets of a call count, told without its logits."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ava_ext.call import Call
from ava_ext.config import UnifiedLossConfig
from ava_ext.ops.dtensors import whole
from ava_ext.reduction import Rows


def rows_of_targets(
    config: UnifiedLossConfig,
    targets: Tensor,  # [batch_size, n_tokens] or [n_rows]
    **arguments: Any,  # of UnifiedLoss.forward: what decides which rows count
) -> Rows:
    """The rows of a call with these targets, each that counts of weight 1 (times its token weight).

    The call itself decides, so that this and the loss cannot differ. Its logits are a single number, repeated.
    """
    # every rank has the whole of DTensors, as in the call: nothing here is beside logits
    targets, *given = (whole("count_items", "targets", value, True) for value in (targets, *arguments.values()))
    arguments = dict(zip(arguments, given, strict=True))
    number = torch.empty(1, device=targets.device if isinstance(targets, Tensor) else None)
    shape = (*targets.shape, config.vocab_size) if isinstance(targets, Tensor) else (config.vocab_size,)
    absent = {name: None for name in list(inspect.signature(Call).parameters)[2:]}
    n_items = 1 if config.reduction == "mean" else None
    of_call = {"logits": number.expand(shape), "targets": targets, "num_items_in_batch": n_items, **arguments}
    return Call(config, (), **(absent | of_call)).rows
