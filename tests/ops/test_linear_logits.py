"""LinearLogits under torch.autocast, in torch.export, as fakes; and what they say of parts that do not fit."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.assertions import relative_error
from support.strategies import Numbers
from torch._subclasses import FakeTensorMode

from ava_ext.ops import linear_logits
from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.row_fields import accumulation_dtype, row_options
from ava_ext.ops.softmax_rows import row_loss
from ava_ext.ops.softmax_statistics import softmax_statistics, token_log_probs

V, HIDDEN, N_ROWS = 40, 16, 24
SINGLE, HALF, BRAIN, DOUBLE = torch.float32, torch.float16, torch.bfloat16, torch.float64


def make_parts(seed, of_states, of_weight):
    """Leaves hidden_states, weight and bias, and targets of which some are ignored."""
    numbers = Numbers(seed)
    parts = (
        numbers.normal(N_ROWS, HIDDEN).to(of_states),
        *(numbers.normal(*n).to(of_weight) for n in ((V, HIDDEN), (V,))),
    )
    targets = numbers.integers(0, V, N_ROWS).masked_fill(numbers.true(0.2, N_ROWS), -100)
    return [part.requires_grad_() for part in parts], targets


def loss_of(parts, targets, reduction="sum"):
    logits = LinearLogits(*parts)
    options = row_options(torch.zeros(0, dtype=logits.dtype))
    return row_loss(logits, targets, options, reduction=reduction, chunk_bytes=7 * V * 4).loss.sum()


def entropy_of(parts, targets):
    log_prob, entropy = token_log_probs(LinearLogits(*parts), targets, chunk_bytes=7 * V * 4)
    return (entropy - log_prob).sum()


FUSED = {
    "sum": loss_of,
    "rows": lambda parts, targets: loss_of(parts, targets, "none"),
    "log_probs": entropy_of,
}


def composed(name, parts, targets):
    """The same in plain PyTorch."""
    logits = F.linear(*parts)
    if name != "log_probs":
        return F.cross_entropy(logits, targets, reduction="sum")
    log_p = logits.to(accumulation_dtype(logits.dtype)).log_softmax(-1)  # as in cross_entropy
    counted = targets != -100
    log_prob = log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return ((-(log_p.exp() * log_p).sum(-1) - log_prob) * counted).sum()


# -- autocast


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("of_region", [BRAIN, HALF])
@pytest.mark.parametrize("of_states, of_weight", list(itertools.product([SINGLE, HALF, BRAIN], repeat=2)))
def test_autocast_is_as_exact_as_that_of_pytorch(name, of_region, of_states, of_weight):
    """Every pair of types, and gradients in the types of the leaves. Backward runs outside the region, as it should."""
    parts, targets = make_parts(0, of_states, of_weight)
    with torch.autocast("cpu", of_region):
        got, naive = FUSED[name](parts, targets), composed(name, parts, targets)
    exact_parts = [part.detach().double().requires_grad_() for part in parts]
    exact = composed(name, exact_parts, targets)
    # float32 of logits that are rounded alike
    torch.testing.assert_close(got, naive.float(), rtol=1e-5, atol=0)
    assert got.dtype == SINGLE
    results = zip(
        torch.autograd.grad(got, parts), torch.autograd.grad(naive, parts), torch.autograd.grad(exact, exact_parts),
        parts, strict=True,
    )  # fmt: skip
    for gradient, of_pytorch, expected, part in results:
        assert gradient.dtype == part.dtype
        assert relative_error(gradient, expected) <= 1.2 * relative_error(of_pytorch, expected)


@pytest.mark.parametrize("name", FUSED)
def test_states_that_autocast_has_made(name):
    """The user's case: a layer within the region gives bfloat16, the head is float32."""
    numbers = Numbers(1)
    inputs, layer = numbers.normal(N_ROWS, HIDDEN).float(), torch.nn.Linear(HIDDEN, HIDDEN)
    weight, targets = numbers.normal(V, HIDDEN).float().requires_grad_(), numbers.integers(0, V, N_ROWS)
    with torch.autocast("cpu", BRAIN):
        states = layer(inputs)
        assert states.dtype == BRAIN
        got, naive = FUSED[name]([states, weight], targets), composed(name, [states, weight], targets)
    leaves = [layer.weight, layer.bias, weight]
    gradients, of_pytorch = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (got, naive))
    for gradient, expected, leaf in zip(gradients, of_pytorch, leaves, strict=True):
        assert gradient.dtype == leaf.dtype == SINGLE
        assert relative_error(gradient, expected) < 2e-2


@pytest.mark.parametrize("name", FUSED)
def test_float64_stays_float64_in_a_region(name):
    parts, targets = make_parts(2, DOUBLE, DOUBLE)
    with torch.autocast("cpu", BRAIN):
        got = FUSED[name](parts, targets)
        gradients = torch.autograd.grad(got, parts)
    expected = composed(name, parts, targets)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, parts), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FUSED)
def test_autocast_compiles_to_the_same(name):
    parts, targets = make_parts(3, BRAIN, SINGLE)
    compiled = torch.compile(FUSED[name], fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", BRAIN):
        values = [function(parts, targets) for function in (FUSED[name], compiled)]
    torch.testing.assert_close(values[1], values[0], rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(value, parts) for value in values]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-4)


def test_types_that_pytorch_does_not_multiply_either():
    for of_states, of_weight, is_in_region in ((BRAIN, SINGLE, False), (SINGLE, HALF, False), (DOUBLE, SINGLE, True)):
        parts, targets = make_parts(4, of_states, of_weight)
        with torch.autocast("cpu", BRAIN, enabled=is_in_region):
            with pytest.raises(RuntimeError):
                F.linear(*parts)
            for function in FUSED.values():
                with pytest.raises(
                    ValueError, match=f"expected weight of hidden_states' type {of_states}, got {of_weight}"
                ):
                    function(parts, targets)


def test_parts_are_named_as_the_caller_names_them():
    head, names = (
        LinearLogits(torch.zeros(3, 4), torch.zeros(V, 5)),
        ("hidden_states", "lm_head_weight", "lm_head_bias"),
    )
    with pytest.raises(ValueError, match=r"^row_loss: expected weight of shape \[vocab_size, 4\] for hidden_states"):
        row_loss(head, torch.zeros(3).long(), row_options(torch.zeros(0)))
    with pytest.raises(ValueError, match=r"^unified_loss: expected lm_head_weight of shape \[vocab_size, 4\]"):
        head.check("unified_loss", names)
    bias = LinearLogits(torch.zeros(3, 4), torch.zeros(V, 4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"^x: expected lm_head_bias of shape \[40\], got \[3\]"):
        bias.check("x", names)


# -- fakes and export


class Model(torch.nn.Module):
    """Every function of LinearLogits, and what they are given of the same logits."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(HIDDEN, V)

    def forward(self, hidden_states, targets):
        logits = LinearLogits(hidden_states, self.head.weight, self.head.bias)
        options = row_options(hidden_states, z_loss_weight=0.1)
        loss = row_loss(logits, targets, options, flags=1 | 16, reduction="sum", chunk_bytes=1000).loss
        rows = row_loss(logits, targets, options, flags=1 | 16).loss
        dense = row_loss(self.head(hidden_states), targets, options, flags=1 | 16).loss
        log_prob, entropy = token_log_probs(logits, targets)
        of_dense = token_log_probs(self.head(hidden_states), targets)
        lse = softmax_statistics(logits, targets.unsqueeze(-1)).lse
        return loss, rows, dense, log_prob, entropy, lse, *of_dense


def exported(model, strict):
    batch_size, n_tokens = torch.export.Dim("batch_size", min=1, max=64), torch.export.Dim("n_tokens", min=2, max=512)
    shapes = {0: batch_size, 1: n_tokens}
    given = (torch.randn(2, 7, HIDDEN), torch.randint(V, (2, 7)))
    with torch.no_grad():
        return model, torch.export.export(model, given, dynamic_shapes=(shapes, shapes), strict=strict)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_shapes(strict):
    model, program = exported(Model(), strict)
    for shape in ((2, 7), (5, 3), (1, 2), (4, 64)):
        given = torch.randn(*shape, HIDDEN), torch.randint(V, shape)
        torch.testing.assert_close(program.module()(*given), model(*given))


def test_fakes_have_the_shapes_of_the_values():
    model, given = Model(), (torch.randn(2, 7, HIDDEN), torch.randint(V, (2, 7)))
    expected = [(value.shape, value.dtype) for value in model(*given)]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes = model(*(mode.from_tensor(tensor) for tensor in given))
    assert [(fake.shape, fake.dtype) for fake in fakes] == expected
    values = model(*given)  # nothing of the fakes is left behind
    assert all(type(value) is torch.Tensor and value.isfinite().all() for value in values)


def test_no_groups_may_be_none():
    """AOTInductor hands an operator None where its argument was an empty list."""
    (hidden_states, weight, bias), targets = make_parts(5, DOUBLE, DOUBLE)
    given = hidden_states, weight, bias, targets, row_options(weight), None, None, None
    results = []
    for groups in ([], None):
        total, losses, terms, *_ = torch.ops.ava_ext.linear_row_loss(
            *given, groups, 1, V, -100, None, DOUBLE, None, [False, False, False]
        )
        results.append((total, losses, terms))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "xla", "maia", "privateuseone", "meta", "vulkan", "hip"])
def test_which_devices_have_no_autocast(device_type):
    has_autocast = device_type not in linear_logits._WITHOUT_AUTOCAST
    assert has_autocast == torch.amp.is_autocast_available(device_type)


def test_one_row_alone():
    """As dense logits [n_columns], whatever is asked for."""
    states, weight = torch.randn(6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    logits = LinearLogits(states, weight)
    dense = (states @ weight.T).detach().requires_grad_()
    got, expected = token_log_probs(logits, torch.tensor(3))[0], dense.log_softmax(-1)[3]
    torch.testing.assert_close(got, expected)
    found = torch.autograd.grad(got, states)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, dense)[0] @ weight)
    ids = torch.tensor([3, 7])
    torch.testing.assert_close(softmax_statistics(logits, ids), softmax_statistics(dense, ids))
