"""softmax_statistics and token_log_probs: values, gradients, and a loss that a user writes on them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.assertions import assert_within, relative_error
from support.strategies import row_problems

from ava_ext import LinearLogits, reference
from ava_ext.ops.row_fields import N_ROW_COEFFICIENTS, STATISTIC_NAMES, RowFlags, row_options
from ava_ext.ops.softmax_statistics import softmax_statistics, token_log_probs


def inputs_of(problem, n_ids, seed):
    """logits without columns beyond reach, ids [..., n_ids] with -1 among them, a mask of the rows to measure."""
    generator = torch.Generator().manual_seed(seed)
    rows = problem.targets.shape
    ids = torch.randint(-1, problem.vocab_size, (*rows, n_ids), generator=generator)
    mask = problem.targets != problem.ignore_index
    return problem.logits.detach(), ids, mask


@given(problem=row_problems(), n_ids=st.integers(0, 4), seed=st.integers(0, 1000), is_capped=st.booleans())
def test_against_the_reference(problem, n_ids, seed, is_capped):
    logits, ids, mask = inputs_of(problem, n_ids, seed)
    is_float64 = logits.dtype == torch.float64
    temperature = problem.options[0].item()
    scale = 0.5 + seed % 3 / 2  # a power of 2 is exact
    options = dict(logit_softcap=8.0 if is_capped else None, logit_scale=scale, vocab_size=problem.vocab_size)
    x = logits.requires_grad_()
    got = softmax_statistics(x, ids, temperature=temperature, row_mask=mask, **options)
    for value in got:
        assert value.dtype == problem.options.dtype
        assert not value[~mask].any()
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in got]
    if not is_float64:  # a subnormal R has no gradient to speak of: see softmax_statistics
        has_rest = got.log_rest.detach() > math.log(1e-37)
        factors[got._fields.index("log_rest")] *= has_rest
    total = sum(
        (value.double() * factor).where(value.isfinite(), 0).sum() for value, factor in zip(got, factors, strict=True)
    )
    (gradient,) = torch.autograd.grad(total, x)
    assert (
        gradient.dtype == logits.dtype and not gradient[~mask].any() and not gradient[..., problem.vocab_size :].any()
    )
    if not mask.any():
        return

    x = logits.detach()[mask].double().requires_grad_()
    expected = reference.softmax_statistics(x, ids[mask], temperature=temperature, **options)
    z = reference.effective_logits(x.detach(), temperature=temperature, **options)
    u_max = (z.amax(-1) - torch.where(z > -math.inf, z, math.inf).amin(-1)).amax()
    unit = 2.0**-44 if is_float64 else 2.0**-22
    tolerance = unit * (4 + u_max + (8 / temperature if is_capped else 0))
    for name, value, wanted in zip(got._fields, got, expected, strict=True):
        if name == "log_rest":  # R may underflow
            value, wanted = value.clamp(min=-80), wanted.clamp(min=-80)
        size = (
            1 + z.amax(-1).abs()
            if name == "lse"
            else 1 + wanted.detach().abs()
            # a CUDA kernel takes the maximum's capped logit more exactly than the others: see test_cuda_rows.py
            if name == "log_rest" or (name == "mean_log_prob" and is_capped)
            else wanted.detach().abs()
        )
        assert_within(value[mask].detach(), wanted.detach(), tolerance * size + 1e-33, name)
    total = sum(
        (value * factor[mask]).where(ours[mask].isfinite() & wanted_is_finite(value), 0).sum()
        for value, factor, ours in zip(expected, factors, got, strict=True)
    )
    (expected_gradient,) = torch.autograd.grad(total, x)
    distance = (gradient[mask].double() - expected_gradient).norm()
    rounding = torch.finfo(logits.dtype).eps + tolerance * 4
    assert distance <= rounding * (1 + expected_gradient.norm()) * (
        1 + sum(f.abs().sum() for f in factors) / mask.sum()
    )


def wanted_is_finite(value):
    return value.detach().isfinite()


@pytest.mark.parametrize("field", ["log_probs", "entropy", "lse", "log_rest", "mean_log_prob"])
def test_gradcheck_of_every_statistic(field):
    logits = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    logits[0, 0, 3] = -math.inf
    ids = torch.tensor([[0, 0], [8, -1], [4, 3]])[:, None].expand(3, 2, 2)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    kept = logits.isfinite()

    def statistic(values):
        x = torch.full_like(logits, -math.inf).masked_scatter(kept, values)
        return getattr(
            softmax_statistics(x, ids, temperature=0.7, logit_softcap=6.0, vocab_size=8 + 1, row_mask=mask), field
        )

    assert torch.autograd.gradcheck(statistic, logits[kept].requires_grad_())


def test_gradcheck_of_a_loss_written_on_the_statistics():
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, 11, 4, 4])

    def loss(logits):
        s = softmax_statistics(logits, torch.stack([targets, targets.flip(0)], -1), temperature=1.3)
        first, second = s.log_probs.unbind(-1)
        sure = s.log_rest - torch.log1p(torch.exp(s.log_rest))  # log(1 - max p)
        return (torch.exp(first) * s.entropy - sure * second + 0.1 * s.lse.square() + s.mean_log_prob.tanh()).sum()

    x = logits.detach().clone().requires_grad_()
    p = (x / 1.3).softmax(-1)
    log_p = p.log()
    first, second = log_p.gather(-1, targets[:, None])[:, 0], log_p.gather(-1, targets.flip(0)[:, None])[:, 0]
    entropy, lse = -(p * log_p).sum(-1), (x / 1.3).logsumexp(-1)
    plain = first.exp() * entropy - (1 - p.amax(-1)).log() * second + 0.1 * lse.square() + log_p.mean(-1).tanh()
    torch.testing.assert_close(loss(logits), plain.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(value.sum(), of)[0] for value, of in ((loss(logits), logits), (plain, x)))
    )
    assert torch.autograd.gradcheck(loss, logits)


@pytest.mark.parametrize("gap", [1.0, 16.0, 40.0, 80.0])
def test_log_rest_of_a_sure_row(gap):
    """log(1 - max p) and its gradient stay exact where p rounds to 1."""
    logits = torch.linspace(-1, 0, 50)[None].clone()
    logits[0, 20] = gap
    x, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = softmax_statistics(x, None).log_rest
    expected = -reference.log_odds(wide, torch.tensor([20]))
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    gradient, expected_gradient = torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(expected.sum(), wide)[0]
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-6 + gap * 2**-23, atol=0)


def test_the_maximum_may_be_in_the_columns_of_another_rank():
    """Its coefficient then belongs to no column here, and changes none."""
    logits, options, flags = torch.randn(2, 9), row_options(torch.zeros(1)), int(RowFlags.ENTROPY)
    statistics = torch.ops.ava_ext.row_statistics(logits, None, None, options, flags, 9)[0]
    statistics[:, STATISTIC_NAMES.index("argmax")] = torch.tensor([-4.0, 9.0])
    coefficients = torch.randn(2, N_ROW_COEFFICIENTS)
    gradients = []
    for of_maximum in (3.0, 0.0):
        coefficients[:, -1] = of_maximum
        gradients.append(torch.ops.ava_ext.row_gradient(logits, statistics, coefficients, None, options, flags, 9))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@given(row_problems(dtypes=[torch.float32, torch.float64]))
def test_token_log_probs(problem):
    """The log-probability is minus F.cross_entropy, and ignored rows are not looked at."""
    logits = problem.logits.detach().requires_grad_()
    log_prob, entropy = token_log_probs(
        logits, problem.targets, vocab_size=problem.vocab_size, ignore_index=problem.ignore_index
    )
    mask = problem.targets != problem.ignore_index
    x = logits.detach()[mask][..., : problem.vocab_size].double().requires_grad_()
    expected = -reference.negative_log_likelihood(reference.effective_logits(x), problem.targets[mask]).detach()
    unit = 2.0**-44 if logits.dtype == torch.float64 else 2.0**-24
    size = 10 + 4 * x.detach().nan_to_num(neginf=0).abs().amax(-1)  # of u: e^u feels it times the distance
    assert_within(log_prob.detach()[mask], expected, unit * size * expected.abs() + 1e-33, "log_prob")
    assert not log_prob[~mask].any() and not entropy[~mask].any()
    (gradient,) = torch.autograd.grad(log_prob.where(log_prob.isfinite(), 0).sum() - entropy.sum(), logits)
    assert not gradient[~mask].any() and not gradient[..., problem.vocab_size :].any()
    assert gradient.isfinite().all()


def test_temperature_as_a_tensor():
    logits, targets = torch.randn(4, 30), torch.arange(4)
    expected = token_log_probs(logits, targets, temperature=0.5)
    torch.testing.assert_close(
        token_log_probs(logits, targets, temperature=torch.tensor(0.5)), expected, rtol=0, atol=0
    )
    for name in ("temperature", "logit_softcap", "logit_scale"):
        with pytest.raises(ValueError, match=f"token_log_probs: expected {name} without requires_grad: no gradient is"):
            token_log_probs(logits, targets, **{name: torch.tensor(0.5, requires_grad=True)})
    with pytest.raises(ValueError, match="expected temperature of real numbers, got complex64"):
        token_log_probs(logits, targets, temperature=torch.tensor(0.5 + 1j))


def test_ids_out_of_range():
    with pytest.raises(IndexError, match=r"row_statistics: expected ids in \[0, 30\) or -1, got 30 at position 3"):
        softmax_statistics(torch.zeros(2, 30), torch.tensor([[0, 1], [2, 30]]))
    with pytest.raises(IndexError, match=r"got -2 at position 0"):
        softmax_statistics(torch.zeros(2, 30), torch.tensor([[-2], [2]]))


def test_double_backward_raises():
    logits = torch.randn(2, 5, requires_grad=True)
    log_prob, _ = token_log_probs(logits, torch.tensor([1, 2]))
    (gradient,) = torch.autograd.grad(log_prob.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.square().sum().backward()


def test_precision_of_entropy_and_gradient_in_bfloat16():
    logits = (torch.randn(16, 3000, generator=torch.Generator().manual_seed(4)) * 2).bfloat16()
    targets = torch.arange(16)
    x, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    log_prob, entropy = token_log_probs(x, targets)
    p = wide.log_softmax(-1)
    expected = p.gather(-1, targets[:, None])[:, 0], -(p.exp() * p).sum(-1)
    assert relative_error(log_prob, expected[0]) < 5e-7 and relative_error(entropy, expected[1]) < 5e-7
    (log_prob + entropy).sum().backward()
    (expected[0] + expected[1]).sum().backward()
    is_target = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, targets[:, None], True)
    for part in (is_target, ~is_target):
        assert relative_error(x.grad[part], wide.grad[part]) < 2**-9


def test_the_gradient_of_log_rest_beyond_the_range_of_normal_numbers():
    """float64 has it; in float32, R = e^-100 is subnormal, and the gradient fades without being nan or too large."""
    for dtype in (torch.float64, torch.float32):
        logits = torch.tensor([[0.0, 100.0, 200.0]], dtype=dtype, requires_grad=True)
        log_rest = softmax_statistics(logits, None).log_rest
        (gradient,) = torch.autograd.grad(log_rest.sum(), logits)
        if dtype == torch.float64:
            assert log_rest.item() == pytest.approx(-100)
            torch.testing.assert_close(gradient, torch.tensor([[0.0, 1.0, -1.0]], dtype=dtype))
        else:
            assert log_rest.item() < -87  # -inf where an exponential is flushed to 0
            assert gradient.isfinite().all() and 0 <= gradient[0, 1] < 1e-5


@pytest.mark.parametrize(("dtype", "exact", "infinite"), [(torch.float32, 87.0, 104.0), (torch.float64, 708.0, 746.0)])
def test_up_to_which_gap_log_rest_is_exact(dtype, exact, infinite):
    """As the guide says."""
    logits = torch.tensor([[0.0, exact], [0.0, infinite]], dtype=dtype)
    log_rest = softmax_statistics(logits, None).log_rest
    assert log_rest[0].item() == pytest.approx(-exact, rel=1e-7) and log_rest[1].item() == -math.inf


def test_linear_logits_without_a_weight():
    with pytest.raises(TypeError, match=r"token_log_probs: expected weight to be a torch.Tensor, got NoneType"):
        token_log_probs(LinearLogits(torch.randn(2, 3), None), torch.zeros(2, dtype=torch.long))
