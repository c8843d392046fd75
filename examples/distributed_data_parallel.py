"""DistributedDataParallel: each process has some of the texts, and the gradients are those of one process with all.

    torchrun --nproc-per-node 2 examples/distributed_data_parallel.py

Two things make it so, however many tokens the texts of a process have:

- N is counted over the whole batch: num_items_in_batch.
- DistributedDataParallel averages gradients over processes; their shares have to be added up. So the loss is multiplied
  by the number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as distributed
from distributed_text import SmallModel, in_process_group, train
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ava_ext import LossMeter


def run() -> None:
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    model = DistributedDataParallel(SmallModel())

    def step(inputs: Tensor, targets: Tensor, n_items: Tensor) -> Mapping[str, Tensor]:
        parts = model(inputs.chunk(world_size)[rank], targets.chunk(world_size)[rank], n_items)
        (world_size * parts["total_loss"]).backward()
        return parts

    train(step, torch.optim.AdamW(model.parameters(), lr=3e-3), LossMeter("world"))


if __name__ == "__main__":
    in_process_group(run)
