"""Rows that are sure of a repeated token, where 1 - p is far below the resolution of float32; and rows by hand."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.assertions import assert_within
from support.strategies import VOCABULARIES

from ava_ext import reference
from ava_ext.ops import softmax_rows, softmax_statistics
from ava_ext.ops.row_fields import TAIL_ID, Candidates, RowFlags, accumulation_dtype, row_options

ops = torch.ops.ava_ext
# of a row whose candidates are all pushed down
EVERY_TERM = sum(RowFlags) - RowFlags.TAIL - RowFlags.SOFT_TARGETS - RowFlags.TARGET_WEIGHTS


def row_loss(logits, targets, ids, weights, terms=0, **coefficients):
    """(row_loss, gradient) of rows with one group of candidates, fused."""
    ids = torch.as_tensor(ids, dtype=torch.int32).expand(*logits.shape[:-1], -1)
    weights = torch.as_tensor(weights, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    loss, _, gradient, *_ = ops.row_loss(
        logits, targets, row_options(logits, **coefficients), None, ids, weights.expand(ids.shape).contiguous(),
        [ids.shape[-1]], int(terms), logits.shape[-1], -100, True, False,
    )  # fmt: skip
    return loss, gradient


def sure_row(gap, vocab_size, place, dtype, seed=0):
    """Column `place` leads by `gap`; the others are within 1 of each other."""
    logits = torch.randint(-4, 1, (1, vocab_size), generator=torch.Generator().manual_seed(seed)).to(dtype) / 4
    logits[0, place] = gap
    return logits


@given(
    gap=st.floats(0.5, 80),
    vocab_size=st.sampled_from([v for v in VOCABULARIES if v > 2]),
    place=st.floats(0, 0.999),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    weight=st.sampled_from([0.25, 1.0, 3.0]),
)
@example(gap=80.0, vocab_size=1500, place=0.5, dtype=torch.float32, weight=1.0)
@example(gap=16.0, vocab_size=1500, place=0.5, dtype=torch.float32, weight=1.0)
def test_penalty_of_a_sure_repetition(gap, vocab_size, place, dtype, weight):
    """-w log(1 - p) and every entry of its gradient, by relative error: rounding u costs gap * 2^-24 by itself."""
    place = int(place * vocab_size)
    logits = sure_row(gap, vocab_size, place, dtype)
    target = torch.tensor([(place + 1) % vocab_size])
    loss, gradient = row_loss(logits, target, [place], [weight])
    x = logits.double().requires_grad_()
    expected = weight * reference.softplus(reference.log_odds(x, torch.tensor([place])))
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    tolerance = 1e-6 + gap * 2**-23 if dtype == torch.float32 else 1e-12
    assert_within(loss, expected.detach(), tolerance * expected.detach(), "penalty")
    assert_within(gradient, expected_gradient, tolerance * expected_gradient.abs(), "gradient")


@given(gap=st.floats(0, 80), vocab_size=st.sampled_from([3, 40, 1100]), target_leads=st.booleans())
def test_cross_entropy_of_a_sure_row(gap, vocab_size, target_leads):
    """The loss and every entry of the gradient stay relatively exact, right (1 - p_t below 1e-34) or wrong."""
    logits, target = sure_row(gap, vocab_size, 1, torch.float32), torch.tensor([1 if target_leads else 2])
    loss, _, gradient, *_ = ops.row_loss(
        logits, target, row_options(logits), None, None, None, [], 1, vocab_size, -100, True, False
    )
    x = logits.double().requires_grad_()
    expected = reference.negative_log_likelihood(x, target)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    tolerance = 1e-6 + gap * 2**-23
    assert_within(loss, expected.detach(), tolerance * expected.detach(), "loss")
    assert_within(gradient, expected_gradient, tolerance * expected_gradient.abs(), "gradient")


@given(
    gap=st.floats(0.5, 80),
    weights=st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=2, max_size=9),
    leads=st.booleans(),
)
def test_duplicates_are_one_candidate_with_the_sum_of_weights(gap, weights, leads):
    logits, place = sure_row(gap, 300, 150, torch.float32), 150 if leads else 7
    target = torch.tensor([9])
    loss, gradient = row_loss(logits, target, [place] * len(weights), weights)
    expected_loss, expected_gradient = row_loss(logits, target, [place], [sum(weights)])
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=2e-6, atol=0)


def test_absent_candidates_and_the_target_contribute_nothing():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    targets = logits.argmax(-1)
    ids = torch.stack([targets, torch.full((4,), -1), torch.full((4,), 3)], -1)
    weights = torch.tensor([5.0, 7.0, 0.0])
    loss, gradient = row_loss(logits, targets, ids, weights, RowFlags.CROSS_ENTROPY)
    expected_loss, expected_gradient = row_loss(logits, targets, [[-1]] * 4, [0.0], RowFlags.CROSS_ENTROPY)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=0)


@given(
    gap=st.floats(0, 30),
    masked=st.sampled_from([0.0, 0.3]),
    terms=st.sampled_from(
        [
            RowFlags.CROSS_ENTROPY,
            EVERY_TERM - RowFlags.SOFTCAP,
            EVERY_TERM - RowFlags.SOFTCAP - 3,
        ]
    ),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_gradient_sums_to_that_of_the_z_loss(gap, masked, terms, dtype):
    """sum_j dz_j = 2 beta lse, whatever the other terms and candidates: they do not see a shift of the row."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 700, generator=generator, dtype=dtype)
    logits[:, 11] = gap
    logits[torch.rand(3, 700, generator=generator) < masked] = -math.inf
    logits[:, 5], logits[:, 12] = 0, 1
    beta = 0.25 if terms & RowFlags.Z_LOSS else 0.0
    _, gradient = row_loss(
        logits, torch.tensor([5, 11, 12]), [12, 11, 11, -1, 600], [1.0, 0.5, 0.5, 1.0, 2.0], terms, label_smoothing=0.2,
        z_loss_weight=beta, confidence_penalty_weight=0.3, temperature=0.5,
    )  # fmt: skip
    expected = 2 * beta * torch.logsumexp(logits.double() / 0.5, -1) / 0.5
    size = gradient.double().abs().sum(-1) + expected.abs()
    assert_within(gradient.double().sum(-1), expected, size * (1e-6 if dtype == torch.float32 else 1e-14), "sum")


def test_one_column():
    """V = 1: nothing can be said about it. A candidate would be infinitely bad: it is finite, without a gradient."""
    logits = torch.tensor([[3.0], [-2.0]])
    loss, gradient = row_loss(
        logits,
        torch.tensor([0, 0]),
        [0],
        [1.0],
        EVERY_TERM - RowFlags.Z_LOSS,
        label_smoothing=0.1,
    )
    torch.testing.assert_close(loss, torch.zeros(2), rtol=0, atol=0)
    torch.testing.assert_close(gradient, torch.zeros(2, 1), rtol=0, atol=0)
    masked_target = torch.tensor([[3.0, -math.inf]])
    loss, gradient = row_loss(masked_target, torch.tensor([1]), [0], [2.0])
    torch.testing.assert_close(loss, torch.tensor([-2 * math.log(1e-37)]))
    torch.testing.assert_close(gradient, torch.zeros(1, 2), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_candidates_of_several_groups_are_reported_apart(dtype):
    logits = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(3)).to(dtype)
    ids = torch.randint(1, 40, (2, 3, 6), generator=torch.Generator().manual_seed(4), dtype=torch.int32)
    weights = torch.linspace(0.5, 2, 36).view(2, 3, 6)
    candidates = Candidates(ids, weights, (1, 0, 2, 3))
    targets = torch.zeros(2, 3, dtype=torch.int64)
    loss, terms, *_ = ops.row_loss(logits, targets, row_options(logits), None, *candidates, 0, 40, -100, False, False)
    p = logits.double().softmax(-1).gather(-1, ids.long())
    each = -weights * torch.log1p(-p)
    expected = torch.stack([part.sum(-1) for part in each.split(candidates.groups, -1)])
    torch.testing.assert_close(terms[6:].double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.double(), expected.sum(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gap", [60.0, 76.0, 84.0, 88.0, 110.0])
@pytest.mark.parametrize(
    "way", ["weight of the row", "from above", "in place", "cold", "tail", "tail, from above", "log_rest"]
)
def test_what_multiplies_a_sure_row_leaves_it_finite(way, gap, dtype):
    """s of the maximum is w / R: times 65536 it was infinite, and infinity times p_j = 0 a nan."""
    factor = 65536.0

    def gradient(dtype):
        leaf = torch.zeros(1, 6, dtype=dtype)
        leaf[0, 2] = gap * (0.1 if way == "cold" else 1)
        leaf.requires_grad_()
        real = accumulation_dtype(dtype)
        options = row_options(leaf.detach(), temperature=0.1 if way == "cold" else 1.0)
        if way == "log_rest":
            loss = -softmax_statistics(leaf, None).log_rest.sum() * factor
        else:
            ids, weights, flags = [[2, 2]], [[0.25, 0.25]], 0  # by two penalties: their sum has to stay finite too
            if way.startswith("tail"):
                ids, weights, flags = [[TAIL_ID, 2]], [[0.1, 0.9]], RowFlags.SOFT_TARGETS | RowFlags.TAIL
            candidates = Candidates(torch.tensor(ids), torch.tensor(weights, dtype=real), (len(ids[0]),))
            within = way in ("weight of the row", "cold", "tail")
            loss = softmax_rows.row_loss(
                leaf * 1,
                torch.tensor([1]),
                options,
                flags=int(flags),
                candidates=candidates,
                row_weights=torch.full((1,), factor if within else 1.0, dtype=real),
                inplace_gradient=way == "in place",
            ).loss.sum() * (1.0 if within else factor)
        return torch.autograd.grad(loss, leaf)[0].double()

    got, expected = gradient(dtype), gradient(torch.float64)
    if dtype == torch.float16:
        expected = expected.clamp(-65504, 65504)
        got = got.clamp(-65504, 65504)
    assert got.isfinite().all()
    if gap <= 76:
        torch.testing.assert_close(got, expected, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-6)
    else:  # fades: never beyond what it is, never of the other sign
        assert (got * expected >= 0).all()
        assert (got.abs() <= expected.abs() * 1.01 + 1e-6).all()
