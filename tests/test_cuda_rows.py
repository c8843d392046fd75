"""The CUDA row kernels, emulated, on devices of every kind: rows of which a warp takes one or several, rows of a block,
of clusters of 2, 4 and 8 blocks, and rows that fit nowhere. Other files run the same kernels on one device only.

tests/cuda_emulator/test_softmax_rows.cpp holds the plans of these devices, and of an H200, against what is named here.
"""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import emulated_cuda
from support.assertions import assert_bitwise_equal, assert_within
from support.row_oracle import expected_row_loss
from support.row_ways import assert_right, fused, in_place, split
from support.strategies import RowProblem, row_problems

from ava_ext import reference
from ava_ext.ops.row_fields import IDS_ARE_PRESENT, Candidates, RowFlags, row_options

pytestmark = pytest.mark.skipif(not emulated_cuda.AVAILABLE, reason="the emulator needs x86-64")
ops = torch.ops.ava_ext
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEFT_OUT = RowFlags.TAIL | RowFlags.TARGET_WEIGHTS | RowFlags.SOFTCAP | RowFlags.DFT | RowFlags.EAFT
EVERY_TERM = int(sum(RowFlags) - LEFT_OUT)


# the mean of u is not exactly 0: a capped logit of -22.8 is as far from the rounded maximum as a multiply-add leaves it
ONE_CAPPED_COLUMN = RowProblem(
    torch.tensor([-30.0]),
    lambda base: base,
    torch.tensor(0),
    row_options(torch.empty(1), label_smoothing=0.1, logit_softcap=30.0),
    int(RowFlags.CROSS_ENTROPY | RowFlags.LABEL_SMOOTHING | RowFlags.SOFTCAP),
    None,
    None,
    1,
)


def device_of(shared_per_block, largest_cluster, blocks=2, n_multiprocessors=1):
    """With 8 blocks on a multiprocessor a block has few threads, each of them several vectors.

    Without a multiprocessor one block takes all rows, of short ones several at once.
    """
    return {
        "n_multiprocessors": n_multiprocessors,
        "shared_per_multiprocessor": blocks * shared_per_block,
        "shared_per_block": shared_per_block,
        "shared_reserved_per_block": 0,
        "largest_cluster": largest_cluster,
    }


# where the kernels keep a row of so many bytes and more: a device, and the bytes
ONE_OF_A_WARP = device_of(227 * 1024, 8), 1100
SEVERAL_OF_A_WARP = device_of(227 * 1024, 8, n_multiprocessors=0), 4
SEVERAL_IN_SLOTS = device_of(227 * 1024, 8, n_multiprocessors=0), 1100
SHARED = device_of(8192, 1), 600
SHARED_IN_SLOTS = device_of(20480, 1, blocks=8), 13600
CLUSTERS_OF_2 = device_of(5120, 8), 3800
CLUSTERS_IN_SLOTS = device_of(10240, 8, blocks=8), 13600
CLUSTERS_OF_4 = device_of(7424, 8), 10240
CLUSTERS_OF_8 = device_of(14080, 8), 38400
STREAMED = device_of(4096, 1), 3700
DEVICES = {
    "one of a warp": ONE_OF_A_WARP,
    "several of a warp": SEVERAL_OF_A_WARP,
    "several of a warp, several vectors a thread": SEVERAL_IN_SLOTS,
    "shared": SHARED,
    "shared, several vectors a thread": SHARED_IN_SLOTS,
    "clusters of 2": CLUSTERS_OF_2,
    "clusters of 2, several vectors a thread": CLUSTERS_IN_SLOTS,
    "clusters of 4": CLUSTERS_OF_4,
    "clusters of 8": CLUSTERS_OF_8,
    "streamed": STREAMED,
}


@pytest.fixture(params=DEVICES)
def bytes_of_a_row(request):
    """The emulated kernels in place, on one of the devices."""
    limits, n_bytes = DEVICES[request.param]
    emulated_cuda.set_schedule("random", len(request.param))
    with emulated_cuda.kernels_in_place(), emulated_cuda.device_limits(**limits):
        yield n_bytes


def rows_of(n_bytes, dtype, n_rows=3, seed=0):
    n_columns = n_bytes // dtype.itemsize + 5
    return (torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def loss_and_gradient(logits, targets, terms=1, ids=None, weights=None, vocab_size=None, **options):
    options = {"label_smoothing": 0.1, "z_loss_weight": 0.1, "confidence_penalty_weight": 0.1, **options}
    groups = [] if ids is None else [ids.shape[-1]]
    loss, _, gradient, *_ = ops.row_loss(
        logits, targets, row_options(logits, **options), None, ids, weights, groups, int(terms),
        vocab_size or logits.shape[-1], -100, True, False,
    )  # fmt: skip
    return loss, gradient


@pytest.mark.parametrize(
    "name",
    ["several of a warp", "one of a warp", "shared", "shared, several vectors a thread", "clusters of 2", "streamed"],
)
@settings(max_examples=12)
@given(problem=row_problems(vocabularies=[1, 3, 64, 255, 513, 1025, 1500, 2500]))
@example(problem=ONE_CAPPED_COLUMN)
def test_every_way_to_the_gradient_on_every_device(name, problem):
    expected = expected_row_loss(problem)
    with emulated_cuda.kernels_in_place(), emulated_cuda.device_limits(**DEVICES[name][0]):
        assert_right(problem, fused(problem), expected, "fused")
        assert_right(problem, split(problem), expected, "split")
        if not problem.is_expanded:
            assert_right(problem, in_place(problem, "row_loss_"), expected, "row_loss_")
            assert_right(problem, in_place(problem, "row_gradient_"), expected, "row_gradient_")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", [1, EVERY_TERM, int(RowFlags.CROSS_ENTROPY | RowFlags.SOFTCAP)])
def test_against_pytorch(bytes_of_a_row, dtype, terms):
    """The loss, and the gradient apart from the target's entry, which would hide all others in a norm."""
    logits = rows_of(bytes_of_a_row, dtype)
    n_columns = logits.shape[-1]
    targets = torch.tensor([0, n_columns - 1, int(logits[2].argmax())])
    options = {"label_smoothing": 0.1, "confidence_penalty_weight": 0.1, "logit_softcap": 9.0, "temperature": 0.9}
    loss, gradient = loss_and_gradient(logits, targets, terms, focal_gamma=1.5, **options)
    x = logits.double().requires_grad_()
    softcap = 9.0 if terms & RowFlags.SOFTCAP else None
    z = reference.effective_logits(x, temperature=0.9, logit_softcap=softcap, vocab_size=n_columns)
    expected = reference.negative_log_likelihood(z, targets)
    if terms == EVERY_TERM:
        hard = reference.focal(z, targets, 1.0, 1.5)
        expected = reference.smoothed(hard, z, 0.1, "exclude_target") + 0.1 * reference.z_loss(z)
        expected = expected + 0.1 * reference.confidence_penalty(z)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    assert_within(loss, expected.detach(), 2e-6 * expected.detach().abs(), "loss")
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    smallest = 6e-8 if dtype == torch.float16 else 1e-12
    others = torch.ones_like(logits, dtype=torch.bool).scatter(-1, targets[:, None], False)
    size = expected_gradient.abs().masked_fill(~others, 0).amax(-1, keepdim=True)
    bound = rounding * expected_gradient.abs() + 1e-6 * size + smallest
    assert_within(gradient, expected_gradient, bound, "gradient")


# each two of dtype, terms and value meet
@pytest.mark.parametrize(
    ("dtype", "terms", "value"),
    [(dtype, 1, value) for dtype, value in zip(DTYPES, (math.nan, math.inf, math.nan), strict=True)]
    + [(dtype, EVERY_TERM, value) for dtype, value in zip(DTYPES, (math.inf, math.nan, math.inf), strict=True)],
)
def test_nan_and_infinity_are_never_hidden(bytes_of_a_row, dtype, terms, value):
    logits = rows_of(bytes_of_a_row, dtype)
    n_columns = logits.shape[-1]
    for column in (0, n_columns // 2, n_columns - 1):
        spoiled = logits.clone()
        spoiled[1, column] = value
        loss, gradient = loss_and_gradient(spoiled, torch.tensor([0, 0, 0]), terms)
        assert loss.isnan().tolist() == [False, True, False]
        assert gradient[1].isnan().all() and gradient[::2].isfinite().all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_rows_of_the_lowest_number(bytes_of_a_row, dtype):
    """All finfo.min: uniform. One other: sure of it. Masked columns beside them count for nothing."""
    logits = torch.full_like(rows_of(bytes_of_a_row, dtype), torch.finfo(dtype).min)
    n_columns = logits.shape[-1]
    logits[1, 2] = 0
    logits[2, 4:] = -math.inf
    for terms, n in ((1, n_columns), (int(RowFlags.CROSS_ENTROPY | RowFlags.CONFIDENCE_PENALTY), n_columns)):
        loss, gradient = loss_and_gradient(logits, torch.tensor([2, 2, 2]), terms, confidence_penalty_weight=0.0)
        torch.testing.assert_close(loss.double(), torch.tensor([math.log(n), 0.0, math.log(4)]).double())
        expected = torch.zeros_like(logits, dtype=torch.float64)
        expected[0] = 1 / n
        expected[0, 2] -= 1
        expected[2, :4] = 0.25
        expected[2, 2] -= 1
        torch.testing.assert_close(gradient.double(), expected, rtol=torch.finfo(dtype).eps + 1e-6, atol=0)


@pytest.mark.parametrize("gap", [16.0, 80.0])
def test_a_sure_repetition_is_exact(bytes_of_a_row, gap):
    """-w log(1 - p) of the candidate that leads by `gap`, where 1 - p is far below the resolution of float32."""
    logits = -rows_of(bytes_of_a_row, torch.float32, seed=1).abs() / 8
    n_columns = logits.shape[-1]
    places = torch.tensor([0, n_columns // 2, n_columns - 1])
    logits[range(3), places] = gap
    ids = torch.stack([places, torch.full((3,), -1), places, (places + 2) % n_columns], -1).int()
    weights = torch.tensor([0.5, 9.0, 1.5, 1.0]).expand(3, 4).contiguous()
    loss, gradient = loss_and_gradient(logits, (places + 1) % n_columns, 0, ids, weights)
    x = logits.double().requires_grad_()
    expected = 2 * reference.softplus(reference.log_odds(x, places))
    expected = expected + reference.softplus(reference.log_odds(x, (places + 2) % n_columns))
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    assert_within(loss, expected.detach(), 2e-6 * expected.detach(), "penalty")
    tolerance = 1e-6 + gap * 2**-23
    assert_within(gradient, expected_gradient, tolerance * expected_gradient.abs() + 1e-37, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_the_same_alone_among_many_and_in_any_order(bytes_of_a_row, dtype):
    logits = rows_of(bytes_of_a_row, dtype, n_rows=7)
    targets = torch.arange(7) % 5
    results = []
    for order, seed in (("forward", 0), ("reverse", 0), ("random", 1)):
        emulated_cuda.set_schedule(order, seed)
        results.append(loss_and_gradient(logits, targets, EVERY_TERM))
    for loss, gradient in results:
        assert_bitwise_equal(loss, results[0][0])
        assert_bitwise_equal(gradient, results[0][1])
    for row in (0, 5):
        loss, gradient = loss_and_gradient(logits[row : row + 1], targets[row : row + 1], EVERY_TERM)
        assert_bitwise_equal(loss, results[0][0][row : row + 1])
        assert_bitwise_equal(gradient, results[0][1][row : row + 1])
    targets[1::2], logits[1::2] = -100, math.nan  # rows that do not count are not looked at
    loss, gradient = loss_and_gradient(logits, targets, EVERY_TERM)
    assert_bitwise_equal(gradient[::2], results[0][1][::2])
    assert not loss[1::2].any() and not gradient[1::2].any()


@pytest.mark.parametrize("n_ids", [1, 3, 8, 20, 31])
@pytest.mark.parametrize("way", [fused, split])
def test_bitwise_the_same_however_many_a_warp_takes(n_ids, way):
    """A warp that has several rows adds up the terms of a row's candidates in the order of a whole warp."""
    random = torch.Generator().manual_seed(n_ids)
    logits = torch.randn(11, 70, generator=random)
    ids = torch.randint(-1, 70, (11, n_ids), generator=random).int()
    candidates = Candidates(ids, torch.rand(11, n_ids, generator=random), (n_ids // 2, n_ids - n_ids // 2))
    targets = torch.randint(70, (11,), generator=random).index_fill(0, torch.tensor([2, 6]), -100)
    problem = RowProblem(
        logits, lambda base: base, targets, row_options(logits, temperature=0.9), EVERY_TERM, None, candidates, 70
    )
    with emulated_cuda.kernels_in_place():
        with emulated_cuda.device_limits(**ONE_OF_A_WARP[0]):
            alone = way(problem)
        with emulated_cuda.device_limits(**SEVERAL_OF_A_WARP[0]):
            together = way(problem)
    for one, other in zip(alone, together, strict=True):
        assert_bitwise_equal(one, other)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_scale_rows(bytes_of_a_row, dtype):
    """Rows at any alignment; a factor of 1 leaves every bit, those of a nan too."""
    rows = rows_of(bytes_of_a_row, dtype, n_rows=4)[:, 1:-2]
    factors = torch.tensor([1.0, 0.0, -2.0, 0.3]).to(torch.float64 if dtype == torch.float64 else torch.float32)
    rows[0, 0] = math.nan
    expected = (rows.to(factors.dtype) * factors[:, None]).to(dtype)
    ops.scale_rows_(rows, factors)
    assert_bitwise_equal(rows, expected)


def test_scale_more_rows_than_are_looked_up_at_once():
    """8 blocks of 256 threads: a second look for the last rows, and rows of every place in a look."""
    n_rows = 2 * 2048 + 50
    rows = torch.randn(n_rows, 3, generator=torch.Generator().manual_seed(0))
    factors = torch.ones(n_rows).index_fill(0, torch.arange(0, n_rows, 61), -2.0)
    factors[-1], targets = 0.5, torch.arange(n_rows) % 5
    expected = torch.where((targets == 4)[:, None], rows, rows * factors[:, None])
    with emulated_cuda.kernels_in_place(), emulated_cuda.device_limits(**ONE_OF_A_WARP[0]):
        ops.scale_rows_(rows, factors, targets, 4)
    assert_bitwise_equal(rows, expected)


@pytest.mark.parametrize("target", [9, -1, 2**32 - 1, -(2**40)])
def test_target_out_of_range_is_a_device_assert(target):
    logits, targets = torch.zeros(3, 10), torch.tensor([0, target, 1])
    with emulated_cuda.kernels_in_place():
        with pytest.raises(RuntimeError, match=r"expected targets in \[0, vocab_size\) or ignore_index"):
            loss_and_gradient(logits, targets, vocab_size=9)
        with pytest.raises(RuntimeError, match=r"expected ids in \[0, vocab_size\) or -1"):
            loss_and_gradient(logits, torch.zeros(3).long(), 1, torch.full((3, 1), 10).int(), torch.ones(3, 1))


IDS = st.one_of(
    st.integers(-1, 9), st.sampled_from([10, -2, 2**31, 2**32, 2**32 + 1, 2**33 - 1, -(2**32), 5 * (2**32 + 1)])
)


@pytest.mark.parametrize("all_are_present", [False, True])
@settings(max_examples=60)
@given(ids=st.lists(IDS, min_size=1, max_size=3))
def test_ids_of_64_bits_are_checked_as_a_whole(all_are_present, ids):
    """Both of an id's words, on both sides of every limit."""
    logits, wide = torch.linspace(-1, 1, 10).expand(1, 10), torch.tensor([ids])
    options, flags = row_options(torch.zeros(1)), int(RowFlags.ENTROPY)
    flags |= IDS_ARE_PRESENT * all_are_present
    with emulated_cuda.kernels_in_place():
        if any(not all_are_present - 1 <= one < 10 for one in ids):
            with pytest.raises(RuntimeError, match=r"expected ids in \[0, vocab_size\) or -1"):
                ops.row_statistics(logits, wide, None, options, flags, 10)
        else:
            got = ops.row_statistics(logits, wide, None, options, flags, 10)[1]
            assert_bitwise_equal(got, ops.row_statistics(logits, wide.int(), None, options, flags, 10)[1])


def test_more_groups_and_ids_than_there_is_room_for():
    logits, targets, coefficients = torch.zeros(1, 5), torch.zeros(1).long(), row_options(torch.zeros(1))
    with emulated_cuda.kernels_in_place():
        ids, weights = torch.zeros(1, 40).int(), torch.ones(1, 40)
        arguments = (targets, coefficients, None, ids, weights)
        with pytest.raises(RuntimeError, match="row_loss: expected at most 32 groups of candidates, got 40"):
            ops.row_loss(logits, *arguments, [1] * 40, 1, 5, -100, True, False)
        with pytest.raises(RuntimeError, match="row_statistics: expected at most 1024 ids for a row, got 1025"):
            ops.row_statistics(logits, torch.zeros(1, 1025).int(), None, coefficients, 128, 5)
