"""Low precision: rounded once, never much worse than PyTorch in the same dtype. Bitwise repeatable."""

import pytest
import torch
from hypothesis import given
from support.assertions import assert_bitwise_equal, assert_within, relative_error
from support.strategies import row_problems

from ava_ext.ops.row_fields import row_options
from ava_ext.ops.softmax_rows import row_loss
from ava_ext.ops.softmax_statistics import softmax_statistics

ops = torch.ops.ava_ext
LOW_PRECISION = [torch.bfloat16, torch.float16]


@given(row_problems(dtypes=LOW_PRECISION))
def test_gradient_is_that_of_float32_rounded_once(problem):
    """Half a unit of the low precision from the float32 kernel's, and no more but that kernel's own rounding.

    Not bitwise: bfloat16 rows are summed in another order. What was rounded twice is up to a whole unit off.
    """
    wide = problem.in_dtype(torch.float32)
    loss, _, gradient, *_ = ops.row_loss(problem.logits, *problem.arguments, True, False)
    wide_loss, _, wide_gradient, *_ = ops.row_loss(wide.logits, *wide.arguments, True, False)
    torch.testing.assert_close(loss, wide_loss, rtol=1e-6, atol=1e-6, equal_nan=True)
    finfo = torch.finfo(gradient.dtype)
    rows = wide_gradient.double()
    float32_rounding = 1e-6 * rows.abs() + 1e-7 * rows.nan_to_num().abs().amax(-1, keepdim=True)
    half_unit = torch.maximum(rows.abs() * finfo.eps / 2, torch.tensor(finfo.smallest_normal * finfo.eps / 2))
    assert_within(gradient, rows, half_unit * (1 + 1e-6) + float32_rounding, "gradient")


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("vocab_size", [100, 5000])
def test_error_against_pytorch_in_the_same_dtype(dtype, vocab_size):
    """At most twice the error of F.cross_entropy, for the target's entries and for the others by themselves."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(64, vocab_size, generator=generator) * 3).to(dtype)
    targets = torch.randint(vocab_size, (64,), generator=generator)

    def gradient(dtype, loss):
        x = logits.to(dtype).requires_grad_()
        value = loss(x)
        return value.detach(), torch.autograd.grad(value.sum(), x)[0]

    def naive(x):
        return torch.nn.functional.cross_entropy(x, targets, reduction="none")

    expected_loss, expected = gradient(torch.float64, naive)
    naive_loss, naive_gradient = gradient(dtype, naive)
    loss, own = gradient(dtype, lambda x: row_loss(x, targets, row_options(x)).loss)
    is_target = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, targets[:, None], True)
    assert relative_error(loss, expected_loss) < min(1e-6, 2 * relative_error(naive_loss, expected_loss))
    for part in (is_target, ~is_target):
        assert relative_error(own[part], expected[part]) <= 2 * relative_error(naive_gradient[part], expected[part])


def test_a_small_upstream_factor_reaches_a_float16_gradient_before_it_is_rounded():
    """GradScaler: entries below 6e-8 without the factor of 2^16 are zeros with one rounding too many."""
    logits = torch.randn(8, 3000, generator=torch.Generator().manual_seed(1)).half()
    weights, targets, scale = torch.full((8,), 1e-5), torch.arange(8), 2.0**16
    x = logits.clone().requires_grad_()
    (row_loss(x, targets, row_options(x), row_weights=weights).loss.sum() * scale).backward()
    wide = logits.float().requires_grad_()
    row_loss(wide, targets, row_options(wide), row_weights=weights).loss.sum().backward()
    expected = wide.grad * scale
    assert (x.grad != 0).double().mean() > 0.99
    torch.testing.assert_close(x.grad.float(), expected, rtol=2**-11 + 1e-6, atol=2**-25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_row_does_not_depend_on_the_others(dtype):
    """Bitwise the same alone, at another place, among many, and for any number of threads."""
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(300, 1999, generator=generator) * 4).to(dtype)
    targets = torch.randint(1999, (300,), generator=generator)
    options = row_options(
        logits, label_smoothing=0.1, z_loss_weight=0.01, confidence_penalty_weight=0.1, temperature=0.9
    )

    def run(rows):
        arguments = (targets[rows], options, None, None, None, [], 1 | 4 | 16 | 32, 1999, -100, True, False)
        loss, terms, gradient, *_ = ops.row_loss(logits[rows], *arguments)
        statistics = torch.stack(softmax_statistics(logits[rows], None)[1:])
        return loss, terms, gradient, statistics

    threads = torch.get_num_threads()
    whole = run(slice(None))
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            for name, value, expected in zip(
                ("loss", "terms", "gradient", "statistics"), run(slice(None)), whole, strict=True
            ):
                assert_bitwise_equal(value, expected, f"{name}, {n_threads} threads")
    finally:
        torch.set_num_threads(threads)
    for rows in (slice(0, 1), slice(7, 9), slice(1, 300, 3)):  # unaligned rows, too
        loss, terms, gradient, statistics = run(rows)
        assert_bitwise_equal(loss, whole[0][rows])
        assert_bitwise_equal(terms, whole[1][:, rows])
        assert_bitwise_equal(gradient, whole[2][rows])
        assert_bitwise_equal(statistics, whole[3][:, rows])
    # an ignored row in between changes nothing
    arguments = (targets.clone(), options, None, None, None, [], 1 | 4 | 16 | 32, 1999, -100, True, False)
    arguments[0][1::2] = -100
    gradient = ops.row_loss(logits, *arguments)[2]
    assert_bitwise_equal(gradient[::2], whole[2][::2])
    assert not gradient[1::2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_gradients_that_are_written_past_the_caches_are_the_same(dtype):
    """Streaming stores begin above 8 MB; they must not change a bit, also where rows are not aligned."""
    vocab_size, n_rows = 5003, 900
    logits = torch.randn(n_rows, vocab_size, generator=torch.Generator().manual_seed(3)).to(dtype)
    targets = torch.arange(n_rows)

    def gradient(rows):
        return ops.row_loss(
            logits[rows],
            targets[rows],
            row_options(logits),
            None,
            None,
            None,
            [],
            1,
            vocab_size,
            -100,
            True,
            False,
        )[2]

    whole = gradient(slice(None))
    for start in range(0, n_rows, 300):
        rows = slice(start, min(start + 150, n_rows))
        assert_bitwise_equal(gradient(rows), whole[rows])
