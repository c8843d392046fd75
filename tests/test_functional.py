"""The functions with torch.nn.functional's signatures: against those, and the row terms as keywords."""

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.strategies import HIDDEN_SIZE, Numbers

from ava_ext import LinearLogits, UnifiedLoss
from ava_ext.functional import cross_entropy, linear_cross_entropy

V = 13
ROW_TERMS = {
    "z_loss_weight": 0.1, "confidence_penalty_weight": 0.2, "use_focal_loss": True, "focal_gamma": 1.5,
    "logit_softcap": 5.0, "logit_scale": 1.6, "initial_temperature": 0.7, "smoothing_mode": "exclude_target",
}  # fmt: skip


def head(numbers, n_rows):
    return numbers.leaf(n_rows, HIDDEN_SIZE), numbers.leaf(V, HIDDEN_SIZE), numbers.leaf(V)


# -- torch's own


def test_signatures_begin_as_those_of_torch():
    pairs = [(cross_entropy, F.cross_entropy)]
    if hasattr(F, "linear_cross_entropy"):  # since torch 2.13
        pairs.append((linear_cross_entropy, F.linear_cross_entropy))
    for ours, theirs in pairs:
        expected = [p for p in inspect.signature(theirs).parameters.values() if p.name != "options"]
        got = list(inspect.signature(ours).parameters.values())[: len(expected)]
        assert [(p.name, p.kind, p.default) for p in got] == [(p.name, p.kind, p.default) for p in expected]


# a row alone, rows, and images, whose classes are the second dimension
@pytest.mark.parametrize("shape", [(V,), (7, V), (2, V, 3), (2, V, 3, 2)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_is_that_of_torch(reduction, shape):
    numbers = Numbers(3)
    logits = numbers.leaf(*shape)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    targets = numbers.integers(0, V, *rows)
    if rows:
        targets = targets.masked_fill(numbers.true(0.3, *rows), 4)
    keywords = {"reduction": reduction, "ignore_index": 4, "label_smoothing": 0.1}
    got, want = cross_entropy(logits, targets, **keywords), F.cross_entropy(logits, targets, **keywords)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)
    upstream = numbers.normal(*want.shape)
    gradients = (torch.autograd.grad(value, logits, upstream)[0] for value in (got, want))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("shape", [(V,), (7, V), (2, V, 3), (2, V, 3, 2)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_probabilities_and_smoothed_classes_are_those_of_torch(reduction, with_weight, label_smoothing, shape):
    numbers = Numbers(5)
    logits, probabilities = numbers.leaf(*shape), numbers.uniform(*shape).requires_grad_()
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    indices = numbers.integers(0, V, *rows)
    keywords = {"reduction": reduction, "label_smoothing": label_smoothing}
    keywords["weight"] = numbers.uniform(V) if with_weight else None
    for targets, leaves in ((probabilities, (logits, probabilities)), (indices, (logits,))):
        if targets is indices and rows:
            keywords["ignore_index"] = int(indices.flatten()[0])
        got, want = cross_entropy(logits, targets, **keywords), F.cross_entropy(logits, targets, **keywords)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        upstream = numbers.normal(*want.shape)
        gradients = (torch.autograd.grad(value, leaves, upstream) for value in (got, want))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


def test_weights_of_integers_are_those_of_floats():
    numbers, weight = Numbers(7), torch.arange(V)
    logits, indices, q = numbers.normal(6, V), numbers.integers(0, V, 6), numbers.uniform(6, V)
    for targets in (indices, q):
        for keywords in ({}, {"label_smoothing": 0.2}):
            want = F.cross_entropy(logits, targets, weight.double(), **keywords)
            torch.testing.assert_close(cross_entropy(logits, targets, weight, **keywords), want, rtol=1e-12, atol=0)


def test_probabilities_take_the_mode_of_a_smoothing_that_is_off():
    logits, q = Numbers(8).normal(6, V), Numbers(9).uniform(6, V)
    got = cross_entropy(logits, q, smoothing_mode="exclude_target")
    torch.testing.assert_close(got, F.cross_entropy(logits, q), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_probabilities_of_lower_precision(label_smoothing, dtype):
    numbers = Numbers(6)
    states, weight = numbers.normal(9, HIDDEN_SIZE).to(dtype), numbers.normal(V, HIDDEN_SIZE).to(dtype)
    for type_of_q in (dtype, torch.float32, torch.float64):
        q, weights = numbers.uniform(9, V).to(type_of_q), numbers.uniform(V)
        logits = F.linear(states, weight)
        for keywords in ({}, {"weight": weights}):
            keywords["label_smoothing"] = label_smoothing
            want = F.cross_entropy(logits.double(), q.double(), **keywords)
            for got in (cross_entropy(logits, q, **keywords), linear_cross_entropy(states, weight, q, **keywords)):
                torch.testing.assert_close(got.double(), want, rtol=4e-6, atol=0)


def test_probabilities_of_less_precision_than_logits():
    numbers = Numbers(6)
    states, head, weight = numbers.normal(9, HIDDEN_SIZE), numbers.normal(V, HIDDEN_SIZE), numbers.uniform(V)
    q, logits = numbers.uniform(9, V).float(), states @ head.T
    want = F.cross_entropy(logits, q.double(), weight)
    for got in (cross_entropy(logits, q, weight), linear_cross_entropy(states, head, q, weight=weight)):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


# beside weights, and whether the columns of padding are known by vocab_size or by their logits
@pytest.mark.parametrize("known_by", ["vocab_size", "logits", "both"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("function", ["cross_entropy", "linear_cross_entropy"])
def test_weighted_probabilities_are_smoothed_over_the_real_columns(function, reduction, label_smoothing, known_by):
    numbers, size = Numbers(8), V - 3
    states, head_weight, bias = leaves = head(numbers, 5)
    probabilities = numbers.uniform(5, V)
    keywords = {"reduction": reduction, "label_smoothing": label_smoothing}
    options = {**keywords, "weight": numbers.uniform(V)}
    offsets = bias
    if known_by != "vocab_size":  # also one column in the middle
        masked = torch.arange(V) >= size
        masked[2] = True
        offsets, probabilities = bias.masked_fill(masked, -torch.inf), probabilities.masked_fill(masked, 0)
    if known_by != "logits":
        options["vocab_size"] = size
    kept = [column for column in range(size) if column != 2 or known_by == "vocab_size"]
    probabilities.requires_grad_()
    logits = F.linear(states, head_weight, offsets)
    want = F.cross_entropy(logits[:, kept], probabilities[:, kept], options["weight"][kept], **keywords)
    if function == "cross_entropy":
        got = cross_entropy(logits, probabilities, **options)
    else:
        got = linear_cross_entropy(states, head_weight, probabilities, linear_bias=offsets, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    upstream = numbers.normal(*want.shape)
    wanted = (*leaves, probabilities)
    gradients = (torch.autograd.grad(value, wanted, upstream, retain_graph=True) for value in (got, want))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


def test_weighted_probabilities_take_each_rows_own_columns():
    numbers = Numbers(10)
    probabilities, weight = numbers.uniform(6, V), numbers.uniform(V)
    masked = numbers.true(0.3, 6, V)
    logits = numbers.normal(6, V).masked_fill(masked, -torch.inf).requires_grad_()
    probabilities = probabilities.masked_fill(masked, 0).requires_grad_()
    got = cross_entropy(logits, probabilities, weight, reduction="none", label_smoothing=0.3)
    want = torch.stack(
        [
            F.cross_entropy(row[columns], q[columns], weight[columns], label_smoothing=0.3)
            for row, q, columns in zip(logits, probabilities, ~masked, strict=True)
        ]
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    upstream = numbers.normal(6)
    gradients = (torch.autograd.grad(value, (logits, probabilities), upstream) for value in (got, want))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("flags", [(True, True), (False, True), (False, False), (None, False)])
def test_deprecated_reductions_are_those_of_torch(flags):
    logits, targets = Numbers(4).normal(6, V), torch.arange(6)
    size_average, reduce = flags
    got = cross_entropy(logits, targets, size_average=size_average, reduce=reduce)
    torch.testing.assert_close(got, F.cross_entropy(logits, targets, size_average=size_average, reduce=reduce))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_is_that_of_torch(reduction):
    numbers = Numbers(16)
    states, weight, bias = leaves = head(numbers, 7)
    targets = numbers.integers(0, V, 7).masked_fill(numbers.true(0.3, 7), -1)
    keywords = {"reduction": reduction, "ignore_index": -1, "label_smoothing": 0.1}
    got = linear_cross_entropy(states, weight, targets, linear_bias=bias, **keywords)
    want = F.cross_entropy(F.linear(*leaves), targets, **keywords)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    upstream = numbers.normal(*want.shape)
    gradients = (torch.autograd.grad(value, leaves, upstream) for value in (got, want))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)
    loss_fn = UnifiedLoss(V, primary_loss_type="standard", ignore_index=-1)
    arguments = {"targets": targets, "hidden_states": states, "lm_head_weight": weight}
    assert loss_fn(**arguments, return_detailed=True)["n_tokens"] == (targets != -1).sum()


def test_no_counted_row_gives_zero():
    logits = Numbers(5).leaf(4, V)
    loss = cross_entropy(logits, torch.full((4,), -100))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


# -- the terms of a row


def test_row_terms_are_those_of_unified_loss():
    numbers = Numbers(6)
    states, weight, bias = leaves = head(numbers, 9)
    targets = numbers.integers(0, V - 2, 9)
    options = {**ROW_TERMS, "vocab_size": V - 2}
    loss_fn = UnifiedLoss(primary_loss_type="standard", label_smoothing=0.1, **options)
    expected = loss_fn(F.linear(*leaves), targets)
    for got in (
        cross_entropy(F.linear(*leaves), targets, label_smoothing=0.1, **options),
        cross_entropy(LinearLogits(*leaves), targets, label_smoothing=0.1, **options),
        linear_cross_entropy(states, weight, targets, linear_bias=bias, label_smoothing=0.1, **options),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_two_calls_with_other_options_do_not_mix():
    (states, weight, _), targets = head(Numbers(17), 7), torch.arange(7)
    smoothed = linear_cross_entropy(states, weight, targets, label_smoothing=0.3, z_loss_weight=0.0)
    plain = linear_cross_entropy(states, weight, targets)
    logits = F.linear(states, weight)
    torch.testing.assert_close(plain, F.cross_entropy(logits, targets))
    torch.testing.assert_close(smoothed, F.cross_entropy(logits, targets, label_smoothing=0.3))


@pytest.mark.parametrize("make", [np.float64, np.float32, np.array, torch.tensor], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["z_loss_weight", "label_smoothing", "logit_softcap"])
def test_an_option_may_be_a_number_of_numpy_or_a_tensor(name, make):
    logits, targets = Numbers(18).normal(6, V), torch.arange(6)
    for number in (0.25, 0.5):
        got = cross_entropy(logits, targets, **{name: make(number)})
        assert got == cross_entropy(logits, targets, **{name: number})


@pytest.mark.parametrize("make", [np.int64, np.array, torch.tensor], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["vocab_size", "ignore_index"])
def test_an_option_may_be_an_integer_of_numpy_or_a_tensor(name, make):
    logits, targets = Numbers(18).normal(6, V), torch.arange(6)
    for number in (V - 1, 4) if name == "ignore_index" else (V, V - 2):
        got = cross_entropy(logits, targets, **{name: make(number)})
        assert got == cross_entropy(logits, targets, **{name: number})


def test_an_option_that_changes_in_place_is_read_at_every_call():
    (states, weight, _), targets = head(Numbers(18), 6), torch.arange(6)
    for value in (torch.tensor(0.25), np.array(0.25)):
        for number in (0.25, 0.5, 0.0):
            value[...] = number
            for name in ("z_loss_weight", "label_smoothing"):
                got = linear_cross_entropy(states, weight, targets, **{name: value})
                assert got == linear_cross_entropy(states, weight, targets, **{name: number})


def test_equal_values_of_other_types_are_checked_apart():
    logits, targets = Numbers(18).normal(6, V), torch.arange(6)
    cross_entropy(logits, targets, use_focal_loss=True, z_loss_weight=1)
    with pytest.raises(ValueError, match="expected use_focal_loss to be True or False, got 1"):
        cross_entropy(logits, targets, use_focal_loss=1, z_loss_weight=1)


def with_option(logits, targets, value):
    return cross_entropy(logits, targets, z_loss_weight=value, label_smoothing=value)


@pytest.mark.parametrize("make", [float, np.float64, np.array, torch.tensor], ids=lambda make: make.__name__)
def test_a_compiled_function_does_not_keep_an_old_option(make):
    logits, targets = Numbers(18).normal(6, V), torch.arange(6)
    torch._dynamo.reset()
    compiled = torch.compile(with_option, backend="eager")
    for number in (0.25, 0.5, 0.125):
        assert compiled(logits, targets, make(number)) == with_option(logits, targets, number)


@pytest.mark.parametrize("make", [np.float64, np.array, torch.tensor], ids=lambda make: make.__name__)
def test_an_option_that_would_break_a_graph_is_named(make):
    torch._dynamo.reset()
    compiled = torch.compile(with_option, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="expected z_loss_weight to be a number of Python"):
        compiled(Numbers(18).normal(6, V), torch.arange(6), make(0.25))


@pytest.mark.parametrize("kind", ["indices", "probabilities", "classes", "padding"])
@pytest.mark.parametrize("function", ["cross_entropy", "linear_cross_entropy"])
def test_compiles_without_a_graph_break(function, kind):
    (states, weight, _), targets = head(Numbers(9), 8), Numbers(9).integers(0, V - 1, 8)
    if kind == "probabilities":
        targets = Numbers(9).uniform(8, V)
    options = {"label_smoothing": 0.1, "z_loss_weight": 0.1}
    if kind == "classes":
        options["weight"] = Numbers(9).uniform(V)
    if kind == "padding":
        options |= {"vocab_size": V - 1, "linear_chunk_bytes": 200}

    def loss(states, weight):
        if function == "cross_entropy":
            return cross_entropy(F.linear(states, weight), targets, **options)
        return linear_cross_entropy(states, weight, targets, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(states, weight)
    torch.testing.assert_close(compiled, loss(states, weight), rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(value, (states, weight)) for value in (compiled, loss(states, weight)))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["indices", "probabilities", "classes"])
def test_compiles_with_symbols_of_sizes_and_numbers(kind):
    """dynamic=True makes symbols of the numbers too; without it, which is tried once, so does their second value."""
    targets = Numbers(9).uniform(8, V).softmax(-1) if kind == "probabilities" else Numbers(9).integers(0, V, 8)
    ignored = {} if kind == "probabilities" else {"ignore_index": 3}

    def loss(logits, number):
        classes = torch.ones(V, dtype=torch.float64) if kind == "classes" else None
        keywords = {"label_smoothing": number, "z_loss_weight": number, **ignored}
        return cross_entropy(logits, targets, classes, **keywords) + cross_entropy(logits, targets, classes)

    logits = Numbers(18).normal(8, V)
    for dynamic in (None, True) if kind == "indices" else (True,):
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for number in (0.125, 0.25, 0.0):
            torch.testing.assert_close(compiled(logits, number), loss(logits, number), rtol=1e-12, atol=0)


# -- bad input


def test_bad_input_is_named():
    (states, weight, _), targets = head(Numbers(19), 6), torch.arange(6)
    logits = F.linear(states, weight)
    for error, message, keywords in (
        (ValueError, "linear_cross_entropy: use_mtp needs a module", {"use_mtp": True}),
        (ValueError, "primary_loss_type needs a module", {"primary_loss_type": "deepseek"}),
        (TypeError, "unknown option 'class_weights'; did you mean 'weight'", {"class_weights": torch.ones(7)}),
        (TypeError, "unknown option 'zloss_weight'; did you mean 'z_loss_weight'", {"zloss_weight": 0.1}),
        (ValueError, r"expected z_loss_weight to be a number >= 0 .*, got -1", {"z_loss_weight": -1}),
        (
            ValueError,
            r"expected reduction to be one of \('mean', 'sum', 'none'\), got 'average'",
            {"reduction": "average"},
        ),
        (ValueError, r"expected weight of shape \[13\], got \[12\]", {"weight": torch.ones(V - 1)}),
        (ValueError, r"expected z_loss_weight to be a number >= 0 .*, got {}", {"z_loss_weight": {}}),
        (ValueError, r"expected z_loss_weight to be a number >= 0 .*, got \(0.1,\)", {"z_loss_weight": [0.1]}),
        (ValueError, "expected label_smoothing to be a number", {"label_smoothing": "0.1"}),
        (TypeError, r"linear_cross_entropy: expected ignore_index to be an integer, got 1\.5", {"ignore_index": 1.5}),
        (ValueError, "^linear_cross_entropy: expected label_smoothing .*, got 2", {"label_smoothing": 2}),
        (ValueError, "^linear_cross_entropy: expected focal_gamma to be .*, got -1", {"focal_gamma": -1}),
        (
            ValueError,
            "linear_cross_entropy: expected z_loss_weight without requires_grad",
            {"z_loss_weight": torch.tensor(0.1, requires_grad=True)},
        ),
        (
            ValueError,
            "linear_cross_entropy: expected label_smoothing to be a number of Python, or a tensor on the CPU, got one "
            "on meta",
            {"label_smoothing": torch.tensor(0.1, device="meta")},
        ),
        (ValueError, "expected weight of real numbers", {"weight": torch.ones(V, dtype=torch.complex64)}),
        (ValueError, "expected weight without requires_grad", {"weight": torch.ones(V, requires_grad=True)}),
    ):
        with pytest.raises(error, match=message):
            linear_cross_entropy(states, weight, targets, **keywords)
    with pytest.raises(ValueError, match=r"cross_entropy: expected target of shape \[6\], got \[5\]"):
        cross_entropy(logits, targets[:5])
    q = logits.detach().softmax(-1)
    for message, keywords in (
        ("expected no ignore_index beside probabilities as target, got 4", {"ignore_index": 4}),
        ("use_focal_loss needs one target for each row, got probabilities", {"use_focal_loss": True}),
        ("token_reweighting needs one target for each row", {"token_reweighting": "dft"}),
        (
            "'exclude_target' needs one target for each row",
            {"label_smoothing": 0.1, "smoothing_mode": "exclude_target"},
        ),
    ):
        with pytest.raises(ValueError, match=message):
            cross_entropy(logits, q, **keywords)
    with pytest.raises(ValueError, match=r"expected probabilities as target of shape \[6, 13\], got \[6, 12\]"):
        cross_entropy(logits, q[:, 1:])
    for bad in (targets > 0, targets.to(torch.complex64)):
        for loss, given in ((cross_entropy, (logits,)), (linear_cross_entropy, (states, weight))):
            with pytest.raises(ValueError, match=f"^{loss.__name__}: expected target to be integers"):
                loss(*given, bad)
    for function, arguments, message in (
        (cross_entropy, ([1.0], targets), "input to be a torch.Tensor or LinearLogits, got list"),
        (cross_entropy, (logits, [1]), "target to be a torch.Tensor, got list"),
        (cross_entropy, (LinearLogits(states, None), targets), "weight to be a torch.Tensor, got NoneType"),
        (linear_cross_entropy, ([1.0], weight, targets), "input to be a torch.Tensor, got list"),
        (linear_cross_entropy, (states, torch.nn.Linear(5, V), targets), "linear_weight to be a torch.Tensor, got to"),
    ):
        with pytest.raises(TypeError, match=f"^{function.__name__}: expected {message}"):
            function(*arguments)
    with pytest.raises(IndexError, match="got 13 at position 5"):
        cross_entropy(logits, torch.tensor([0, 1, 2, 3, 4, 13]))
