"""Rows of logits and devices that send them every way through the kernels, and the ways to run them."""

import math
import re
from typing import NamedTuple

import torch
from cuda_operators import H100, Device, DeviceLimits, on_device, uninitialised
from support.row_oracle import expected_row_loss
from support.strategies import RowProblem
from test_softmax_rows import assert_right, fused, in_place, split

from ava_ext.ops.row_fields import Candidates, RowFlags, accumulation_dtype, row_options

PLAIN = int(RowFlags.CROSS_ENTROPY)
# a tail is for another kernel: test_tail
LEFT_OUT = RowFlags.TARGET_WEIGHTS | RowFlags.SOFTCAP | RowFlags.EXCLUDE_TARGET | RowFlags.ENTROPY | RowFlags.TAIL
EVERY_TERM = int(sum(RowFlags) - LEFT_OUT)
CAPPED = int(RowFlags.CROSS_ENTROPY | RowFlags.LABEL_SMOOTHING | RowFlags.EXCLUDE_TARGET | RowFlags.SOFTCAP)
TERMS = {"plain": PLAIN, "every term": EVERY_TERM, "capped": CAPPED}
RESIDENCES = ("warp", "shared", "clusters", "streamed")  # Residence in csrc/cuda, in its order


def small_device(shared_per_block: int, largest_cluster: int = 8, blocks: int = 2) -> DeviceLimits:
    """One where rows of some hundred columns go the ways of long rows.

    With 8 blocks on a multiprocessor a block has few threads, each of them several vectors; without a multiprocessor
    one block, or cluster, takes all rows.
    """
    return DeviceLimits(1 if blocks == 2 else 0, blocks * shared_per_block, shared_per_block, 0, largest_cluster)


class Path(NamedTuple):
    """Where the kernel keeps a row of `n_columns` float32 numbers, or twice as many of 16 bits, on a device."""

    residence: str
    cluster_size: int
    device: DeviceLimits
    n_columns: int


ONE_BLOCK = DeviceLimits(0, *[getattr(H100, n) for n, _ in H100._fields_[1:]])  # an H100 where one block takes all rows
PATHS = [
    Path("warp", 1, H100, 250),
    Path("warp", 1, ONE_BLOCK, 247),
    Path("shared", 1, small_device(4608), 701),
    Path("shared", 1, small_device(20480, blocks=8), 3401),
    Path("clusters", 2, small_device(5120), 1001),
    Path("clusters", 4, small_device(7424), 2501),
    Path("clusters", 2, small_device(10240, blocks=8), 3401),
    Path("clusters", 4, small_device(12288, blocks=8), 6803),
    Path("streamed", 1, small_device(4096, largest_cluster=1), 1100),
    Path("streamed", 1, small_device(4096, largest_cluster=1), 4403),
    Path("warp", 1, ONE_BLOCK, 901),
    Path("warp", 1, ONE_BLOCK, 1801),
]
# a warp's shared memory, a block's, a cluster and none of them, with several vectors a thread
MAIN_PATHS = [PATHS[1], PATHS[3], PATHS[6], PATHS[9]]


def name_of(path: Path) -> str:
    return f"{path.residence}_x{path.cluster_size}_{path.n_columns}"


def columns_of(path: Path, dtype: torch.dtype) -> int:
    return path.n_columns * (2 if dtype.itemsize == 2 else 1)


WAYS = {
    "fused": fused,
    "split": split,
    "row_loss_": lambda problem: in_place(problem, "row_loss_"),
    "row_gradient_": lambda problem: in_place(problem, "row_gradient_"),
    "no gradient": lambda problem: (
        *torch.ops.ava_ext.row_loss(problem.logits, *problem.arguments, False, False)[:2],
        None,
    ),
}


def problem_of(
    dtype: torch.dtype,
    n_columns: int,
    terms: int,
    *,
    n_rows: int = 5,
    padding: int = 0,
    shift: int = 0,
    gap: int = 0,
    n_ids: int = 4,
    seed: int = 0,
) -> RowProblem:
    """Rows with masked columns, one sure of another token than its target, one sure of its target, one ignored.

    What the kernels may not look at is uninitialised: the padding columns and the ignored row.

    Args:
        padding: of the columns, so many are beyond the vocabulary
        shift: elements between a 64-byte boundary and the first row
        gap: elements between two rows
        n_ids: candidates of a row, in two groups: the most likely token, none, and another one twice
    """
    random = torch.Generator().manual_seed(seed)
    vocab_size = n_columns - padding
    logits = torch.randn(n_rows, vocab_size, generator=random) * 3
    logits[1::2].masked_fill_(torch.rand(logits[1::2].shape, generator=random) < 0.1, -math.inf)
    peak, targets, twice = (torch.randint(vocab_size, (n_rows,), generator=random) for _ in range(3))
    rows = torch.arange(n_rows)
    logits[rows, peak] = 9
    if n_rows > 2:
        logits[1, peak[1]] = 40
        targets[2] = peak[2]
    logits[rows, targets] = logits[rows, targets].clamp(min=0)
    base = uninitialised((n_rows, shift + n_columns + gap), dtype)
    base[:, shift : shift + vocab_size] = logits
    real = accumulation_dtype(dtype)
    candidates = None
    if n_ids:
        ids = torch.stack([peak, torch.full_like(peak, -1), twice, twice], -1)[:, :n_ids].int()
        weights = (0.5 + torch.arange(n_ids, dtype=real)).expand(n_rows, -1).contiguous()
        candidates = Candidates(ids, weights, (1, n_ids - 1))
    if n_rows > 3:
        targets[3] = -100
        # float64 reads the candidates' logits of such a row, and drops them
        base[3, shift : shift + n_columns] = math.nan if dtype == torch.float64 else uninitialised((), dtype)
    coefficients = row_options(
        torch.empty(0, dtype=dtype),
        temperature=0.8,
        label_smoothing=0.1,
        focal_alpha=0.75,
        focal_gamma=1.5,
        z_loss_weight=0.01,
        confidence_penalty_weight=0.2,
        logit_softcap=12.0,
        reweighting_exponent=0.7,
    )
    return RowProblem(
        base,
        lambda base: base[:, shift : shift + n_columns],
        targets,
        coefficients,
        terms,
        0.25 + torch.arange(n_rows, dtype=real),
        candidates,
        vocab_size,
    )


def check(problem: RowProblem, way: str, device: DeviceLimits, architecture: str = "sm_90", **options) -> Device:
    """Runs a problem, compares it with the reference, and returns what it ran on."""
    with on_device(device, architecture, **options) as ran_on:
        outputs = WAYS[way](problem)
    assert_right(problem, outputs, expected_row_loss(problem), way)
    ran_on.require_no_findings()
    return ran_on


def residence_of(device: Device) -> tuple[str, int]:
    """Residence and cluster size of the first launch, a row_loss_kernel or a short_row_loss_kernel."""
    launch = device.launches[0]
    found = re.search(r"ResidenceE(\d)E", launch.kernel.name)
    return RESIDENCES[int(found[1]) if found else 0], launch.cluster_size
