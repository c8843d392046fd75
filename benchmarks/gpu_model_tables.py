"""Prints the tables of docs/gpu_model.md, or with --write puts them there; gpu_model.py says what it needs."""

from __future__ import annotations

import argparse
import functools
import math
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import sass
import torch
from gpu_model import (
    GPUS,
    ROOT,
    ROUTER,
    RowInstructions,
    count_router_instructions,
    count_row_instructions,
    plan_rows,
    registers_of,
    router_times,
    row_times,
    short_row_instructions,
)
from gpu_model_repetition import TEXTS, reading_milliseconds
from gpu_model_repetition import count as count_repetition
from gpu_model_repetition import milliseconds as repetition_milliseconds

from ava_ext.ops.linear_logits import rows_of_a_chunk

CUBINS = ROOT / "build" / "cuda_gates"
PAGE = ROOT / "docs" / "gpu_model.md"


def find_cuobjdump() -> str:
    """The toolkit's, or that of the extra `test`."""
    packaged = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump")
    found = shutil.which("cuobjdump") or next(map(str, packaged), None)
    if found is None:
        raise SystemExit("gpu_model: expected cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return found


_ROWS = r"row_loss_kernelI{type}LNS_9ResidenceE{residence}ELNS_8FeaturesE{features}E"
_SHORT_ROWS = r"short_row_loss_kernelI{type}LNS_8FeaturesE{features}E"
PLAIN, DENSE, CAPPED = 0, 1, 2  # Features in csrc/cuda


@functools.cache
def _functions(stem: str, architecture: str, names: str) -> list[sass.Function]:
    cubin = CUBINS / f"{stem}.sm_{architecture}.cubin"
    if not cubin.exists():
        raise SystemExit(f"gpu_model: expected {cubin.relative_to(ROOT)}: python tests/cuda_gates.py")
    return sass.functions_of_cubin(cubin, find_cuobjdump(), names)


def _range(low: float, high: float, digits: int = 0) -> str:
    texts = f"{low:.{digits}f}", f"{high:.{digits}f}"
    return texts[0] if texts[0] == texts[1] else "-".join(texts)


@functools.cache
def _row_instructions(residence: int, vector_size: int, architecture: str, features: int) -> RowInstructions | None:
    """None where a loop over vectors is not found."""
    stem, type_name = ("bfloat16", "13__nv_bfloat16") if vector_size == 8 else ("float32", "f")
    pattern = (_ROWS if residence > 0 else _SHORT_ROWS).format(type=type_name, residence=residence, features=features)
    try:
        (kernel,) = _functions(f"softmax_rows_{stem}", architecture, pattern)
        return count_row_instructions(kernel, vector_size)
    except ValueError:
        return None


def row_table(n_rows: int = 8192) -> list[str]:
    """Loss and gradient of rows: plain cross-entropy, every term, and every term under a soft cap."""
    lines = [
        f"| {n_rows} rows | GPU | cluster x parts | instructions a vector: maximum, sum, gradient; a row | copy ms"
        " | kernel ms | share of copy |",
        "|---|---|---|---|---|---|---|",
    ]
    for dtype, size in (("bf16", 8), ("fp32", 4)):
        sizes = [(n_columns, PLAIN) for n_columns in (128256, 50257, 32000, 8192, 4096, 1024, 256)]
        for n_columns, features in (*sizes, (128256, DENSE), (1024, DENSE), (128256, CAPPED)):
            case = f"{dtype} {n_columns}" + ("", ", every term", ", soft cap")[features]
            for gpu in GPUS:
                plan = plan_rows(n_columns, 16 // size, gpu)
                counts = _row_instructions(plan.residence, size, gpu.architecture, features)
                if counts is None:
                    lines.append(f"| {case} | {gpu.name} |" + " not modelled |" * 5)
                    continue
                copy = 2 * n_rows * n_columns * 16 / size / gpu.copy
                least, most = row_times(plan, counts, n_rows, gpu, features != PLAIN)
                digits = 2 if copy > 1e-4 else 3 if copy > 1e-5 else 4
                row = f"{counts.row:.0f}"
                if plan.is_of_warps:
                    row = "{:.0f} + {:.0f}".format(*short_row_instructions(features != PLAIN))
                    row += f" / {plan.rows_at_once}" * (plan.rows_at_once > 1)
                lines.append(
                    f"| {case} | {gpu.name} | {plan.cluster_size} x {plan.blocks} | {counts.maximum:.1f},"
                    f" {counts.sum:.1f}, {counts.gradient:.1f}; {row} | {copy * 1e3:.{digits}f}"
                    f" | {_range(least * 1e3, most * 1e3, digits)} | {_range(100 * copy / most, 100 * copy / least)}% |"
                )
    return lines


def router_table(k: int = 8) -> list[str]:
    """Statistics and gradient of a router, over the time of its bytes."""
    lines = [
        f"| bf16, k = {k} | GPU | instructions a warp: statistics, gradient | share of the bytes' time |",
        "|---|---|---|---|",
    ]
    for gpu in GPUS:
        kernels = _functions("router_rows", gpu.architecture, ROUTER)
        report = (CUBINS / f"router_rows.sm_{gpu.architecture}.cubin.log").read_text()
        registers = {s: registers_of(report, f"{s}_kernel") for s in ("router_statistics", "router_gradient")}
        for n_experts in (64, 128, 256):
            for is_given in (True, False):
                case = f"| E = {n_experts}, {'given' if is_given else 'own'} choices | {gpu.name} |"
                try:
                    counts = count_router_instructions(kernels, n_experts // 16, k, is_given)
                except ValueError:
                    lines.append(case + " not modelled |" * 2)
                    continue
                (least, most), of_bytes = router_times(counts, registers, n_experts, k, is_given, gpu)
                share = _range(100 * of_bytes / most, 100 * of_bytes / least)
                lines.append(f"{case} {counts.statistics:.0f}, {counts.gradient:.0f} | {share}% |")
    return lines


def linear_table(n_rows: int = 8192, n_columns: int = 128256, hidden_size: int = 4096) -> list[str]:
    """Loss and gradients of a linear layer and its logits: products, the row kernel, sums of the weight's gradient."""
    lines = [
        f"| bf16 [{n_rows}, {hidden_size}] x {n_columns} | chunks | products ms | row kernel ms | sums of chunks ms"
        " | over products |",
        "|---|---|---|---|---|---|",
    ]
    accumulator = 4 * n_columns * hidden_size
    chunk_rows = rows_of_a_chunk(n_rows, n_columns, torch.bfloat16, torch.device("cuda"), None, accumulator)
    n_chunks = math.ceil(n_rows / chunk_rows)
    for gpu in GPUS:
        plan = plan_rows(n_columns, 2, gpu)
        counts = _row_instructions(plan.residence, 8, gpu.architecture, PLAIN)
        if counts is None:
            continue
        _, rows = row_times(plan, counts, n_rows, gpu)
        products = 3 * 2 * n_rows * n_columns * hidden_size / gpu.products
        # the float32 accumulator is written once, then read and written for every chunk, and copied to bfloat16
        sums = n_columns * hidden_size * (2 if n_chunks == 1 else 4 + 8 * (n_chunks - 1) + 6) / gpu.copy
        lines.append(
            f"| {gpu.name} | {n_chunks} x {chunk_rows} rows | {products * 1e3:.1f} | {rows * 1e3:.2f}"
            f" | {sums * 1e3:.2f} | {(products + rows + sums) / products:.3f} |"
        )
    return lines


def repetition_table() -> list[str]:
    """N-grams, immediate repetition and early EOS; needs nvcc, and a minute."""
    lines = [
        "| text | GPU | [1, 131072] ms | by reading | [8, 8192] ms | by reading |",
        "|---|---|---|---|---|---|",
    ]
    for kind in TEXTS:
        executed = count_repetition(kind)
        for gpu in GPUS:
            times = [
                f"{time(executed, *shape, gpu):.2f}"
                for shape in ((1, 131072), (8, 8192))
                for time in (repetition_milliseconds, reading_milliseconds)
            ]
            lines.append(f"| {kind} | {gpu.name} | {' | '.join(times)} |")
    return lines


TABLES = {"rows": row_table, "linear": linear_table, "router": router_table, "repetition": repetition_table}


def with_tables(page: str, tables: dict[str, list[str]]) -> str:
    """The page with these tables between their marks."""
    for name, lines in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
        page, n = re.subn(pattern, lambda m, lines=lines: m[1] + "\n".join(lines) + m[2], page, flags=re.DOTALL)
        if n != 1:
            raise ValueError(f"gpu_model: expected one '<!-- {name} -->' on the page, got {n}")
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="default: all")
    parser.add_argument("--write", action="store_true", help="into docs/gpu_model.md")
    options = parser.parse_args()
    tables = {name: TABLES[name]() for name in options.tables or TABLES}
    if options.write:
        PAGE.write_text(with_tables(PAGE.read_text(), tables))
    else:
        print("\n\n".join("\n".join(lines) for lines in tables.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
