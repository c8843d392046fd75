"""The interpreter notices when a barrier, or a wait for copies, is taken out of the PTX of a kernel.

A mutant lacks one instruction, or has another number in one on mbarriers. It is noticed by a finding, a fault, or a
wrong result.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from cuda_operators import H100, DeviceLimits, find_kernel, on_device, stems_of_kernels
from grid import IS_FULL
from row_cases import EVERY_TERM, PATHS, PLAIN, WAYS, problem_of, small_device
from simt import KernelFault
from simt.module import Kernel
from support.row_oracle import expected_row_loss
from test_repetition import assert_agrees
from test_router_rows_properties import test_values_and_gradient as check_values_and_gradient
from test_softmax_rows import assert_right

SYNCHRONISATION = re.compile(r"cp\.async\.wait_group|bar\.sync|bar\.warp\.sync|barrier\.cluster\.arrive")
EVERY = 1 if IS_FULL else 6  # which mutants run


def rows(n_columns: int, terms: int, ways: list[str], dtype: torch.dtype = torch.bfloat16) -> Callable[[], None]:
    def run() -> None:
        problem = problem_of(dtype, n_columns, terms, shift=1, seed=1)
        for way in ways:
            assert_right(problem, WAYS[way](problem), expected_row_loss(problem), way)

    return run


def router() -> None:
    case = {"n_layers": 2, "n_rows": 150, "n_experts": 64, "k": 3, "dtype": torch.bfloat16, "score": "softmax"}
    case |= {"scale": 2.0, "masked_experts": False, "mask": "layers", "n_segments": None, "choice": "own"}
    check_values_and_gradient.hypothesis.inner_test({**case, "form": "list", "seed": 1})


def repetition() -> None:
    text = torch.randint(5, (2, 75), generator=torch.Generator().manual_seed(0))
    for ngram_size in (1, 3):
        assert_agrees(
            text,
            text.roll(-1, 1),
            weights=torch.tensor([0.5, 1.5, 0.05, 0.1]),
            vocab_size=5,
            use_immediate_repetition_penalty=True,
            use_ngram_penalty=True,
            ngram_size=ngram_size,
            ngram_slots=3,
            eos_token_id=[0],
            min_sequence_length=40,
        )


class Case(NamedTuple):
    kernel: str  # a pattern of its mangled name
    device: DeviceLimits
    run: Callable[[], None]
    # barriers and waits, counted from 0, that nobody misses: another one does their work, or nothing reaches them here
    redundant: tuple[int, ...] = ()


ROW_LOSS = "row_loss_kernelI13__nv_bfloat16.*ResidenceE{}E.*FeaturesE{}E"
THREE_WAYS = ["fused", "row_loss_", "no gradient"]
CASES = {
    # its block is one warp, and __syncwarp stands before __syncthreads
    "short": Case("short_row_loss_kernelI13__nv_bfloat16.*FeaturesE0E", PATHS[1].device, rows(493, PLAIN, THREE_WAYS)),
    "shared": Case(ROW_LOSS.format(1, 1), small_device(20480, blocks=8), rows(6802, EVERY_TERM, THREE_WAYS)),
    "clusters": Case(ROW_LOSS.format(2, 1), small_device(10240, blocks=8), rows(6802, EVERY_TERM, THREE_WAYS)),
    # behind a row that does not count; there are no two, one behind the other
    "streamed": Case(ROW_LOSS.format(3, 1), small_device(4096, 1), rows(2200, EVERY_TERM, THREE_WAYS), (2,)),
    # the __syncwarp at the end of finish_scratch stands before __syncthreads
    "gradient": Case(
        "row_gradient_kernelI13__nv_bfloat16.*FeaturesE1E",
        small_device(4096),
        rows(1402, EVERY_TERM, ["split", "row_gradient_"]),
        (0,),
    ),
    # of tails and weights of columns, which this case has none of; or before another __syncwarp
    "float64": Case(
        "scalar_rows_kernelIdE", H100, rows(333, EVERY_TERM, ["fused", "split"], torch.float64), (1, 3, 4, 5, 6, 7, 11)
    ),
    # its copies behind the last row hold nothing
    "router": Case("router_statistics_kernelI13__nv_bfloat16Li16ELb0E", H100, router, (1,)),
    "group sums": Case("group_sums_kernelIfE", H100, router),
    "repetition": Case("repetition_kernelIfE", H100, repetition),
    "texts": Case("text_facts_kernelIfE", DeviceLimits(0, 228 * 1024, 227 * 1024, 1024, 8), repetition),
}


def mutants(kernel: Kernel) -> Iterator[tuple[str, Kernel]]:
    lines = kernel.module.functions[kernel.name].body.split("\n")
    for number, line in enumerate(lines):
        if SYNCHRONISATION.search(line):
            left = [*lines[:number], "", *lines[number + 1 :]]
            if "cluster.arrive" in line:  # with the wait that belongs to it
                left[next(k for k in range(number, number + 4) if "cluster.wait" in lines[k])] = ""
            yield f"line {number}: {line.strip()}", kernel.module.mutated(kernel.name, "\n".join(left))


def run(case: Case, plain: str, kernel: Kernel) -> None:
    """Raises where something is wrong."""
    with on_device(case.device) as device:
        device.kernels[plain] = kernel
        case.run()
    device.require_no_findings()
    if all(launch.kernel is not kernel for launch in device.launches):
        raise LookupError(f"{plain} is not launched")


def is_noticed(case: Case, plain: str, mutant: Kernel) -> bool:
    try:
        run(case, plain, mutant)
    except (AssertionError, KernelFault):
        return True
    return False


EXCHANGE = {  # what is wrong: a line of the PTX, and what stands there instead
    "no wait": (r"mbarrier\.try_wait\S* (\w+), \[(%r\d+)\], %r\d+;", r"setp.eq.s32 \1, \2, \2;"),
    "a phase that is not flipped": (r"(mbarrier\.try_wait\S* \w+, \[%r\d+\]), %r\d+;", r"\1, 0;"),
    "too few bytes": (r"(mbarrier\.arrive\.expect_tx\S* _, \[%r\d+\]), %r\d+;", r"\1, 16;"),
    "too many bytes": (r"(mbarrier\.arrive\.expect_tx\S* _, \[%r\d+\]), %r\d+;", r"\1, 48;"),
    "too few arrivals": (r"(mbarrier\.init\S* \[%r\d+\]), %r\d+;", r"\1, 1;"),
    "another block's mbarrier": (r"(mapa\S* counter, %r\d+), %r\d+;", r"\1, 0;"),
    "no store": (r"st\.async[^;]*;", ""),
}


@pytest.mark.parametrize("what", EXCHANGE)
def test_mutants_of_the_exchange(what):
    case = Case(ROW_LOSS.format(2, 0), small_device(5120), rows(2002, PLAIN, ["fused", "no gradient"]))
    (plain,) = [kernel for kernel in stems_of_kernels() if re.search(case.kernel, kernel)]
    kernel = find_kernel(plain)
    broken, n = re.subn(*EXCHANGE[what], kernel.module.functions[kernel.name].body)
    assert n == 1
    assert not is_noticed(case, plain, kernel)
    assert is_noticed(case, plain, kernel.module.mutated(kernel.name, broken))


@pytest.mark.parametrize("name", CASES)
def test_mutants(name):
    case = CASES[name]
    (plain,) = [kernel for kernel in stems_of_kernels() if re.search(case.kernel, kernel)]
    kernel = find_kernel(plain)
    run(case, plain, kernel)
    broken = list(enumerate(mutants(kernel)))[::EVERY]
    assert broken
    missed = {n: text for n, (text, mutant) in broken if not is_noticed(case, plain, mutant)}
    assert set(missed) <= set(case.redundant), str(missed)
