"""Errors of gradients beside those of speed: cross-entropy of rows whose target leads or trails by a gap.

    python benchmarks/accuracy.py            measures, prints the table, writes results/accuracy.json
    python benchmarks/accuracy.py --print    prints the table of results/accuracy.json

For each dtype, gap and way to compute: the relative L2 error of the gradient at the targets, and that of all its other
entries, against the closed form in float64 on the same logits. In a norm of the whole gradient, the target would hide
the others. A gap of 16 means that the target's logit is 16 above the others, which lie within 1 of each other; then
1 - p of the target is about V e^-16.

Losses of hidden states and a weight take part with hidden states that are the unit matrix and the logits as the
weight: its products are exact, and the gradient of the weight is that of the logits.

The last column says whether a row's gradient has the same bits alone and anywhere in a batch; for hidden states that is
the gradient of the states, with random states and weight, so that the matrix products take part.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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

HIDDEN_SIZE = 64  # of the test of bits


class Way(NamedTuple):
    """A sum of losses over rows: of (logits, targets) or, if linear, of (hidden states, weight, targets)."""

    loss: Callable[..., Tensor]
    is_linear: bool = False

    def gradient(self, logits: Tensor, targets: Tensor) -> Tensor:
        """UPSTREAM times that of logits [n_rows, vocab_size]."""
        if not self.is_linear:
            leaf = logits.clone().requires_grad_()
            return torch.autograd.grad(UPSTREAM * self.loss(leaf * 1, targets), leaf)[0]
        states = torch.eye(len(logits), dtype=logits.dtype)
        weight = logits.T.contiguous().requires_grad_()  # states @ weight.T = logits
        return torch.autograd.grad(UPSTREAM * self.loss(states, weight, targets), weight)[0].T

    def gradient_of_rows(self, rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """That of random hidden states, or of their logits, as rows [n_rows, ...]."""
        if not self.is_linear:
            return self.gradient(rows, targets)
        leaf = rows.clone().requires_grad_()
        return torch.autograd.grad(UPSTREAM * self.loss(leaf, weight, targets), leaf)[0]


def ways() -> dict[str, Way]:
    """What is compared: everything that runs on a CPU here."""
    loss_fn = UnifiedLoss(VOCAB_SIZE, primary_loss_type="standard", reduction="sum")
    found = {
        "ava_ext": Way(loss_fn),
        "PyTorch eager": Way(partial(F.cross_entropy, reduction="sum")),
        "PyTorch compiled": Way(torch.compile(partial(F.cross_entropy, reduction="sum"), dynamic=False)),
        "ava_ext, linear": Way(partial(functional.linear_cross_entropy, reduction="sum"), is_linear=True),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        for name, options in {"": {}, ", accurate": {"acc_policy": "accurate"}}.items():
            options = torch.nn.LinearCrossEntropyOptions(**options)
            loss = partial(F.linear_cross_entropy, reduction="sum", options=options)
            found["F.linear_cross_entropy" + name] = Way(loss, is_linear=True)
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        pass
    else:
        loss = partial(linear_cross_entropy, reduction="sum", impl="torch_compile")
        found["cut-cross-entropy, torch_compile"] = Way(loss, is_linear=True)
    return found


def rows(gap: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits [N_ROWS, VOCAB_SIZE] and targets; quarters, so that every dtype holds them exactly."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-4, 1, (N_ROWS, VOCAB_SIZE), generator=generator) / 4
    targets = torch.randint(VOCAB_SIZE, (N_ROWS,), generator=generator)
    logits.scatter_(-1, targets.unsqueeze(-1), float(gap))
    return logits.to(dtype), targets


def exact_gradient(logits: Tensor, targets: Tensor) -> Tensor:  # as logits, float64
    """UPSTREAM times: -rest / (1 + rest) at the target, p elsewhere; rest = sum over the others of e^(z - z_target)."""
    z, targets = logits.double(), targets.unsqueeze(-1)
    others = z.scatter(-1, targets, -math.inf)
    log_rest = others.logsumexp(-1, keepdim=True) - z.gather(-1, targets)
    return UPSTREAM * (others - z.logsumexp(-1, keepdim=True)).exp().scatter(-1, targets, -torch.sigmoid(log_rest))


def errors(way: Way, logits: Tensor, targets: Tensor) -> dict[str, float]:
    actual, expected = way.gradient(logits, targets).double(), exact_gradient(logits, targets)
    at_target = torch.zeros_like(expected, dtype=torch.bool).scatter_(-1, targets.unsqueeze(-1), True)
    names = {"target": at_target, "others": ~at_target}
    return {name: relative_error(actual[part], expected[part]) for name, part in names.items()}


def has_the_same_bits_everywhere(way: Way, dtype: torch.dtype) -> bool:
    """Of random rows: whether one alone, and the batch turned around, give each row the same gradient."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return (2 * torch.randn(shape, generator=generator)).to(dtype)

    weight = normal(VOCAB_SIZE, HIDDEN_SIZE) / 8
    rows = normal(33, HIDDEN_SIZE if way.is_linear else VOCAB_SIZE)
    targets = torch.randint(VOCAB_SIZE, (33,), generator=generator)
    together = way.gradient_of_rows(rows, weight, targets)
    turned = way.gradient_of_rows(rows.flip(0), weight, targets.flip(0)).flip(0)
    some = (0, 7, 32)
    alone = torch.cat([way.gradient_of_rows(rows[i : i + 1], weight, targets[i : i + 1]) for i in some])
    return torch.equal(alone, together[list(some)]) and torch.equal(turned, together)


def measure(dtypes: Iterable[str]) -> dict[str, Any]:
    result: dict[str, Any] = {"torch": torch.__version__, "n_rows": N_ROWS, "vocab_size": VOCAB_SIZE, "errors": []}
    for dtype in dtypes:
        for name, way in ways().items():
            torch.compiler.reset()
            row: dict[str, Any] = {"dtype": dtype, "way": name}
            try:
                row["gaps"] = {gap: errors(way, *rows(gap, DTYPES[dtype])) for gap in GAPS}
                row["same_bits"] = has_the_same_bits_everywhere(way, DTYPES[dtype])
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
    parser.add_argument("--print", action="store_true", help="the table of the existing results")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not options.print:
        options.json.write_text(json.dumps(measure(options.dtype), indent=1) + "\n")
    print(table(json.loads(options.json.read_text())), end="")


if __name__ == "__main__":
    main()
