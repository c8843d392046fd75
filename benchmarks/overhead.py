"""What does not grow with the logits: the Python side of a call, and the search for repetition candidates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from row_loss import EVERY_TERM, N_NEGATIVES
from torch import Tensor

from ava_ext import UnifiedLoss, repetition_candidates
from ava_ext.bench.timing import Times, interleave


def python_side(rounds: int) -> Times:
    """One call on logits [2, 4, 64], and the same with its backward ("<name>+backward"): Python and dispatch."""
    logits = torch.randn(2, 4, 64, requires_grad=True) * 1
    targets = torch.randint(1, 64, (2, 4))
    negative_ids = torch.randint(0, 64, (2, 4, N_NEGATIVES))

    def unified(options: dict[str, Any], **inputs: Tensor) -> Callable[[], Tensor]:
        loss_fn = UnifiedLoss(64, **options)
        return lambda: loss_fn(logits, targets, **inputs)

    standard = {"primary_loss_type": "standard"}
    forwards: dict[str, Callable[[], Tensor]] = {
        "cross_entropy": lambda: F.cross_entropy(logits.view(-1, 64), targets.view(-1)),
        "ours": unified(standard),
        "every_term": unified({**standard, **EVERY_TERM}),
        "every_term_negatives": unified({**standard, **EVERY_TERM}, negative_ids=negative_ids),
        "every_term_negatives_adaptive_temperature": unified(EVERY_TERM, negative_ids=negative_ids),
    }

    def with_backward(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), logits)

    backwards = {f"{name}+backward": with_backward(forward) for name, forward in forwards.items()}
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waking a second thread would cost more than these sizes
    try:
        return interleave({**forwards, **backwards}, rounds=rounds, repeats=200, warm_ups=50)
    finally:
        torch.set_num_threads(n_threads)


def repetition(rounds: int) -> Times:
    """n-gram candidates, n = 4, of [8, 4096] tokens: random, Zipf-distributed and constant text over 50257 ids."""
    vocab_size, shape = 50257, (8, 4096)
    generator = torch.Generator().manual_seed(0)
    frequencies = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    texts = {
        "random": torch.randint(0, vocab_size, shape, generator=generator),
        "zipf": torch.multinomial(frequencies, shape[0] * shape[1], True, generator=generator).view(shape),
        "constant": torch.full(shape, 7),
    }
    weights = torch.tensor([0.5, 1.0, 0.05, 0.1])

    def search(text: Tensor) -> Callable[[], object]:  # [8, 4096]
        return lambda: repetition_candidates(text, text, weights=weights, vocab_size=vocab_size, use_ngram_penalty=True)

    return interleave({name: search(text) for name, text in texts.items()}, rounds=rounds)
