"""Forward mode, torch.func, outputs that users write to, nan from above: the right derivative or an error, never 0."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.assertions import assert_bitwise_equal
from support.strategies import Numbers
from torch.autograd import forward_ad

from ava_ext import UnifiedLoss, functional
from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.router_rows import router_statistics
from ava_ext.ops.row_fields import Candidates, RowFlags, accumulation_dtype, row_options
from ava_ext.ops.softmax_rows import row_loss
from ava_ext.ops.softmax_statistics import softmax_statistics, token_log_probs

V, HIDDEN = 11, 5
TARGETS = [3, -100, 7, 10]
# without token reweighting, whose weight is a constant to autograd
EVERY_TERM = int(sum(RowFlags) - RowFlags.TAIL - RowFlags.TARGET_WEIGHTS - RowFlags.DFT - RowFlags.EAFT)
second_derivative = pytest.raises(
    (RuntimeError, NotImplementedError), match=r"double backward is|second derivatives are"
)


def make_head(seed, dtype=torch.float64):
    numbers = Numbers(seed)
    parts = numbers.normal(4, HIDDEN), numbers.normal(V, HIDDEN), numbers.normal(V)
    return LinearLogits(*(part.to(dtype).requires_grad_() for part in parts))


def make_logits(seed=0, dtype=torch.float64):
    return Numbers(seed).normal(4, V, scale=2.0).to(dtype)


def loss_of_every_term(logits):
    """Of every row; no random number is drawn, which vmap forbids."""
    options = row_options(logits, temperature=0.8, label_smoothing=0.1, z_loss_weight=0.1, logit_softcap=5.0)
    ids = torch.tensor([[1, 5, -1], [2, 2, 9], [0, 7, 4], [-1, -1, 3]], dtype=torch.int32)
    weights = torch.linspace(0.1, 1, 12, dtype=options.dtype).view(4, 3)
    row_weights = torch.linspace(-0.5, 1, 4, dtype=options.dtype)
    return row_loss(
        logits,
        torch.tensor(TARGETS),
        options,
        flags=EVERY_TERM,
        row_weights=row_weights,
        candidates=Candidates(ids, weights, (1, 2)),
    ).loss


def cross_entropy(logits):
    return row_loss(logits, torch.tensor(TARGETS), row_options(torch.zeros(0, dtype=logits.dtype))).loss


def sum_of(logits):
    options = row_options(torch.zeros(0, dtype=logits.dtype))
    return row_loss(logits, torch.tensor(TARGETS), options, reduction="sum").loss


# of logits or LinearLogits, a tensor
STATISTICS = {
    "log_prob": lambda x: token_log_probs(x, torch.tensor(TARGETS))[0],
    "entropy": lambda x: token_log_probs(x, torch.tensor(TARGETS))[1],
    "lse": lambda x: softmax_statistics(x, None).lse,
}
LOSSES = {"rows": cross_entropy, "sum": sum_of}
OF_LINEAR_LOGITS = LOSSES | STATISTICS
WITHOUT_FORWARD_MODE = STATISTICS | {"router": lambda x: router_statistics(x, k=2).importance_sum}
FUNCTIONS = LOSSES | WITHOUT_FORWARD_MODE


# -- forward mode


@pytest.mark.parametrize("loss", [cross_entropy, loss_of_every_term])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_mode_is_the_gradient_times_the_tangent(loss, dtype):
    logits, tangent = make_logits(0, dtype), make_logits(1, dtype)
    exact = logits.double().requires_grad_()
    rows = torch.eye(4, dtype=torch.float64)
    expected = torch.stack([(torch.autograd.grad(loss(exact), exact, row)[0] * tangent.double()).sum() for row in rows])
    value, got = torch.func.jvp(loss, (logits,), (tangent,))
    # float16 is widened first: the same numbers, perhaps in another order
    torch.testing.assert_close(value, loss(logits), rtol=1e-6 if dtype == torch.float16 else 0, atol=0)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(logits, tangent)))
    # each of the products is rounded as a gradient is
    sizes = (
        torch.stack([torch.autograd.grad(loss(exact), exact, row)[0].norm() for row in rows]) * tangent.double().norm()
    )
    for way in (got, dual.tangent):
        assert way.dtype == value.dtype
        assert ((way.double() - expected).abs() <= 4 * torch.finfo(dtype).eps * sizes + 1e-15).all()
        assert way[1] == 0 and way.count_nonzero() == 3


def test_forward_mode_equals_that_of_pytorch():
    logits, tangent, targets = make_logits(2), make_logits(3), torch.tensor(TARGETS)
    got = torch.func.jvp(lambda x: cross_entropy(x).sum() / 3, (logits,), (tangent,))
    torch.testing.assert_close(got, torch.func.jvp(lambda x: F.cross_entropy(x, targets), (logits,), (tangent,)))


@pytest.mark.parametrize("name", WITHOUT_FORWARD_MODE)
def test_forward_mode_of_the_others_raises(name):
    """torch.func.jvp and dual numbers; also where the logits require grad."""
    for logits in (make_logits(), make_logits().requires_grad_()):
        with pytest.raises(NotImplementedError, match="forward-mode derivatives are not supported"):
            torch.func.jvp(FUNCTIONS[name], (logits,), (make_logits(1),))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode derivatives"):
            FUNCTIONS[name](forward_ad.make_dual(logits, make_logits(1)))
        with forward_ad.dual_level():  # nothing is asked of these
            torch.testing.assert_close(FUNCTIONS[name](logits), FUNCTIONS[name](logits))


@pytest.mark.parametrize("name", OF_LINEAR_LOGITS)
@pytest.mark.parametrize("part", [0, 1, 2])
def test_forward_mode_of_linear_logits_raises(name, part):
    head = make_head(0)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode derivatives"):
        parts = list(head)
        parts[part] = forward_ad.make_dual(parts[part], torch.ones_like(parts[part]))
        OF_LINEAR_LOGITS[name](LinearLogits(*parts))


@pytest.mark.parametrize("name", ["row_weights", "options", "candidate weights", "target_probabilities"])
@pytest.mark.parametrize("is_linear", [False, True])
def test_forward_mode_of_what_has_no_derivative_raises(name, is_linear):
    logits = make_logits()
    tensors = {"row_weights": torch.ones(4).double(), "options": row_options(logits)}
    tensors["candidate weights"] = torch.ones(4, 1).double()
    tensors["target_probabilities"] = torch.full((4, V), 1 / V).double() if name == "target_probabilities" else None
    logits = LinearLogits(logits, torch.eye(V).double()) if is_linear else logits
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="row_loss: forward-mode derivatives"):
        tensors[name] = forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
        candidates = Candidates(torch.zeros(4, 1, dtype=torch.int32), tensors.pop("candidate weights"), (1,))
        row_loss(logits, torch.tensor(TARGETS), candidates=candidates, **tensors)


@pytest.mark.parametrize("name", ["token_weights", "num_items_in_batch"])
def test_forward_mode_of_what_weighs_the_rows_of_a_loss_raises(name):
    logits, targets, value = make_logits(), torch.tensor(TARGETS), torch.tensor(4.0)
    value = torch.ones(4) if name == "token_weights" else value
    for reduction in ("mean", "sum") if name == "token_weights" else ("mean",):
        loss_fn = UnifiedLoss(V, primary_loss_type="standard", reduction=reduction)
        with pytest.raises(NotImplementedError, match="unified_loss: forward-mode derivatives"):
            torch.func.jvp(lambda x: loss_fn(logits, targets, **{name: x}), (value,), (value,))  # noqa: B023
        _, derivative = torch.func.jvp(lambda x: loss_fn(x, targets, **{name: value}), (logits,), (logits,))  # noqa: B023
        assert derivative != 0


@pytest.mark.parametrize("name", ["initial_temperature", "label_smoothing", "z_loss_weight"])
def test_forward_mode_of_an_option_raises(name):
    logits, targets, value = make_logits(), torch.tensor(TARGETS), torch.tensor(0.5)
    with pytest.raises(NotImplementedError, match="cross_entropy: forward-mode derivatives"):
        torch.func.jvp(lambda x: functional.cross_entropy(logits, targets, **{name: x}), (value,), (value,))


# by us, or by the compiler, which from torch 2.14 on takes no dual tensor
REFUSED = r"forward-mode derivatives|Observed exception|wrap a dual tensor input"


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("name", ["rows", "entropy", "lse"])
def test_forward_mode_of_compiled_code_raises(name):
    torch._dynamo.reset()
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")
    logits, tangent = make_logits(), make_logits(1)
    torch.testing.assert_close(compiled(logits), FUNCTIONS[name](logits))
    with forward_ad.dual_level(), pytest.raises(Exception, match=REFUSED):
        compiled(forward_ad.make_dual(logits, tangent))
    of_jvp = torch.compile(
        lambda x: torch.func.jvp(FUNCTIONS[name], (x,), (tangent,)), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match=REFUSED):
        of_jvp(logits)
    torch._dynamo.reset()


# -- torch.func in reverse mode


def test_torch_func_grad_and_jacobians():
    logits, targets = make_logits(4), torch.tensor(TARGETS)
    leaf = logits.clone().requires_grad_()
    rows = loss_of_every_term(leaf)
    expected = torch.stack(
        [torch.autograd.grad(rows, leaf, row, retain_graph=True)[0] for row in torch.eye(4).double()]
    )
    torch.testing.assert_close(torch.func.grad(lambda x: loss_of_every_term(x).sum())(logits), expected.sum(0))
    torch.testing.assert_close(
        torch.func.vjp(loss_of_every_term, logits)[1](torch.ones(4).double())[0], expected.sum(0)
    )
    torch.testing.assert_close(torch.func.jacrev(loss_of_every_term)(logits), expected)
    torch.testing.assert_close(torch.func.jacfwd(loss_of_every_term)(logits), expected)
    batch = torch.stack([logits, logits + 1 * make_logits(5)])
    per_sample = torch.func.vmap(torch.func.grad(lambda x: cross_entropy(x).sum()))(batch)
    naive = torch.func.vmap(torch.func.grad(lambda x: F.cross_entropy(x, targets, reduction="sum")))(batch)
    torch.testing.assert_close(per_sample, naive)


def test_float16_under_torch_func_meets_the_scaler_before_it_is_rounded():
    logits, scale = make_logits(6).half(), 2.0**40
    options, weights = row_options(logits), torch.full((4,), 2.0**-40)  # gradients of 1e-12 are zeros in float16

    def scaled(x):
        return row_loss(x, torch.tensor(TARGETS), options, row_weights=weights, reduction="sum").loss * scale

    expected = torch.autograd.grad(cross_entropy(wide := logits.float().requires_grad_()).sum(), wide)[0]
    torch.testing.assert_close(torch.func.grad(scaled)(logits).float(), expected, rtol=2e-3, atol=1e-6)


def jvp_of(function, tangent):
    return lambda x: torch.func.jvp(function, (x,), (tangent,))[1].sum()


def grad_of(function):
    return lambda x: torch.func.grad(lambda y: function(y).sum())(x).square().sum()


@pytest.mark.parametrize("loss", [cross_entropy, loss_of_every_term])
def test_second_derivatives_raise(loss):
    logits, tangent = make_logits(7), make_logits(8)
    for first in (grad_of(loss), jvp_of(loss, tangent)):
        with second_derivative:
            torch.func.grad(first)(logits)
        with second_derivative:
            torch.func.jvp(first, (logits,), (tangent,))
        leaf = logits.clone().requires_grad_()
        with second_derivative:
            torch.autograd.grad(first(leaf), leaf)
    with second_derivative:
        torch.func.hessian(lambda x: loss(x).sum())(logits)


def test_forward_over_reverse_and_reverse_over_forward_raise():
    logits, tangent = make_logits(7).requires_grad_(), make_logits(8)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits, tangent)
        with second_derivative:
            torch.autograd.grad(cross_entropy(dual).sum(), dual)
        derivative = forward_ad.unpack_dual(cross_entropy(dual)).tangent
        with second_derivative:
            torch.autograd.grad(derivative.sum(), logits)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_upstream_gradient_with_a_tangent_raises(name):
    logits = make_logits().requires_grad_()
    before = FUNCTIONS[name](logits)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(before), torch.ones_like(before))
        for value in (before, FUNCTIONS[name](logits)):
            with pytest.raises((NotImplementedError, RuntimeError), match=r"not supported"):
                torch.autograd.grad(value, logits, upstream)


# -- second derivatives by what comes from above, in which a gradient is linear


def by_what_comes_from_above(value, leaf, seed):
    """d (sum of gradient * direction) / d upstream."""
    numbers = Numbers(seed)
    upstream = numbers.normal(*value.shape).to(value.dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(value, leaf, upstream, create_graph=True)
    return torch.autograd.grad(gradient, upstream, numbers.normal(*leaf.shape).to(leaf.dtype))[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_derivatives_by_what_comes_from_above_dense_logits(dtype, reduction):
    leaf = make_logits(20, dtype).requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, torch.tensor(TARGETS), reduction=reduction)
    expected = by_what_comes_from_above(expected, exact, 21).to(accumulation_dtype(dtype))
    loss = row_loss(leaf, torch.tensor(TARGETS), row_options(leaf.detach()), reduction=reduction).loss
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(by_what_comes_from_above(loss, leaf, 21), expected, rtol=8 * eps, atol=8 * eps)


def test_derivatives_by_what_comes_from_above_linear_logits():
    head = make_head(20)
    for part in head:
        exact = F.cross_entropy(F.linear(*head), torch.tensor(TARGETS), reduction="sum")
        expected = by_what_comes_from_above(exact, part, 21)
        torch.testing.assert_close(by_what_comes_from_above(sum_of(head), part, 21), expected)


def in_float16(logits):
    return cross_entropy(logits.half()).double()


def written_over(logits):
    return row_loss(logits * 1, torch.tensor(TARGETS), row_options(logits.detach()), inplace_gradient=True).loss


@pytest.mark.parametrize("function", [*WITHOUT_FORWARD_MODE.values(), in_float16, written_over])
def test_derivatives_by_what_comes_from_above_raise_where_there_are_none(function):
    leaf = make_logits(22).requires_grad_()
    with second_derivative:
        by_what_comes_from_above(function(leaf), leaf, 23)


@pytest.mark.parametrize("name", ["rows", *STATISTICS])
def test_derivatives_by_what_comes_from_above_linear_logits_raise_where_there_are_none(name):
    head = make_head(22)
    for part in head:
        with second_derivative:
            by_what_comes_from_above(OF_LINEAR_LOGITS[name](head), part, 23)


@pytest.mark.parametrize("kind", ["dense", "linear"])
def test_mixed_second_derivatives_by_logits_and_probabilities_raise(kind):
    logits = make_logits(24).requires_grad_() if kind == "dense" else make_head(24)
    of_logits = [logits] if kind == "dense" else list(logits)
    probabilities = make_logits(25).softmax(-1).requires_grad_()
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    options = row_options(torch.zeros(0, dtype=torch.float64))
    keywords = {"target_probabilities": probabilities, "reduction": "sum"}
    loss = factor * row_loss(logits, torch.tensor(TARGETS), options, **keywords).loss
    leaves = [*of_logits, probabilities]
    for leaf in leaves:
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        for other in (*leaves, factor):
            if leaf is not probabilities or other is not probabilities:
                with second_derivative:
                    torch.autograd.grad(gradient.square().sum(), other, retain_graph=True)


# -- several gradients at once, and vmap


def gradients_at_once(function, leaves, **options):
    """autograd.grad with a batch of gradients from above, and what one by one gives."""
    upstream = torch.linspace(-1, 1, 3 * function().numel(), dtype=function().dtype).view(3, *function().shape)
    upstream[1] = 1
    one_by_one = [torch.autograd.grad(function(), leaves, rows) for rows in upstream]
    expected = [torch.stack(parts) for parts in zip(*one_by_one, strict=True)]
    return list(torch.autograd.grad(function(), leaves, upstream, is_grads_batched=True, **options)), expected


@pytest.mark.parametrize("name", LOSSES | STATISTICS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("kept", [False, True])
def test_several_gradients_at_once(name, dtype, kept):
    leaf = make_logits(18, dtype).requires_grad_()
    found, expected = gradients_at_once(lambda: FUNCTIONS[name](leaf), [leaf], retain_graph=kept)
    torch.testing.assert_close(found, expected)
    head = make_head(18, dtype)
    found, expected = gradients_at_once(lambda: OF_LINEAR_LOGITS[name](head), list(head), retain_graph=kept)
    torch.testing.assert_close(found, expected)


def test_several_gradients_at_once_of_logits_that_are_written_over():
    leaf = make_logits(18).requires_grad_()
    options = row_options(leaf)
    found, expected = gradients_at_once(
        lambda: row_loss(leaf * 1, torch.tensor(TARGETS), options, inplace_gradient=True).loss, [leaf]
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["dense", "linear"])
@pytest.mark.parametrize("vocab_size", [None, V - 2])
@pytest.mark.parametrize("n_rows", [0, 4])
def test_several_gradients_at_once_by_target_probabilities(kind, vocab_size, n_rows):
    head = make_head(18)
    logits = head._replace(hidden_states=head.hidden_states[:n_rows])
    logits = F.linear(*logits) if kind == "dense" else logits
    leaf = make_logits(19)[:n_rows].softmax(-1).requires_grad_()
    keywords = {"vocab_size": vocab_size, "chunk_bytes": 3 * V * 8, "target_probabilities": leaf}
    targets, options = torch.tensor(TARGETS)[:n_rows].clamp(max=V - 3), row_options(leaf)
    found, expected = gradients_at_once(
        lambda: row_loss(logits, targets, options, **keywords).loss, [leaf], retain_graph=True
    )
    torch.testing.assert_close(found, expected)


def test_several_gradients_at_once_of_a_router_raise():
    leaf = make_logits().requires_grad_()
    with pytest.raises(NotImplementedError, match="router_statistics: is_grads_batched=True"):
        gradients_at_once(lambda: FUNCTIONS["router"](leaf), [leaf])


@pytest.mark.parametrize("name", OF_LINEAR_LOGITS)
def test_second_derivatives_of_several_gradients_at_once_raise(name):
    leaf, head = make_logits().requires_grad_(), make_head(0)
    for function, leaves in ((lambda: FUNCTIONS[name](leaf), [leaf]), (lambda: FUNCTIONS[name](head), list(head))):
        with second_derivative:
            gradients, _ = gradients_at_once(function, leaves, create_graph=True)
            torch.autograd.grad(gradients[0].square().sum(), leaves)


SAMPLES = torch.linspace(-2, 2, 2 * 4 * V, dtype=torch.float64).sin().view(2, 4, V)
TRANSFORMS = {
    "vmap": lambda function: torch.func.vmap(function)(SAMPLES),
    "vmap of a leaf": lambda function: torch.func.vmap(function)(SAMPLES.clone().requires_grad_()),
    "grad": lambda function: torch.func.grad(lambda x: function(x).sum())(SAMPLES[0]),
    "vmap of grad": lambda function: torch.func.vmap(torch.func.grad(lambda x: function(x).sum()))(SAMPLES),
    "vmap of jvp": lambda function: torch.func.vmap(lambda x: torch.func.jvp(function, (x,), (x,))[1])(SAMPLES),
    "grad of vmap": lambda function: torch.func.grad(lambda x: torch.func.vmap(function)(x).sum())(SAMPLES),
    "jvp of vmap": lambda function: torch.func.jvp(torch.func.vmap(function), (SAMPLES,), (SAMPLES,)),
    "jacrev": lambda function: torch.func.jacrev(function)(SAMPLES[0]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_raise_where_they_are_not_supported(name, transform):
    if name in LOSSES and not transform.endswith("of vmap"):
        expected = TRANSFORMS[transform](naive_rows)
        found = TRANSFORMS[transform](cross_entropy)
        return torch.testing.assert_close(found, expected)
    with pytest.raises(NotImplementedError, match=r"^\w+: (torch.func|forward-mode).* expected"):
        TRANSFORMS[transform](FUNCTIONS[name])


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", OF_LINEAR_LOGITS)
def test_transforms_of_linear_logits_raise(name, transform):
    weight = make_head(19).weight.detach()[:, :1].expand(-1, V)

    def function(x):
        return OF_LINEAR_LOGITS[name](LinearLogits(x, weight, None))

    if name in LOSSES and transform == "vmap":
        expected = torch.stack([function(sample) for sample in SAMPLES])
        return torch.testing.assert_close(TRANSFORMS[transform](function), expected)
    with pytest.raises(NotImplementedError, match=r"^\w+: (torch.func|forward-mode).* expected"):
        TRANSFORMS[transform](function)


def naive_rows(logits):
    return F.cross_entropy(logits, torch.tensor(TARGETS), reduction="none")


# a loss of one sample, a leaf [2, 4, V] -> values
VMAPS = {
    "of a batch": lambda loss, leaf: torch.vmap(loss)(leaf),
    "of what is computed": lambda loss, leaf: torch.vmap(loss, in_dims=1)(leaf.sin().transpose(0, 1)),
    "beside what is captured": lambda loss, leaf: torch.vmap(lambda factor: loss(factor * leaf[0]))(torch.ones(3)),
    "of vmap": lambda loss, leaf: torch.vmap(lambda factor: torch.vmap(loss)(factor * leaf))(torch.ones(3)),
    "of an ensemble": lambda loss, leaf: torch.vmap(lambda weight: loss(SAMPLES[0] @ weight))(leaf.mT @ leaf),
}


@pytest.mark.parametrize("loss", [cross_entropy, lambda x: functional.cross_entropy(x, torch.tensor(TARGETS))])
@pytest.mark.parametrize("way", VMAPS)
def test_vmap_keeps_the_gradient_of_what_requires_grad_around_it(way, loss):
    """Beside another term, with which nobody would notice that it is gone."""
    leaf = SAMPLES.clone().requires_grad_()
    naive = naive_rows if loss is cross_entropy else lambda x: F.cross_entropy(x, torch.tensor(TARGETS))
    found, expected = (VMAPS[way](function, leaf).square().sum() + leaf.sum() for function in (loss, naive))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, leaf), torch.autograd.grad(expected, leaf))
    with torch.no_grad():
        torch.testing.assert_close(VMAPS[way](loss, leaf), VMAPS[way](naive, leaf))


@pytest.mark.parametrize("part", [0, 1, 2])
def test_vmap_of_linear_logits_that_require_grad_raises(part):
    parts = [tensor.detach().expand(2, *tensor.shape) for tensor in make_head(20)]
    parts[part] = parts[part].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=r"row_loss: torch.func.vmap of what requires grad is not supported"):
        torch.vmap(lambda *parts: sum_of(LinearLogits(*parts)))(*parts)
    with torch.no_grad():
        expected = torch.stack([sum_of(LinearLogits(*one)) for one in zip(*parts, strict=True)])
        torch.testing.assert_close(torch.vmap(lambda *parts: sum_of(LinearLogits(*parts)))(*parts), expected)


@pytest.mark.parametrize("name", OF_LINEAR_LOGITS)
def test_jvp_beside_linear_logits_that_require_grad(name):
    """A learned head, or one of the loss, while the derivative is by something else."""
    head = make_head(0)

    def function(x):
        return x.sum() + FUNCTIONS[name](head).sum()

    with pytest.raises(NotImplementedError, match=r"torch.func.jvp beside what requires grad .* within torch.no_grad$"):
        torch.func.jvp(function, (SAMPLES,), (SAMPLES,))
    with torch.no_grad():
        _, tangent = torch.func.jvp(function, (SAMPLES,), (SAMPLES,))
    torch.testing.assert_close(tangent, SAMPLES.sum())


def test_vmap_of_constants_that_require_grad_raises():
    weights = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    loss_fn = UnifiedLoss(V, primary_loss_type="standard", reduction="sum")
    with pytest.raises(ValueError, match="row_loss: expected row_weights without requires_grad"):
        torch.vmap(lambda x, w: row_loss(x, torch.tensor(TARGETS), row_options(x), row_weights=w).loss)(
            SAMPLES, weights
        )
    with pytest.raises(ValueError, match="unified_loss: expected token_weights without requires_grad"):
        torch.vmap(lambda x, w: loss_fn(x, torch.tensor(TARGETS), token_weights=w))(SAMPLES, weights)
    of_class = torch.ones(2, V, requires_grad=True)
    with pytest.raises(ValueError, match="cross_entropy: expected weight without requires_grad"):
        torch.vmap(lambda x, w: functional.cross_entropy(x, torch.tensor(TARGETS), w))(SAMPLES, of_class)


def test_transforms_of_target_probabilities_that_require_grad_raise_beside_linear_logits():
    logits = LinearLogits(*(part.detach() for part in make_head(21)))

    def loss(q):
        return functional.cross_entropy(logits, q)

    q = SAMPLES.softmax(-1)
    with pytest.raises(NotImplementedError, match=r"row_loss: torch.func.grad is not supported here; expected torch"):
        torch.func.grad(loss)(q[0])
    leaf = q.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=r"row_loss: torch.func.vmap is not supported here; expected a call"):
        torch.vmap(loss)(leaf)
    expected = torch.stack([loss(one) for one in q])
    torch.testing.assert_close(torch.vmap(loss)(q), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(loss)(leaf), expected)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("way", VMAPS)
def test_a_compiled_vmap_keeps_the_gradient(way):
    torch._dynamo.reset()
    leaf = SAMPLES.clone().requires_grad_()

    def total(leaf):
        return VMAPS[way](cross_entropy, leaf).square().sum() + leaf.sum()

    compiled = torch.compile(total, backend="aot_eager")(leaf)
    torch.testing.assert_close(compiled, total(leaf))
    torch.testing.assert_close(torch.autograd.grad(compiled, leaf), torch.autograd.grad(total(leaf), leaf))


@pytest.mark.devices("cpu")
def test_a_compiled_vmap_of_linear_logits_keeps_the_gradient():
    torch._dynamo.reset()
    head = [part.detach().expand(2, *part.shape).clone().requires_grad_() for part in make_head(22)[:2]]

    def total(states, weight):
        return torch.vmap(lambda *parts: sum_of(LinearLogits(*parts)))(states, weight).sum()

    expected = sum(sum_of(LinearLogits(*parts)) for parts in zip(*head, strict=True))
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")(*head)
    torch.testing.assert_close(torch.autograd.grad(compiled, head), torch.autograd.grad(expected, head))


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("transform", ["grad", "vmap of grad"])
def test_a_graph_within_torch_func_grad_is_left_to_eager_mode(transform):
    torch._dynamo.reset()

    def transformed():
        return TRANSFORMS[transform](cross_entropy)

    torch.testing.assert_close(torch.compile(transformed, backend="aot_eager")(), transformed())
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch.func.grad is not supported in a compiled graph"):
        torch.compile(transformed, fullgraph=True, backend="aot_eager")()


@pytest.mark.devices("cpu")
def test_so_is_that_of_a_loss_whose_temperature_adapts():
    torch._dynamo.reset()
    loss_fn, logits = UnifiedLoss(V).eval(), make_logits()
    gradient = torch.func.grad(lambda x: loss_fn(x, torch.tensor(TARGETS)))
    torch.testing.assert_close(torch.compile(gradient, backend="aot_eager")(logits), gradient(logits))


# -- what users write to


@pytest.mark.parametrize("name", FUNCTIONS)
def test_outputs_of_dense_logits_may_be_written_to(name):
    logits = make_logits(9).requires_grad_()
    expected = torch.autograd.grad(FUNCTIONS[name](logits).sum() / 4, logits)[0]
    value = FUNCTIONS[name](logits)
    value /= 4
    assert_bitwise_equal(torch.autograd.grad(value.sum(), logits)[0], expected)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        value = FUNCTIONS[name](logits)
        value *= 3
        (gradient,) = torch.autograd.grad(value.sum(), logits, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), logits)


@pytest.mark.parametrize("name", OF_LINEAR_LOGITS)
def test_outputs_of_linear_logits_may_be_written_to(name):
    head = make_head(10)
    expected = torch.autograd.grad(OF_LINEAR_LOGITS[name](head).sum() / 4, list(head))
    value = OF_LINEAR_LOGITS[name](head)
    value /= 4
    torch.testing.assert_close(torch.autograd.grad(value.sum(), list(head)), expected, rtol=1e-14, atol=1e-16)
    for part in head:
        value = OF_LINEAR_LOGITS[name](head)
        value *= 3
        (gradient,) = torch.autograd.grad(value.sum(), part, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            torch.autograd.grad(gradient.square().sum(), part)


@pytest.mark.parametrize("kind", ["dense", "linear"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_statistic_that_is_written_to_leaves_the_others_alone(kind, is_compiled):
    """Also those that something has saved for its own backward."""
    head = make_head(11)
    logits = F.linear(*head).detach().requires_grad_() if kind == "dense" else head
    leaves = [logits] if kind == "dense" else list(head)

    def statistics(*parts):
        logits = parts[0] if kind == "dense" else LinearLogits(*parts)
        return tuple(softmax_statistics(logits, torch.tensor(TARGETS).clamp(min=-1).unsqueeze(-1)))

    def total(values):
        return sum(value.square().sum() for value in values)

    function = torch.compile(statistics, fullgraph=True, backend="aot_eager") if is_compiled else statistics
    expected = torch.autograd.grad(total(statistics(*leaves)) + 3 * statistics(*leaves)[1].sum(), leaves)
    values = function(*leaves)
    squares = total(values)
    clones = [value.clone() for value in values]
    changed = function(*leaves)
    squares_of_others = total(value for value in changed if value is not changed[1]) + total([clones[1]])
    changed[1].mul_(3)
    for value, clone in zip(changed, clones, strict=True):
        assert_bitwise_equal(value.detach(), clone.detach() * (3 if value is changed[1] else 1))
    gradients = torch.autograd.grad(squares_of_others + changed[1].sum(), leaves)
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)
    assert squares == total(clones)


def test_a_fused_loss_divided_in_place_as_trainers_do():
    head = make_head(12)
    loss = row_loss(head, torch.tensor(TARGETS), row_options(head.weight), reduction="sum").loss
    loss /= 3
    loss.backward()
    exact = make_head(12)
    F.cross_entropy(F.linear(*exact), torch.tensor(TARGETS)).backward()
    torch.testing.assert_close([part.grad for part in head], [part.grad for part in exact])


# -- nan and infinity from above


WAYS = {
    "fused": (torch.float32, {}),
    "split": (torch.float16, {}),
    "in place": (torch.float32, {"inplace_gradient": True}),
    "float64": (torch.float64, {}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("ignore_index", [-100, 4])
def test_what_comes_from_above_stays_out_of_ignored_rows(way, bad, ignore_index):
    dtype, keywords = WAYS[way]
    targets = torch.tensor([3, ignore_index, 7, 10])
    leaf = make_logits(13, dtype).requires_grad_()
    upstream = torch.tensor([1.0, bad, -2.0, bad], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    rows = row_loss(leaf * 1, targets, row_options(leaf), ignore_index=ignore_index, **keywords).loss
    (gradient,) = torch.autograd.grad(rows, leaf, upstream)
    exact = make_logits(13, dtype).double().requires_grad_()
    rows = F.cross_entropy(exact, targets, ignore_index=ignore_index, reduction="none")
    (expected,) = torch.autograd.grad(rows, exact, upstream.double())
    assert not gradient[1].any() and not gradient[3].isfinite().any()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient[:3].double(), expected[:3], rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: cross_entropy(x),
        lambda x: token_log_probs(x, torch.tensor(TARGETS))[0],
        lambda x: sum(softmax_statistics(x, None, row_mask=torch.tensor(TARGETS) >= 0)[1:]),
    ],
)
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("kind", ["dense", "linear"])
def test_the_same_of_every_function(loss, is_compiled, kind):
    head = make_head(14)
    upstream = torch.tensor([1.0, math.nan, -2.0, 0.5], dtype=torch.float64)
    function = torch.compile(loss, fullgraph=True, backend="aot_eager") if is_compiled else loss
    leaves = [head.hidden_states] if kind == "linear" else [F.linear(*head).detach().requires_grad_()]

    def gradients(function, upstream):
        logits = LinearLogits(leaves[0], *head[1:]) if kind == "linear" else leaves[0]
        parts = [leaves[0]] if kind == "dense" else list(head)
        return torch.autograd.grad(function(logits), parts, upstream)

    got, expected = gradients(function, upstream), gradients(loss, upstream.nan_to_num(0.0))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    assert not got[0][1].any()


@pytest.mark.parametrize("kept", [False, True])
def test_a_sum_that_is_nan_leaves_ignored_hidden_states_alone(kept):
    head = make_head(15)
    loss = row_loss(head, torch.tensor(TARGETS), row_options(head.weight), reduction="sum").loss
    gradients = torch.autograd.grad(loss * math.nan, list(head), retain_graph=kept)
    exact = make_head(15)
    expected = torch.autograd.grad(
        F.cross_entropy(F.linear(*exact), torch.tensor(TARGETS), reduction="sum") * math.nan, list(exact)
    )
    torch.testing.assert_close(gradients, expected, equal_nan=True)
    assert not gradients[0][1].any() and gradients[0][0].isnan().all()


def test_under_torch_func_too():
    logits = make_logits(16)
    _, vjp = torch.func.vjp(cross_entropy, logits)
    assert not vjp(torch.tensor([1.0, math.nan, 1.0, 1.0]).double())[0][1].any()
    tangent = make_logits(17)
    tangent[1] = math.nan
    assert torch.func.jvp(cross_entropy, (logits,), (tangent,))[1][1] == 0
