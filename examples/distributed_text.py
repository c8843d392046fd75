"""What the distributed examples share: bytes of the standard library's documentation, a small model, a training loop.

The examples spread the same batches over processes in different ways, and print the same losses.
"""

from __future__ import annotations

import gc
import pydoc_data.topics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed
from small_gpt import Block
from torch import Tensor, nn

from ava_ext import LossMeter, UnifiedLoss
from ava_ext.distributed import FusedHead

END_OF_TEXT = 256
VOCAB_SIZE = 257  # bytes, and the end: no multiple of the number of processes
CONTEXT, BATCH_SIZE, WIDTH, N_STEPS = 64, 8, 64, 30


def in_process_group(run: Callable[[], None]) -> None:
    """run(), between the beginning and the end of the default group. What run has made is gone before the group goes: a
    model that outlives the group it talks through may abort its process."""
    torch.distributed.init_process_group("gloo")
    run()
    gc.collect()  # also what is part of a cycle
    torch.distributed.destroy_process_group()


def make_loss(**options: Any) -> UnifiedLoss:
    """Cross-entropy, and a push away from tokens that repeat the text."""
    return UnifiedLoss(
        VOCAB_SIZE,
        primary_loss_type="standard",
        z_loss_weight=1e-4,
        use_ngram_penalty=True,
        ngram_size=3,
        pad_token_id=END_OF_TEXT,
        **options,
    )


class SmallModel(nn.Module):
    """Two transformer layers; the head and the loss are one module, which never makes the logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # the same weights in every process
        self.embedding = nn.Embedding(VOCAB_SIZE, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, n_heads=4) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = FusedHead(nn.Linear(WIDTH, VOCAB_SIZE, bias=False), make_loss())

    def hidden_states(
        self,
        input_ids: Tensor,  # [batch_size, n_tokens]
    ) -> Tensor:  # [batch_size, n_tokens, WIDTH]
        """What the head reads."""
        hidden = self.embedding(input_ids) + self.positions.weight
        for block in self.blocks:
            hidden = block(hidden)[0]
        return self.norm(hidden)

    def forward(
        self,
        input_ids: Tensor,  # [batch_size, n_tokens]
        targets: Tensor,  # [batch_size, n_tokens]
        n_items: Tensor,  # []
    ) -> dict[str, Tensor]:
        """The loss and its parts."""
        return self.head(self.hidden_states(input_ids), targets, num_items_in_batch=n_items, return_detailed=True)


def batches() -> Iterator[tuple[Tensor, Tensor]]:  # two of [BATCH_SIZE, CONTEXT]
    """Inputs and targets, the same in every process. Texts end where they end: the rest of a row is padding."""
    texts = [text.encode() for text in pydoc_data.topics.topics.values()]
    generator = torch.Generator().manual_seed(0)
    for _ in range(N_STEPS):
        rows = torch.full((BATCH_SIZE, CONTEXT + 1), END_OF_TEXT)
        for row in rows:
            text = texts[int(torch.randint(len(texts), (), generator=generator))]
            begin = int(torch.randint(len(text), (), generator=generator))
            piece = torch.tensor(list(text[begin : begin + CONTEXT + 1]))
            row[: len(piece)] = piece
        yield rows[:, :-1], rows[:, 1:]


def train(
    step: Callable[[Tensor, Tensor, Tensor], Mapping[str, Tensor] | None],
    optimizer: torch.optim.Optimizer,
    meter: LossMeter,
) -> None:
    """Calls step(inputs, targets, N of the whole batch), which computes gradients and gives the parts of the loss.

    None: the meter has been given them.
    """
    for number, (inputs, targets) in enumerate(batches(), start=1):
        optimizer.zero_grad()
        parts = step(inputs, targets, (targets != END_OF_TEXT).sum())
        optimizer.step()
        if parts is not None:
            meter.update(parts)
        if number % 10 == 0:
            means = meter.compute()  # over 10 steps; with a group, of all processes
            meter.reset()
            if torch.distributed.get_rank() == 0:
                print(f"step {number}: loss {means['total_loss'] / 10:.5f}, perplexity {means['perplexity']:.3f}")
