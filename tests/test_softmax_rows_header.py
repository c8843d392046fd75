"""csrc/softmax_rows.h and csrc/element_type.h by themselves, compiled as a Python module: numbers in, numbers out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ava_ext import reference
from ava_ext.ops.row_fields import RowFlags

REALS = ["float32", "float64"]
TOLERANCE = {"float32": 3e-6, "float64": 1e-13}
logit = st.one_of(st.floats(-30, 30, width=32), st.sampled_from([-math.inf, 0.0, 1.0]))
rows = st.lists(logit, min_size=1, max_size=12)


def expected_statistics(values, inverse_temperature=1.0):
    """(max, argmax, rest, weighted, sum, count) in float64, from their definition."""
    kept = [(value, column) for column, value in enumerate(values) if value > -math.inf]
    if not kept:
        return (-math.inf, -1, 0, 0, 0, 0)
    largest = max(value for value, _ in kept)
    argmax = min(column for value, column in kept if value == largest)
    u = [(value - largest) * inverse_temperature for value, _ in kept]
    rest = math.fsum(math.exp(x) for x, (_, column) in zip(u, kept, strict=True) if column != argmax)
    return largest, argmax, rest, math.fsum(x * math.exp(x) for x in u), math.fsum(u), len(kept)


def assert_statistics_close(got, expected, real):
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE[real] * 4, atol=1e-36)


@pytest.mark.parametrize("real", REALS)
@given(values=rows, inverse_temperature=st.sampled_from([1.0, 0.5, 4.0]))
def test_update_column_by_column(header_maths, real, values, inverse_temperature):
    got = getattr(header_maths, f"measure_{real}")(values, 0, inverse_temperature)
    assert_statistics_close(got, expected_statistics(values, inverse_temperature), real)


@pytest.mark.parametrize("real", REALS)
@given(parts=st.lists(st.lists(logit, max_size=6), max_size=6), seed=st.randoms(use_true_random=False))
@example(parts=[[-math.inf], [], [1.0], [-math.inf, 1.0]], seed=None)
def test_merge_is_a_monoid(header_maths, real, parts, seed):
    """Any parts of a row, some of them empty or masked, in any order and association."""
    measure, merge = getattr(header_maths, f"measure_{real}"), getattr(header_maths, f"merge_{real}")
    measured, begin = [], 0
    for part in parts:
        measured.append(measure(part, begin, 1.0))
        begin += len(part)
    whole = expected_statistics([value for part in parts for value in part])
    if seed:
        seed.shuffle(measured)
    empty = measure([], 0, 1.0)
    while len(measured) > 1:
        place = seed.randrange(len(measured) - 1) if seed else 0
        measured[place : place + 2] = [merge(measured[place], measured[place + 1], 1.0)]
    merged = measured[0] if measured else empty
    assert_statistics_close(merged, whole, real)
    assert merge(merged, empty, 1.0) == merge(empty, merged, 1.0) == merged


@pytest.mark.parametrize("real", REALS)
def test_nan_travels_through_every_merge(header_maths, real):
    measure, merge = getattr(header_maths, f"measure_{real}"), getattr(header_maths, f"merge_{real}")
    for part in ([math.nan], [1.0, math.nan], [math.nan, -math.inf]):
        for other in ([], [2.0], [-math.inf], [math.nan]):
            for pair in ((part, other), (other, part)):
                assert math.isnan(merge(measure(pair[0], 0, 1.0), measure(pair[1], 5, 1.0), 1.0)[2])


@pytest.mark.parametrize("real", REALS)
@given(
    values=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=9),
    flags=st.integers(0, 2047).map(lambda flags: flags & ~int(RowFlags.SOFTCAP)),
    target=st.integers(0, 8),
    columns=st.lists(st.tuples(st.integers(0, 8), st.sampled_from([0.5, 2.0])), max_size=4),
    smoothing=st.sampled_from([0.1, 1.0]),
    gamma=st.sampled_from([0.0, 0.5, 2.0]),
    exponent=st.sampled_from([1.0, 0.0, 0.5]),
)
def test_terms_and_gradient(header_maths, real, values, flags, target, columns, smoothing, gamma, exponent):
    target %= len(values)
    candidates = [(column % len(values), w) for column, w in columns if column % len(values) != target]
    dtype = getattr(torch, real)
    values = torch.tensor(values, dtype=dtype).tolist()
    options = torch.tensor([1.0, smoothing, 0.5, gamma, 0.25, 0.75, 0.0, exponent], dtype=dtype).tolist()
    statistics = getattr(header_maths, f"measure_{real}")(values, 0, 1.0)
    terms, gradient = getattr(header_maths, f"evaluate_{real}")(statistics, values, options, flags, target, candidates)

    z = torch.tensor([values], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([target])
    nll = reference.negative_log_likelihood(z, t)
    zero = 0 * nll
    main = reference.focal(z, t, options[2], gamma) if flags & RowFlags.FOCAL else nll
    if flags & (RowFlags.DFT | RowFlags.EAFT):
        weight = reference.token_weight(z, t, "eaft" if flags & RowFlags.EAFT else "dft", exponent)
        main = reference.reweighted(main, weight)
    if flags & RowFlags.LABEL_SMOOTHING:
        mode = "exclude_target" if flags & RowFlags.EXCLUDE_TARGET else "uniform"
        main = reference.smoothed(main, z, options[1], mode)
    weights = torch.zeros(1, len(values), dtype=torch.float64)
    for column, weight in candidates:
        weights[0, column] += weight
    expected = [
        main if flags & RowFlags.CROSS_ENTROPY else zero,
        options[4] * reference.z_loss(z) if flags & RowFlags.Z_LOSS else zero,
        options[5] * reference.confidence_penalty(z) if flags & RowFlags.CONFIDENCE_PENALTY else zero,
        nll,
        reference.token_entropy(z),
        (z.argmax(-1) == t).double(),
        reference.unlikelihood(z, weights),
    ]
    total = expected[0] + expected[1] + expected[2] + expected[6]
    (expected_gradient,) = torch.autograd.grad(total.sum(), z)
    scale = 10 * (1 + sum(weight for _, weight in candidates))  # sums of terms that may cancel
    tolerance = TOLERANCE[real]
    np.testing.assert_allclose(terms, [value.item() for value in expected], rtol=10 * tolerance, atol=scale * tolerance)
    odds = max([reference.log_odds(z, torch.tensor([c])).exp().item() for c, _ in candidates], default=0)
    lse = abs(reference.log_normaliser(z).item())
    np.testing.assert_allclose(gradient, expected_gradient[0], rtol=10 * tolerance, atol=tolerance * (1 + odds + lse))


@pytest.mark.parametrize("real, gap", [("float32", 16), ("float32", 80), ("float64", 80), ("float64", 600)])
def test_a_sure_candidate_stays_exact(header_maths, real, gap):
    """-w log(1 - p) = w (gap - log sum of the others) and dz, where 1 - p is far below the resolution of the type."""
    values = [0.0, float(gap), -1.0, -2.0]
    statistics = getattr(header_maths, f"measure_{real}")(values, 0, 1.0)
    terms, gradient = getattr(header_maths, f"evaluate_{real}")(statistics, values, [1.0] + [0.0] * 7, 0, 0, [(1, 3.0)])
    others = np.array([1.0, np.exp(-1), np.exp(-2)])
    tolerance = TOLERANCE[real] if gap < 100 else 1e-12
    assert terms[-1] == pytest.approx(3 * (gap - math.log(others.sum())), rel=tolerance)
    share = -3 * others / others.sum()
    np.testing.assert_allclose(gradient, [share[0], 3.0, share[1], share[2]], rtol=tolerance)


@pytest.mark.parametrize("real", REALS)
def test_a_flat_row_s_maximum_as_candidate_stays_exact(header_maths, real):
    """R = 2999: -log(1 - p) = log1p(1 / R), not the difference of two logarithms."""
    values = [0.0] * 3000
    statistics = getattr(header_maths, f"measure_{real}")(values, 0, 1.0)
    terms, _ = getattr(header_maths, f"evaluate_{real}")(statistics, values, [1.0] + [0.0] * 7, 0, 5, [(0, 1.0)])
    assert terms[-1] == pytest.approx(math.log1p(1 / 2999), rel=TOLERANCE[real])


def test_one_column_is_finite(header_maths):
    statistics = header_maths.measure_float32([2.0], 0, 1.0)
    terms, gradient = header_maths.evaluate_float32(statistics, [2.0], [1.0] * 7, 255 - 64, 0, [(0, 30.0)])
    assert all(math.isfinite(value) for value in terms + gradient)


def bits(tensor, width):
    return (
        tensor.view(torch.int16 if width == 16 else torch.int32).numpy().view(np.uint16 if width == 16 else np.uint32)
    )


ALL_16_BITS = torch.arange(2**16, dtype=torch.int32).to(torch.int16)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_widen_every_value(header_maths, name):
    expected = ALL_16_BITS.view(getattr(torch, name)).float()
    widen = getattr(header_maths, f"widen_{name}")
    got = torch.tensor(np.array([widen(i) for i in range(2**16)], dtype=np.uint32).view(np.float32))
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_narrow_around_every_value(header_maths, name):
    """Every representable value, the ties between neighbours, and what lies just beside both."""
    narrow = getattr(header_maths, f"narrow_{name}")
    values = bits(ALL_16_BITS.view(getattr(torch, name)).float(), 32)[::5]
    half = 0x8000 if name == "bfloat16" else 0x1000
    around = np.concatenate([values + np.uint32(delta % 2**32) for delta in (0, half, half - 1, half + 1, -1)])
    expected = torch.tensor(around.view(np.float32)).to(getattr(torch, name))
    got = np.array([narrow(int(value)) for value in around], dtype=np.uint16)
    got = torch.tensor(got.view(np.int16)).view(getattr(torch, name))
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert (got.signbit() == expected.signbit())[~expected.isnan()].all()


@given(st.integers(0, 2**32 - 1))
@example(0x7F800001)  # a signalling nan whose upper half looks like infinity
@example(0x477FEFFF)
@example(0x477FF000)
@example(0x33000000)  # 2^-25, a tie between 0 and the smallest float16
@example(0x33000001)
@example(0x387FFFFF)
def test_narrow_any_float(header_maths, value):
    as_float = torch.tensor([value - 2**32 if value >= 2**31 else value], dtype=torch.int32).view(torch.float32)
    for name in ("bfloat16", "float16"):
        got = getattr(header_maths, f"narrow_{name}")(value)
        expected = as_float.to(getattr(torch, name))
        if expected.isnan():
            magnitude, infinity = got & 0x7FFF, 0x7F80 if name == "bfloat16" else 0x7C00
            assert magnitude > infinity
        else:
            assert got == bits(expected, 16)[0]
