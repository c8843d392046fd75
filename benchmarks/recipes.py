"""Log-probabilities of answers and a DPO step from hidden states: ours, and what a trainer does without it.

    python benchmarks/recipes.py [N_ANSWERS N_TOKENS HIDDEN_SIZE VOCAB_SIZE]

prints time and peak extra memory of a forward and backward of each variant. Half of each answer's row is prompt.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import peak_memory
import torch
import torch.nn.functional as F
from torch import Tensor

from ava_ext import LinearLogits, token_log_probs
from ava_ext.bench.timing import interleave

SIZE = (8, 256, 768, 32000)  # n_answers, n_tokens, hidden_size, vocab_size


class Case:
    """Hidden states of pairs of answers, a head, labels that are -100 in the prompts, and a reference."""

    def __init__(self, n_answers: int, n_tokens: int, hidden_size: int, vocab_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.states = torch.randn(n_answers, n_tokens, hidden_size, generator=generator).requires_grad_()
        weight = torch.randn(vocab_size, hidden_size, generator=generator) * hidden_size**-0.5
        self.weight = weight.requires_grad_()
        self.labels = torch.randint(0, vocab_size, (n_answers, n_tokens), generator=generator)
        self.labels[:, : n_tokens // 2] = -100
        # log-probabilities of the answers
        self.reference = -10 * torch.rand(n_answers, generator=generator)


def dpo_loss(
    log_probs: Tensor,  # [n_answers, n_tokens], 0 outside of answers
    reference: Tensor,  # [n_answers]
) -> Tensor:
    """-log sigmoid of the difference of the log ratios; the chosen answers come first."""
    chosen, rejected = (log_probs.sum(-1) - reference).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def _gathered(log_probs: Tensor, labels: Tensor) -> Tensor:
    chosen = log_probs.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels == -100, 0.0, chosen)


def whole(case: Case) -> Tensor:
    """log_softmax of all logits."""
    return _gathered(F.linear(case.states, case.weight).log_softmax(-1), case.labels)


def selective(case: Case) -> Tensor:
    """The chosen logit less the log-sum-exp, one answer at a time: no log_softmax, but the logits as a whole."""
    logits = F.linear(case.states, case.weight)
    lse = torch.stack([answer.logsumexp(-1) for answer in logits])
    return torch.where(case.labels == -100, 0.0, _gathered(logits, case.labels) - lse)


def ours(case: Case) -> Tensor:
    """token_log_probs of LinearLogits."""
    return token_log_probs(LinearLogits(case.states, case.weight), case.labels)[0]


VARIANTS: dict[str, Callable[[Case], Tensor]] = {"log_softmax": whole, "selective": selective, "ours": ours}


def step(case: Case, variant: str) -> tuple[Tensor, ...]:
    """The loss, and the gradients of hidden states and weight."""
    loss = dpo_loss(VARIANTS[variant](case), case.reference)
    return loss, *torch.autograd.grad(loss, (case.states, case.weight))


def extra_memory(variant: str, size: tuple[int, ...]) -> int:
    """Peak extra memory of a step in bytes, in a process of its own.

    Raises:
        RuntimeError: with what the process wrote, if it failed.
    """
    command = [sys.executable, __file__, *map(str, size), variant]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"extra_memory of {variant}: {result.stderr}")
    return int(result.stdout.split()[-1])


def main(size: tuple[int, ...], rounds: int = 5) -> None:
    """Prints the table."""
    case = Case(*size)
    times = interleave({name: lambda name=name: step(case, name) for name in VARIANTS}, rounds=rounds, warm_ups=1)
    print("[{}, {}, {}] x {}: a DPO step, forward and backward".format(*size))
    for name in VARIANTS:
        memory = f"{extra_memory(name, size) / 1e6:8.0f} MB" if peak_memory.is_available() else ""
        print(f"  {name:12} {times.median(name):8.0f} ms  {times.ratio(name, 'ours'):5.2f} x ours  {memory}")


if __name__ == "__main__":
    numbers = tuple(int(number) for number in sys.argv[1:5]) or SIZE
    if len(sys.argv) == 6:
        step(Case(2, 4, 8, 64), sys.argv[5])  # code is loaded; nothing of full size has been in use
        measured = Case(*numbers)
        print(peak_memory.extra_bytes(lambda: step(measured, sys.argv[5])))
    else:
        main(numbers)
