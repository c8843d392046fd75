"""row_loss at the edges: nan, infinities, empty batches, wrong arguments, more than 2^31 logits."""

import math
import re

import pytest
import torch
from support.assertions import assert_bitwise_equal
from torch.utils._python_dispatch import TorchDispatchMode

from ava_ext import UnifiedLoss, functional, token_metrics
from ava_ext.ops.router_rows import router_statistics
from ava_ext.ops.row_fields import N_OPTIONS, TARGET_PROBABILITIES, Candidates, RowFlags, row_options
from ava_ext.ops.softmax_rows import row_loss
from ava_ext.ops.softmax_statistics import token_log_probs

ops = torch.ops.ava_ext
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EVERY_TERM = sum(RowFlags) - RowFlags.TAIL - RowFlags.TARGET_WEIGHTS - RowFlags.SOFTCAP


def loss_and_gradient(logits, targets, flags=RowFlags.CROSS_ENTROPY, **keywords):
    logits = logits.detach().requires_grad_()
    options = row_options(logits, label_smoothing=0.1, z_loss_weight=0.1, confidence_penalty_weight=0.1)
    loss = row_loss(logits, targets, options, flags=flags, **keywords).loss
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "terms", [RowFlags.CROSS_ENTROPY, EVERY_TERM, RowFlags.Z_LOSS, RowFlags.CROSS_ENTROPY | RowFlags.SOFTCAP]
)
@pytest.mark.parametrize("column", [0, 3, 500, 1023, 1024, 1499])
def test_nan_is_never_hidden(dtype, terms, column):
    logits = torch.randn(3, 1500, generator=torch.Generator().manual_seed(0)).to(dtype)
    clean_loss, clean_gradient = loss_and_gradient(logits, torch.tensor([3, 3, 3]), terms)
    logits[1, column] = math.nan
    loss, gradient = loss_and_gradient(logits, torch.tensor([3, 3, 3]), terms)
    assert loss[1].isnan() and gradient[1].isnan().any()
    assert_bitwise_equal(loss[::2], clean_loss[::2])
    assert_bitwise_equal(gradient[::2], clean_gradient[::2])


def test_nan_beside_masked_columns_and_alone():
    for row in ([math.nan, -math.inf, -math.inf], [-math.inf, math.nan, 1.0], [math.nan] * 3):
        for terms in (RowFlags.CROSS_ENTROPY, EVERY_TERM):
            assert loss_and_gradient(torch.tensor([row]), torch.tensor([2]), terms)[0].isnan()
        assert token_log_probs(torch.tensor([row]), torch.tensor([2]))[0].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [[2], [5], [2, 5], [1100]])
def test_positive_infinity_as_pytorch(dtype, columns):
    logits = torch.randn(2, 1200, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[1, columns] = math.inf
    targets = torch.tensor([2, 2])
    loss, gradient = loss_and_gradient(logits, targets)
    x = logits.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(x, targets, reduction="none")
    expected.sum().backward()
    assert expected[1].isnan() and x.grad[1].isnan().all()
    assert loss[1].isnan() and gradient[1].isnan().all()
    assert gradient[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_but_masked_columns(dtype):
    logits = torch.full((2, 40), -math.inf, dtype=dtype)
    logits[1, 7] = 0.0
    loss, gradient = loss_and_gradient(logits, torch.tensor([3, 3]))
    assert loss.tolist() == [math.inf, math.inf]
    assert not gradient[0].any() and gradient[1, 7] == 1 and gradient[1].count_nonzero() == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_lowest", [1, 63, 64, 700, 1024, 2048, 2500])
def test_masked_by_the_lowest_number(dtype, n_lowest):
    """What masked_fill(~allowed, finfo.min) leaves: whole blocks of it before the first other logit, some -inf too."""
    logits = torch.randn(2, 2600, generator=torch.Generator().manual_seed(2)).to(dtype)
    logits[:, :n_lowest] = torch.finfo(dtype).min
    logits[1, : n_lowest // 2] = -math.inf
    targets = torch.tensor([2550, 2599])
    for flags in (RowFlags.CROSS_ENTROPY, RowFlags.CROSS_ENTROPY | RowFlags.CONFIDENCE_PENALTY):
        loss, gradient = loss_and_gradient(logits, targets, flags)
        x = logits.double()[:, n_lowest:].requires_grad_()  # the others have p = 0
        log_p = x.log_softmax(-1)
        expected = -log_p.gather(-1, (targets - n_lowest).unsqueeze(-1)).squeeze(-1)
        if flags & RowFlags.CONFIDENCE_PENALTY:
            n_present = (logits > -math.inf).sum(-1)
            expected = expected + 0.1 * (1 + (log_p.exp() * log_p).sum(-1) / n_present.double().log())
        expected_gradient = torch.autograd.grad(expected.sum(), x)[0]
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(gradient[:, n_lowest:].double(), expected_gradient, rtol=tolerance, atol=1e-7)
        assert not gradient[:, :n_lowest].any()


@pytest.mark.parametrize("flags", list(RowFlags))
@pytest.mark.parametrize("dtype", DTYPES)
def test_split_gradient_beside_a_row_that_does_not_count(dtype, flags):
    """In place, backward reads the coefficients of rows: with ranks, too, which only the forward has a place for."""
    options = {"with_ranks": True}
    if flags & RowFlags.SOFT_TARGETS:
        options["candidates"] = Candidates(torch.tensor([[1, 4]] * 3), torch.full((3, 2), 0.5).to(torch.float32), (2,))
    if flags & (RowFlags.TAIL | RowFlags.TARGET_WEIGHTS):
        return  # they come with candidates of their own kind, and have tests of their own
    if dtype == torch.float64 and "candidates" in options:
        options["candidates"] = options["candidates"]._replace(weights=options["candidates"].weights.double())
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(3)).to(dtype)
    targets = torch.tensor([3, -100, 5])
    _, expected = loss_and_gradient(logits, targets, flags | RowFlags.CROSS_ENTROPY, **options)
    leaf = logits.clone().requires_grad_()
    row = row_options(logits, label_smoothing=0.1, z_loss_weight=0.1, confidence_penalty_weight=0.1)
    given = {"flags": flags | RowFlags.CROSS_ENTROPY, "inplace_gradient": True, **options}
    row_loss(leaf * 1, targets, row, **given).loss.sum().backward()
    torch.testing.assert_close(leaf.grad, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert not leaf.grad[1].any()


@pytest.mark.parametrize("n_ids", [1024])
def test_as_many_candidates_as_a_gpu_takes(n_ids):
    logits = torch.randn(1, 1500).half()
    candidates = Candidates(torch.arange(n_ids).unsqueeze(0), torch.full((1, n_ids), 0.01), (n_ids,))
    loss, gradient = loss_and_gradient(logits, torch.tensor([1300]), candidates=candidates)
    assert loss.isfinite() and gradient.isfinite().all() and gradient[0, 1300] < 0


def test_groups_of_negative_size():
    candidates = Candidates(torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1), (2_000_000, -1_999_999))
    with pytest.raises((RuntimeError, ValueError), match="expected candidate_groups of sizes >= 0, got -1999999"):
        loss_and_gradient(torch.randn(4, 9), torch.zeros(4, dtype=torch.long), candidates=candidates)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_nan_of_a_gpu_stays_one(dtype):
    """All ones but the sign: to round it as a number would make it -0."""
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    logits = torch.randn(2, 200).to(dtype)
    _, gradient = loss_and_gradient(logits, torch.tensor([3, 3]), row_weights=torch.stack([nan, torch.tensor(1.0)]))
    assert gradient[0].isnan().all() and gradient[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [slice(64, 65), slice(0, 1), slice(16, 200)])
def test_the_maximum_beside_a_nan(dtype, at):
    """nan is no maximum: argmax and accuracy are those of the other columns."""
    logits = torch.zeros(1, 200, dtype=dtype)
    logits[0, 5], logits[0, 128], logits[0, at] = 5.0, 1.0, math.nan
    found = row_loss(logits, torch.tensor([5]), row_options(logits), with_ranks=True)
    assert found.terms[-1].item() == 1 + 5 and found.loss.isnan()


def test_no_smoothing_beside_the_lowest_number():
    """A schedule may come to 0 with the flag on; the sum of u has then overflowed."""
    logits = torch.zeros(1, 40)
    logits[0, :9] = torch.finfo(torch.float32).min
    options = row_options(logits, label_smoothing=0.0)
    flags = RowFlags.CROSS_ENTROPY | RowFlags.LABEL_SMOOTHING
    got = row_loss(logits, torch.tensor([20]), options, flags=flags).loss
    torch.testing.assert_close(got, row_loss(logits, torch.tensor([20]), options).loss)


def test_extreme_logits_are_exact():
    largest = torch.finfo(torch.float32).max
    logits = torch.tensor([[largest, -largest, 0.0], [1e30, 1e30, -1e30], [-largest, -largest, -largest]])
    loss, gradient = loss_and_gradient(logits, torch.tensor([0, 0, 0]))
    torch.testing.assert_close(loss, torch.tensor([0.0, math.log(2), math.log(3)]), rtol=2e-7, atol=0)
    torch.testing.assert_close(
        gradient, torch.tensor([[0.0, 0, 0], [-0.5, 0.5, 0], [-2 / 3, 1 / 3, 1 / 3]]), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 7), (0, 3, 7)])
@pytest.mark.parametrize("inplace_gradient", [False, True])
def test_empty_batches(shape, inplace_gradient):
    leaf = torch.zeros(shape, requires_grad=True)
    logits, targets = leaf * 1, torch.zeros(shape[:-1], dtype=torch.int64)
    ids = torch.zeros((*shape[:-1], 2), dtype=torch.int32)
    candidates = Candidates(ids, torch.zeros(ids.shape), (2,))
    loss, terms = row_loss(
        logits, targets, row_options(logits), candidates=candidates, inplace_gradient=inplace_gradient
    )
    assert loss.shape == shape[:-1] and terms.shape == (7, *shape[:-1])
    assert torch.autograd.grad(loss.sum(), leaf)[0].shape == shape


def test_empty_batches_whose_last_stride_is_not_one():
    leaf = torch.randn(11, 6, requires_grad=True)
    logits, targets = leaf.t()[:0], torch.zeros(0, dtype=torch.int64)
    q = torch.rand(11, 6).t()[:0]
    for target in (targets, q):
        loss = functional.cross_entropy(logits, target, weight=torch.rand(11), reduction="sum")
        assert loss == 0 and not torch.autograd.grad(loss, leaf)[0].any()
    assert functional.cross_entropy(torch.randn(2, 7, 0), torch.rand(2, 7, 0), torch.rand(7), reduction="sum") == 0
    assert UnifiedLoss(11, primary_loss_type="standard")(logits, targets) == 0
    for values in (*token_log_probs(logits, targets), *token_metrics(logits, targets)):
        assert values.shape == (0,)
    assert not router_statistics(logits, k=2).counts.any()


def test_no_row_counts():
    logits = torch.full((5, 9), math.nan)
    loss, gradient = loss_and_gradient(logits, torch.full((5,), -100), EVERY_TERM)
    assert not loss.any() and not gradient.any()


def test_targets_of_any_integer_type():
    logits, targets = torch.randn(3, 9), torch.tensor([1, 2, 8])
    expected = loss_and_gradient(logits, targets)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert_bitwise_equal(loss_and_gradient(logits, targets.to(dtype)), expected)


def test_logits_whose_last_stride_is_not_one():
    logits = torch.randn(9, 3, generator=torch.Generator().manual_seed(2))
    targets = torch.tensor([1, 2, 8])
    assert_bitwise_equal(loss_and_gradient(logits.T, targets), loss_and_gradient(logits.T.contiguous(), targets))


class Clones(TorchDispatchMode):
    """Collects how many dimensions the tensors have that are copied."""

    def __init__(self):
        super().__init__()
        self.n_dims = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.clone.default:
            self.n_dims.append(args[0].dim())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [(12,), (1, 12), (3, 4), (3, 2, 2)])
def test_rows_that_lie_as_columns_are_transposed_as_a_matrix(rows):
    """torch transposes a matrix in blocks, and more dimensions several times slower, number by number."""
    leaf = torch.randn(9, *rows, generator=torch.Generator().manual_seed(2))
    logits, targets = leaf.movedim(0, -1), torch.arange(12).reshape(rows) % 9
    with Clones() as copied:
        got = loss_and_gradient(logits, targets)
    assert copied.n_dims == [2]
    assert_bitwise_equal(got, loss_and_gradient(logits.contiguous(), targets))


@pytest.mark.parametrize("value", [9, -1, 2**40, -(2**40)])
def test_target_out_of_range_names_row_and_value(value):
    logits, targets = torch.zeros(2, 3, 10), torch.zeros(2, 3, dtype=torch.int64)
    targets[1, 1] = value
    message = rf"row_loss: expected targets in \[0, 9\) or -100, got {value} at position 4"
    with pytest.raises(IndexError, match=message):
        row_loss(logits, targets, row_options(logits), vocab_size=9)
    targets[1, 1], targets[0, 2] = 0, -100
    row_loss(logits, targets, row_options(logits), vocab_size=9)


def test_candidate_out_of_range():
    logits, ids = torch.zeros(2, 10), torch.tensor([[1, -1], [10, 2]], dtype=torch.int32)
    with pytest.raises(IndexError, match=r"expected candidate_ids in \[0, 10\) or -1, got 10 at position 2"):
        row_loss(logits, torch.zeros(2).long(), row_options(logits), candidates=Candidates(ids, torch.ones(2, 2), (2,)))


def some_candidates(ids_shape, weights_shape, groups):
    return Candidates(torch.zeros(ids_shape).int(), torch.zeros(weights_shape), groups)


# what is wrong of the arguments below, made by the test, on its device
WRONG = {
    "targets of shape [4, 3], got [4, 2]": lambda: dict(targets=torch.zeros(4, 2).long()),
    "options of shape [8], got [6]": lambda: dict(options=torch.ones(6)),
    "options of type float32, got float64": lambda: dict(options=torch.ones(N_OPTIONS).double()),
    "row_weights of shape [4, 3], got [12]": lambda: dict(row_weights=torch.ones(12)),
    "row_weights of type float32, got float64": lambda: dict(row_weights=torch.ones(4, 3).double()),
    "vocab_size in [1, 10] for logits of shape [4, 3, 10], got 11": lambda: dict(vocab_size=11),
    "vocab_size in [1, 10] for logits of shape [4, 3, 10], got 0": lambda: dict(vocab_size=0),
    "logits of type float32, bfloat16, float16 or float64": lambda: dict(logits=torch.zeros(4, 3, 10).int()),
    "candidate_ids of shape [4, 3, 2], got [4, 1, 2]": lambda: dict(
        candidates=some_candidates((4, 1, 2), (4, 1, 2), (2,))
    ),
    "candidate_weights of shape [4, 3, 2], got [4, 3, 1]": lambda: dict(
        candidates=some_candidates((4, 3, 2), (4, 3, 1), (2,))
    ),
    "candidate_groups to add up to 2, got 3": lambda: dict(candidates=some_candidates((4, 3, 2), (4, 3, 2), (2, 1))),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    arguments = dict(logits=torch.zeros(4, 3, 10), targets=torch.zeros(4, 3).long(), options=torch.ones(N_OPTIONS))
    with pytest.raises(RuntimeError, match=re.escape("row_loss: expected " + message)):
        row_loss(**(arguments | WRONG[message]()))


def test_candidates_that_are_no_integers():
    candidates = Candidates(torch.zeros(4, 3, 2), torch.zeros(4, 3, 2), (2,))
    with pytest.raises(ValueError, match=r"row_loss: expected candidate_ids to be integers of shape .*, got float32"):
        row_loss(torch.zeros(4, 3, 10), torch.zeros(4, 3).long(), torch.ones(N_OPTIONS), candidates=candidates)


def test_wrong_arguments_of_the_other_operators():
    logits, options = torch.zeros(4, 10), row_options(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"row_statistics: expected ids of type int32 or int64, got float32"):
        ops.row_statistics(logits, torch.zeros(4, 1), None, options, 128, 10)
    with pytest.raises(RuntimeError, match=r"row_statistics: expected row_mask of shape \[4\], got \[3\]"):
        ops.row_statistics(logits, None, torch.ones(3).bool(), options, 128, 10)
    with pytest.raises(RuntimeError, match=r"row_gradient: expected statistics of shape \[4, 6\], got \[4, 5\]"):
        ops.row_gradient(logits, torch.zeros(4, 5), torch.zeros(4, 4), None, options, 1, 10)
    with pytest.raises(RuntimeError, match=r"row_gradient_: expected row_coefficients of shape \[4, 4\], got \[4, 5\]"):
        ops.row_gradient_(logits, torch.zeros(4, 6), torch.zeros(4, 5), None, options, 1, 10)
    with pytest.raises(RuntimeError, match=r"scale_rows_: expected factors of shape \[4\], got \[5\]"):
        ops.scale_rows_(logits, torch.zeros(5))
    with pytest.raises(RuntimeError, match="row_loss: expected logits with last stride 1, got 4"):
        ops.row_loss(
            torch.zeros(10, 4).T, torch.zeros(4).long(), options, None, None, None, [], 1, 10, -100, False, False
        )


def test_scale_rows():
    rows = torch.randn(3, 5, 33)[:, 1:]
    factors = torch.tensor([[1.0, 0.0, -2.0, 0.5]]).expand(3, 4)
    expected = rows * factors.unsqueeze(-1)
    ops.scale_rows_(rows, factors)
    assert_bitwise_equal(rows, expected)


def test_more_than_two_billion_logits():
    """One row, 45000 times: offsets beyond 2^31 in what is counted, rows at the end like those at the beginning."""
    row = torch.randn(50257, generator=torch.Generator().manual_seed(3))
    targets = torch.arange(45000) % 50257
    with torch.no_grad():
        loss = row_loss(row.expand(45000, -1), targets, row_options(row)).loss
    torch.testing.assert_close(loss.double(), -row.double().log_softmax(-1)[targets], rtol=1e-6, atol=0)


def test_rows_beyond_two_billion_elements_of_their_memory():
    """A stride times a row number over 2^31; the memory in between is never touched, so it is never there."""
    n_rows, stride = 3, 2**30 + 5
    memory = torch.empty(n_rows * stride, dtype=torch.float32)
    logits = memory.as_strided((n_rows, 100), (stride, 1))
    logits.copy_(torch.randn(n_rows, 100, generator=torch.Generator().manual_seed(4)))
    targets = torch.tensor([1, 2, 3])
    loss = row_loss(logits, targets, row_options(logits)).loss
    expected = torch.nn.functional.cross_entropy(logits.contiguous(), targets, reduction="none")
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_a_maximum_in_columns_that_are_not_here(dtype, is_weighted):
    """Of the shard of another rank: nothing is read or written there."""
    logits = torch.randn(2, 32).to(dtype)
    options = row_options(logits)
    statistics = ops.row_statistics(logits[:, :8], None, None, options, 0, 8)[0]
    statistics[:, 1] += 24
    coefficients = torch.zeros(2, 4, dtype=statistics.dtype)
    coefficients[:, 3] = 1
    flags, weights = 0, None
    if is_weighted:
        flags, weights = int(RowFlags.CROSS_ENTROPY) | TARGET_PROBABILITIES, torch.ones(2, 8, dtype=statistics.dtype)
    before = logits.clone()
    ops.row_gradient_(logits[:, :8], statistics, coefficients, None, options, flags, 8, weights)
    assert_bitwise_equal(logits[:, 8:], before[:, 8:])
    assert logits[:, :8].isfinite().all()


@pytest.mark.parametrize("flags", [1 | 1 << 17, 1 | 1 << 40, -1])
def test_flags_that_mean_nothing(flags):
    logits = torch.randn(2, 8)
    with pytest.raises((ValueError, RuntimeError), match="expected flags of RowFlags, got"):
        row_loss(logits, torch.tensor([1, 2]), row_options(logits), flags=flags)
