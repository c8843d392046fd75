"""Pipeline: each process has some of the layers, and the last one computes the loss of every micro-batch.

    torchrun --nproc-per-node 2 examples/distributed_pipeline.py

Micro-batches have different numbers of tokens: each gets N of the whole batch, their shares add up to its loss, and the
schedule adds up their gradients (scale_grads=False).
"""

from __future__ import annotations

import torch
import torch.distributed as distributed
from distributed_text import BATCH_SIZE, SmallModel, in_process_group, train
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from ava_ext import LossMeter
from ava_ext.distributed import pipeline_loss


class FirstStage(nn.Module):
    """Embedding and the first layer."""

    def __init__(self, model: SmallModel) -> None:
        super().__init__()
        self.embedding, self.positions, self.block = model.embedding, model.positions, model.blocks[0]

    def forward(
        self,
        input_ids: Tensor,  # [micro_batch_size, n_tokens]
    ) -> Tensor:  # [micro_batch_size, n_tokens, WIDTH]
        return self.block(self.embedding(input_ids) + self.positions.weight)[0]


class LastStage(nn.Module):
    """The second layer and the head."""

    def __init__(self, model: SmallModel) -> None:
        super().__init__()
        self.block, self.norm, self.lm_head = model.blocks[1], model.norm, model.head.lm_head

    def forward(
        self,
        hidden: Tensor,  # [micro_batch_size, n_tokens, WIDTH]
    ) -> Tensor:  # [micro_batch_size, n_tokens, VOCAB_SIZE]
        return self.lm_head(self.norm(self.block(hidden)[0]))


def run() -> None:
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    if world_size != 2:
        raise SystemExit(f"distributed_pipeline: expected 2 processes, one for each stage, got {world_size}")
    model, meter = SmallModel(), LossMeter("world")
    module = FirstStage(model) if rank == 0 else LastStage(model)
    stage = PipelineStage(module, rank, world_size, torch.device("cpu"))
    n_items = torch.zeros((), dtype=torch.int64)
    loss_fn = pipeline_loss(model.head.loss_fn, n_items, meter)
    schedule = ScheduleGPipe(stage, BATCH_SIZE // 2, loss_fn=loss_fn, scale_grads=False)

    def step(inputs: Tensor, targets: Tensor, n: Tensor) -> None:
        n_items.copy_(n)
        if rank == 0:
            schedule.step(inputs)
        else:
            schedule.step(target=targets)

    train(step, torch.optim.AdamW(module.parameters(), lr=3e-3), meter)


if __name__ == "__main__":
    in_process_group(run)
