"""`make bench`: measures, prints tables beside the targets, writes JSON. README.md says how to read them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import linear
import overhead
import peak_memory
import router
import row_loss
import targets
import torch

from ava_ext import build_info
from ava_ext.bench.timing import Times

PARTS = ("row_loss", "peak_memory", "linear", "overhead", "router")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="V = 50257 only, fewer rounds")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--vocab-size", nargs="+", type=int, help="default: 32000 50257 128256")
    parser.add_argument("--rounds", type=int, help="default: 40, or 8 with --quick")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="default: everything")
    parser.add_argument("--json", type=Path, metavar="PATH", help="default: results/<CPU model>.json beside this file")
    arguments = parser.parse_args()
    if arguments.vocab_size is None:
        arguments.vocab_size = [targets.VOCAB_SIZE] if arguments.quick else [32000, targets.VOCAB_SIZE, 128256]
    if arguments.rounds is None:
        arguments.rounds = 8 if arguments.quick else 40
    # terms composed in PyTorch take a hundred times as long as ours: five times in a whole run, twice in a quick one
    arguments.slow_every = max(1, arguments.rounds // (2 if arguments.quick else 5))
    return arguments


def describe_machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE)):
        model = found[1]
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "build": build_info(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def print_row_loss(times: Times, variants: dict[str, row_loss.Variant]) -> None:
    print(f"{'forward + backward':54}{'ms':>9}{'quartiles':>19}  vs eager  vs comp.  / copy_  / ours")
    for name, variant in variants.items():
        lower, upper = times.quartiles(name)
        eager, compiled, copy, ours = row_loss.relative(times, name).values()
        milliseconds = f"{times.median(name):9.2f}{f'{lower:.2f} .. {upper:.2f}':>19}"
        print(f"{variant.label:54}{milliseconds}{eager:9.1f}x{compiled:9.1f}x{copy:9.2f}{ours:8.2f}")


def print_linear(times: Times, variants: dict[str, linear.Variant], extra: dict[str, int]) -> None:
    print(f"{'forward + backward':54}{'ms':>9}{'quartiles':>19}  / ours   extra MB")
    for name, variant in variants.items():
        lower, upper = times.quartiles(name)
        milliseconds = f"{times.median(name):9.0f}{f'{lower:.0f} .. {upper:.0f}':>19}"
        memory = f"{extra[name] / 1e6:11.1f}" if name in extra else ""
        print(f"{variant.label:54}{milliseconds}{times.ratio(name, 'ours'):8.2f}{memory}", flush=True)


def run_linear(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[targets.Verdict]]:
    """The fused linear layer, and heads of multi-token prediction at its first size."""
    results: list[dict[str, Any]] = []
    verdicts: list[targets.Verdict] = []
    rounds = max(3, arguments.rounds // 8)
    for dtype in arguments.dtype:
        for n_rows, hidden_size, vocab_size in linear.SIZES[:1] if arguments.quick else linear.SIZES:
            size = {"n_rows": n_rows, "hidden_size": hidden_size, "vocab_size": vocab_size, "dtype": dtype}
            for make in (linear.make_variants, linear.make_mtp_variants):
                is_mtp = make is linear.make_mtp_variants
                if is_mtp and (n_rows, hidden_size, vocab_size) != linear.SIZES[0]:
                    continue
                print(f"\n[{n_rows}, {hidden_size}] x {vocab_size} {dtype}, {rounds} rounds", flush=True)
                case = linear.Case(n_rows, hidden_size, vocab_size, row_loss.DTYPES[dtype])
                times, variants = linear.measure(make, case, rounds)
                del case
                extra = {}
                if peak_memory.is_available():
                    extra = {
                        name: linear.extra_memory(name, n_rows, hidden_size, vocab_size, dtype)
                        for name in variants
                        if name.startswith(("ours", "eager", "mtp"))
                    }
                print_linear(times, variants, extra)
                results.append({**size, "times": summary(times), "extra_bytes": extra})
                verdicts += targets.of_linear(times, extra, size)
    return results, verdicts


def print_router(times: Times, variants: dict[str, router.Variant]) -> None:
    print(f"{'forward + backward':54}{'ms':>9}{'quartiles':>19}  / ours")
    for name, variant in variants.items():
        lower, upper = times.quartiles(name)
        milliseconds = f"{times.median(name):9.2f}{f'{lower:.2f} .. {upper:.2f}':>19}"
        print(f"{variant.label:54}{milliseconds}{times.ratio(name, 'ours'):8.2f}")


def print_verdicts(verdicts: list[targets.Verdict]) -> None:
    width = max([60, *(len(verdict.name) + 2 for verdict in verdicts)])
    print(f"\n{'targets':{width}}{'measured':>10}{'wanted':>11}")
    for verdict in verdicts:
        wanted = f"{verdict.relation} {verdict.wanted:g}"
        print(f"{verdict.name:{width}}{verdict.measured:10.3g}{wanted:>11}  {'met' if verdict.is_met else 'MISSED'}")


def summary(times: Times) -> dict[str, dict[str, Any]]:
    return {
        name: {"median_ms": times.median(name), "quartiles_ms": times.quartiles(name), "rounds": len(times.ran(name))}
        for name in times.milliseconds
    }


def main() -> None:
    arguments = parse_arguments()
    machine = describe_machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    result: dict[str, Any] = {
        "machine": machine,
        "row_loss": [],
        "peak_memory": [],
        "linear": [],
        "overhead": {},
        "router": [],
    }
    verdicts: list[targets.Verdict] = []
    n_rows = targets.N_ROWS
    for dtype in arguments.dtype if "row_loss" in arguments.only else ():
        for vocab_size in arguments.vocab_size:
            print(f"\n[{n_rows}, {vocab_size}] {dtype}, {arguments.rounds} rounds", flush=True)
            times, variants = row_loss.measure(
                n_rows,
                vocab_size,
                row_loss.DTYPES[dtype],
                rounds=arguments.rounds,
                slow_every=arguments.slow_every,
            )
            print_row_loss(times, variants)
            size = {"n_rows": n_rows, "vocab_size": vocab_size, "dtype": dtype}
            ratios = {name: row_loss.relative(times, name) for name in variants}
            result["row_loss"].append({**size, "times": summary(times), "ratios": ratios})
            if vocab_size == targets.VOCAB_SIZE:
                verdicts += targets.of_row_loss(times, dtype)
    for dtype in arguments.dtype if "peak_memory" in arguments.only and peak_memory.is_available() else ():
        print(f"\npeak extra memory / logits, [{n_rows}, {targets.VOCAB_SIZE}] {dtype}; 1 is the gradient", flush=True)
        extra = {}
        for name in peak_memory.VARIANTS:
            extra[name] = peak_memory.peak_extra_memory(name, n_rows, targets.VOCAB_SIZE, dtype)
            print(f"{name:50}{extra[name]:9.3f}", flush=True)
        result["peak_memory"].append({"dtype": dtype, "extra_over_logits": extra})
        verdicts += targets.of_memory(extra, dtype)
    if "linear" in arguments.only:
        result["linear"], of_linear = run_linear(arguments)
        verdicts += of_linear
    if "overhead" in arguments.only:
        python_side, repetition = overhead.python_side(arguments.rounds), overhead.repetition(arguments.rounds)
        print(f"\n{'one call on tiny inputs, microseconds':50}{'forward':>9}{'+ backward':>12}")
        for name in [name for name in python_side.milliseconds if not name.endswith("+backward")]:
            forward, both = python_side.median(name) * 1e3, python_side.median(f"{name}+backward") * 1e3
            print(f"{name:50}{forward:9.1f}{both:12.1f}")
        result["overhead"] = {"python_side": summary(python_side), "repetition": summary(repetition)}
        verdicts += targets.of_overhead(python_side, repetition)
    if "router" in arguments.only:
        few = {"rounds": max(4, arguments.rounds // 2), "slow_every": max(2, arguments.rounds // 4)}
        for n_experts in targets.N_EXPERTS:
            size = [targets.N_ROUTER_ROWS, n_experts, targets.EXPERTS_PER_ROW]
            print("\nrouter [{}, {}] float32, {} experts a row".format(*size), flush=True)
            times, router_variants = router.measure_router(*size, **few)
            print_router(times, router_variants)
            result["router"].append({"size": size, "times": summary(times)})
            verdicts += targets.of_router(times, n_experts)
        print(f"\ndiversity of experts' outputs {targets.EXPERT_OUTPUTS} float32", flush=True)
        times, router_variants = router.measure_diversity(*targets.EXPERT_OUTPUTS, rounds=4, slow_every=2)
        print_router(times, router_variants)
        result["router"].append({"size": targets.EXPERT_OUTPUTS, "times": summary(times)})
        verdicts += targets.of_diversity(times)
    print_verdicts(verdicts)
    result["targets"] = [{**verdict._asdict(), "is_met": verdict.is_met} for verdict in verdicts]
    slug = re.sub(r"[^a-z0-9]+", "_", machine["cpu"].lower()).strip("_")
    path = arguments.json or Path(__file__).parent / "results" / f"{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
