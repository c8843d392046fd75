"""FSDP2: weights, gradients and the optimizer's state are spread over processes; head and loss are one unit.

    torchrun --nproc-per-node 2 examples/distributed_fully_sharded.py

fully_shard(model.head) gathers the head's weight once for the loss, which never makes the logits, and spreads its
gradient again. As under DistributedDataParallel, N is counted over the whole batch, and the loss is multiplied by the
number of processes, whose gradients FSDP2 averages.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as distributed
from distributed_text import SmallModel, in_process_group, train
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from ava_ext import LossMeter


def run() -> None:
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    mesh = distributed.init_device_mesh("cpu", (world_size,))
    model = SmallModel()
    for unit in (*(block.feed_forward for block in model.blocks), model.head, model):
        fully_shard(unit, mesh=mesh)

    def step(inputs: Tensor, targets: Tensor, n_items: Tensor) -> Mapping[str, Tensor]:
        parts = model(inputs.chunk(world_size)[rank], targets.chunk(world_size)[rank], n_items)
        (world_size * parts["total_loss"]).backward()
        return parts

    train(step, torch.optim.AdamW(model.parameters(), lr=3e-3), LossMeter("world"))


if __name__ == "__main__":
    in_process_group(run)
