"""The emulated device catches broken kernels: each mutant changes one line of a kernel whose C++ test is green, which
`make test-sanitizers` shows."""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.ninja_library import ROOT, build_library

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator needs x86-64")

SANITIZERS = {  # -O0: they take longer to compile than to run; but ThreadSanitizer misses a race then
    "none": ["-O0"],
    "address": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}


@dataclass
class Mutant:
    name: str
    sanitizer: str
    kernel: str  # below the root of the project
    line: str  # of the kernel, once
    replacement: str
    report: str  # what the program says


ROW_SUM, REPETITION = "tests/cuda_emulator/kernels/row_sum.cuh", "csrc/cuda/repetition.cuh"
REPETITION_LISTS, REPETITION_TEXT = "csrc/cuda/repetition_arguments.cuh", "csrc/cuda/repetition_text.cuh"
REPETITION_ORDER = "csrc/cuda/repetition_order.cuh"
ROW_WEIGHTS = "csrc/cuda/row_weights.cuh"
SOFTMAX_SUMS, EXCHANGE = "csrc/cuda/softmax_rows_measure.cuh", "csrc/cuda/softmax_rows_exchange.cuh"
SHORT_ROWS = "csrc/cuda/softmax_rows_short.cuh"
ROUTER_CHOICE, ROUTER_LANES = "csrc/cuda/router_rows_choice.cuh", "csrc/cuda/router_rows_lanes.cuh"
ROUTER_FETCH = "csrc/cuda/router_rows_fetch.cuh"
MUTANTS = [
    Mutant("barrier_removed", "thread", ROW_SUM, "__syncthreads();", "", "data race"),
    Mutant("barrier_removed_nan", "none", ROW_SUM, "__syncthreads();", "", "nan, expected"),
    Mutant(
        "barrier_for_some", "none", ROW_SUM, "__syncthreads();", "if (threadIdx.x < 64) __syncthreads();",
        "waits in __syncthreads at row_sum.cuh",
    ),
    Mutant(
        "two_barriers", "none", ROW_SUM, "__syncthreads();",
        "if (threadIdx.x < 64) __syncthreads(); else __syncthreads();", "divergent barrier",
    ),
    Mutant("shuffle_for_some", "none", ROW_SUM, "sum = warp_sum(sum);", "if (threadIdx.x % 2) sum = warp_sum(sum);",
           "waits in __shfl_xor_sync at primitives.cuh"),
    Mutant("past_the_row", "address", ROW_SUM, "column < n_columns", "column <= n_columns", "heap-buffer-overflow"),
    Mutant("past_the_array", "none", ROW_SUM, "partial[threadIdx.x / 32] = sum", "partial[threadIdx.x / 32 + 1] = sum",
           "a write outside the arrays of shared memory"),
    Mutant("past_the_array_by_address", "address", ROW_SUM, "partial[threadIdx.x / 32] = sum",
           "partial[threadIdx.x / 32 + 1] = sum", "use-after-poison"),
    Mutant("unaligned", "none", ROW_SUM, "cp_async16(slot, values + column)", "cp_async16(slot, values + column + 1)",
           "cp_async16: expected addresses aligned to 16 bytes at row_sum.cuh"),
    Mutant("no_wait_for_copies", "none", ROW_SUM, "cp_async_wait<0>();", "", "nan, expected"),
    Mutant("one_copy_too_few", "none", ROW_SUM, "cp_async_wait<0>();", "cp_async_wait<1>();", "nan, expected"),
    Mutant("no_cluster_sync", "none", ROW_SUM, "cluster_sync();", "", "a cluster_sync is missing"),
    Mutant("no_wait_for_stores", "none", ROW_SUM, "mbarrier_wait(mbarriers + turn % 2, turn / 2 % 2);", "",
           "nobody has waited for the phase before"),
    Mutant("no_last_wait", "none", ROW_SUM, "mbarrier_wait(mbarriers",
           "if (row + n_clusters < n_rows) mbarrier_wait(mbarriers", "has ended before the bytes arrived"),
    Mutant("too_few_bytes", "none", ROW_SUM, "kRowSumCluster * 16)", "16)",
           "has ended before the bytes arrived"),
    Mutant("too_many_bytes", "none", ROW_SUM, "kRowSumCluster * 16)", "kRowSumCluster * 32)",
           "waits in mbarrier_wait at row_sum.cuh"),
    Mutant("phase_not_flipped", "none", ROW_SUM, "turn / 2 % 2", "0", "more arrivals than the phase has"),
    Mutant("one_slot", "none", ROW_SUM, "of_blocks + turn % 2 * kRowSumCluster", "of_blocks", "expected"),
    Mutant("one_slot_race", "thread", ROW_SUM, "of_blocks + turn % 2 * kRowSumCluster", "of_blocks", "data race"),
    Mutant("sums_without_barrier", "thread", ROW_WEIGHTS, "__syncthreads();", "", "data race"),
    Mutant("sums_of_other_warps", "none", ROW_WEIGHTS, "threadIdx.x % kRowWeightsWarps", "threadIdx.x / 32",
           "test_row_weights.cpp"),
    Mutant("no_syncwarp", "thread", REPETITION, "__syncwarp();", "", "data race"),
    Mutant("past_the_list", "address", REPETITION_LISTS, "i < chunk.n_ids", "i <= chunk.n_ids", "heap-buffer-overflow"),
    Mutant("past_the_last_row", "address", REPETITION, "first + i < arguments.n_tokens",
           "first + i <= arguments.n_tokens", "heap-buffer-overflow"),
    Mutant("text_without_barrier", "thread", REPETITION_TEXT, "__syncthreads();", "", "data race"),
    Mutant("tiles_share_totals", "thread", REPETITION_TEXT, "shared == totals ? kTextFacts * kTextWarps : 0", "0",
           "data race"),
    Mutant("run_of_its_tile", "none", REPETITION_TEXT, "run_start = larger(run_start, ", "larger(run_start, ",
           "weights"),
    Mutant("no_list_for_the_target", "none", REPETITION_ORDER, "most_(int(n_slots) + 1)", "most_(int(n_slots))",
           "ids"),
    Mutant("no_spans_before", "none", REPETITION_ORDER, "is_open && before >= 0", "is_open && before > span", "ids"),
    Mutant("no_collisions_of_texts", "none", REPETITION_ORDER,
           " || facts_.text_start[place.row] != facts_.text_start[other]", "", "collides"),
    Mutant("no_wait_in_a_row", "none", SOFTMAX_SUMS, "if (stage == 0) cp_async_wait<1>();", "", "expected"),
    Mutant("tensor_cores_with_some_lanes", "none", SOFTMAX_SUMS, "? warp_min(n_mine) :", "? n_mine :",
           "__shfl_xor_sync at softmax_rows_measure.cuh"),
    Mutant("no_stand_in", "none", SOFTMAX_SUMS, "if (wins) store_in_vector(best_place, stand_in);", "", "expected"),
    Mutant("the_stand_in_stays", "none", SOFTMAX_SUMS,
           "store_in_vector(best_place, from_float<Element>(warp_best));", "", "expected"),
    Mutant("the_stand_in_is_summed", "none", SOFTMAX_SUMS, "sums.sum -= exponent.summand(capped[0].value);", "",
           "expected"),
    Mutant("the_winner_does_not_wait", "thread", SOFTMAX_SUMS, "__syncwarp();  // only the winner writes to it", "",
           "data race"),
    Mutant("no_wait_for_short_rows", "none", SHORT_ROWS, "cp_async_wait<0>();", "", "expected"),
    Mutant("care_for_another_row", "none", SHORT_ROWS, "careful_rows >> r & 1", "careful_rows >> (r ^ 1) & 1",
           "expected"),
    Mutant("lists_of_other_lanes", "none", ROUTER_CHOICE, "halve<2>(lists, 6);", "halve<2>(lists, 4);",
           "test_router_rows.cpp"),
    Mutant("halves_in_opposite_orders", "none", ROUTER_CHOICE, "sort<kScores, false>(best", "sort<kScores, true>(best",
           "choice == expected_choice"),
    Mutant("equal_scores_are_all_chosen", "none", ROUTER_LANES, "chosen.remove(item);", "",
           "choice == expected_choice"),
    Mutant("nan_is_no_best_score", "none", ROUTER_LANES, "has_nan || n_surplus > 0", "n_surplus > 0",
           "choice == expected_choice"),
    Mutant("padding_is_chosen", "none", ROUTER_LANES, "= from_float<Element>(-INFINITY);", ";",
           "test_router_rows.cpp"),
    Mutant("masked_rows_are_ordinary", "none", ROUTER_LANES, " && weighted == weighted", "", "test_router_rows.cpp"),
    Mutant("sure_rows_are_ordinary", "none", ROUTER_LANES, "total >= (1 + kLeastOrdinaryRest) * largest && ", "",
           "test_router_rows.cpp"),
    Mutant("no_wait_for_rows", "none", ROUTER_FETCH, "cp_async_wait<kRowsAhead>();", "cp_async_wait<kRowStages>();",
           "test_router_rows.cpp"),
    # what they take for partials sends them anywhere: the program may end without a word
    Mutant("no_wait_for_partials", "none", EXCHANGE, "if (every_warp || threadIdx.x < 32) mbarrier_wait(",
           "static_cast<void>(", ""),
    Mutant("too_few_bytes_of_partials", "none", EXCHANGE, "cluster_size * kVectors * 16", "16", ""),
    Mutant("phase_of_partials_not_flipped", "none", EXCHANGE, "row / 2 % 2", "0", ""),
    Mutant("only_the_first_warp_waits", "none", EXCHANGE, "every_warp || ", "",
           "waits in __syncthreads at softmax_rows_kernels.cuh"),
]  # fmt: skip


def run_test_of(kernel, folder, sanitizer):
    """Compiles the C++ test of a kernel in a copy of the sources and runs it."""
    device_flags = ["-g1", "-DAVA_EMULATOR_TSAN"] if sanitizer == "thread" else SANITIZERS[sanitizer]
    library = build_library(
        f"emulated_device_{sanitizer}",
        ".so",
        {"tests/cuda_emulator/device.cpp": []},
        [*device_flags, "-O1", "-fvisibility=default", f"-I{ROOT}/tests/cuda_emulator"],
        SANITIZERS[sanitizer],
    )
    emulator, program = folder / "tests/cuda_emulator", folder / "program"
    stems = ("row_sum", "row_weights", "repetition", "softmax_rows", "router_rows")
    stem = next(stem for stem in stems if Path(kernel).stem.startswith(stem))
    # launchers that are compiled files of their own, one for each type of element
    launchers = [f"-xc++ {path} -xnone" for path in sorted((folder / "csrc/cuda").glob(f"{stem}_*.cu"))]
    sources = [str(emulator / f"test_{stem}.cpp"), *" ".join(launchers).split()]
    flags = ["-std=c++20", "-Wno-unknown-pragmas", f"-I{emulator}", *SANITIZERS[sanitizer]]
    link = [str(library), f"-Wl,-rpath,{library.parent}"]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *flags, *sources, *link, "-o", str(program)], check=True)
    return subprocess.run([program], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_are_caught(tmp_path, mutant):
    for part in ("csrc", "tests/cuda_emulator", "tests/cpp"):
        shutil.copytree(ROOT / part, tmp_path / part)
    path = tmp_path / mutant.kernel
    text = path.read_text()
    assert text.count(mutant.line) == 1
    path.write_text(text.replace(mutant.line, mutant.replacement))
    result = run_test_of(mutant.kernel, tmp_path, mutant.sanitizer)
    assert result.returncode != 0
    assert mutant.report in result.stdout + result.stderr
