"""Errors of gradients beside those of speed: cross-entropy of rows whose target leads or trails by a gap.

    python benchmarks/accuracy.py            measures, prints the table, writes results/accuracy.json
    python benchmarks/accuracy.py --print    prints the table of results/accuracy.json

For each dtype, gap and way to compute: the relative error of the gradient at the target, and the relative L2 error of
all its other entries, against the closed form in float64 on the same logits. With L2 over the whole gradient, the target
would hide the others. A gap of 16 means that the target's logit is 16 above the others, which lie within 1 of each other;
then 1 - p of the target is V e^-16.

Losses of hidden states and a weight take part with hidden states that are the unit matrix and the logits as the
weight: its products are exact, and the gradient of the weight is that of the logits.

The last columns say whether a row's gradient has the same bits whether it is alone, or anywhere in a batch.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ava_ext import UnifiedLoss, functional
from ava_ext.bench.errors import relative_error

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
GAPS = (-16, 0, 4, 8, 12, 16, 20, 40, 80)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
N_ROWS, VOCAB_SIZE = 8, 4096
# of the loss, before the gradient is rounded to float16: keeps it from becoming subnormal, as a GradScaler does
UPSTREAM = 1024.0

Gradient = Callable[[Tensor, Tensor], Tensor]  # (logits [n_rows, vocab_size], targets [n_rows]) -> as logits


def from_logits(loss: Callable[[Tensor, Tensor], Tensor]) -> Gradient:
    def gradient(logits: Tensor, targets: Tensor) -> Tensor:
        leaf = logits.clone().requires_grad_()
        return torch.autograd.grad(UPSTREAM * loss(leaf * 1, targets), leaf)[0]

    return gradient


def from_hidden_states(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Gradient:
    def gradient(logits: Tensor, targets: Tensor) -> Tensor:
        states = torch.eye(len(logits), dtype=logits.dtype)
        weight = logits.T.contiguous().requires_grad_()  # states @ weight.T = logits
        return torch.autograd.grad(UPSTREAM * loss(states, weight, targets), weight)[0].T

    return gradient


def ways() -> dict[str, Gradient]:
    """What is compared: everything that runs on a CPU here."""
    loss_fn = UnifiedLoss(VOCAB_SIZE, primary_loss_type="standard", reduction="sum")
    found = {
        "ava_ext": from_logits(loss_fn),
        "PyTorch eager": from_logits(partial(F.cross_entropy, reduction="sum")),
        "PyTorch compiled": from_logits(torch.compile(partial(F.cross_entropy, reduction="sum"), dynamic=False)),
        "ava_ext, linear": from_hidden_states(partial(functional.linear_cross_entropy, reduction="sum")),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        for name, options in {"": {}, ", accurate": {"acc_policy": "accurate"}}.items():
            options = torch.nn.LinearCrossEntropyOptions(**options)
            loss = partial(F.linear_cross_entropy, reduction="sum", options=options)
            found["F.linear_cross_entropy" + name] = from_hidden_states(loss)
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        pass
    else:
        loss = partial(linear_cross_entropy, reduction="sum", impl="torch_compile")
        found["cut-cross-entropy, torch_compile"] = from_hidden_states(loss)
    return found


def rows(gap: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits [N_ROWS, VOCAB_SIZE] and targets; quarters, so that every dtype holds them exactly."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-4, 1, (N_ROWS, VOCAB_SIZE), generator=generator) / 4
    targets = torch.randint(VOCAB_SIZE, (N_ROWS,), generator=generator)
    logits.scatter_(-1, targets.unsqueeze(-1), float(gap))
    return logits.to(dtype), targets


def exact_gradient(logits: Tensor, targets: Tensor) -> Tensor:  # as logits, float64
    """UPSTREAM times: -rest / (1 + rest) at the target, p elsewhere; rest = sum over the others of exp(z - z_target)."""
    z, targets = logits.double(), targets.unsqueeze(-1)
    others = z.scatter(-1, targets, -math.inf)
    log_rest = others.logsumexp(-1, keepdim=True) - z.gather(-1, targets)
    return UPSTREAM * (others - z.logsumexp(-1, keepdim=True)).exp().scatter(-1, targets, -torch.sigmoid(log_rest))


def errors(gradient: Gradient, logits: Tensor, targets: Tensor) -> dict[str, float]:
    actual, expected = gradient(logits, targets).double(), exact_gradient(logits, targets)
    at_target = torch.zeros_like(expected, dtype=torch.bool).scatter_(-1, targets.unsqueeze(-1), True)
    names = {"target": at_target, "others": ~at_target}
    return {name: relative_error(actual[part], expected[part]) for name, part in names.items()}


def has_the_same_bits_everywhere(gradient: Gradient, dtype: torch.dtype) -> bool:
    """Of random rows: whether one alone, and the batch turned around, give each row the same gradient."""
    generator = torch.Generator().manual_seed(1)
    logits = (2 * torch.randn(33, VOCAB_SIZE, generator=generator)).to(dtype)
    targets = torch.randint(VOCAB_SIZE, (33,), generator=generator)
    together = gradient(logits, targets)
    alone = torch.cat([gradient(logits[i : i + 1], targets[i : i + 1]) for i in (0, 7, 32)])
    turned = gradient(logits.flip(0), targets.flip(0)).flip(0)
    return torch.equal(alone, together[[0, 7, 32]]) and torch.equal(turned, together)


def measure(dtypes: Iterable[str]) -> dict[str, Any]:
    result: dict[str, Any] = {"torch": torch.__version__, "n_rows": N_ROWS, "vocab_size": VOCAB_SIZE, "errors": []}
    for dtype in dtypes:
        for name, gradient in ways().items():
            torch.compiler.reset()
            row: dict[str, Any] = {"dtype": dtype, "way": name}
            try:
                row["gaps"] = {gap: errors(gradient, *rows(gap, DTYPES[dtype])) for gap in GAPS}
                row["same_bits"] = has_the_same_bits_everywhere(gradient, DTYPES[dtype])
            except Exception as error:  # a peer that does not run here: said, not hidden
                row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            result["errors"].append(row)
            print(f"{dtype}, {name}: {'failed' if 'failed' in row else 'measured'}", flush=True)
    return result


def table(result: dict[str, Any]) -> str:
    """The table in Markdown: for each dtype and gap 'target / others'."""
    gaps = [str(gap) for gap in GAPS]
    lines = [
        "| gradient of | dtype | " + " | ".join(f"gap {gap}" for gap in gaps) + " | same bits in any batch |",
        "| --- " * (len(gaps) + 3) + "|",
    ]
    for row in result["errors"]:
        if "failed" in row:
            cells = [row["failed"].replace("|", "\\|")] + [""] * len(gaps)
        else:
            by_gap = {str(gap): found for gap, found in row["gaps"].items()}
            cells = [f"{by_gap[gap]['target']:.0e} / {by_gap[gap]['others']:.0e}" for gap in gaps]
            cells.append("yes" if row["same_bits"] else "no")
        lines.append(f"| {row['way']} | {row['dtype']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--print", action="store_true", help="the table of the results that are there")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not options.print:
        options.json.write_text(json.dumps(measure(options.dtype), indent=1) + "\n")
    print(table(json.loads(options.json.read_text())), end="")


if __name__ == "__main__":
    main()
