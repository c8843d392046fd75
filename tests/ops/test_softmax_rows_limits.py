"""The row operators at the ends of what they take: upstream nan, ids out of range, the lowest numbers, many ids."""

import math

import pytest
import torch
from support.assertions import assert_bitwise_equal

from ava_ext.ops.row_fields import row_options

ops = torch.ops.ava_ext
CROSS_ENTROPY, LABEL_SMOOTHING, CONFIDENCE, SOFTCAP, ENTROPY, IDS_ARE_PRESENT = 1, 4, 32, 64, 128, 256
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def options(like, temperature=1.0, confidence=0.0, smoothing=0.0):
    real = torch.float64 if like.dtype == torch.float64 else torch.float32
    weights = {"label_smoothing": smoothing, "confidence_penalty_weight": confidence}
    return row_options(torch.zeros(1, dtype=real), temperature=temperature, logit_softcap=5.0, **weights)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("n_columns", [7, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_stay_zero_whatever_comes_from_above(dtype, n_columns):
    rows, targets = random(4, n_columns, dtype=dtype), torch.tensor([2, -7, 3, -7])
    rows[1] = rows[3] = 0
    before = rows.clone()
    factors = torch.tensor([2.0, math.nan, math.nan, math.inf]).to(options(rows).dtype)
    ops.scale_rows_(rows, factors, targets, -7)
    assert_bitwise_equal(rows[0], (before[0].to(factors.dtype) * 2).to(dtype))
    assert_bitwise_equal(rows[1], torch.zeros_like(rows[1]))
    assert rows[2].isnan().all()
    assert_bitwise_equal(rows[3], torch.zeros_like(rows[3]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_of_zero_on_infinite_gradients_is_nan(dtype):
    """As in torch: only an ignored row is left alone."""
    rows = torch.full((2, 9), math.inf).to(dtype)
    ops.scale_rows_(rows, torch.zeros(2).to(options(rows).dtype), torch.tensor([1, -100]), -100)
    assert rows[0].isnan().all() and rows[1].isinf().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_split_gradient_of_ignored_rows(dtype):
    logits, targets = random(3, 40, dtype=dtype), torch.tensor([1, -100, 2])
    flags = CROSS_ENTROPY | LABEL_SMOOTHING | CONFIDENCE
    _, _, _, statistics, coefficients = ops.row_loss(
        logits, targets, options(logits, confidence=0.1, smoothing=0.1), None, None, None, [], flags, 40, -100,
        False, True,
    )  # fmt: skip
    ids = torch.tensor([[1], [2**40], [2]])  # of an ignored row: not looked at
    upstream = torch.tensor([[1.0], [math.nan], [math.nan]]).to(coefficients.dtype)
    gradient = ops.row_gradient(logits, statistics, coefficients * upstream, ids, options(logits), flags, 40)
    assert gradient[0].isfinite().all() and gradient[0].any()
    assert_bitwise_equal(gradient[1], torch.zeros_like(gradient[1]))
    assert gradient[2].isnan().all()


def candidates_loss(logits, targets, ids, weights=None):
    weights = torch.ones(ids.shape) if weights is None else weights
    return ops.row_loss(
        logits, targets, options(logits), None, ids, weights, [ids.shape[-1]], CROSS_ENTROPY, logits.shape[-1], -100,
        True, False,
    )  # fmt: skip


def test_wide_ids_are_the_same_ids():
    logits, targets = random(3, 50), torch.tensor([1, -100, 2])
    ids = torch.tensor([[3, -1, 3], [4, 5, 6], [49, 2, 0]])
    for wide, narrow in zip(
        candidates_loss(logits, targets, ids), candidates_loss(logits, targets, ids.int()), strict=True
    ):
        assert_bitwise_equal(wide, narrow)
    wide = ops.row_statistics(logits, ids, None, options(logits), ENTROPY, 50)
    narrow = ops.row_statistics(logits, ids.int(), None, options(logits), ENTROPY, 50)
    for one, other in zip(wide, narrow, strict=True):
        assert_bitwise_equal(one, other)
    coefficients = random(3, 7)
    gradients = [
        ops.row_gradient(logits, wide[0], coefficients, given, options(logits), ENTROPY, 50)
        for given in (ids, ids.int())
    ]
    assert_bitwise_equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("anything", [2**33, -5, 50])
def test_ids_of_rows_that_do_not_count_may_be_anything(dtype, anything):
    logits, mask = random(3, 50, dtype=dtype), torch.tensor([True, False, True])
    ids, safe = torch.tensor([[1], [anything], [2]]), torch.tensor([[1], [0], [2]])
    flags = ENTROPY | IDS_ARE_PRESENT
    got = ops.row_statistics(logits, ids, mask, options(logits), flags, 50)
    for one, other in zip(got, ops.row_statistics(logits, safe, mask, options(logits), flags, 50), strict=True):
        assert_bitwise_equal(one, other)
    coefficients = random(3, 5, dtype=dtype)
    assert_bitwise_equal(
        ops.row_gradient(logits, got[0], coefficients, ids, options(logits), flags, 50),
        ops.row_gradient(logits, got[0], coefficients, safe, options(logits), flags, 50),
    )
    targets = torch.tensor([1, -100, 2])
    weights = torch.ones(3, 1, dtype=dtype)
    for one, other in zip(
        candidates_loss(logits, targets, ids, weights), candidates_loss(logits, targets, safe, weights), strict=True
    ):
        assert_bitwise_equal(one, other)


@pytest.mark.parametrize("value", [2**32 + 1, 2**33 - 1, 50, -2, -(2**32)])
def test_out_of_range_ids_are_found_before_they_are_narrowed(value):
    logits, ids = random(2, 50), torch.tensor([[1, 2], [3, value]])
    message = rf"ids in \[0, 50\) or -1, got {value} at position 3 \(row 1\)"
    with pytest.raises(IndexError, match="^row_loss: expected candidate_" + message):
        candidates_loss(logits, torch.tensor([0, 1]), ids)
    with pytest.raises(IndexError, match="^row_statistics: expected " + message):
        ops.row_statistics(logits, ids, None, options(logits), ENTROPY, 50)
    statistics = ops.row_statistics(logits, None, None, options(logits), ENTROPY, 50)[0]
    with pytest.raises(IndexError, match="^row_gradient: expected " + message):
        ops.row_gradient(logits, statistics, random(2, 6), ids, options(logits), ENTROPY, 50)


def test_an_absent_id_is_out_of_range_where_all_are_present():
    logits, ids = random(2, 50), torch.tensor([[1], [-1]])
    assert ops.row_statistics(logits, ids, None, options(logits), ENTROPY, 50)[1][1] == 0
    with pytest.raises(IndexError, match=r"^row_statistics: expected ids in \[0, 50\), got -1 at position 1 \(row 1\)"):
        ops.row_statistics(logits, ids, None, options(logits), ENTROPY | IDS_ARE_PRESENT, 50)


# one register and several blocks, with a lowest number that the temperature leaves finite, and one that it does not
@pytest.mark.parametrize(("n_columns", "temperature"), [(3, 1.0), (3, 0.01), (100, 0.25), (5000, 1.0), (5000, 0.01)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [ENTROPY, CONFIDENCE, CONFIDENCE | SOFTCAP])
def test_entropy_gradient_beside_the_lowest_number(dtype, n_columns, temperature, flags):
    logits = random(2, n_columns, dtype=dtype)
    lowest = list(range(0, n_columns, 3))
    masked = logits.clone()
    logits[:, lowest] = torch.finfo(dtype).min
    masked[:, lowest] = -math.inf
    if flags & SOFTCAP:  # which brings them back
        masked[:, lowest] = -5e4
    coefficients = torch.tensor([[0.5, -1.0, 0, 0, 0.3], [0, 2.0, 0, 0, 1]]).to(options(logits).dtype)
    ids = torch.tensor([[0], [lowest[-1]]])

    def gradient(of):
        given = options(logits, temperature)
        statistics = ops.row_statistics(of, None, None, given, flags | ENTROPY, n_columns)[0]
        return ops.row_gradient(of, statistics, coefficients, ids, given, flags | ENTROPY, n_columns)

    got, expected = gradient(logits), gradient(masked)
    assert got.isfinite().all()
    # of a masked column the s is not spent, of the lowest it is; all else is the same
    if not flags & SOFTCAP:
        assert not got[:, [column for column in lowest if column not in ids]].any()
    others = [column for column in range(n_columns) if column not in lowest]
    torch.testing.assert_close(got[:, others], expected[:, others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_with_confidence_penalty_beside_the_lowest_number(dtype):
    """Fused; the target is the lowest one in the second row."""
    logits = torch.tensor([[torch.finfo(dtype).min, 1, 2], [torch.finfo(dtype).min, 1, 2]], dtype=dtype)
    given = options(logits, temperature=0.5, confidence=1.0)
    gradient = ops.row_loss(
        logits, torch.tensor([1, 0]), given, None, None, None, [], CROSS_ENTROPY | CONFIDENCE, 3, -100, True, False
    )[2]
    assert gradient.isfinite().all()
    z = (logits.double() / 0.5).clamp_min(-1e4).requires_grad_()
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    loss = -log_p[[0, 1], [1, 0]] + 1 - entropy / math.log(3)
    (expected,) = torch.autograd.grad(loss.sum(), z)
    torch.testing.assert_close(
        gradient.double(), expected / 0.5, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-3
    )


def test_a_distant_target_has_its_whole_loss():
    logits = torch.tensor([[0.0, 5000.0, -1e30]])
    for target, expected in ((0, 5000.0), (2, 1e30)):
        row_loss = candidates_loss(logits, torch.tensor([target]), torch.tensor([[-1]]))[0]
        torch.testing.assert_close(row_loss, torch.tensor([expected]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_ids", [16, 17, 500])
def test_many_candidates_are_a_few_written_apart(dtype, n_ids):
    """Duplicates among many candidates add up as among few."""
    n_columns = 120
    logits, targets = random(3, n_columns, dtype=dtype), torch.tensor([1, 5, -100])
    ids = torch.randint(-1, n_columns, (3, n_ids), generator=torch.Generator("cpu").manual_seed(1))
    weights = random(3, n_ids, dtype=dtype, seed=2).abs()
    row_loss, _, gradient, *_ = candidates_loss(logits, targets, ids, weights)
    x = logits.double().requires_grad_()
    log_p = x.log_softmax(-1)
    p = log_p.exp()
    penalties = torch.where((ids >= 0) & (ids != targets.unsqueeze(-1)), weights.double(), 0)
    penalties = -(penalties * torch.log1p(-p.gather(-1, ids.clamp_min(0)))).sum(-1)
    loss = torch.where(targets >= 0, penalties - log_p.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1), 0)
    (expected,) = torch.autograd.grad(loss.sum(), x)
    tolerance = dict(rtol=2e-5, atol=2e-5) if dtype == torch.float32 else dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(row_loss.double(), loss.detach(), **tolerance)
    torch.testing.assert_close(gradient.double(), expected, **tolerance)
