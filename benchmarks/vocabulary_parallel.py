"""Every row term of logits whose columns are spread over ranks: time of a rank, and what is communicated.

    python benchmarks/vocabulary_parallel.py [--rows 1024] [--vocab-size 50257] [--ranks 2] [--rounds 15] [--json PATH]

Each rank is a process with its share of the cores. In every round it measures forward and backward of its columns, of
the whole logits while the other ranks do the same, and of the whole logits while the others wait. Processor times leave
out what a rank waits for: on a busy machine, they say more than those of the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import row_loss
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from torch import Tensor

from ava_ext import UnifiedLoss
from ava_ext.distributed import ShardedLogits

N_CANDIDATES = 32  # of row_loss.EVERY_TERM and its negatives
VARIANTS = ("sharded", "whole_at_once", "whole_alone")
# whatever moves numbers between ranks
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "scatter",
    "send",
)


class Shard(row_loss.Case):
    """The columns [n_rows, n_local_columns] of one rank; logits are ShardedLogits of them."""

    def __init__(self, whole: row_loss.Case, rank: int, n_ranks: int) -> None:
        pieces = whole.source.tensor_split(n_ranks, dim=1)
        self.source = pieces[rank].contiguous()
        self.buffer = torch.empty_like(self.source)
        self.first_column = sum(piece.shape[1] for piece in pieces[:rank])
        self.n_columns = whole.source.shape[1]
        self.targets, self.negative_ids, self.text_shape = whole.targets, whole.negative_ids, whole.text_shape
        self.refill()


def make_loss(vocab_size: int) -> UnifiedLoss:
    return UnifiedLoss(vocab_size, primary_loss_type="standard", **row_loss.EVERY_TERM)


def loss_and_gradient(loss_fn: UnifiedLoss, case: row_loss.Case) -> tuple[Tensor, Tensor]:
    """The loss [] and the gradient of the case's columns."""
    texts = case.logits.unflatten(0, case.text_shape)
    logits = ShardedLogits(texts, "world", case.first_column, case.n_columns) if isinstance(case, Shard) else texts
    targets, negatives = (value.unflatten(0, case.text_shape) for value in (case.targets, case.negative_ids))
    loss = loss_fn(logits, targets, negative_ids=negatives)
    return loss.detach(), torch.autograd.grad(loss, case.logits)[0]


@contextlib.contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """(name, bytes that this rank gives) of each collective within."""
    found: list[tuple[str, int]] = []
    kept = {name: getattr(distributed, name) for name in COLLECTIVES if hasattr(distributed, name)}

    def counting(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            tensors = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
            found.append((name, tensors[-1].nbytes if tensors else 0))  # the output comes first, then the input
            return collective(*arguments, **options)

        return call

    for name, collective in kept.items():
        setattr(distributed, name, counting(name, collective))
    try:
        yield found
    finally:
        for name, collective in kept.items():
            setattr(distributed, name, collective)


def of_rank(rank: int, n_ranks: int, n_rows: int, vocab_size: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of clock and processor in each round, the collectives of one call, and how far results differ."""
    whole = row_loss.Case(n_rows, vocab_size, torch.float32)
    shard, loss_fn = Shard(whole, rank, n_ranks), make_loss(vocab_size)
    cases = {"sharded": shard, "whole_at_once": whole, "whole_alone": whole}
    milliseconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    processor: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in range(rounds + 2):  # two of which warm up
        first = number % len(VARIANTS)
        for name in VARIANTS[first:] + VARIANTS[:first]:
            case = cases[name]
            case.refill()
            turns = range(n_ranks) if name == "whole_alone" else [rank]
            for turn in turns:
                distributed.barrier()
                if turn != rank:
                    continue
                begin, begin_of_processor = time.perf_counter(), time.process_time()
                result = loss_and_gradient(loss_fn, case)
                elapsed, of_processor = time.perf_counter() - begin, time.process_time() - begin_of_processor
                del result
                if number >= 2:
                    milliseconds[name].append(1000 * elapsed)
                    processor[name].append(1000 * of_processor)
            distributed.barrier()
    with counted() as collectives:
        shard.refill()
        loss, gradient = loss_and_gradient(loss_fn, shard)
    whole.refill()
    whole_loss, whole_gradient = loss_and_gradient(loss_fn, whole)
    expected = whole_gradient[:, shard.first_column : shard.first_column + gradient.shape[1]]
    return {
        "milliseconds": milliseconds,
        "processor": processor,
        "collectives": collectives,
        "loss_error": float((loss - whole_loss).abs() / whole_loss.abs()),
        "gradient_error": float((gradient - expected).norm() / expected.norm()),
    }


def _process(rank: int, folder: str, n_threads: int, n_ranks: int, *sizes: int) -> None:
    torch.set_num_threads(n_threads)
    store = f"file://{folder}/store"
    distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=n_ranks, timeout=timedelta(minutes=2)
    )
    found = of_rank(rank, n_ranks, *sizes)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def measure(n_rows: int, vocab_size: int, n_ranks: int, rounds: int) -> list[dict[str, Any]]:
    """What `of_rank` finds, of every rank."""
    n_threads = max(1, torch.get_num_threads() // n_ranks)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_process, (folder, n_threads, n_ranks, n_rows, vocab_size, rounds), nprocs=n_ranks)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(n_ranks)]


def summary(ranks: list[dict[str, Any]], n_rows: int) -> dict[str, Any]:
    """Medians and ratios of paired rounds, of every rank."""

    def ratio(reference: str, kind: str = "milliseconds") -> list[float]:
        pairs = [zip(rank[kind]["sharded"], rank[kind][reference], strict=True) for rank in ranks]
        return [statistics.median(ours / other for ours, other in of) for of in pairs]

    return {
        **{name: [statistics.median(rank["milliseconds"][name]) for rank in ranks] for name in VARIANTS},
        "sharded_over_whole_at_once": ratio("whole_at_once"),
        "sharded_over_whole_alone": ratio("whole_alone"),
        "sharded_over_whole_of_processor": ratio("whole_at_once", "processor"),
        "n_collectives": [len(rank["collectives"]) for rank in ranks],
        "bytes_of_a_row": [sum(size for _, size in rank["collectives"]) / n_rows for rank in ranks],
        "loss_error": max(rank["loss_error"] for rank in ranks),
        "gradient_error": max(rank["gradient_error"] for rank in ranks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    found = summary(measure(options.rows, options.vocab_size, options.ranks, options.rounds), options.rows)
    print(
        f"[{options.rows}, {options.vocab_size}] float32, every term, {options.ranks} ranks, load {load:.1f} at first"
    )
    for name in VARIANTS:
        print(f"  {name:14}" + "".join(f"{value:9.1f} ms" for value in found[name]))
    references = {"at once": "whole_at_once", "alone": "whole_alone", "processor": "whole_of_processor"}
    for name, reference in references.items():
        ratios = "".join(f"{value:9.2f}" for value in found[f"sharded_over_{reference}"])
        print(f"  sharded / whole, {name:9}{ratios}   (target <= 0.6)")
    limit = 100 * (1 + N_CANDIDATES / 5)
    for n_collectives, n_bytes in zip(found["n_collectives"], found["bytes_of_a_row"], strict=True):
        print(f"  {n_collectives} collective, {n_bytes:.0f} bytes a row   (target 1, <= {limit:.0f})")
    print(f"  relative error of loss {found['loss_error']:.1e}, of gradient {found['gradient_error']:.1e}")
    if options.json:
        import run

        sizes = {"n_rows": options.rows, "vocab_size": options.vocab_size, "n_ranks": options.ranks}
        content = {"machine": run.describe_machine() | {"load_average": round(load, 2)}, **sizes, **found}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
