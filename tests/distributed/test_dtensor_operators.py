"""The functions of ava_ext.ops, and the operators themselves, called by hand with DTensors: each rank runs them on its
rows, the columns of several ranks go the vocabulary-parallel way, and no logits are gathered."""

import contextlib
import itertools

import pytest
import torch
from support.processes import on_ranks
from torch.nn import functional as F

from ava_ext import LinearLogits, SequenceUnlikelihoodLoss, functional
from ava_ext.ops import (
    Candidates,
    RowFlags,
    repeated_ngram_mask,
    repetition_candidates,
    repetition_weights,
    router_statistics,
    row_loss,
    row_options,
    softmax_statistics,
    token_log_probs,
    token_metrics,
)

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.distributed.tensor.parallel import loss_parallel

    from ava_ext.distributed.operator_rules import ROW_OPERATORS, WITHOUT_RULE

# odd sizes: no dimension is cut into equal parts
BATCH_SIZE, N_TOKENS, V, H, N_EXPERTS = 3, 5, 7, 4, 3
PLACES = [None, 0, 1, 2]  # which dimension of [batch_size, n_tokens, n_columns] is spread; None: Replicate
FLAGS = int(RowFlags.CROSS_ENTROPY | RowFlags.LABEL_SMOOTHING | RowFlags.Z_LOSS | RowFlags.ENTROPY)
OPTIONS = {"label_smoothing": 0.1, "z_loss_weight": 0.2}
close = {"rtol": 1e-12, "atol": 1e-12}


def inputs():
    generator = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows = (BATCH_SIZE, N_TOKENS)
    targets = torch.randint(V, rows, generator=generator)
    targets[1, 1:4] = -100
    return {
        "logits": normal(*rows, V),
        "hidden_states": normal(*rows, H),
        "weight": normal(V, H),
        "targets": targets,
        "row_weights": normal(*rows).abs(),
        "ids": torch.randint(-1, V, (*rows, 2), generator=generator, dtype=torch.int32),
        "id_weights": normal(*rows, 2).abs(),
        "upstream": normal(*rows),
    }


def placed(dimension):
    return [Replicate() if dimension is None else Shard(dimension)]


def of_rows(dimension):
    """The placements of what is aligned with the rows of logits placed there."""
    return placed(None if dimension == 2 else dimension)


def whole(value):
    return value.detach().full_tensor() if isinstance(value, DTensor) else value.detach()


def as_whole(values):
    return [whole(value) for value in values]


# a loss of each function: (values, a scalar to differentiate)


def rows_of_loss(logits, given):
    candidates = Candidates(given["ids"], given["id_weights"], (2,))
    loss, terms = row_loss(
        logits,
        given["targets"],
        row_options(torch.empty(0, dtype=torch.float64), **OPTIONS),
        flags=FLAGS,
        row_weights=given["row_weights"],
        candidates=candidates,
    )
    upstream = given["upstream"].full_tensor() if isinstance(given["upstream"], DTensor) else given["upstream"]
    return [loss, terms], (loss * upstream).sum()


def statistics_of_loss(logits, given):
    statistics = softmax_statistics(logits, given["ids"], row_mask=given["targets"] != -100, temperature=0.7)
    upstream = given["upstream"]
    if not isinstance(statistics.lse, DTensor) and isinstance(upstream, DTensor):
        upstream = upstream.full_tensor()
    loss = (statistics.log_probs.sum(-1) + statistics.entropy * statistics.lse + statistics.mean_log_prob) * upstream
    return list(statistics), loss.sum()


def policy_loss(logits, given):
    log_probs, entropy = token_log_probs(logits, given["targets"])
    upstream = given["upstream"]
    if not isinstance(log_probs, DTensor) and isinstance(upstream, DTensor):
        upstream = upstream.full_tensor()
    return [log_probs, entropy], (log_probs.exp() * upstream + entropy).sum()


LOSSES = {"row_loss": rows_of_loss, "softmax_statistics": statistics_of_loss, "token_log_probs": policy_loss}


def run_function(name, dimension, others_are_spread, mesh):
    given = inputs()
    leaf = distribute_tensor(given["logits"], mesh, placed(dimension)).detach().requires_grad_()
    others = ["targets", "row_weights", "ids", "id_weights", "upstream"] if others_are_spread else []
    if dimension in (0, 1) and name != "row_loss":
        others = others or ["upstream"]  # torch's own product of DTensors wants DTensors
    given |= {other: distribute_tensor(given[other], mesh, of_rows(dimension)) for other in others}
    with CommDebugMode() as communication:
        values, loss = LOSSES[name](leaf, given)
        n_forward = communication.get_total_counts()
        loss.backward()
    n_all = communication.get_total_counts()
    return as_whole(values), leaf.grad.full_tensor(), (n_forward, n_all)


CALLS = list(itertools.product([False, True], [False, True]))  # others are DTensors, within loss_parallel()


def function_worker(rank, name, dimension):
    mesh, found = init_device_mesh("cpu", (2,)), []
    for others_are_spread, in_loss_parallel in CALLS:
        with loss_parallel() if in_loss_parallel else contextlib.nullcontext():
            found.append(run_function(name, dimension, others_are_spread, mesh))
    return found


@pytest.mark.parametrize("dimension", PLACES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_function_of_logits(name, dimension):
    given = inputs()
    leaf = given["logits"].requires_grad_()
    expected, loss = LOSSES[name](leaf, given)
    loss.backward()
    ranks = on_ranks(2, function_worker, name, dimension)
    for (others_are_spread, _), found in zip(CALLS, zip(*ranks, strict=True), strict=True):
        for values, gradient, (n_forward, n_all) in found:
            torch.testing.assert_close(gradient, leaf.grad, **close)
            if not others_are_spread and dimension == 2:  # a few numbers of each row, once
                assert (n_forward, n_all) == (1, 1)
            if not others_are_spread and dimension != 2:
                assert n_forward == 0
            if name != "row_loss" or dimension not in (0, 1):
                torch.testing.assert_close(values, as_whole(expected), **close)
        if name == "row_loss" and dimension in (0, 1):  # a rank's share, and zeros beside it
            shares = [sum(values[index] for values, *_ in found) for index in range(2)]
            torch.testing.assert_close(shares, as_whole(expected), **close)


def head_worker(rank, name, dimension, of_weight):
    mesh, given = init_device_mesh("cpu", (2,)), inputs()
    states = distribute_tensor(given["hidden_states"], mesh, placed(dimension)).detach().requires_grad_()
    weight = distribute_tensor(given["weight"], mesh, placed(of_weight)).detach().requires_grad_()
    if dimension is not None and of_weight is None and name != "row_loss":
        given["upstream"] = distribute_tensor(given["upstream"], mesh, placed(dimension))
    values, loss = LOSSES[name](LinearLogits(states, weight), given)
    loss.backward()
    return as_whole(values), states.grad.full_tensor(), weight.grad.full_tensor()


@pytest.mark.parametrize(("dimension", "of_weight"), [(None, None), (0, None), (1, None), (None, 0), (1, 0)])
@pytest.mark.parametrize("name", LOSSES)
def test_a_function_of_hidden_states(name, dimension, of_weight):
    given = inputs()
    states, weight = (given[part].requires_grad_() for part in ("hidden_states", "weight"))
    expected, loss = LOSSES[name](LinearLogits(states, weight), given)
    loss.backward()
    for values, of_states, of_head in on_ranks(2, head_worker, name, dimension, of_weight):
        torch.testing.assert_close((of_states, of_head), (states.grad, weight.grad), **close)
        if name != "row_loss":
            torch.testing.assert_close(values, as_whole(expected), **close)


def metrics_worker(rank, dimension):
    mesh, given = init_device_mesh("cpu", (2,)), inputs()
    weight = distribute_tensor(given["weight"], mesh, [Replicate()])
    logits, states = (distribute_tensor(given[name], mesh, placed(dimension)) for name in ("logits", "hidden_states"))
    targets = distribute_tensor(given["targets"], mesh, placed(dimension))
    calls = (logits, given["targets"]), (logits, targets), (LinearLogits(states, weight), given["targets"])
    found = [token_metrics(*call) for call in calls]
    assert all(isinstance(value, DTensor) == (dimension is not None) for metrics in found for value in metrics)
    return [as_whole(metrics) for metrics in found]


@pytest.mark.parametrize("dimension", [None, 0, 1])
def test_token_metrics(dimension):
    given = inputs()
    whole_calls = (given["logits"], given["logits"], LinearLogits(given["hidden_states"], given["weight"]))
    expected = [list(token_metrics(logits, given["targets"])) for logits in whole_calls]
    for found in on_ranks(2, metrics_worker, dimension):
        torch.testing.assert_close(found, expected, **close)


def column_weights_loss(logits, given, name):
    given = {key: value for key, value in given.items() if key in ("targets", "row_weights", name)}
    options = row_options(torch.empty(0, dtype=torch.float64), **OPTIONS)
    return row_loss(logits, given.pop("targets"), options, flags=FLAGS, reduction="sum", **given).loss


def column_weights(name):
    generator = torch.Generator().manual_seed(8)
    shape = (BATCH_SIZE, N_TOKENS, V) if name == "target_probabilities" else (V,)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def column_weights_worker(rank, name, dimension, is_linear):
    """Of each placement of the weights beside logits that are spread there: loss, gradient of the logits or states."""
    mesh, given, found = init_device_mesh("cpu", (2,)), inputs(), []
    for placement in [Replicate(), Shard(0), Shard(column_weights(name).dim() - 1)]:
        own = {name: distribute_tensor(column_weights(name), mesh, [placement])}
        source = given["hidden_states" if is_linear else "logits"]
        leaf = distribute_tensor(source, mesh, placed(dimension)).detach().requires_grad_()
        weight = distribute_tensor(given["weight"], mesh, placed(None))
        loss = column_weights_loss(LinearLogits(leaf, weight) if is_linear else leaf, given | own, name)
        loss.backward()
        found.append((loss.detach(), leaf.grad.full_tensor()))
    return found


@pytest.mark.parametrize("is_linear", [False, True])
@pytest.mark.parametrize("dimension", [None, 0, 1])
@pytest.mark.parametrize("name", ["target_probabilities", "smoothing_weights"])
def test_column_weights_that_are_a_dtensor(name, dimension, is_linear):
    given = inputs() | {name: column_weights(name)}
    leaf = given["hidden_states" if is_linear else "logits"].requires_grad_()
    expected = column_weights_loss(LinearLogits(leaf, given["weight"]) if is_linear else leaf, given, name)
    expected.backward()
    for of_ranks in zip(*on_ranks(2, column_weights_worker, name, dimension, is_linear), strict=True):
        losses, gradients = zip(*of_ranks, strict=True)
        torch.testing.assert_close(sum(losses) / (2 if dimension is None else 1), expected.detach(), **close)
        for gradient in gradients:
            torch.testing.assert_close(gradient, leaf.grad, **close)


def probability_gradient_worker(rank):
    mesh, given, name = init_device_mesh("cpu", (2,)), inputs(), "target_probabilities"
    logits, found = distribute_tensor(given["logits"], mesh, [Replicate()]), []
    for placement in [Replicate(), Shard(0), Shard(2)]:
        own = distribute_tensor(column_weights(name), mesh, [placement]).detach().requires_grad_()
        column_weights_loss(logits, given | {name: own}, name).backward()
        assert own.grad.placements == own.placements
        found.append(own.grad.full_tensor())
    return found


def test_the_gradient_of_probabilities_that_are_a_dtensor():
    given, name = inputs(), "target_probabilities"
    own = column_weights(name).requires_grad_()
    column_weights_loss(given["logits"], given | {name: own}, name).backward()
    for rank in on_ranks(2, probability_gradient_worker):
        for gradient in rank:
            torch.testing.assert_close(gradient, own.grad, **close)


def cross_entropy_worker(rank, dimension):
    mesh, given = init_device_mesh("cpu", (2,)), inputs()
    logits, targets = given["logits"].flatten(0, 1), given["targets"].flatten()
    leaf = distribute_tensor(logits, mesh, placed(dimension)).detach().requires_grad_()
    loss = functional.cross_entropy(leaf, targets, label_smoothing=0.1)
    loss.backward()
    return loss.detach(), leaf.grad.full_tensor()


@pytest.mark.parametrize("dimension", [None, 0, 1])
def test_cross_entropy(dimension):
    given = inputs()
    leaf = given["logits"].flatten(0, 1).requires_grad_()
    loss = F.cross_entropy(leaf, given["targets"].flatten(), label_smoothing=0.1)
    loss.backward()
    found = on_ranks(2, cross_entropy_worker, dimension)
    total = sum(rank[0] for rank in found) if dimension == 0 else found[1][0]
    torch.testing.assert_close(total, loss.detach(), **close)
    for _, gradient in found:
        torch.testing.assert_close(gradient, leaf.grad, **close)


def class_weights_worker(rank, probabilities):
    """Losses with weight and target in every mixture of DTensors and Tensors, and the gradient of the logits."""
    mesh, given, found = init_device_mesh("cpu", (2,)), inputs(), []
    logits, weight = given["logits"].flatten(0, 1), given["row_weights"].flatten()[:V]
    target = given["targets"].flatten() if probabilities is None else probabilities
    spread = distribute_tensor(target, mesh, [Shard(0)]), distribute_tensor(weight, mesh, [Replicate()])
    for of_target, of_weight in itertools.product((target, spread[0]), (weight, spread[1])):
        leaf = distribute_tensor(logits, mesh, [Shard(0)]).detach().requires_grad_()
        loss = functional.cross_entropy(leaf, of_target, weight=of_weight, label_smoothing=0.1)
        loss.backward()
        found.append((loss.detach(), leaf.grad.full_tensor()))
    return found


@pytest.mark.parametrize("with_probabilities", [False, True])
def test_cross_entropy_with_class_weights(with_probabilities):
    given = inputs()
    leaf, weight = given["logits"].flatten(0, 1).requires_grad_(), given["row_weights"].flatten()[:V]
    probabilities = given["logits"].flatten(0, 1).softmax(-1).detach() if with_probabilities else None
    target = given["targets"].flatten() if probabilities is None else probabilities
    loss = F.cross_entropy(leaf, target, weight, label_smoothing=0.1)
    loss.backward()
    for of_ranks in zip(*on_ranks(2, class_weights_worker, probabilities), strict=True):
        losses, gradients = zip(*of_ranks, strict=True)
        torch.testing.assert_close(sum(losses), loss.detach(), **close)
        for gradient in gradients:
            torch.testing.assert_close(gradient, leaf.grad, **close)


def unlikelihood_worker(rank, dimension):
    mesh, tokens = init_device_mesh("cpu", (2,)), texts()[0]
    logits = inputs()["logits"].repeat(2, 3, 1)[:5, :12, :4].contiguous()
    loss_fn = SequenceUnlikelihoodLoss(4, ngram_size=2)
    spread = [distribute_tensor(values, mesh, placed(dimension)) for values in (logits, tokens)]
    return loss_fn(*spread), loss_fn(logits, tokens)


@pytest.mark.parametrize("dimension", [None, 0])
def test_sequence_unlikelihood(dimension):
    ranks = on_ranks(2, unlikelihood_worker, dimension)
    losses, (expected, _) = zip(*ranks, strict=True)
    total = losses[0] if dimension is None else sum(losses)
    torch.testing.assert_close(total, expected, **close)


def texts():
    tokens = torch.randint(4, (5, 12), generator=torch.Generator().manual_seed(1))
    segments = torch.arange(12).div(7, rounding_mode="floor").unsqueeze(0)
    return tokens, tokens.roll(-1, 1), segments, tokens != 3


def searched(tokens, targets, segments, mask):
    options = {"vocab_size": 4, "weights": repetition_weights(torch.zeros(1).double()), "segments": segments}
    options |= {"use_ngram_penalty": True, "ngram_size": 2, "use_immediate_repetition_penalty": True}
    found = repetition_candidates(tokens, targets, **options)
    return [found.ids, found.weights, repeated_ngram_mask(tokens, 2, mask=mask, segments=segments)]


def texts_worker(rank, dimension, others_are_spread):
    mesh, (tokens, targets, segments, mask) = init_device_mesh("cpu", (2,)), texts()
    tokens = distribute_tensor(tokens, mesh, placed(dimension))
    if others_are_spread:
        targets, mask = (distribute_tensor(values, mesh, placed(dimension)) for values in (targets, mask))
        segments = distribute_tensor(segments, mesh, [Replicate()])
    found = searched(tokens, targets, segments, mask)
    assert all(isinstance(value, DTensor) == (dimension == 0) for value in found)
    # and on to the loss, of logits spread in the same way
    given = inputs()
    logits = distribute_tensor(given["logits"].repeat(2, 3, 1)[:5, :12, :4].contiguous(), mesh, placed(dimension))
    loss = row_loss(logits, targets, row_options(logits), candidates=Candidates(found[0], found[1], (1, 8)))
    return as_whole(found), loss.loss


@pytest.mark.parametrize("others_are_spread", [False, True])
@pytest.mark.parametrize("dimension", [None, 0])
def test_functions_of_texts(dimension, others_are_spread):
    tokens, targets, segments, mask = texts()
    expected = searched(tokens, targets, segments, mask)
    assert (expected[0] >= 0).any() and expected[2].any()
    logits = inputs()["logits"].repeat(2, 3, 1)[:5, :12, :4]
    candidates = Candidates(expected[0], expected[1], (1, 8))
    loss = row_loss(logits.contiguous(), targets, row_options(logits), candidates=candidates).loss
    found = on_ranks(2, texts_worker, dimension, others_are_spread)
    for values, _ in found:
        torch.testing.assert_close(values, expected)
    total = found[0][1] + found[1][1] if dimension == 0 else found[0][1]
    torch.testing.assert_close(total, loss)


def router_inputs():
    generator = torch.Generator().manual_seed(2)
    rows = (2, BATCH_SIZE, N_TOKENS)  # two layers
    logits = torch.randn((*rows, N_EXPERTS), generator=generator, dtype=torch.float64)
    indices = torch.randint(N_EXPERTS, (2, BATCH_SIZE * N_TOKENS, 2), generator=generator)
    mask = torch.rand(BATCH_SIZE * N_TOKENS, generator=generator) > 0.3
    return logits, indices, mask


def balanced(logits, indices, mask):
    statistics = router_statistics(logits, indices, mask, k=2)
    n_rows = statistics.n_rows.unsqueeze(-1)
    loss = (statistics.counts * statistics.probability_sum / n_rows.square()).sum()
    return statistics, loss + (statistics.lse_squared_sum / statistics.n_rows).sum() - statistics.entropy_sum.sum()


ROUTER_CALLS = list(itertools.product([False, True], [False, True]))  # indices are given, they and the mask DTensors


def router_worker(rank, dimension):
    mesh, found = init_device_mesh("cpu", (2,)), []
    for has_indices, others_are_spread in ROUTER_CALLS:
        logits, indices, mask = router_inputs()
        leaf = distribute_tensor(logits, mesh, placed(dimension)).detach().requires_grad_()
        if others_are_spread:
            indices, mask = distribute_tensor(indices, mesh, [Shard(1)]), distribute_tensor(mask, mesh, [Shard(0)])
        statistics, loss = balanced(leaf, indices if has_indices else None, mask)
        assert all(isinstance(value, DTensor) == (dimension is not None) for value in statistics)
        loss.backward()
        found.append((as_whole(statistics), whole(loss), leaf.grad.full_tensor()))
    return found


@pytest.mark.parametrize("dimension", [None, 1, 2])
def test_a_router(dimension):
    logits, indices, mask = router_inputs()
    expected = []
    for has_indices, _ in ROUTER_CALLS:
        leaf = logits.clone().requires_grad_()
        statistics, loss = balanced(leaf, indices if has_indices else None, mask)
        loss.backward()
        expected.append((as_whole(statistics), loss.detach(), leaf.grad))
    for found in on_ranks(2, router_worker, dimension):
        torch.testing.assert_close(found, expected, **close)


# the operators themselves


def raw_loss(ops, given, make):
    options = make(row_options(torch.empty(0, dtype=torch.float64), **OPTIONS))
    constants = ([2], FLAGS, V, -100)
    names = ("targets", "row_weights", "ids", "id_weights")
    arguments = (given["targets"], options, *(given[name] for name in names[1:]), *constants)
    split = ops.row_loss(given["logits"], *arguments, False, True)
    fused = ops.row_loss(given["logits"] * 2, *arguments, True, False)
    measured = ops.row_statistics(given["logits"], given["ids"], given["targets"] != -100, options, FLAGS, V)
    values = [*split[:2], *split[3:], *fused[:3], *measured]
    loss = split[0].sum() + fused[0].square().sum() + measured[1].sum() + (measured[2] * measured[2]).sum()
    return values, loss


def raw_linear_loss(ops, given, make):
    options = make(row_options(torch.empty(0, dtype=torch.float64), **OPTIONS))
    states, targets, ids = (given[name] for name in ("hidden_states", "targets", "ids"))
    arguments = (states, given["weight"], None, targets, options, None, None, None, None, FLAGS, V, -100, 100)
    total, _, terms, *_ = ops.linear_row_loss(*arguments, torch.float64, None, [True, True, False])
    measured = ops.linear_row_statistics(
        states, given["weight"], None, ids, targets != -100, options, FLAGS, V, 100, torch.float64, None
    )
    return [total, terms, *measured[:-1]], total + measured[1].sum() + measured[2].square().sum()


RAW = {"rows": (raw_loss, ["logits"]), "linear": (raw_linear_loss, ["hidden_states", "weight"])}


def raw_inputs(name):
    given = inputs()
    if name == "linear":  # of rows in one dimension
        given = {key: value if key == "weight" else value.flatten(0, 1) for key, value in given.items()}
    return given


def raw_worker(rank, name, dimension):
    mesh, given = init_device_mesh("cpu", (2,)), raw_inputs(name)
    function, leaves = RAW[name]
    spread = {
        key: distribute_tensor(value, mesh, placed(None if key == "weight" else dimension)).detach()
        for key, value in given.items()
    }
    for leaf in leaves:
        spread[leaf].requires_grad_()
    values, loss = function(torch.ops.ava_ext, spread, lambda options: distribute_tensor(options, mesh, [Replicate()]))
    assert all(isinstance(value, DTensor) for value in values)
    loss.backward()
    return as_whole(values), [spread[leaf].grad.full_tensor() for leaf in leaves]


@pytest.mark.parametrize(
    ("name", "dimension"), [("rows", None), ("rows", 0), ("rows", 1), ("linear", None), ("linear", 0)]
)
def test_operators(name, dimension):
    function, leaves = RAW[name]
    given = raw_inputs(name)
    for leaf in leaves:
        given[leaf].requires_grad_()
    values, loss = function(torch.ops.ava_ext, given, lambda options: options)
    loss.backward()
    for found, gradients in on_ranks(2, raw_worker, name, dimension):
        torch.testing.assert_close(found, as_whole(values), **close)
        torch.testing.assert_close(gradients, [given[leaf].grad for leaf in leaves], **close)


def raw_router_worker(rank):
    mesh, (logits, _, mask) = init_device_mesh("cpu", (2,)), router_inputs()
    leaf = distribute_tensor(logits.flatten(1, 2), mesh, [Shard(1)]).detach().requires_grad_()
    spread_mask = distribute_tensor(mask, mesh, [Shard(0)])
    found = torch.ops.ava_ext.router_statistics([leaf], None, spread_mask, None, None, 1, 2, False)
    (found[0].square() + found[1].square()).sum().backward()  # the second asks for the choices
    tokens = distribute_tensor(texts()[0], mesh, [Shard(0)])
    weights = repetition_weights(torch.zeros(1))
    options = {"tokens_include_row": False, "vocab_size": 4, "ignore_index": -100, "repetition_allow_list": None}
    options |= {"use_immediate_repetition_penalty": True, "immediate_repetition_threshold": 1, "ngram_size": 2}
    options |= {"ngram_window_size": 0, "ngram_slots": 2, "eos_ids": None, "min_sequence_length": 0}
    candidates = torch.ops.ava_ext.repetition_candidates(tokens, tokens, None, weights, **options)
    rows = distribute_tensor(torch.ones(5, 3), mesh, [Shard(1)])  # each rank its columns
    torch.ops.ava_ext.scale_rows_(rows, torch.arange(5.0))
    return as_whole([*found, leaf.grad, *candidates, rows]), options


def test_operators_of_routers_texts_and_memory():
    logits, _, mask = router_inputs()
    leaf = logits.flatten(1, 2).requires_grad_()
    expected = torch.ops.ava_ext.router_statistics([leaf], None, mask, None, None, 1, 2, False)
    (expected[0].square() + expected[1].square()).sum().backward()
    for found, options in on_ranks(2, raw_router_worker):
        tokens, weights = texts()[0], repetition_weights(torch.zeros(1))
        candidates = torch.ops.ava_ext.repetition_candidates(tokens, tokens, None, weights, **options)
        rows = torch.arange(5.0).unsqueeze(1).expand(5, 3)
        torch.testing.assert_close(found, [*as_whole(expected), leaf.grad, *candidates, rows], **close)


def test_every_operator_of_tensors_has_a_rule():
    operators = {
        schema.name.removeprefix("ava_ext::"): schema
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("ava_ext::")
    }
    with_tensors = {
        name
        for name, schema in operators.items()
        if any("Tensor" in str(argument.type) for argument in schema.arguments)
    }
    others = {"repetition_candidates", "router_statistics", "router_gradient"}
    assert with_tensors == set(ROW_OPERATORS) | set(WITHOUT_RULE) | others
    for name, kind in ROW_OPERATORS.items():
        schema = operators[name]
        tensors = {argument.name for argument in schema.arguments if "Tensor" in str(argument.type)}
        assert tensors - {kind.first, *kind.of_rows, *kind.weights} <= {"options"}
        assert len(schema.returns) == len(kind.results)


def errors_worker(rank):
    """Every error comes on every rank."""
    mesh, given = init_device_mesh("cpu", (2,)), inputs()

    def spread(value, *placements):
        return distribute_tensor(value, mesh, list(placements))

    logits, targets = given["logits"], given["targets"]
    options = row_options(logits)
    with pytest.raises(ValueError, match=r"row_loss: expected targets as a torch.Tensor beside logits that are one"):
        row_loss(logits, spread(targets, Shard(0)), options)
    with pytest.raises(ValueError, match=r"row_loss: expected row_weights as a torch.Tensor beside logits"):
        row_loss(logits, targets, options, row_weights=spread(given["row_weights"], Shard(0)))
    with pytest.raises(ValueError, match=r"row_loss: expected candidate_ids as a torch.Tensor beside logits"):
        ids = spread(given["ids"], Shard(0))
        row_loss(logits, targets, options, candidates=Candidates(ids, given["id_weights"], (2,)))
    for name in ("target_probabilities", "smoothing_weights"):
        with pytest.raises(ValueError, match=rf"row_loss: expected {name} as a torch.Tensor beside logits"):
            row_loss(logits, targets, options, **{name: spread(column_weights(name), Shard(0))})
    with pytest.raises(ValueError, match=r"softmax_statistics: expected row_mask as a torch.Tensor beside logits"):
        softmax_statistics(logits, given["ids"], row_mask=spread(targets != -100, Shard(0)))
    with pytest.raises(ValueError, match=r"token_log_probs: expected logits in placements Replicate or Shard, got P"):
        token_log_probs(DTensor.from_local(logits, mesh, [Partial()]), targets)
    with pytest.raises(ValueError, match=r"expected values of all rows \[3, 5\].* got shape \[2, 5\]"):
        row_loss(spread(logits, Shard(0)), targets[:2], options)
    tokens = texts()[0]
    with pytest.raises(ValueError, match=r"repetition_candidates: expected tokens whose texts are whole .* prefix_ids"):
        searched(spread(tokens, Shard(1)), *texts()[1:])
    with pytest.raises(ValueError, match=r"repeated_ngram_mask: expected mask as a torch.Tensor beside tokens"):
        repeated_ngram_mask(tokens, 2, mask=spread(tokens != 3, Shard(0)))
    of_router, indices, mask = router_inputs()
    for placement in (Shard(0), Shard(3)):
        with pytest.raises(ValueError, match=r"gate_logits whose rows are spread, with every layer and expert"):
            router_statistics(spread(of_router, placement), indices, mask)
    with pytest.raises(ValueError, match=r"gate_logits of every layer as a DTensor .* got a torch.Tensor"):
        router_statistics([spread(of_router[0].flatten(0, 1), Shard(0)), of_router[1].flatten(0, 1)], k=1)
    with pytest.raises(ValueError, match=r"expected row_mask as a torch.Tensor beside gate_logits"):
        router_statistics(of_router, indices, spread(mask, Shard(0)))

    ops = torch.ops.ava_ext
    constants = (None, None, None, None, FLAGS, V, -100, False, True)
    with pytest.raises(ValueError, match=r"row_loss: expected logits whose last dimension is whole .* token_log_probs"):
        ops.row_loss(spread(logits, Shard(2)), spread(targets, Replicate()), options, *constants)
    with pytest.raises(ValueError, match=r"row_loss: expected logits as a DTensor beside targets, got a torch.Tensor"):
        ops.row_loss(logits, spread(targets, Shard(0)), options, *constants)
    states, weight = given["hidden_states"].flatten(0, 1), given["weight"]
    arguments = (None, None, None, options, FLAGS, V, None, torch.float64, None)
    with pytest.raises(ValueError, match=r"linear_row_statistics: expected weight as a DTensor beside hidden_states"):
        ops.linear_row_statistics(spread(states, Shard(0)), weight, *arguments)
    with pytest.raises(ValueError, match=r"weight in placements Replicate, got .*LinearLogits takes a weight in Shard"):
        ops.linear_row_statistics(spread(states, Shard(0)), spread(weight, Shard(0)), *arguments)


def test_errors():
    on_ranks(2, errors_worker)
