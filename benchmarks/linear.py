"""The last linear layer and the loss together: ours, PyTorch's ways, and the bare matrix products as the yardstick.

    python benchmarks/linear.py VARIANT N_ROWS HIDDEN_SIZE VOCAB_SIZE DTYPE

prints the peak extra memory of one variant, in bytes (see peak_memory.py).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import peak_memory
import torch
import torch.nn.functional as F
from row_loss import DTYPES, EVERY_TERM, N_NEGATIVES
from torch import Tensor, nn

from ava_ext import UnifiedLoss
from ava_ext.bench.timing import Times, interleave
from ava_ext.ops.linear_logits import rows_of_a_chunk

SIZES = ((2048, 768, 50257), (4096, 2048, 32000))  # n_rows, hidden_size, vocab_size
N_DEPTHS = 3  # of multi-token prediction


class Case:
    """Hidden states, a head and targets of one size and dtype."""

    def __init__(
        self,
        n_rows: int,
        hidden_size: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        to = {"generator": generator, "device": device}
        self.hidden_states = torch.randn(n_rows, hidden_size, **to).to(dtype).requires_grad_()
        weight = torch.randn(vocab_size, hidden_size, **to) * (2 / hidden_size**0.5)
        self.weight = weight.to(dtype).requires_grad_()
        words = torch.randint(1, vocab_size, (16,), **to)  # a text that repeats itself
        self.targets = words[torch.randint(0, 16, (n_rows,), **to)]
        self.negative_ids = torch.randint(0, vocab_size, (n_rows, N_NEGATIVES), **to)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size


class Variant(NamedTuple):
    """One way from hidden states and weight to the loss [] and the gradients of both."""

    label: str
    call: Callable[[], object]
    is_compiled: bool = False


def with_gradients(case: Case, loss: Callable[[Tensor, Tensor], Tensor], parameters: Any = ()) -> Callable[[], object]:
    def call() -> tuple[Tensor, ...]:
        value = loss(case.hidden_states, case.weight)
        return value, *torch.autograd.grad(value, (case.hidden_states, case.weight, *parameters), allow_unused=True)

    return call


def _products(case: Case) -> Callable[[], object]:
    """The three products of a chunk, and nothing else: logits, gradient of hidden states, gradient of weight."""
    states, weight = case.hidden_states.detach(), case.weight.detach()
    chunk_rows = rows_of_a_chunk(len(states), len(weight), states.dtype, states.device, None)

    def call() -> tuple[Tensor, Tensor]:
        grad_states, grad_weight = torch.empty_like(states), torch.zeros_like(weight)
        logits = states.new_empty(chunk_rows, case.vocab_size)
        for begin in range(0, len(states), chunk_rows):
            rows = slice(begin, begin + chunk_rows)
            chunk = logits[: len(states[rows])]
            torch.mm(states[rows], weight.t(), out=chunk)
            torch.mm(chunk, weight, out=grad_states[rows])
            if states.dtype == torch.bfloat16:
                torch.mm(
                    chunk.t(), states[rows], out=grad_weight
                )  # addmm_ would round at every chunk: slower, not better
            else:
                grad_weight.addmm_(chunk.t(), states[rows])
        return grad_states, grad_weight

    return call


def _ours(case: Case, **options: Any) -> Callable[[], object]:
    loss_fn = UnifiedLoss(case.vocab_size, primary_loss_type="standard", **options).to(case.weight.device)
    return with_gradients(
        case, lambda states, weight: loss_fn(targets=case.targets, hidden_states=states, lm_head_weight=weight)
    )


def _ours_with_half(case: Case) -> Callable[[], object]:
    """Every second row is a prompt's: ignored."""
    loss_fn = UnifiedLoss(case.vocab_size, primary_loss_type="standard").to(case.weight.device)
    targets = case.targets.clone()
    targets[::2] = -100
    most = len(targets) // 2
    return with_gradients(
        case,
        lambda states, weight: loss_fn(
            targets=targets, hidden_states=states, lm_head_weight=weight, max_counted_rows=most
        ),
    )


def _ours_with_every_term(case: Case) -> Callable[[], object]:
    loss_fn = UnifiedLoss(case.vocab_size, primary_loss_type="standard", **EVERY_TERM).to(case.weight.device)
    targets, negative_ids = case.targets.unsqueeze(0), case.negative_ids.unsqueeze(0)
    return with_gradients(
        case,
        lambda states, weight: loss_fn(
            targets=targets, hidden_states=states.unsqueeze(0), lm_head_weight=weight, negative_ids=negative_ids
        ),
    )


def _torch_options(case: Case) -> dict[str, Variant]:
    """F.linear_cross_entropy with its chunking options, where this torch has it."""
    options_type = getattr(nn, "LinearCrossEntropyOptions", None)
    if options_type is None:
        return {}
    choices = {
        "auto": options_type(),
        "accurate": options_type(acc_policy="accurate"),
        "large": options_type(acc_policy="accurate", chunking_method="aspect_ratio:1"),
    }

    def loss(states: Tensor, weight: Tensor, options: Any) -> Tensor:
        return F.linear_cross_entropy(states, weight, case.targets, options=options)

    return {
        f"torch_{name}": Variant(
            f"F.linear_cross_entropy, {name}", with_gradients(case, partial(loss, options=options))
        )
        for name, options in choices.items()
    }


def _cut_cross_entropy(case: Case) -> dict[str, Variant]:
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        return {}
    loss = partial(linear_cross_entropy, targets=case.targets, impl="torch_compile")
    return {"cut": Variant("cut-cross-entropy, torch_compile", with_gradients(case, loss), is_compiled=True)}


def make_variants(case: Case) -> dict[str, Variant]:
    """All variants of one head, by the name they have in the JSON."""

    def plain(states: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(states, weight), case.targets)

    return {
        "products": Variant("the three matrix products alone", _products(case)),
        "eager": Variant("F.linear + F.cross_entropy", with_gradients(case, plain)),
        "compiled": Variant(
            "F.linear + F.cross_entropy, compiled",
            with_gradients(case, torch.compile(plain, dynamic=False, fullgraph=True)),
            is_compiled=True,
        ),
        **_torch_options(case),
        **_cut_cross_entropy(case),
        "ours": Variant("UnifiedLoss", _ours(case)),
        "ours_half": Variant("UnifiedLoss, half of the rows ignored", _ours_with_half(case)),
        "ours_terms": Variant("UnifiedLoss, every term", _ours_with_every_term(case)),
    }


def make_mtp_variants(case: Case) -> dict[str, Variant]:
    """Multi-token prediction with N_DEPTHS heads, beside one head without."""
    loss_fn = UnifiedLoss(
        case.vocab_size,
        case.hidden_size,
        primary_loss_type="standard",
        use_mtp=True,
        num_future_tokens=N_DEPTHS,
        mtp_weight=0.3,
    ).to(case.weight.dtype)
    mtp, targets = loss_fn.mtp, case.targets.unsqueeze(0)
    assert mtp is not None

    def ours(states: Tensor, weight: Tensor) -> Tensor:
        return loss_fn(targets=targets, hidden_states=states.unsqueeze(0), lm_head_weight=weight)

    def eager(states: Tensor, weight: Tensor) -> Tensor:
        loss = F.cross_entropy(F.linear(states, weight), case.targets)
        normed = mtp.norm(states)
        for k, head in enumerate(mtp.heads, start=1):
            depth = F.cross_entropy(head(normed)[:-k], case.targets[k:], reduction="sum")
            loss = loss + 0.3 / N_DEPTHS * depth / len(case.targets)
        return loss

    parameters = list(loss_fn.parameters())
    return {
        "ours": Variant("UnifiedLoss", _ours(case)),
        "mtp_eager": Variant("3 heads of nn.Linear, eager", with_gradients(case, eager, parameters)),
        "mtp_ours": Variant("UnifiedLoss, 3 heads", with_gradients(case, ours, parameters)),
    }


def measure(make: Callable[[Case], dict[str, Variant]], case: Case, rounds: int) -> tuple[Times, dict[str, Variant]]:
    """Times of forward and backward of every variant."""
    torch.compiler.reset()
    variants = make(case)
    times = interleave({name: variant.call for name, variant in variants.items()}, rounds=rounds, warm_ups=1)
    return times, variants


def extra_memory(variant: str, n_rows: int, hidden_size: int, vocab_size: int, dtype: str) -> int:
    """Peak extra memory of a variant in bytes, without the gradients it returns; in a process of its own.

    Raises:
        RuntimeError: with what the process wrote, if it failed.
    """
    arguments = [variant, str(n_rows), str(hidden_size), str(vocab_size), dtype]
    result = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"extra_memory of {variant}: {result.stderr}")
    return int(result.stdout.split()[-1])


def _measure_memory(name: str, n_rows: int, hidden_size: int, vocab_size: int, dtype: str) -> int:
    make = make_mtp_variants if name.startswith("mtp_") else make_variants
    case = Case(n_rows, hidden_size, vocab_size, DTYPES[dtype])
    variant = make(case)[name]
    if variant.is_compiled:
        variant.call()
    else:  # code is loaded; nothing of full size has been in use
        make(Case(8, 16, 64, DTYPES[dtype]))[name].call()
    returned: list[object] = []
    extra = peak_memory.extra_bytes(lambda: returned.append(variant.call()))
    gradients = [value for value in returned[0] if isinstance(value, Tensor)]  # type: ignore[attr-defined]
    return extra - sum(gradient.numel() * gradient.element_size() for gradient in gradients)


if __name__ == "__main__":
    print(_measure_memory(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]))
