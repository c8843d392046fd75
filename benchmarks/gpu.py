"""The benchmark of a GPU: prints tables beside the targets, writes JSON. README.md says how to read them.

    python benchmarks/gpu.py [rows] [linear] [router]

With --device cpu --quick it is a dry run over tiny sizes: everything runs, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gpu_linear
import gpu_peers
import gpu_router
import gpu_rows
import torch
from gpu_timing import Outcome
from row_loss import Variant
from run import describe_machine, print_verdicts, summary
from targets import Verdict

from ava_ext import build_info

PARTS = ("rows", "linear", "router")
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
    parser.add_argument("--vocab-size", nargs="+", type=int, help="of rows; default: all")
    parser.add_argument("--rounds", type=int, help="default: 20, or 3 with --quick")
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile has to compile")
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


def rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[Result]:
    vocab_sizes = arguments.vocab_size or ((509,) if arguments.quick else gpu_rows.VOCAB_SIZES)
    for dtype in arguments.dtype:
        for n_rows in (64,) if arguments.quick else gpu_rows.N_ROWS:
            for vocab_size in vocab_sizes:
                outcome, variants, logits_bytes = gpu_rows.run_case(
                    n_rows,
                    vocab_size,
                    dtype,
                    device,
                    rounds=arguments.rounds,
                    n_sequences=2 if arguments.quick else n_rows // 2048,
                    is_whole=arguments.quick or (n_rows, vocab_size) == gpu_rows.MAIN_SIZE,
                    with_compiled=not arguments.no_compile,
                )
                size = {"n_rows": n_rows, "vocab_size": vocab_size, "dtype": dtype}
                yield Result(
                    size,
                    outcome,
                    variants,
                    gpu_rows.table(outcome, variants, logits_bytes),
                    gpu_rows.verdicts(outcome, size, logits_bytes),
                    {"logits_bytes": logits_bytes,
                     "ratios": {name: gpu_rows.relative(outcome, name) for name in outcome.times.milliseconds}},
                )  # fmt: skip


def linear(arguments: argparse.Namespace, device: torch.device) -> Iterator[Result]:
    for n_rows, hidden_size, vocab_size in ((40, 16, 130),) if arguments.quick else gpu_linear.SIZES:
        outcome, variants, gradient_bytes = gpu_linear.run_case(
            n_rows,
            hidden_size,
            vocab_size,
            "bfloat16",
            device,
            rounds=arguments.rounds,
            with_compiled=not arguments.no_compile,
        )
        size = {"n_rows": n_rows, "hidden_size": hidden_size, "vocab_size": vocab_size, "dtype": "bfloat16"}
        yield Result(
            size,
            outcome,
            variants,
            gpu_linear.table(outcome, variants, gradient_bytes),
            gpu_linear.verdicts(outcome, size),
            {"gradient_bytes": gradient_bytes},
        )


def router(arguments: argparse.Namespace, device: torch.device) -> Iterator[Result]:
    for dtype in arguments.dtype:
        for n_layers, n_rows, n_experts, k in ((2, 96, 8, 2),) if arguments.quick else gpu_router.SIZES:
            outcome, variants, bytes_over_copy = gpu_router.run_case(
                n_layers,
                n_rows,
                n_experts,
                k,
                dtype,
                device,
                rounds=arguments.rounds,
                with_compiled=not arguments.no_compile,
            )
            size = {"n_layers": n_layers, "n_rows": n_rows, "n_experts": n_experts, "k": k, "dtype": dtype}
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
    for part in parsed.parts:
        stored[part] = []
        for result in {"rows": rows, "linear": linear, "router": router}[part](parsed, device):
            case = ", ".join(f"{key} {value}" for key, value in result.size.items())
            print(f"\n{part}: {case}, {parsed.rounds} rounds")
            print("\n".join(result.lines))
            for variant, reason in result.outcome.absent.items():
                print(f"  {variant}: not measured: {reason}")
                if "ours" in variant or variant in ("copy", "products"):
                    failures.append(f"{part}, {case}: {variant}: {reason}")
            sys.stdout.flush()
            verdicts += result.verdicts
            stored[part].append(
                {
                    **result.size,
                    **result.further,
                    "times": summary(result.outcome.times),
                    "extra_bytes": result.outcome.extra_bytes,
                    "not_measured": result.outcome.absent,
                    "targets": [{**verdict._asdict(), "is_met": verdict.is_met} for verdict in result.verdicts],
                }
            )
            path.write_text(json.dumps(stored, indent=1) + "\n")  # after every case: a run may be cut short
    if device.type == "cuda":
        print_verdicts(verdicts)
    print(f"\n{path}")
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
