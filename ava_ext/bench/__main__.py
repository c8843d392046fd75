"""Your sizes: the loss and its gradients by this library, PyTorch and what else is installed.

    python -m ava_ext.bench --vocab-size 32000 --hidden-size 2048 --tokens 4096 --dtype bfloat16

prints a table and writes ava_ext_bench.json and ava_ext_bench.png. Times are medians of interleaved rounds: noise of
the machine hits all variants alike. Errors are those of a batch of at most --error-tokens tokens against float64.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ava_ext import info
from ava_ext.bench import memory, report
from ava_ext.bench.errors import errors, exact
from ava_ext.bench.timing import Times, interleave, wall_clock
from ava_ext.bench.variants import DTYPES, HIDDEN_STATES, LOGITS, Case, Peers, Size, peers

WARM_UPS = 2
# a variant that takes so many times as long as ours runs in one round only
SLOW = 8


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m ava_ext.bench", description=__doc__, formatter_class=formatter)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--hidden-size", type=int, help="also from hidden states and a head of this width")
    parser.add_argument("--tokens", type=int, default=4096, help="rows of the logits")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each variant")
    parser.add_argument("--error-tokens", type=int, default=256, help="float64 is slow: errors of so many rows")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which may take a minute")
    parser.add_argument("--output", type=Path, default=Path("ava_ext_bench"), help="path of .json and .png")
    parser.add_argument("--peak-of", nargs=2, metavar=("PROBLEM", "VARIANT"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure(problem: str, size: Size, options: argparse.Namespace, progress: Any) -> report.Result:
    """Everything about one problem. A variant that fails is absent, with its error as the reason."""
    torch.compiler.reset()
    found = peers(problem, size, not options.no_compile)
    small = size._replace(n_tokens=min(size.n_tokens, options.error_tokens))
    n_variants = len(found.variants)
    memory_steps = n_variants if size.device != "cpu" or memory.is_available() else 0
    title = problem.replace("_", " ")
    task = progress.add_task(title, total=n_variants * (1 + options.rounds + WARM_UPS) + memory_steps)

    def step(doing: str) -> None:
        progress.update(task, advance=1, description=f"{title}: {doing}")

    errors_of = _errors(found, problem, small, step)
    case = Case(problem, size)

    def before() -> None:
        case.refill()
        step("times")

    calls = {name: (lambda variant=variant: variant.call(case)) for name, variant in found.variants.items()}
    stopwatch = wall_clock if size.device == "cpu" else _device_clock
    first = {}  # compilation, first touch of memory
    for name, call in calls.items():
        for _ in range(WARM_UPS):
            before()
            first[name] = stopwatch(call, 1)
    every = {name: options.rounds for name, time in first.items() if time > SLOW * first["ours"]}
    times = interleave(calls, rounds=options.rounds, before=before, every=every, warm_ups=0, stopwatch=stopwatch)
    rows = {}
    for name, variant in found.variants.items():
        extra = None
        if memory_steps:
            step("memory")
            extra = _peak(problem, name, size, case)
        rows[name] = {**_row(times, name), "label": variant.label, "extra_bytes": extra, "errors": errors_of[name]}
    progress.update(task, completed=progress.tasks[task].total, description=title)
    shape = f"[{size.n_tokens}, {size.vocab_size}]"
    if problem == HIDDEN_STATES:
        shape = f"[{size.n_tokens}, {size.hidden_size}] x {size.vocab_size}"
    return {
        "problem": problem,
        "title": f"from {title} {shape}, {size.dtype}, on {size.device}",
        "variants": rows,
        "absent": found.absent,
        "error_names": list(next(iter(errors_of.values()))),
        "error_note": f"Errors against float64, of {small.n_tokens} tokens: relative, L2 of a gradient.",
    }


def _errors(found: Peers, problem: str, size: Size, step: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Errors of each variant; those that cannot run here move to found.absent."""
    case = Case(problem, size)
    expected = exact(case)
    measured = {}
    for name, variant in list(found.variants.items()):
        step(f"errors of {variant.label}")
        try:
            measured[name] = errors(variant, case, expected)
        except Exception as error:
            if name == "ours":
                raise
            found.absent[name] = f"{variant.label}: {type(error).__name__}: {error}".splitlines()[0][:200]
            del found.variants[name]
    return measured


def _row(times: Times, name: str) -> dict[str, Any]:
    return {
        "median_ms": times.median(name),
        "quartiles_ms": times.quartiles(name),
        "time_over_ours": times.ratio(name, "ours"),
        "milliseconds": times.milliseconds[name],
    }


def _device_clock(call: Callable[[], object], repeats: int) -> float:
    """Time of a call on the GPU, ms."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        result = call()
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end) / repeats


def _peak(problem: str, name: str, size: Size, case: Case) -> int | None:
    """Peak extra memory, bytes. On the CPU in a process of its own, whose allocator has kept nothing yet."""
    if size.device != "cpu":
        case.refill()
        return memory.extra_bytes_on_gpu(lambda: peers(problem, size).variants[name].call(case))
    command = [sys.executable, "-m", "ava_ext.bench", "--peak-of", problem, name, "--tokens", str(size.n_tokens)]
    command += ["--vocab-size", str(size.vocab_size), "--dtype", size.dtype, "--device", size.device]
    command += ["--hidden-size", str(size.hidden_size)] if size.hidden_size else []
    result = subprocess.run(command, capture_output=True, text=True)
    return int(result.stdout.split()[-1]) if result.returncode == 0 else None


def _print_peak(problem: str, name: str, size: Size) -> None:
    variant = peers(problem, size).variants[name]
    # code is loaded, and nothing of full size has been in use; a compiled variant compiles for its own size
    first = size if variant.is_compiled else size._replace(n_tokens=2)
    for _ in range(2):
        variant.call(Case(problem, first))
    case = Case(problem, size)
    print(memory.extra_bytes(lambda: variant.call(case)))


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, writes. Returns the exit status."""
    options = parse_arguments(arguments)
    size = Size(options.tokens, options.vocab_size, options.hidden_size, options.dtype, options.device)
    if options.peak_of:
        problem, name = options.peak_of
        _print_peak(problem, name, size)
        return 0
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        print("ava_ext.bench: expected rich to be installed; get it with pip install 'ava_ext[bench]'", file=sys.stderr)
        return 1
    console = Console()
    machine = info.collect(check=False)
    console.print(f"{machine['machine']['cpu']}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    for problem in (LOGITS, *([HIDDEN_STATES] if size.hidden_size else [])):
        with Progress(*columns, console=console, transient=True) as progress:
            results.append(measure(problem, size, options, progress))
        report.print_table(results[-1], console)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    json_path, png_path = (options.output.with_name(options.output.name + end) for end in (".json", ".png"))
    json_path.write_text(json.dumps({"size": size._asdict(), "machine": machine, "results": results}, indent=1) + "\n")
    console.print(f"written: {json_path}", report.write_png(results, png_path) or f"and {png_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
