"""The operators within torch.library, torch.compile and torch.export."""

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from ava_ext.ops.row_fields import Candidates, RowFlags, row_options
from ava_ext.ops.softmax_rows import row_loss
from ava_ext.ops.softmax_statistics import softmax_statistics, token_log_probs

ops = torch.ops.ava_ext
EVERY_TERM = int(sum(RowFlags) - RowFlags.TAIL - RowFlags.TARGET_WEIGHTS)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(dtype=torch.float32, n_rows=4, requires_grad=True):
    generator = torch.Generator().manual_seed(n_rows)
    logits = torch.randn(n_rows, 2, 37, generator=generator).to(dtype)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    ids = torch.randint(-1, 36, (n_rows, 2, 3), generator=generator, dtype=torch.int32)
    weights = torch.rand(n_rows, 2, 3, generator=generator, dtype=real)
    targets = torch.randint(36, (n_rows, 2), generator=generator)
    targets[0, 0] = -100
    return logits.requires_grad_(requires_grad), targets, Candidates(ids, weights, (1, 2))


def options_of(logits, **changes):
    return row_options(
        logits, label_smoothing=0.1, z_loss_weight=0.1, confidence_penalty_weight=0.1, logit_softcap=5.0, **changes
    )


OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("with_gradient, with_statistics", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("with_candidates", [True, False])
def test_opcheck_row_loss(with_gradient, with_statistics, with_candidates):
    logits, targets, candidates = inputs(requires_grad=with_gradient or with_statistics)
    row_weights = torch.ones_like(targets, dtype=torch.float32)
    weights, ids, id_weights, groups = (row_weights, *candidates) if with_candidates else (None, None, None, ())
    arguments = (
        logits, targets, options_of(logits), weights, ids, id_weights, list(groups), EVERY_TERM, 36, -100,
    )  # fmt: skip
    torch.library.opcheck(ops.row_loss.default, (*arguments, with_gradient, with_statistics), test_utils=OPCHECK)


@pytest.mark.parametrize("with_ids", [True, False])
def test_opcheck_row_statistics_and_row_gradient(with_ids):
    logits, targets, candidates = inputs()
    ids, n_ids = (candidates.ids, 3) if with_ids else (None, 0)
    options, flags = options_of(logits), EVERY_TERM
    mask = targets != -100
    torch.library.opcheck(ops.row_statistics.default, (logits, ids, mask, options, flags, 36), test_utils=OPCHECK)
    statistics = ops.row_statistics(logits.detach(), ids, None, options, flags, 36)[0]
    row_coefficients = torch.rand(4, 2, 4 + n_ids)
    arguments = (logits.detach(), statistics, row_coefficients, ids, options, flags, 36)
    torch.library.opcheck(ops.row_gradient.default, arguments, test_utils=OPCHECK)
    torch.library.opcheck(ops.row_gradient_.default, arguments, test_utils=OPCHECK)


def test_opcheck_ops_that_write():
    logits, targets, candidates = inputs(requires_grad=False)
    torch.library.opcheck(
        ops.row_loss_.default,
        (logits, targets, options_of(logits), None, *candidates[:2], [1, 2], EVERY_TERM, 36, -100),
        test_utils=OPCHECK,
    )
    torch.library.opcheck(ops.scale_rows_.default, (logits, torch.rand(4, 2)), test_utils=OPCHECK)


def training_loss(logits, targets, candidates, options, factor):
    losses, terms = row_loss(
        logits, targets, options, flags=EVERY_TERM, candidates=candidates, vocab_size=36, inplace_gradient=False
    )
    log_prob, entropy = token_log_probs(logits, targets)
    return (losses * factor).sum() + (log_prob.exp() * entropy).sum(), terms


def assert_equals_eager(compiled, dtype, n_rows):
    logits, targets, candidates = inputs(dtype, n_rows)
    options = options_of(logits)
    factor = torch.linspace(0.5, 2, n_rows * 2, dtype=options.dtype).view(n_rows, 2)
    expected, expected_terms = training_loss(logits, targets, candidates, options, factor)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    loss, terms = compiled(logits, targets, candidates, options, factor)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(terms, expected_terms, rtol=1e-6, atol=0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient, expected_gradient, rtol=4 * eps + 1e-6, atol=4 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_training_equals_eager(dtype):
    assert_equals_eager(torch.compile(training_loss, fullgraph=True, backend="aot_eager"), dtype, 4)


def test_compiled_by_inductor_with_dynamic_shapes():
    compiled = torch.compile(training_loss, fullgraph=True, dynamic=True)
    for n_rows in (4, 7, 5):
        assert_equals_eager(compiled, torch.float32, n_rows)


def test_ignored_rows_under_compile_are_zeros():
    logits, targets, _ = inputs()
    targets[1:] = -100

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(logits):
        return row_loss(logits, targets, row_options(logits)).loss

    value = loss(logits)
    assert value.shape == (4, 2) and (value == 0).sum() == 7
    gradient = torch.autograd.grad(value.sum(), logits)[0]
    assert not gradient[1:].any() and gradient[0, 1].any()


def test_a_schedule_does_not_recompile():
    counter = CompileCounterWithBackend("aot_eager")
    logits, targets, candidates = inputs()

    @torch.compile(fullgraph=True, backend=counter)
    def loss(logits, options, temperature):
        own = row_loss(logits, targets, options, flags=EVERY_TERM, candidates=candidates).loss.mean()
        return own + softmax_statistics(logits, None, temperature=temperature).entropy.mean()

    values = set()
    for step in range(4):
        temperature = torch.tensor(1 + 0.1 * step)
        value = loss(logits, options_of(logits, temperature=temperature.item()), temperature)
        torch.autograd.grad(value, logits)
        values.add(value.item())
    assert counter.frame_count == 1 and len(values) == 4


def test_inplace_gradient_changes_nothing_under_compile():
    logits, targets, _ = inputs()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(leaf):
        logits = leaf * 2
        return row_loss(logits, targets, row_options(logits), inplace_gradient=True).loss.sum() + logits.sum()

    x = logits.detach().requires_grad_()
    plain = row_loss(x * 2, targets, row_options(x)).loss.sum() + (x * 2).sum()
    expected = torch.autograd.grad(plain, x)[0]
    torch.testing.assert_close(torch.autograd.grad(loss(logits), logits)[0], expected)


@pytest.mark.parametrize("inplace_gradient", [False, True])
def test_compiled_autograd_of_an_eager_loss(inplace_gradient):
    logits, targets, _ = inputs()
    x = logits.detach().requires_grad_()
    options = row_options(x)
    expected = torch.autograd.grad(row_loss(x * 2, targets, options).loss.sum(), x)[0]
    loss = row_loss(x * 2, targets, options, inplace_gradient=inplace_gradient).loss.sum()
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss.backward()
    torch.testing.assert_close(x.grad, expected)


def test_double_backward_under_compile_raises():
    logits, targets, _ = inputs()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(logits):
        return row_loss(logits, targets, row_options(logits)).loss.sum()

    (gradient,) = torch.autograd.grad(loss(logits), logits, create_graph=True)
    # in torch 2.11, a compiled backward has no graph at all
    with pytest.raises(RuntimeError, match=r"double backward|does not require grad"):
        gradient.square().sum().backward()


def test_targets_out_of_range_under_compile():
    logits, targets, _ = inputs()
    compiled = torch.compile(
        lambda logits, targets: row_loss(logits, targets, row_options(logits)).loss.sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    compiled(logits, targets)
    targets[2, 1] = 37
    with pytest.raises(IndexError, match="got 37 at position 5"):
        compiled(logits, targets)


def test_export():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(8, 37)

        def forward(self, states, targets):
            logits = self.head(states)
            loss = row_loss(logits, targets, row_options(logits, z_loss_weight=0.1), flags=1 | 16).loss.mean()
            return loss, token_log_probs(logits, targets)[0]

    model, states, targets = Model(), torch.randn(4, 3, 8), torch.randint(37, (4, 3))
    rows = torch.export.Dim("rows", min=2, max=100)
    exported = torch.export.export(model, (states, targets), dynamic_shapes=({0: rows}, {0: rows}))
    assert "ava_ext.row_loss" in str(exported.graph)
    states, targets = torch.randn(6, 3, 8), torch.randint(37, (6, 3))
    torch.testing.assert_close(exported.module()(states, targets), model(states, targets))
