"""What the CUDA kernels should take on an H100, an H200 and a B200, from what nvcc makes of them: docs/gpu_model.md.

    python tests/cuda_gates.py --architectures 90 100     # compiles build/cuda_gates/*.cubin
    python benchmarks/gpu_model_tables.py                 # prints the tables; --write: puts them into the page

Instructions are counted in the listing (sass.py), the cut of a row is asked of plan_rows itself (g++ compiles it). What
neither can say is in ASSUMED and in GPUS. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import sass

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Gpu:
    """A device; `copy` is what a large copy moves, reads and writes together."""

    name: str
    architecture: str
    n_multiprocessors: int
    hertz: float
    copy: float  # bytes a second
    products: float  # bfloat16 operations a second of a large matrix product

    def cycles(self, n_bytes: float) -> float:
        """That a multiprocessor's share of the memory takes for these bytes."""
        return n_bytes / (self.copy / self.n_multiprocessors) * self.hertz


GPUS = (
    Gpu("H100", "90", 132, 1.755e9, 3.0e12, 0.65e15),
    Gpu("H200", "90", 132, 1.755e9, 4.3e12, 0.65e15),
    Gpu("B200", "100", 148, 1.85e9, 6.9e12, 1.45e15),
)
# of every multiprocessor since Volta: schedulers, and cycles that an exponential or a reciprocal keeps one busy
SCHEDULERS, SPECIAL_CYCLES = 4, 8
ASSUMED = {
    "issue": 0.8,  # instructions a scheduler issues in a cycle where enough warps are ready
    "dependent": 5,  # cycles from an instruction to one that needs it
    "alone": 3,  # cycles for an instruction of a warp that has several independent ones
    "loops": 5,  # that a thread enters for a row: two stages of maximum and gradient, and the sum
    "loop": 30,  # instructions to enter one
    # instructions of PTX of one warp between a row's barriers, as tests/ptx executes them, mov and bra among them: of
    # plain cross-entropy, and of every term with four candidates
    "stretch": 310,
    "stretch of every term": 600,
    # the same of a warp that takes several short rows at once, without mov and bra: for each of them besides its
    # vectors, and for all of them together
    "short row": 165,
    "short row of every term": 205,
    "short rows together": 560,
    "short rows together of every term": 920,
    "barrier": 40,  # cycles of a block's barrier
    # from a store into another multiprocessor's shared memory until a warp there has woken up: 180 that the way takes
    # (measured on Hopper, arXiv 2402.13499), and as long again for counting the bytes and the warp
    "exchange": 360,
    "latency": 0.7e-6,  # seconds of a load from memory
}


def bounds(demands: Sequence[float], delay: float, n_customers: int) -> tuple[float, float]:
    """Time for one customer's work where `n_customers` share resources: least and likely most.

    demands: how long the work keeps each resource busy; delay: what it waits for besides. Least: everything overlaps.
    Most: customers meet by chance (mean value analysis of a closed network).
    """
    least = max(*demands, (sum(demands) + delay) / n_customers)
    queues, most = [0.0] * len(demands), 0.0
    for n in range(1, n_customers + 1):
        times = [demand * (1 + queue) for demand, queue in zip(demands, queues, strict=True)]
        most = (sum(times) + delay) / n
        queues = [time / most for time in times]
    return least, most


def issue_cycles(n_instructions: float, n_special: float) -> float:
    """Cycles in which a multiprocessor issues these instructions of warps."""
    return max(n_instructions / ASSUMED["issue"], n_special * SPECIAL_CYCLES) / SCHEDULERS


# -- Rows of logits


@dataclass(frozen=True)
class Plan:
    """As RowPlan in csrc/cuda/softmax_rows_plan.h."""

    residence: int
    cluster_size: int
    capacity: int
    n_threads: int
    blocks: int  # on a multiprocessor
    rows_at_once: int = 1

    @property
    def is_of_warps(self) -> bool:
        """A warp takes `rows_at_once` whole rows."""
        return self.residence == 0


def plan_rows(n_columns: int, element_bytes: int, gpu: Gpu) -> Plan:
    """What the launcher plans for the device."""
    program = f"""
#include <cstdio>
#include "{ROOT}/csrc/cuda/softmax_rows_plan.h"
int main() {{
  const ava::RowPlan plan = ava::plan_rows({n_columns}, {element_bytes}, 0,
                                           {{{gpu.n_multiprocessors}, 228 * 1024, 227 * 1024, 1024, 8}});
  std::printf("%d %d %d %d %d %d", int(plan.residence), plan.cluster_size, plan.capacity, plan.n_threads,
              plan.blocks_per_multiprocessor, plan.rows_at_once);
}}
"""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "plan.cpp"), Path(folder, "plan")
        source.write_text(program)
        flags = ["-std=c++20", "-w", f"-I{ROOT}/tests/cuda_emulator"]
        subprocess.run(["g++", *flags, "-o", binary, source], check=True)
        return Plan(*map(int, subprocess.check_output([binary], text=True).split()))


@dataclass(frozen=True)
class RowInstructions:
    """What a warp executes for each vector of 16 bytes, and for each row besides, unless it takes several at once."""

    maximum: float
    sum: float
    gradient: float
    row: float
    special: float = 0.0  # of a vector's: exponentials and reciprocals

    @property
    def vector(self) -> float:
        return self.maximum + self.sum + self.gradient


_LONGEST_LOOP = 1500  # over vectors; the loop over rows has thousands of instructions


def count_row_instructions(kernel: sass.Function, vector_size: int) -> RowInstructions:
    """Of row_loss_kernel where the row is kept in shared memory, and of short_row_loss_kernel."""
    least = {"maximum": math.inf, "sum": math.inf, "gradient": math.inf}
    special = 0.0
    for loop in kernel.loops():
        if not any("128" in opcode for opcode in kernel.opcodes(loop)) or loop.last - loop.first > _LONGEST_LOOP:
            continue
        path = kernel.path(loop, r"MUFU.EX2|LDS.128|LDGSTS.*128|STG.*128")
        if path is None:
            continue
        n_kept, n_exponentials = path.count("LDS.128"), path.count("MUFU.EX2")
        n_stored, n_fetched = path.count(r"STG.*128"), path.count("LDGSTS")
        if n_kept and not (n_exponentials or n_stored or n_fetched):
            kind, n_vectors = "maximum", n_kept
        elif n_kept and n_exponentials in _exponentials(vector_size * n_kept) and not (n_stored or n_fetched):
            kind, n_vectors = "sum", n_kept
            special = 2 * path.count("MUFU") / n_vectors  # the gradient has as many
        elif n_stored and n_exponentials in _exponentials(vector_size * n_stored) and n_fetched == n_stored:
            kind, n_vectors = "gradient", n_stored
        else:
            continue
        least[kind] = min(least[kind], path.n_instructions / n_vectors)
    if math.inf in least.values():
        raise ValueError(f"gpu_model: expected the loops {list(least)} in {kernel.name}, got {least}")
    rows = max(kernel.loops(), key=lambda loop: (kernel.opcodes(loop)[BARRIER], loop.last - loop.first))
    row = 0.0  # of a warp that takes several rows, tests/ptx counts it
    if kernel.opcodes(rows)[BARRIER]:
        row = kernel.path(rows, " BAR| STAS", lambda inner: 0).n_instructions
    return RowInstructions(**least, row=row, special=special)


def _exponentials(n_elements: int) -> tuple[int, int]:
    """Of so many elements: one each, and one more under a soft cap."""
    return n_elements, 2 * n_elements


BARRIER = "BAR.SYNC.DEFER_BLOCKING"


def row_times(
    plan: Plan, counts: RowInstructions, n_rows: int, gpu: Gpu, has_every_term: bool = False
) -> tuple[float, float]:
    """Seconds of one read, one gradient and all sums: least and likely most."""
    if plan.is_of_warps:
        return _short_row_times(plan, counts, n_rows, gpu, has_every_term)
    stretch = ASSUMED["stretch of every term" if has_every_term else "stretch"]
    n_warps, n_slots = plan.n_threads / 32, math.ceil(plan.capacity / plan.n_threads)
    of_row = counts.row + ASSUMED["loops"] * ASSUMED["loop"]
    issue = issue_cycles(
        n_warps * (n_slots * counts.vector + of_row) + stretch,
        n_warps * n_slots * counts.special,
    )
    exchange = ASSUMED["exchange" if plan.cluster_size > 1 else "barrier"]
    delay = stretch * ASSUMED["dependent"] + exchange + 2 * ASSUMED["barrier"]
    delay += ASSUMED["latency"] * gpu.hertz  # of the row's first vectors
    # a warp does not go faster than its own instructions, however few others there are
    alone = (n_slots * counts.vector + of_row) * ASSUMED["alone"] + stretch * ASSUMED["dependent"]
    cycles = [
        max(bound, alone / plan.blocks)
        for bound in bounds([gpu.cycles(2 * 16 * plan.capacity), issue], delay, plan.blocks)
    ]
    parts = n_rows * plan.cluster_size / gpu.n_multiprocessors
    return cycles[0] * parts / gpu.hertz, cycles[1] * parts / gpu.hertz


def short_row_instructions(has_every_term: bool) -> tuple[float, float]:
    """Of a warp that takes several rows: for each of them besides its vectors, and for all together."""
    which = " of every term" if has_every_term else ""
    return ASSUMED["short row" + which], ASSUMED["short rows together" + which]


def _short_row_times(
    plan: Plan, counts: RowInstructions, n_rows: int, gpu: Gpu, has_every_term: bool
) -> tuple[float, float]:
    of_row, together = short_row_instructions(has_every_term)
    n_slots = math.ceil(plan.capacity / 32)
    of_rows = plan.rows_at_once * (n_slots * counts.vector + of_row)
    issue = issue_cycles(of_rows + together, plan.rows_at_once * n_slots * counts.special)
    # of what a row is, of its candidates and their logits, of its vectors
    delay = together * ASSUMED["dependent"] + 3 * ASSUMED["latency"] * gpu.hertz
    alone = of_rows * ASSUMED["alone"] + together * ASSUMED["dependent"]
    memory = plan.rows_at_once * gpu.cycles(2 * 16 * plan.capacity)
    cycles = [max(bound, alone / plan.blocks) for bound in bounds([memory, issue], delay, plan.blocks)]
    turns = n_rows / plan.rows_at_once / gpu.n_multiprocessors
    return cycles[0] * turns / gpu.hertz, cycles[1] * turns / gpu.hertz


# -- The router


@dataclass(frozen=True)
class RouterInstructions:
    """What a warp executes for its 32 / n_lanes rows of 16 logits a lane."""

    statistics: float
    gradient: float


def count_router_instructions(
    kernels: Sequence[sass.Function], n_lanes: int, k: int, is_given: bool
) -> RouterInstructions:
    """Of the kernels over bfloat16, softmax.

    is_given: the caller brings the choices; else they are made, all at once.
    """
    if not is_given and k not in AT_ONCE:
        raise ValueError(f"gpu_model: expected a k that is chosen at once, {AT_ONCE[0]} to {AT_ONCE[-1]}, got {k}")

    def path(stem: str, keys: str) -> float:
        (found,) = [f for f in kernels if re.search(stem, f.name)]
        kernel = _of_ordinary_rows(found, n_lanes, is_given)
        loops = [loop for loop in kernel.loops() if _is_over_rows(kernel.opcodes(loop))]
        over_rows = min(loops, key=lambda loop: loop.last - loop.first)

        def trips(inner: sass.Loop) -> float:
            opcodes = kernel.opcodes(inner)
            if opcodes["SHFL.BFLY"]:  # one choice after another, or many scores that equal the last choice's
                return math.inf
            if not opcodes["SHFL.IDX"]:
                return 1
            if opcodes["SHFL.IDX"] == 1 or not is_given:  # experts chosen twice
                return math.inf
            n_reads = math.ceil(k / n_lanes)
            return n_reads if any(o.startswith("LDG") for o in opcodes) else k / n_reads / opcodes["SHFL.IDX"]

        way = kernel.path(over_rows, rf"MUFU|LDGSTS.*128|SHFL.BFLY|{keys}", trips)
        if way is None or way.count("STG.*128") != (2 if keys == "STG.*128" else 0):
            raise ValueError(f"gpu_model: expected a path through the choices of {kernel.name}")
        return way.n_instructions

    # importance is added where bits in predicates say so
    return RouterInstructions(
        path("router_statistics_kernel", "SHFL.IDX|R2P" if is_given else "SHFL.IDX|STG.E.U8|HSET2.*GE"),
        path("router_gradient_kernel", "STG.*128"),
    )


def _of_ordinary_rows(kernel: sass.Function, n_lanes: int, is_given: bool) -> sass.Function:
    """The kernel without ways through code for other rows, and through shuffles of more lanes than a row has."""
    shuffles = [offset for offset in (4, 6, 8, 12, 16, 20) if offset >= n_lanes]
    offsets = [f", {offset:#x}," for offset in shuffles]

    def is_elsewhere(i: sass.Instruction) -> bool:
        if i.opcode == "SHFL.BFLY":
            return any(offset in i.operands for offset in offsets)
        if is_given and i.opcode.startswith("HSET2"):  # own choices
            return True
        return i.opcode in ("FMNMX.NAN", "I2F.U32.RP")  # what bounds u, and divides the number of a row

    kept = [replace(i, opcode="EXIT", guard="") if is_elsewhere(i) else i for i in kernel.instructions]
    return sass.Function(kernel.name, kept)


def _is_over_rows(opcodes: Counter[str]) -> bool:
    return opcodes["MUFU.EX2"] >= 16 and any(opcode.startswith("LDGSTS") for opcode in opcodes)


ROUTER = r"I13__nv_bfloat16Li16ELb0E"  # in a kernel's name: bfloat16, more than 8 experts, softmax
ROUTER_BLOCK = 256  # threads
ROUTER_SPECIAL = 19  # exponentials, a logarithm and a reciprocal of 16 logits
AT_ONCE = range(3, 9)  # kLeastBest to kBest in csrc/cuda/router_rows_choice.cuh
REGISTERS = 65536  # of a multiprocessor


def router_times(
    counts: RouterInstructions, registers: dict[str, int], n_experts: int, k: int, is_given: bool, gpu: Gpu
) -> tuple[tuple[float, float], float]:
    """Cycles of a multiprocessor for a warp's rows, forward and backward, least and likely most; and of their bytes."""
    n_lanes = n_experts // 16
    rows, n_bytes = 32 // n_lanes, 1024
    of_choices = rows * (k * 8 if is_given else n_experts / 8)
    least = most = 0.0
    for n_instructions, n_moved, kernel in (
        (counts.statistics, n_bytes + of_choices, "router_statistics"),
        (counts.gradient, 2 * n_bytes, "router_gradient"),
    ):
        n_warps = REGISTERS // (ROUTER_BLOCK * registers[kernel]) * ROUTER_BLOCK // 32
        # three rows are under way meanwhile: a warp waits only for what the latency exceeds its work on those
        alone = n_instructions * ASSUMED["alone"]
        delay = max(0.0, ASSUMED["latency"] * gpu.hertz - 3 * alone)
        bound = bounds([gpu.cycles(n_moved), issue_cycles(n_instructions, ROUTER_SPECIAL)], delay, n_warps)
        least, most = least + max(bound[0], alone / n_warps), most + max(bound[1], alone / n_warps)
    return (least, most), gpu.cycles(3 * n_bytes + of_choices)


def registers_of(report: str, stem: str) -> int:
    """Of ptxas' report beside the cubin."""
    found = re.search(rf"entry function '\w*{stem}{ROUTER}\w*'.*?Used (\d+) registers", report, re.DOTALL)
    if found is None:
        raise ValueError(f"gpu_model: expected the registers of {stem}, got none")
    return int(found[1])
