"""The PTX of the row kernels against the reference, in every residence, type, feature and way to the gradient."""

import itertools
import math
import re

import pytest
import torch
from cuda_operators import H100, DeviceLimits, on_device
from grid import IS_FULL, of_grid
from row_cases import (
    CAPPED,
    EVERY_TERM,
    MAIN_PATHS,
    PATHS,
    PLAIN,
    TERMS,
    WAYS,
    check,
    columns_of,
    name_of,
    problem_of,
    residence_of,
)
from support.assertions import assert_bitwise_equal, assert_within
from support.row_oracle import expected_row_loss
from test_softmax_rows import assert_right
from test_softmax_rows_tail import expected_with_tail, with_tail

from ava_ext import reference
from ava_ext.ops import RowFlags, row_options

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
A100 = DeviceLimits(108, 164 * 1024, 163 * 1024, 1024, 1)
ARCHITECTURES = {"sm_90": None, "sm_80": 1} if IS_FULL else {"sm_90": None}  # the largest cluster
ops = torch.ops.ava_ext

# a step that is prime to the lengths of the axes comes by every value of each
GRID = list(itertools.product(PATHS, TERMS, WAYS, DTYPES))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("number", "case"), of_grid(list(enumerate(GRID)), every=13))
def test_against_the_reference(number, case, architecture):
    path, terms, way, dtype = case
    if path.cluster_size > 1 and ARCHITECTURES[architecture]:
        pytest.skip(f"{architecture} has no clusters")
    n_columns = columns_of(path, DTYPES[dtype])
    # what else may differ goes round with the number, each at a pace of its own
    problem = problem_of(
        DTYPES[dtype],
        n_columns,
        TERMS[terms],
        padding=number % 3 * 2,
        shift=number % 4,
        gap=number % 2 * 3,
        n_ids=0 if number % 5 == 0 else 4,
        seed=number,
    )
    ran_on = check(problem, way, path.device, architecture, seed=number if number % 2 else None)
    assert residence_of(ran_on) == (path.residence, path.cluster_size)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("way", WAYS)
def test_float64(terms, way):
    problem = problem_of(torch.float64, 333, TERMS[terms], padding=1, shift=1, seed=1)
    check(problem, way, H100)


# vocabularies of today, one row each, with the plans of an H100. An H200 and a B200 have its limits, but for the number
# of multiprocessors, on which only the grid depends
VOCABULARIES = [
    (torch.bfloat16, 4096, ("warp", 1)),
    (torch.bfloat16, 32000, ("shared", 1)),
    (torch.bfloat16, 50257, ("shared", 1)),
    (torch.bfloat16, 128256, ("clusters", 4)),
    (torch.float32, 32000, ("clusters", 2)),
    (torch.float32, 50257, ("clusters", 2)),
    (torch.float32, 128256, ("clusters", 8)),
    (torch.bfloat16, 262144, ("clusters", 8)),
    (torch.bfloat16, 600000, ("clusters", 8)),
]


@pytest.mark.parametrize(("dtype", "n_columns", "residence"), VOCABULARIES[: None if IS_FULL else 6])
def test_the_plans_of_gpus(dtype, n_columns, residence):
    for terms in (PLAIN, EVERY_TERM):
        problem = problem_of(dtype, n_columns, terms, n_rows=1, seed=5)
        assert residence_of(check(problem, "row_loss_", H100)) == residence


def loss_and_gradient(logits, targets, terms):
    coefficients = row_options(logits, label_smoothing=0.1, confidence_penalty_weight=0.1, logit_softcap=12.0)
    n_columns = logits.shape[-1]
    loss, _, gradient, *_ = ops.row_loss(
        logits, targets, coefficients, None, None, None, [], terms, n_columns, -100, True, False
    )
    return loss, gradient


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", MAIN_PATHS, ids=name_of)
def test_rows_that_are_not_numbers(path, dtype):
    """nan and +inf reach the loss and the whole gradient; a row of one column, and one that is sure, are exact."""
    n_columns = columns_of(path, DTYPES[dtype])
    logits = torch.randn(6, n_columns, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    targets = torch.tensor([7, 5, 11, 3, 2, 0])
    logits[1, n_columns // 2] = math.nan
    logits[2, torch.arange(n_columns) != 11] = -math.inf
    logits[3, n_columns - 1] = math.inf
    logits[4] = -math.inf
    logits[5], logits[5, 0] = -30, 30
    for terms in (PLAIN, EVERY_TERM, CAPPED) if IS_FULL else (PLAIN,):
        with on_device(path.device) as device:
            loss, gradient = loss_and_gradient(logits, targets, terms)
        device.require_no_findings()
        is_infinite = not terms & RowFlags.SOFTCAP  # which makes a number of +inf
        assert loss[[0, 1, 2, 3, 5]].isnan().tolist() == [False, True, False, is_infinite, False]
        for row, is_nan in enumerate([False, True, False, is_infinite, False, False]):
            assert (gradient[row].isnan() if is_nan else gradient[row].isfinite()).all()
        assert not gradient[4].any() and not gradient[2, torch.arange(n_columns) != 11].any()
        if terms == PLAIN:
            assert loss[2] == 0 and loss[5] <= 1e-20


@pytest.mark.parametrize("first", [0, 1])
def test_the_gradient_of_a_slice_is_written_16_bytes_at_a_time(first):
    """An odd number of columns, without the first or the last of 9 tokens: no vector but those at the rows' ends goes
    element by element."""
    base = torch.randn(2, 9, 2001, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits, targets = base[:, first : first + 8], torch.zeros(2, 8, dtype=torch.int64)
    with on_device(H100) as device:
        _, gradient = loss_and_gradient(logits, targets, PLAIN)
    device.require_no_findings()
    stores = device.launches[0].thread_instructions
    n_wide = sum(n for opcode, n in stores.items() if opcode.startswith("st.global.v4"))
    n_single = sum(n for opcode, n in stores.items() if re.fullmatch(r"st\.global\.[bu]16", opcode))
    assert n_wide >= 16 * (2001 // 8 - 1) and n_single <= 16 * (2 * 7 + 1)
    expected = torch.softmax(logits.double(), -1)
    expected[..., 0] -= 1
    torch.testing.assert_close(gradient.double(), expected, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("terms", [RowFlags.ENTROPY, RowFlags.ENTROPY | RowFlags.SOFTCAP], ids=["dense", "capped"])
@pytest.mark.parametrize("dtype", of_grid(list(DTYPES), every=3))
@pytest.mark.parametrize("path", MAIN_PATHS, ids=name_of)
def test_statistics(path, dtype, terms):
    n_columns = columns_of(path, DTYPES[dtype])
    problem = problem_of(DTYPES[dtype], n_columns, int(terms), padding=2, shift=3, gap=1)
    logits, ids, mask = problem.logits, problem.candidates.ids, problem.targets >= 0
    with on_device(path.device) as device:
        arguments = (problem.options, problem.flags, problem.vocab_size)
        _, log_probs, summaries = ops.row_statistics(logits, ids, mask, *arguments)
    device.require_no_findings()
    expected = reference.softmax_statistics(
        logits[mask, : problem.vocab_size].double(),
        ids[mask],
        temperature=problem.options[0].item(),
        logit_softcap=12.0 if terms & RowFlags.SOFTCAP else None,
    )
    assert_within(log_probs[mask], expected.log_probs, 4e-6 * (1 + expected.log_probs.abs()), "log_probs")
    assert not log_probs[~mask].any()
    for name, value in zip(("entropy", "lse", "log_rest", "mean_log_prob"), summaries, strict=True):
        wanted = getattr(expected, name)
        assert_within(value[mask], wanted, 4e-6 * (1 + wanted.abs()), name)


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64])
def test_scale_rows(dtype):
    """More than one part; a factor of 1 leaves every bit, those of a nan too."""
    rows = torch.randn(5, 40000 // dtype.itemsize, generator=torch.Generator().manual_seed(0)).to(dtype)[:, 1:-2]
    rows[0, 0] = math.nan
    factors = torch.tensor([1, 0.5, 1, -3, 0.1]).to(torch.float64 if dtype == torch.float64 else torch.float32)
    expected = (rows.to(factors.dtype) * factors[:, None]).to(dtype)
    with on_device(H100) as device:
        ops.scale_rows_(rows, factors)
    device.require_no_findings()
    assert_bitwise_equal(rows, expected)


@pytest.mark.parametrize("dtype", DTYPES if IS_FULL else ["float32"])
@pytest.mark.parametrize("terms", ["every term", "capped"])
@pytest.mark.parametrize("path", MAIN_PATHS, ids=name_of)
def test_errors_of_exp2(path, terms, dtype):
    """ex2.approx may be off by 2 units in the last place; here by up to 2^-22 of the value, at random."""
    problem = problem_of(DTYPES[dtype], columns_of(path, DTYPES[dtype]), TERMS[terms], seed=3)
    expected = expected_row_loss(problem)
    with on_device(path.device, ex2_error=2.0**-22):
        outputs = WAYS["fused"](problem)
    assert_right(problem, outputs, expected, "fused")


def test_a_target_out_of_range_is_a_device_assert():
    with on_device(H100), pytest.raises(Exception, match=r"device assert: .*expected targets in \[0, vocab_size\)"):
        loss_and_gradient(torch.zeros(3, 10), torch.tensor([0, 10, 1]), PLAIN)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tail(dtype, architecture):
    """Of soft targets: an ordinary row, and one that is sure of what is named."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 300, generator=random).to(dtype)
    ids, q = torch.tensor([[7, 150, 299], [3, 4, 5]]), torch.tensor([[0.5, 0.25, 0.125]] * 2)
    logits[1, 3:6] = torch.tensor([24.0, 23.5, 23.0], dtype=dtype)
    logits.requires_grad_()
    q = q.to(torch.float64 if dtype == torch.float64 else torch.float32)
    with on_device(H100, architecture) as device:
        loss = with_tail(logits, ids, q)
        (gradient,) = torch.autograd.grad(loss, logits, torch.ones(2, dtype=loss.dtype))
    device.require_no_findings()
    assert "scalar_rows_kernel" in device.launches[0].kernel.name
    expected, expected_gradient = expected_with_tail(logits, ids, q)
    exact = 1e-12 if dtype == torch.float64 else 4e-6
    torch.testing.assert_close(loss.double(), expected, rtol=exact, atol=0)
    rounding = 2**-8 if dtype == torch.bfloat16 else exact
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rounding, atol=1e-7)
