"""A weight for every column beside a row: target probabilities, and weights of label smoothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.assertions import assert_within
from torch.utils._python_dispatch import TorchDispatchMode

from ava_ext import LinearLogits
from ava_ext.ops import Candidates, RowFlags, column_weights, row_loss, row_options
from ava_ext.ops.row_fields import SMOOTHING_WEIGHTS, TARGET_PROBABILITIES, accumulation_dtype

ops = torch.ops.ava_ext
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Case:
    """Rows, their probabilities or the weights of the classes, and options, all of one seed."""

    def __init__(
        self, seed, dtype, weights_dtype, vocab_size, n_padding, scale, smoothing, cap, is_probability, masked
    ):
        generator = torch.Generator().manual_seed(seed)
        self.real = accumulation_dtype(dtype)
        logits = torch.randn(5, vocab_size + n_padding, generator=generator, dtype=torch.float64) * scale
        logits[1, vocab_size // 2] += 40  # a row that is sure
        self.mask = torch.rand(logits.shape, generator=generator) < (0.3 if masked and vocab_size > 6 else 0.0)
        self.mask[:, 0] = False
        self.logits = logits.masked_fill(self.mask, -math.inf).to(dtype)
        shape = (5, vocab_size) if is_probability else (vocab_size,)
        weights = torch.rand(shape, generator=generator, dtype=torch.float64)
        weights = weights.masked_fill(torch.rand(shape, generator=generator) < 0.3, 0)
        if is_probability:
            weights = weights.masked_fill(self.mask[:, :vocab_size], 0)  # else the loss is infinite
            weights[1] = (
                F.one_hot(torch.tensor(vocab_size // 2), vocab_size).double().masked_fill(self.mask[1, :vocab_size], 0)
            )
        self.weights = weights.to(weights_dtype)
        self.targets = torch.randint(vocab_size, (5,), generator=generator).masked_fill(
            self.mask[:, :vocab_size].any(), 0
        )
        self.targets[3] = -100
        self.row_weights = torch.rand(5, generator=generator, dtype=torch.float64).to(self.real)
        self.is_probability, self.vocab_size, self.smoothing, self.cap = is_probability, vocab_size, smoothing, cap
        self.options = row_options(
            torch.empty(0, dtype=dtype),
            label_smoothing=smoothing,
            logit_softcap=cap,
            temperature=0.8,
            z_loss_weight=0.1,
        )
        self.flags = int(RowFlags.CROSS_ENTROPY | RowFlags.Z_LOSS | (RowFlags.SOFTCAP if cap else 0))
        if smoothing or not is_probability:
            self.flags |= int(RowFlags.LABEL_SMOOTHING)
        ids = torch.randint(-1, vocab_size, (5, 3), generator=generator)
        self.candidates = Candidates(
            ids, torch.rand(5, 3, generator=generator, dtype=torch.float64).to(self.real), (3,)
        )

    @property
    def keywords(self):
        name = "target_probabilities" if self.is_probability else "smoothing_weights"
        return {
            "flags": self.flags,
            "row_weights": self.row_weights,
            "candidates": self.candidates,
            "vocab_size": self.vocab_size,
            name: self.weights,
        }

    @property
    def operator_arguments(self):
        flags = self.flags | (TARGET_PROBABILITIES if self.is_probability else SMOOTHING_WEIGHTS)
        ids, weights, groups = self.candidates
        rows = (self.row_weights, ids, weights, groups)
        return self.logits, self.targets, self.options, *rows, flags, self.vocab_size, -100

    def expected(self, logits, weights):
        """The loss of each row by torch in float64, of leaves."""
        z = logits.double()[:, : self.vocab_size]
        absent = z == -math.inf
        if self.cap:
            z = torch.where(absent, z, self.cap * torch.tanh(z / self.cap))
        log_probs = torch.log_softmax(z / 0.8, -1)
        finite = torch.where(absent, 0.0, log_probs)
        n_present, q = (~absent).sum(-1), weights.double()
        hard = -log_probs.gather(-1, self.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        if self.is_probability:
            loss = -(1 - self.smoothing) * (q * finite).sum(-1) - self.smoothing * finite.sum(-1) / n_present
        else:
            loss = (1 - self.smoothing) * hard - self.smoothing * (q * finite).sum(-1) / n_present
        loss = loss + 0.1 * torch.logsumexp(z / 0.8, -1).square()
        p = log_probs.exp()
        for c, w in zip(self.candidates.ids.unbind(-1), self.candidates.weights.double().unbind(-1), strict=True):
            at = c.clamp(min=0).unsqueeze(-1)
            others = torch.where(torch.arange(self.vocab_size) == at, 0.0, p).sum(-1)  # 1 - p_c, exactly
            counts = (c >= 0) & (c != self.targets) & ~absent.gather(-1, at).squeeze(-1) & (self.vocab_size > 1)
            loss = loss - torch.where(counts, w * torch.where(counts, others, 1.0).log(), 0.0)
        return torch.where(self.targets == -100, 0.0, loss * self.row_weights.double())


@st.composite
def cases(draw, dtypes=DTYPES, kinds=(True, False)):
    dtype = draw(st.sampled_from(dtypes))
    return Case(
        draw(st.integers(0, 2**31)),
        dtype,
        draw(st.sampled_from([dtype, accumulation_dtype(dtype)])),
        draw(st.sampled_from([1, 2, 7, 16, 33, 64, 255, 1025, 2500])),
        draw(st.sampled_from([0, 0, 5])),
        draw(st.sampled_from([0.0, 1.0, 4.0])),
        draw(st.sampled_from([0.0, 0.1, 1.0])),
        draw(st.sampled_from([None, None, 5.0])),
        draw(st.sampled_from(kinds)),
        draw(st.booleans()),
    )


def assert_right(case, loss, gradient, name):
    logits = case.logits.double().requires_grad_()
    expected = case.expected(logits, case.weights)
    (wanted,) = torch.autograd.grad(expected.sum(), logits)
    unit = 2.0**-24 if case.real == torch.float32 else 2.0**-46
    of_u = unit * 300 * (1 + case.logits.double().masked_fill(case.mask, 0)[:, : case.vocab_size].abs().amax(-1))
    size = 2 + case.weights.double().sum(-1)
    assert_within(loss, expected.detach(), of_u * (expected.detach().abs() + size), f"{name}: loss")
    stored = wanted.abs() * torch.finfo(case.logits.dtype).eps + torch.finfo(case.logits.dtype).tiny
    assert_within(gradient, wanted, (of_u * size).unsqueeze(-1) + stored, f"{name}: gradient")
    assert (gradient[:, case.vocab_size :] == 0).all() and (gradient[case.targets == -100] == 0).all()


@given(cases())
def test_every_way_to_the_gradient(case):
    arguments = case.operator_arguments
    loss, _, gradient, *_ = ops.row_loss(*arguments, True, False, case.weights)
    assert_right(case, loss, gradient, "fused")
    loss, _, _, statistics, coefficients = ops.row_loss(*arguments, False, True, case.weights)
    columns = torch.cat([case.targets.masked_fill(case.targets == -100, -1).unsqueeze(-1), case.candidates.ids], -1)
    columns = columns.masked_fill((case.targets == -100).unsqueeze(-1), -1)
    after = (statistics, coefficients, columns, case.options, arguments[7], case.vocab_size, case.weights)
    assert_right(case, loss, ops.row_gradient(case.logits, *after), "split")
    into = case.logits.clone()
    ops.row_gradient_(into, *after)
    assert_right(case, loss, into, "row_gradient_")
    into = case.logits.clone()
    loss, _ = ops.row_loss_(into, *arguments[1:], case.weights)
    assert_right(case, loss, into, "row_loss_")
    leaf = case.logits.clone().requires_grad_()
    for inplace in (False, True):
        logits = leaf * 1
        loss = row_loss(logits, case.targets, case.options, inplace_gradient=inplace, **case.keywords).loss
        assert_right(case, loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0], f"inplace_gradient={inplace}")


@given(cases(dtypes=[torch.float64]), st.sampled_from(["sum", "none"]), st.sampled_from([None, 64]))
def test_of_linear_logits(case, reduction, chunk_bytes):
    generator = torch.Generator().manual_seed(case.vocab_size)
    states = torch.randn(5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(case.logits.shape[-1], 3, generator=generator, dtype=torch.float64).requires_grad_()
    case.mask, leaves = torch.zeros_like(case.mask), (states, weight)
    for way in (LinearLogits(states, weight), F.linear(states, weight)):
        keywords = {"reduction": reduction, "chunk_bytes": chunk_bytes, **case.keywords}
        loss = row_loss(way, case.targets, case.options, **keywords).loss
        expected = case.expected(F.linear(states, weight), case.weights)
        torch.testing.assert_close(loss, expected.sum() if reduction == "sum" else expected, rtol=1e-11, atol=1e-11)
        gradients = (torch.autograd.grad(value.sum(), leaves) for value in (loss, expected))
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


@given(cases(kinds=(True,)), st.sampled_from(["sum", "none"]), st.booleans())
def test_the_gradient_by_the_probabilities(case, reduction, is_linear):
    if is_linear and case.mask.any():  # no product of finite states is -inf
        return
    probabilities, logits = case.weights.clone().requires_grad_(), case.logits
    keywords = {**case.keywords, "target_probabilities": probabilities, "reduction": reduction}
    given_logits = LinearLogits(logits, torch.eye(logits.shape[-1], dtype=logits.dtype)) if is_linear else logits
    loss = row_loss(given_logits, case.targets, case.options, chunk_bytes=64, **keywords).loss
    expected = case.expected(logits, probabilities)
    got, wanted = (torch.autograd.grad(value.sum(), probabilities)[0] for value in (loss, expected))
    assert got.dtype == probabilities.dtype
    eps = torch.finfo(got.dtype).eps if got.dtype != torch.float64 else 1e-10
    torch.testing.assert_close(got, wanted, rtol=8 * eps, atol=60 * eps)
    if not is_linear:
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            (gradient,) = torch.autograd.grad(
                row_loss(logits, case.targets, case.options, **keywords).loss.sum(), probabilities, create_graph=True
            )
            gradient.sum().backward()


def test_the_gradient_by_the_probabilities_under_autocast():
    states, weight, bias = torch.randn(4, 3), torch.randn(9, 3), torch.randn(9)
    probabilities, targets = torch.rand(4, 9, requires_grad=True), torch.zeros(4, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = LinearLogits(states, weight, bias)
        loss = row_loss(logits, targets, row_options(states), target_probabilities=probabilities).loss
        expected = -torch.log_softmax(F.linear(states, weight, bias).float(), -1)
    (gradient,) = torch.autograd.grad(loss.sum(), probabilities)
    torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.02)


class Passes(TorchDispatchMode):
    """Collects the operators whose result has n_columns columns, and its greatest number of elements for each."""

    def __init__(self, n_columns):
        super().__init__()
        self.n_columns, self.sizes = n_columns, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dim() > 1 and result.shape[-1] == self.n_columns:
            name = function.overloadpacket.__name__
            self.sizes[name] = max(self.sizes.get(name, 0), result.numel())
        return result


@pytest.mark.devices("cpu")
def test_the_gradient_by_the_probabilities_is_made_in_the_cache(monkeypatch):
    """Nothing is compared or chosen where nothing is masked, which would take the time of log_softmax each."""
    monkeypatch.setattr(column_weights, "CACHE_BYTES", 3 * 31 * 4 // torch.get_num_threads() + 1)
    logits, probabilities = torch.randn(9, 31), torch.rand(9, 31, requires_grad=True)
    targets = torch.zeros(9, dtype=torch.int64).index_fill_(0, torch.tensor([4]), -100)
    for x in (logits, logits.masked_fill(probabilities.detach() < 0.1, -math.inf)):
        loss = row_loss(x, targets, row_options(x), target_probabilities=probabilities, reduction="sum").loss
        with Passes(31) as passes:
            (gradient,) = torch.autograd.grad(loss, probabilities)
        assert passes.sizes["_log_softmax"] <= 3 * 31
        assert ("eq" in passes.sizes) == bool(x.isinf().any()) and "where" not in passes.sizes
        expected = -torch.log_softmax(x, -1)
        expected[4] = 0
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("is_linear", [False, True])
@pytest.mark.parametrize("flags", [RowFlags.Z_LOSS, RowFlags.LABEL_SMOOTHING, RowFlags.ENTROPY], ids=str)
def test_a_loss_without_the_probabilities_has_no_gradient_by_them(flags, is_linear):
    states, weight = torch.randn(4, 3, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    logits = LinearLogits(states, weight) if is_linear else states @ weight.T
    probabilities = torch.rand(4, 9, dtype=torch.float64, requires_grad=True)
    options = row_options(states, z_loss_weight=0.3, label_smoothing=0.1)
    keywords = {"flags": int(flags), "target_probabilities": probabilities}
    loss = row_loss(logits, torch.zeros(4).long(), options, **keywords).loss
    assert (torch.autograd.grad(loss.sum(), probabilities)[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_that_is_sure_keeps_its_digits(dtype):
    """1 - p is 6e-9 here: the gradient at the maximum is that of the others, not 0."""
    logits = torch.tensor([[20.0, 0.0, -1.0, 0.5]], dtype=dtype)
    for q in ([[1.0, 0.0, 0.0, 0.0]], [[1.0, 2e-9, 0.0, 0.0]]):
        q = torch.tensor(q, dtype=dtype)
        x = logits.detach().double().clone().requires_grad_()
        expected = -(q.double() * torch.log_softmax(x, -1)).sum(-1)
        p = torch.softmax(x.detach(), -1)
        wanted = q.double().sum() * p - q.double()
        wanted[0, 0] = q[0, 1:].double().sum() - q.double().sum() * p[0, 1:].sum()
        y = logits.detach().clone().requires_grad_()
        found = row_loss(y, torch.tensor([0]), row_options(y), target_probabilities=q)
        found.loss.sum().backward()
        torch.testing.assert_close(found.loss.double(), expected.detach(), rtol=1e-5, atol=1e-17)
        torch.testing.assert_close(y.grad.double(), wanted, rtol=1e-5, atol=1e-18)


def test_masked_columns():
    logits = torch.tensor([[1.0, -math.inf, 2.0, 0.0]], requires_grad=True)
    for q, is_infinite in (([[0.5, 0.0, 0.5, 0.0]], False), ([[0.5, 0.1, 0.4, 0.0]], True)):
        q = torch.tensor(q, requires_grad=True)
        found = row_loss(logits, torch.tensor([0]), row_options(logits), target_probabilities=q)
        assert found.loss.isinf().all() == is_infinite and not found.loss.isnan().any()
        gradient, by_probabilities = torch.autograd.grad(found.loss.sum(), (logits, q))
        assert gradient[0, 1] == 0 and gradient.isfinite().all()
        expected = -torch.log_softmax(logits.detach(), -1)
        torch.testing.assert_close(by_probabilities, expected.masked_fill((q == 0) & expected.isinf(), 0))


def test_layouts_are_not_copied():
    """Any leading strides; a last stride other than 1 is copied."""
    generator = torch.Generator().manual_seed(3)
    base = torch.rand(4, 3, 9, generator=generator, dtype=torch.float64)
    logits = torch.randn(3, 4, 7, generator=generator, dtype=torch.float64)
    targets = torch.zeros(3, 4, dtype=torch.int64)
    rows = base.transpose(0, 1)
    by_column = torch.rand(7, 3, 4, generator=generator, dtype=torch.float64).permute(1, 2, 0)
    for q in (rows[..., :7], rows[..., 1:8], rows[:, :1, :7].expand(3, 4, 7), by_column):
        found = row_loss(logits, targets, row_options(logits), target_probabilities=q).loss
        torch.testing.assert_close(found, -(q * logits.log_softmax(-1)).sum(-1), rtol=1e-12, atol=0)


def test_the_metric_is_the_cross_entropy_of_the_probabilities():
    logits, q = torch.randn(4, 9), torch.rand(4, 9)
    options = row_options(logits, label_smoothing=0.2)
    flags = int(RowFlags.CROSS_ENTROPY | RowFlags.LABEL_SMOOTHING)
    terms = row_loss(logits, logits.argmax(-1), options, flags=flags, target_probabilities=q).terms
    torch.testing.assert_close(terms[3], -(q * logits.log_softmax(-1)).sum(-1))
    assert (terms[5] == 1).all()


@pytest.mark.devices("cpu")
def test_compiled():
    numbers = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 11, generator=numbers, dtype=torch.float64, requires_grad=True)
    q = torch.rand(6, 11, generator=numbers, dtype=torch.float64, requires_grad=True)
    targets, options = torch.zeros(6, dtype=torch.int64), row_options(logits, label_smoothing=0.1)
    flags = int(RowFlags.CROSS_ENTROPY | RowFlags.LABEL_SMOOTHING)

    def loss(logits, q):
        smoothed = row_loss(logits, targets, options, flags=flags, smoothing_weights=q[0].detach(), reduction="sum")
        linear = row_loss(LinearLogits(logits, logits.detach()), targets, options, target_probabilities=q[:, :6])
        return (
            row_loss(logits, targets, options, target_probabilities=q, reduction="sum").loss
            + smoothed.loss
            + linear.loss.sum()
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits, q)
    eager = loss(logits, q)
    torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(value, (logits, q)) for value in (compiled, eager))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


def test_torch_func():
    logits, q = torch.randn(4, 9, dtype=torch.float64), torch.rand(4, 9, dtype=torch.float64)
    targets, options = torch.zeros(4, dtype=torch.int64), row_options(logits)

    def loss(x):
        return row_loss(x, targets, options, target_probabilities=q, reduction="sum").loss

    wanted = q.sum(-1, keepdim=True) * logits.softmax(-1) - q
    torch.testing.assert_close(torch.func.grad(loss)(logits), wanted)
    _, tangent = torch.func.jvp(loss, (logits,), (q,))
    torch.testing.assert_close(tangent, (wanted * q).sum())


def with_every_factor(*shape):
    """A loss and what torch has for it, and their arguments: rows that count twice and not at all, a masked column, a
    soft cap, a temperature and label smoothing."""
    logits, q = torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
    logits[..., 0], q[..., 0] = -math.inf, 0
    logits[..., 1, 2], q[..., 1, 3] = math.nan, math.nan
    row_weights, targets = torch.arange(4.0, dtype=torch.float64), torch.tensor([1, -100, 5, 1])
    options = row_options(logits, logit_softcap=3.0, temperature=0.7, label_smoothing=0.2)
    flags = int(RowFlags.CROSS_ENTROPY | RowFlags.SOFTCAP | RowFlags.LABEL_SMOOTHING)

    def loss(x, q):
        keywords = {"flags": flags, "row_weights": row_weights, "reduction": "sum"}
        return row_loss(x, targets, options, target_probabilities=q, **keywords).loss

    def expected(x, q):
        x, q = (values.masked_fill((targets == -100).unsqueeze(-1), 0) for values in (x, q))
        z = 3.0 * (x[:, 1:] / 3.0).tanh() / 0.7
        rows = F.cross_entropy(z, q[:, 1:], label_smoothing=0.2, reduction="none")
        return (rows * row_weights).sum()

    return loss, expected, (logits, q)


def square_of(derivative):
    return lambda *arguments: derivative(*arguments).square().sum()


DERIVATIVES_BY_PROBABILITIES = {
    "by them": lambda loss: torch.func.grad(loss, 1),
    "by both": lambda loss: torch.func.grad(loss, (0, 1)),
    "of each sample": lambda loss: torch.vmap(torch.func.grad(loss, (0, 1))),
    "jacobian": lambda loss: torch.func.jacrev(loss, 1),
    "by them, then by them": lambda loss: torch.func.grad(square_of(torch.func.grad(loss, 1)), 1),
    "by them, then by logits": lambda loss: torch.func.grad(square_of(torch.func.grad(loss, 1))),
    "by logits, then by them": lambda loss: torch.func.grad(square_of(torch.func.grad(loss)), 1),
}


@pytest.mark.parametrize("name", DERIVATIVES_BY_PROBABILITIES)
def test_derivatives_of_torch_func_by_the_probabilities(name):
    loss, expected, arguments = with_every_factor(*[3] * (name == "of each sample"), 4, 9)
    derivative = DERIVATIVES_BY_PROBABILITIES[name]
    torch.testing.assert_close(derivative(loss)(*arguments), derivative(expected)(*arguments))


def test_probabilities_that_require_grad_outside_of_vmap():
    loss, expected, (logits, q) = with_every_factor(3, 4, 9)
    q.requires_grad_()
    found, wanted = (torch.autograd.grad(torch.vmap(f)(logits, q).sum(), q) for f in (loss, expected))
    torch.testing.assert_close(found, wanted)


def test_gradcheck():
    case = Case(5, torch.float64, torch.float64, 7, 2, 1.0, 0.1, None, True, False)
    leaves = (case.logits.requires_grad_(), case.weights.requires_grad_())
    keywords = {**case.keywords, "reduction": "none"}

    def loss(logits, q):
        return row_loss(logits, case.targets, case.options, **keywords | {"target_probabilities": q}).loss

    assert torch.autograd.gradcheck(loss, leaves)


def test_bad_input_is_named():
    logits, targets, options = torch.randn(4, 9), torch.zeros(4, dtype=torch.int64), row_options(torch.zeros(1))
    for message, keywords in (
        (r"target_probabilities of shape \[4, 9\], got \[4, 8\]", {"target_probabilities": torch.rand(4, 8)}),
        (r"smoothing_weights of shape \[9\], got \[4, 9\]", {"smoothing_weights": torch.rand(4, 9)}),
        (
            "floating point that do not require grad, got torch.int64",
            {"target_probabilities": torch.zeros(4, 9).long()},
        ),
        ("got one that does", {"smoothing_weights": torch.rand(9, requires_grad=True)}),
        (
            "expected flags without EXCLUDE_TARGET beside target_probabilities, which have no one target",
            {
                "flags": int(RowFlags.CROSS_ENTROPY | RowFlags.LABEL_SMOOTHING | RowFlags.EXCLUDE_TARGET),
                "target_probabilities": torch.rand(4, 9, requires_grad=True),
            },
        ),
        ("got both", {"smoothing_weights": torch.rand(9), "target_probabilities": torch.rand(4, 9)}),
    ):
        with pytest.raises(ValueError, match=message):
            row_loss(logits, targets, options, **keywords)
    arguments = (logits, targets, options, None, None, None, [], 1, 9, -100, False, False)
    with pytest.raises(RuntimeError, match="expected column_weights with the flags"):
        ops.row_loss(*arguments, torch.rand(4, 9))
