"""Rows with nan and +inf: nan in loss and gradient, whatever the terms are, so that a check of overflow sees it."""

import math

import pytest
import torch
from support.assertions import assert_bitwise_equal

from ava_ext import UnifiedLoss, softmax_statistics, token_log_probs, token_metrics
from ava_ext.ops.row_fields import RANKS, TERM_NAMES, RowFlags, row_options

ops = torch.ops.ava_ext
CE, N_COLUMNS, TARGET = RowFlags.CROSS_ENTROPY, 50, 3
SMOOTHED = CE | RowFlags.LABEL_SMOOTHING
TERMS = {
    "cross-entropy": CE,
    "focal": CE | RowFlags.FOCAL,
    "dft": CE | RowFlags.DFT,
    "eaft": CE | RowFlags.EAFT,
    "smoothed": SMOOTHED,
    "smoothed others": SMOOTHED | RowFlags.EXCLUDE_TARGET,
    "z-loss": RowFlags.Z_LOSS,
    "confidence": RowFlags.CONFIDENCE_PENALTY,
    "all": SMOOTHED | RowFlags.EAFT | RowFlags.FOCAL | RowFlags.Z_LOSS | RowFlags.CONFIDENCE_PENALTY,
}
INF, NAN = math.inf, math.nan
# what a row holds at some columns; None: at every other one
SPOILED = {
    "one nan": {7: NAN},
    "nan at the target": {TARGET: NAN},
    "all nan": {None: NAN},
    "nan and one finite": {None: NAN, 7: 1.0},
    "nan and masked": {None: -INF, 7: NAN},
    "nan, one finite and masked": {None: -INF, 7: NAN, TARGET: 1.0},
    "+inf at the target": {TARGET: INF},
    "+inf elsewhere": {7: INF},
    "+inf twice": {TARGET: INF, 7: INF},
    "+inf alone": {None: -INF, TARGET: INF},
    "+inf elsewhere alone": {None: -INF, 7: INF},
    "all +inf": {None: INF},
    "+inf and nan": {None: NAN, 7: INF},
}


def rows_of(dtype, n_columns=N_COLUMNS):
    """Finite rows, and as many of which every second one is spoiled, in the order of SPOILED."""
    clean = torch.randn(2 * len(SPOILED), n_columns, generator=torch.Generator("cpu").manual_seed(0)).to(dtype)
    spoiled = clean.clone()
    for row, values in zip(spoiled[::2], SPOILED.values(), strict=True):
        for column, value in values.items():
            row[slice(None) if column is None else column] = value
    return clean, spoiled


def options_of(like):
    return row_options(like, label_smoothing=0.1, z_loss_weight=0.1, confidence_penalty_weight=0.1, focal_gamma=2.0)


def losses_and_gradients(logits, flags):
    """Of the three ways: fused, over the logits, from statistics."""
    targets, n_columns = torch.full(logits.shape[:-1], TARGET), logits.shape[-1]
    options = options_of(logits)
    arguments = (targets, options, None, None, None, [], int(flags), n_columns, -100)
    loss, _, gradient, *_ = ops.row_loss(logits, *arguments, True, False)
    over = logits.clone()
    loss_over, _ = ops.row_loss_(over, *arguments)
    loss_split, _, _, statistics, coefficients = ops.row_loss(logits, *arguments, False, True)
    split = ops.row_gradient(logits, statistics, coefficients, targets.unsqueeze(-1), options, int(flags), n_columns)
    return {"fused": (loss, gradient), "in place": (loss_over, over), "split": (loss_split, split)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("terms", TERMS)
def test_nan_and_infinity_are_nan_in_loss_and_gradient(dtype, terms):
    clean, logits = rows_of(dtype)
    of_clean = losses_and_gradients(clean, TERMS[terms])
    for way, (loss, gradient) in losses_and_gradients(logits, TERMS[terms]).items():
        for kind, row_loss, row_gradient in zip(SPOILED, loss[::2], gradient[::2], strict=True):
            assert row_loss.isnan(), (way, kind)
            assert row_gradient.isnan().any(), (way, kind)
        assert_bitwise_equal(loss[1::2], of_clean[way][0][1::2])
        assert_bitwise_equal(gradient[1::2], of_clean[way][1][1::2])


@pytest.mark.devices("pytorch", "cuda-emulated", "cuda")  # the CPU's kernel may leave columns at 0 beside +inf
@pytest.mark.parametrize("terms", ["cross-entropy", "all"])
def test_every_column_is_nan_as_in_torch(terms):
    _, logits = rows_of(torch.float32)
    for way, (_, gradient) in losses_and_gradients(logits, TERMS[terms]).items():
        nan_or_masked = gradient.isnan() | (logits == -INF)
        assert nan_or_masked.all(-1).tolist() == [True, False] * len(SPOILED), way


@pytest.mark.parametrize("flags", [CE | RowFlags.EAFT, CE | RowFlags.CONFIDENCE_PENALTY, SMOOTHED])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_single_column(flags, value):
    logits = torch.tensor([[value], [0.5]])
    arguments = (torch.tensor([0, 0]), options_of(logits), None, None, None, [], int(flags), 1, -100)
    loss, _, gradient, *_ = ops.row_loss(logits, *arguments, True, False)
    assert loss.isnan().tolist() == gradient[:, 0].isnan().tolist() == [True, False]


def test_rows_that_do_not_count_stay_zero():
    _, logits = rows_of(torch.float32)
    targets = torch.full(logits.shape[:-1], -100)
    arguments = (targets, options_of(logits), None, None, None, [], int(TERMS["all"]), N_COLUMNS, -100)
    loss, terms, gradient, *_ = ops.row_loss(logits, *arguments, True, False)
    assert not loss.any() and not terms.any() and not gradient.any()


@pytest.mark.parametrize("keywords", [{"token_reweighting": "eaft"}, {"confidence_penalty_weight": 0.1}])
@pytest.mark.parametrize("kind", ["all nan", "+inf at the target", "+inf elsewhere"])
def test_the_loss_of_a_model(kind, keywords):
    """A loss of 0.0 or 3e38 in place of nan is a step that no GradScaler skips."""
    row = rows_of(torch.float32)[1][2 * list(SPOILED).index(kind)]
    logits = row.expand(1, 4, -1).contiguous().requires_grad_()
    loss_of = UnifiedLoss(N_COLUMNS, primary_loss_type="standard", **keywords)
    loss = loss_of(logits, torch.full((1, 4), TARGET))
    loss.backward()
    assert loss.isnan() and logits.grad.isnan().any()


def test_statistics_and_their_gradients():
    _, logits = rows_of(torch.float32)
    logits.requires_grad_()
    log_probs, _ = token_log_probs(logits, torch.full(logits.shape[:-1], TARGET))
    entropy = softmax_statistics(logits, None).entropy
    for values in (log_probs, entropy):
        (gradient,) = torch.autograd.grad(values.sum(), logits)
        assert values.isnan().tolist() == [True, False] * len(SPOILED)
        assert gradient.isnan().any(-1).tolist() == [True, False] * len(SPOILED)


def test_ranks_and_accuracy():
    """The greatest is the lowest of equals, and nan is none of them; a target of nan is right nowhere."""
    logits = torch.tensor(
        [[NAN, 1, 2, 0], [1, NAN, 2, 0], [NAN] * 4, [NAN, -INF, -INF, -INF], [1, INF, NAN, INF], [NAN, -1, NAN, -2]]
    )
    targets = torch.tensor([2, 1, 3, 0, 1, 1])
    found = token_metrics(logits, targets)
    assert found.argmax.tolist() == [2, 2, -1, -1, 1, 1]
    assert found.rank.tolist() == [0, 4, 4, 4, 0, 0]
    terms = ops.row_loss(logits, targets, row_options(logits), None, None, None, [], 1, 4, -100, True, False)[1]
    assert terms[TERM_NAMES.index("correct")].tolist() == [1, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("n_columns", [1, 7, 33, 300, 2100])
def test_ranks_and_accuracy_among_many_nans(n_columns, dtype):
    generator = torch.Generator("cpu").manual_seed(n_columns)
    logits = (torch.randn(40, n_columns, generator=generator) * 4).round().to(dtype)  # with equals
    chance = torch.linspace(0, 1, 40).unsqueeze(-1)
    logits = logits.masked_fill(torch.rand(logits.shape, generator=generator) < 0.2, -INF)
    logits = logits.masked_fill(torch.rand(logits.shape, generator=generator) < chance, NAN)
    targets = torch.randint(n_columns, (40,), generator=generator)
    present = logits.nan_to_num(nan=-INF, neginf=-INF)
    targets[::3] = present[::3].argmax(-1)
    own = logits.gather(-1, targets.unsqueeze(-1))
    rank = torch.where(own.isnan().squeeze(-1), n_columns, (logits > own).sum(-1))
    argmax = torch.where(present.amax(-1) == -INF, -1, present.argmax(-1))
    for of_ranks in (0, RANKS):
        arguments = (None, None, None, [], 1 + of_ranks, n_columns, -100, False, False)
        terms = ops.row_loss(logits, targets, row_options(logits), *arguments)[1]
        assert (terms[TERM_NAMES.index("correct")] == (targets == argmax)).all()
    assert (terms[-2] - 1 == rank).all() and (terms[-1] - 1 == argmax).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flags", [SMOOTHED, SMOOTHED | RowFlags.EXCLUDE_TARGET])
def test_no_smoothing_beside_the_lowest_number(dtype, flags):
    """The sum of u is -inf there, and 0 * inf is nan."""
    logits = torch.zeros(1, 6, dtype=dtype)
    logits[0, 2:] = torch.finfo(dtype).min
    arguments = (torch.tensor([0]), row_options(logits, label_smoothing=0.0), None, None, None, [])
    loss, _, gradient, *_ = ops.row_loss(logits, *arguments, int(flags), 6, -100, True, False)
    torch.testing.assert_close(loss, torch.tensor([math.log(2)]))
    assert gradient.tolist() == [[-0.5, 0.5, 0, 0, 0, 0]]
