"""The benchmark of a GPU: prints tables beside the targets, writes JSON. README.md says how to read them.

    python benchmarks/gpu.py [rows] [linear] [router] [sweep]

With --device cpu --quick it is a dry run over tiny sizes: everything runs, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gpu_linear
import gpu_peers
import gpu_router
import gpu_rows
import torch
from gpu_timing import DeviceLostError, Outcome
from row_loss import Variant
from run import describe_machine, print_verdicts, summary
from targets import Verdict

from ava_ext import build_info

PARTS = ("rows", "linear", "router", "sweep")
# on both sides of where another kernel, or a larger cluster, takes the rows in 16 bits
SWEPT_VOCAB_SIZES = (256, 1024, 2048, 4096, 8192, 16384, 49152, 57344, 98304, 131072, 151936, 200064)
Progress = Callable[[dict[str, Any], Outcome], None]  # a case's size and what its first rounds gave
ROOT = Path(__file__).resolve().parent.parent


class Result(NamedTuple):
    """One case of a part, as it is printed and stored."""

    size: dict[str, Any]
    outcome: Outcome
    variants: dict[str, Variant]
    lines: list[str]
    verdicts: list[Verdict]
    further: dict[str, Any]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few rounds")
    parser.add_argument("--dtype", nargs="+", choices=list(gpu_rows.DTYPES), default=list(gpu_rows.DTYPES))
    parser.add_argument("--vocab-size", nargs="+", type=int, help="of rows and sweep; default: all")
    parser.add_argument("--n-rows", nargs="+", type=int, help="of rows; default: all")
    parser.add_argument("--rounds", type=int, help="default: 20, or 3 with --quick")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure what torch.compile has to compile too",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="of <GPU>.json, in which parts add up; default: results beside this file, with --quick build/gpu",
    )
    parsed = parser.parse_args(arguments)
    if unknown := set(parsed.parts) - set(PARTS):
        parser.error(f"expected parts of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    parsed.parts = parsed.parts or list(PARTS)
    parsed.rounds = parsed.rounds or (3 if parsed.quick else 20)
    if parsed.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("found no GPU that torch can use; --device cpu --quick is a dry run")
        if build_info()["cuda"].startswith("none"):
            parser.error(f"ava_ext has no CUDA kernels ({build_info()['cuda']}): build it where nvcc is on PATH")
    return parsed


def rows(arguments: argparse.Namespace, device: torch.device, on_progress: Progress) -> Iterator[Result]:
    vocab_sizes = arguments.vocab_size or ((509,) if arguments.quick else gpu_rows.VOCAB_SIZES)
    n_rows_of_cases = arguments.n_rows or ((64,) if arguments.quick else gpu_rows.N_ROWS)
    for dtype in arguments.dtype:
        for n_rows in n_rows_of_cases:
            for vocab_size in vocab_sizes:
                is_whole = arguments.quick or (n_rows, vocab_size) == gpu_rows.MAIN_SIZE
                yield rows_of(arguments, device, n_rows, vocab_size, dtype, is_whole, on_progress)


def sweep(arguments: argparse.Namespace, device: torch.device, on_progress: Progress) -> Iterator[Result]:
    """Many vocabularies, of 8192 rows in 16 bits."""
    for vocab_size in arguments.vocab_size or ((130, 509) if arguments.quick else SWEPT_VOCAB_SIZES):
        yield rows_of(arguments, device, 64 if arguments.quick else 8192, vocab_size, "bfloat16", False, on_progress)


def rows_of(
    arguments: argparse.Namespace,
    device: torch.device,
    n_rows: int,
    vocab_size: int,
    dtype: str,
    is_whole: bool,
    on_progress: Progress,
) -> Result:
    size = {"n_rows": n_rows, "vocab_size": vocab_size, "dtype": dtype}
    outcome, variants, logits_bytes = gpu_rows.run_case(
        n_rows,
        vocab_size,
        dtype,
        device,
        rounds=arguments.rounds,
        n_sequences=max(1, n_rows // 2048) if n_rows % 2048 == 0 else 2,
        is_whole=is_whole,
        with_compiled=arguments.compile,
        on_progress=lambda outcome: on_progress(size, outcome),
    )
    return Result(
        size,
        outcome,
        variants,
        gpu_rows.table(outcome, variants, logits_bytes),
        gpu_rows.verdicts(outcome, size, logits_bytes),
        {
            "logits_bytes": logits_bytes,
            "ratios": {name: gpu_rows.relative(outcome, name) for name in outcome.times.milliseconds},
        },
    )


def linear(arguments: argparse.Namespace, device: torch.device, on_progress: Progress) -> Iterator[Result]:
    for n_rows, hidden_size, vocab_size in ((40, 16, 130),) if arguments.quick else gpu_linear.SIZES:
        size = {"n_rows": n_rows, "hidden_size": hidden_size, "vocab_size": vocab_size, "dtype": "bfloat16"}
        outcome, variants, gradient_bytes = gpu_linear.run_case(
            n_rows,
            hidden_size,
            vocab_size,
            "bfloat16",
            device,
            rounds=arguments.rounds,
            with_compiled=arguments.compile,
            on_progress=lambda outcome, size=size: on_progress(size, outcome),
        )
        yield Result(
            size,
            outcome,
            variants,
            gpu_linear.table(outcome, variants, gradient_bytes),
            gpu_linear.verdicts(outcome, size),
            {"gradient_bytes": gradient_bytes},
        )


def router(arguments: argparse.Namespace, device: torch.device, on_progress: Progress) -> Iterator[Result]:
    for dtype in arguments.dtype:
        for n_layers, n_rows, n_experts, k in ((2, 96, 8, 2),) if arguments.quick else gpu_router.SIZES:
            size = {"n_layers": n_layers, "n_rows": n_rows, "n_experts": n_experts, "k": k, "dtype": dtype}
            outcome, variants, bytes_over_copy = gpu_router.run_case(
                n_layers,
                n_rows,
                n_experts,
                k,
                dtype,
                device,
                rounds=arguments.rounds,
                with_compiled=arguments.compile,
                on_progress=lambda outcome, size=size: on_progress(size, outcome),
            )
            yield Result(
                size,
                outcome,
                variants,
                gpu_router.table(outcome, variants, bytes_over_copy),
                gpu_router.verdicts(outcome, size, bytes_over_copy),
                {"bytes_over_copy": bytes_over_copy},
            )


def describe_device(device: torch.device) -> dict[str, Any]:
    """The machine, the GPU and the versions of what is compared."""
    machine: dict[str, Any] = {**describe_machine(), "peers": gpu_peers.versions()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = properties.name
        machine["capability"] = f"{properties.major}.{properties.minor}"
        machine["multiprocessors"] = properties.multi_processor_count
        machine["memory_bytes"] = properties.total_memory
        machine["cuda"] = torch.version.cuda
    return machine


def stored_case(result: Result) -> dict[str, Any]:
    return {
        **result.size,
        **result.further,
        "times": summary(result.outcome.times),
        "is_complete": True,
        "extra_bytes": result.outcome.extra_bytes,
        "not_measured": result.outcome.absent,
        "targets": [{**verdict._asdict(), "is_met": verdict.is_met} for verdict in result.verdicts],
    }


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where ours or the yardstick failed, so that a target was not measured."""
    parsed = parse_arguments(arguments)
    device = torch.device(parsed.device)
    machine = describe_device(device)
    for key, value in machine.items():
        print(f"{key}: {value}")
    if device.type == "cpu":
        print("a dry run: no device is measured")
    name = re.sub(r"[^a-z0-9]+", "_", machine.get("gpu", "dry run").lower()).strip("_")
    folder = parsed.out or ROOT / ("build/gpu" if parsed.quick or device.type == "cpu" else "benchmarks/results")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored |= {"machine": machine, "dry_run": device.type == "cpu"}
    verdicts: list[Verdict] = []
    failures: list[str] = []

    def store() -> None:
        path.write_text(json.dumps(stored, indent=1) + "\n")  # a run may be cut short

    for part in parsed.parts:
        cases: list[dict[str, Any]] = []

        def on_progress(size: dict[str, Any], outcome: Outcome, part: str = part, cases: list = cases) -> None:
            stored[part] = [*cases, {**size, "times": summary(outcome.times), "is_complete": False}]
            store()

        try:
            for result in {"rows": rows, "linear": linear, "router": router, "sweep": sweep}[part](
                parsed, device, on_progress
            ):
                case = ", ".join(f"{key} {value}" for key, value in result.size.items())
                print(f"\n{part}: {case}, {parsed.rounds} rounds")
                print("\n".join(result.lines))
                for variant, reason in result.outcome.absent.items():
                    print(f"  {variant}: not measured: {reason}")
                    if "ours" in variant or variant in ("copy", "products"):
                        failures.append(f"{part}, {case}: {variant}: {reason}")
                sys.stdout.flush()
                verdicts += result.verdicts
                cases.append(stored_case(result))
                stored[part] = cases
                store()
        except DeviceLostError as error:
            failures.append(f"{part}: {error}")
            break
    if device.type == "cuda":
        print_verdicts(verdicts)
    print(f"\n{path}")
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
