"""How many instructions of PTX a row costs: its vectors, one warp's work between the barriers, and all the rest.

And what several short rows cost a warp.

Counted is all that a warp issues but mov and bra, most of which the assembler takes away. docs/gpu_model.md quotes the
numbers, which `python -m pytest tests/ptx/test_ptx_row_counts.py -n0 -s` prints.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from cuda_operators import DeviceLimits, on_device
from row_cases import EVERY_TERM, ONE_BLOCK, PLAIN, WAYS, problem_of, small_device

ROW = 1  # of three: one that has a row before it and one behind


def issued(terms: int, n_columns: int, n_ids: int, device: DeviceLimits, likely: tuple[float, ...] = ()) -> np.ndarray:
    """[3, n_warps]: what each warp of a block issues up to the row's sums, its coefficients, its gradient.

    likely: the logits of the first candidates, beside others of about 0
    """
    problem = problem_of(torch.bfloat16, n_columns, terms, n_rows=3, n_ids=n_ids)
    problem.base.copy_(torch.randn(problem.base.shape, generator=torch.Generator().manual_seed(1)))
    for k, logit in enumerate(likely):
        problem.base[torch.arange(3), problem.candidates.ids[:, k].long()] = logit
    with on_device(device, check_races=False) as ran_on:
        WAYS["fused"](problem)
    (launch,) = ran_on.launches
    assert launch.grid == (1, 1)
    between = np.diff(launch.issued_at_barriers, axis=0)  # the first barrier is before all rows
    return between.reshape(3, 3, launch.n_warps)[ROW]


class RowCounts(NamedTuple):
    """What a warp issues for a row that does nothing for the others."""

    vector: float  # for each of its vectors
    bookkeeping: float  # besides


def count_row(terms: int) -> RowCounts:
    """Of 10 warps, the plan of an H100 and an H200: as many vectors for every thread, in two lengths."""
    few, many = 11, 13
    short, long = (issued(terms, n * 320 * 8, 0, ONE_BLOCK).sum(0)[1:-1].mean() for n in (few, many))
    vector = (long - short) / (many - few)
    return RowCounts(vector, short - few * vector)


@pytest.mark.parametrize(
    ("terms", "most"), [(PLAIN, RowCounts(97, 205)), (EVERY_TERM, RowCounts(121, 250))], ids=["plain", "every term"]
)
def test_vectors_and_bookkeeping(terms, most):
    counts = count_row(terms)
    print(counts)
    assert counts.vector <= most.vector and counts.bookkeeping <= most.bookkeeping


CANDIDATES = {
    "no": (0, ()),
    "four": (4, ()),
    "four, one likely": (4, (8.0,)),
    "four, one the maximum": (4, (15.0,)),
    "four, one the maximum and one likely": (4, (15.0, 14.0)),
}


@pytest.mark.parametrize("candidates", CANDIDATES)
@pytest.mark.parametrize("terms", [PLAIN, EVERY_TERM], ids=["plain", "every term"])
def test_between_the_barriers(terms, candidates):
    """One warp alone evaluates a row, while the others wait."""
    n_ids, likely = CANDIDATES[candidates]
    _, stretch, _ = issued(terms, 3584, n_ids, small_device(18432, blocks=8), likely)
    print(stretch[0] - stretch[-1])
    assert stretch[0] - stretch[-1] <= 400


def of_warps(terms: int, n_columns: int, n_ids: int) -> float:
    """What a short row costs a warp that takes as many at once as it can."""

    def all_issued(n_rows: int) -> int:
        problem = problem_of(torch.bfloat16, n_columns, terms, n_rows=n_rows, n_ids=n_ids)
        problem.base.copy_(torch.randn(problem.base.shape, generator=torch.Generator().manual_seed(1)))
        problem.targets.clamp_(min=0)  # all count
        with on_device(ONE_BLOCK, check_races=False) as ran_on:
            WAYS["fused"](problem)
        return int(ran_on.launches[0].issued.sum())

    return (all_issued(64) - all_issued(32)) / 32


class ShortRowCounts(NamedTuple):
    row: float  # besides its vectors
    together: float  # for all that a warp takes at once


@pytest.mark.parametrize(
    ("terms", "n_ids", "most"),
    [(PLAIN, 0, ShortRowCounts(165, 560)), (EVERY_TERM, 4, ShortRowCounts(205, 920))],
    ids=["plain", "every term and four candidates"],
)
def test_short_rows(terms, n_ids, most):
    """Of 1024 columns a warp takes four rows, each 4 vectors of a lane; of 2048 two, each 8."""
    vector = (of_warps(terms, 1024, n_ids) - of_warps(terms, 512, n_ids)) / 2
    four, two = of_warps(terms, 1024, n_ids) - 4 * vector, of_warps(terms, 2048, n_ids) - 8 * vector
    together = (two - four) / (1 / 2 - 1 / 4)
    counts = ShortRowCounts(four - together / 4, together)
    print(vector, counts)
    assert counts.row <= most.row and counts.together <= most.together
