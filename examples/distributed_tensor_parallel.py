"""Tensor parallel: each process has some of the columns of the logits, and the loss never gathers them.

    torchrun --nproc-per-node 2 examples/distributed_tensor_parallel.py

The head gives a DTensor in Shard(-1), which the loss takes as it is. Targets are the same in every process, and so is
the loss: nothing is multiplied, and a LossMeter needs no group.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as distributed
from distributed_text import SmallModel, in_process_group, train
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ava_ext import LossMeter


def run() -> None:
    mesh = distributed.init_device_mesh("cpu", (distributed.get_world_size(),))
    model = SmallModel()
    plan = {
        "blocks.*.feed_forward.1": ColwiseParallel(),
        "blocks.*.feed_forward.3": RowwiseParallel(),
        "head.lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, mesh, plan)

    def step(inputs: Tensor, targets: Tensor, n_items: Tensor) -> Mapping[str, Tensor]:
        logits = model.head(model.hidden_states(inputs))  # [batch_size, n_tokens, VOCAB_SIZE], Shard(-1)
        parts = model.head.loss_fn(logits, targets, num_items_in_batch=n_items, return_detailed=True)
        parts["total_loss"].backward()
        return parts

    train(step, torch.optim.AdamW(model.parameters(), lr=3e-3), LossMeter())


if __name__ == "__main__":
    in_process_group(run)
