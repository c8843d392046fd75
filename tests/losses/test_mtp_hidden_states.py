"""Depth modules of the model: one cross-entropy per row, one gradient of a shared head, what a depth is worth."""

import pytest
import torch
from support.strategies import Numbers
from torch.nn.functional import cross_entropy, linear

from ava_ext import LinearLogits, UnifiedLoss
from ava_ext.ops import linear_rows

BATCH, LENGTH, HIDDEN, VOCAB, DEPTHS = 2, 7, 5, 11, 3


def make_loss(**options):
    options = {"num_future_tokens": DEPTHS, "mtp_weight": 0.3} | options
    return UnifiedLoss(VOCAB, primary_loss_type="standard", use_mtp=True, mtp_type="hidden_states", **options)


def make_inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    targets = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    targets[0, 4] = -100
    return {
        "targets": targets,
        "hidden_states": torch.randn(BATCH, LENGTH, HIDDEN, **draw).requires_grad_(),
        "lm_head_weight": torch.randn(VOCAB, HIDDEN, **draw).requires_grad_(),
        "mtp_hidden_states": [torch.randn(BATCH, LENGTH, HIDDEN, **draw).requires_grad_() for _ in range(DEPTHS)],
        "segment_ids": torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0]]),
    }


def rows_of_depth(targets, segments, k):
    """(b, t) of the rows that predict something at depth k."""
    return [
        (b, t)
        for b in range(BATCH)
        for t in range(LENGTH - k)
        if targets[b, t + k] != -100 and segments[b, t] == segments[b, t + k]
    ]


def one_row_at_a_time(inputs, depth_weights=(1, 1, 1), own_denominator=False, head=None):
    targets, segments = inputs["targets"], inputs["segment_ids"]
    head = inputs["lm_head_weight"] if head is None else head
    n = int((targets != -100).sum())
    total = 0
    for k, states in enumerate(inputs["mtp_hidden_states"], start=1):
        rows = rows_of_depth(targets, segments, k)
        losses = [cross_entropy(linear(states[b, t], head), targets[b, t + k]) for b, t in rows]
        total = total + 0.3 / DEPTHS * depth_weights[k - 1] * sum(losses) / (len(rows) if own_denominator else n)
    return total


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("own_denominator", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_against_one_row_at_a_time(stacked, own_denominator, reduction):
    inputs, depth_weights = make_inputs(), torch.tensor([1.0, 0.5, 0.25])
    expected = one_row_at_a_time(inputs, depth_weights.tolist(), own_denominator)
    leaves = [inputs["lm_head_weight"], *inputs["mtp_hidden_states"]]
    given = inputs | ({"mtp_hidden_states": torch.stack(inputs["mtp_hidden_states"])} if stacked else {})
    loss_fn = make_loss(reduction=reduction, mtp_own_denominator=own_denominator)
    parts = loss_fn(**given, mtp_depth_weights=depth_weights, return_detailed=True)
    n = 1 if reduction == "mean" else int((inputs["targets"] != -100).sum())
    torch.testing.assert_close(parts["mtp_loss"].sum() / n, expected.detach(), rtol=1e-12, atol=0)
    main = UnifiedLoss(VOCAB, primary_loss_type="standard", reduction=reduction)
    depths = parts["total_loss"] - main(linear(inputs["hidden_states"], inputs["lm_head_weight"]), inputs["targets"])
    gradients = torch.autograd.grad(depths.sum() / n, leaves)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, leaves), rtol=1e-10, atol=1e-14)


def test_metrics():
    inputs = make_inputs()
    head, targets, segments = inputs["lm_head_weight"], inputs["targets"], inputs["segment_ids"]
    # heads that are often right: their states point at the target
    for k, states in enumerate(inputs["mtp_hidden_states"], start=1):
        with torch.no_grad():
            for b, t in rows_of_depth(targets, segments, k)[:: k + 1]:
                states[b, t] = 9 * head[targets[b, t + k]]
    parts = make_loss()(**inputs, return_detailed=True)
    chain = None
    right = None
    for k, states in enumerate(inputs["mtp_hidden_states"], start=1):
        rows = rows_of_depth(targets, segments, k)
        is_right = {(b, t) for b, t in rows if linear(states[b, t], head).argmax() == targets[b, t + k]}
        assert 0 < len(is_right) < len(rows)
        assert parts[f"mtp_accuracy_depth_{k}"] == pytest.approx(len(is_right) / len(rows))
        chain = set(rows) if chain is None else chain & set(rows)
        right = is_right if right is None else right & is_right
        assert parts[f"mtp_acceptance_depth_{k}"] == pytest.approx(len(right) / len(chain))
    torch.testing.assert_close(
        parts["mtp_loss_depth_1"],
        torch.stack(
            [
                cross_entropy(linear(inputs["mtp_hidden_states"][0][row], head), targets[row[0], row[1] + 1])
                for row in rows_of_depth(targets, segments, 1)
            ]
        ).mean(),
    )


@pytest.mark.parametrize("kind", ["hidden_states", "linear", "adaptive"])
def test_heads_that_share_a_weight_go_as_one_batch(kind, monkeypatch):
    inputs = make_inputs()
    head, states = inputs["lm_head_weight"], inputs["mtp_hidden_states"]
    options = {"mtp_type": "adaptive", "use_confidence_weighting": False} if kind == "adaptive" else {}
    loss_fn = UnifiedLoss(
        VOCAB, **{"primary_loss_type": "standard", "use_mtp": True, "mtp_type": "hidden_states"} | options
    )
    other = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, requires_grad=True)
    if kind != "hidden_states":
        del inputs["mtp_hidden_states"]
        heads = [LinearLogits(states[0], head), LinearLogits(states[1], other), LinearLogits(states[2], head)]
        inputs["additional_logits"] = heads
    products, add = [], linear_rows._add_product
    monkeypatch.setattr(linear_rows, "_add_product", lambda *given: products.append(given[1].shape) or add(*given))
    got = loss_fn(**inputs)
    # the main rows, and each weight of the depths once; rows without a target take no part
    assert len(products) == (2 if kind == "hidden_states" else 3)
    dense = inputs | {"additional_logits": [linear(*x[:2]) for x in heads]} if kind != "hidden_states" else inputs
    if kind != "hidden_states":
        torch.testing.assert_close(got, loss_fn(**dense), rtol=1e-12, atol=0)
        leaves = [head, other, *states]
        gradients = [torch.autograd.grad(loss, leaves) for loss in (got, loss_fn(**dense))]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("adaptive", [False, True])
def test_heads_of_one_weight_that_are_no_batch(adaptive):
    """Their bias is another, or there are logits among them."""
    numbers = Numbers(0)
    options = {"mtp_type": "adaptive", "use_confidence_weighting": False} if adaptive else {"mtp_type": "hidden_states"}
    loss_fn = UnifiedLoss(VOCAB, primary_loss_type="standard", use_mtp=True, num_future_tokens=4, **options).double()
    logits, targets = numbers.normal(BATCH, LENGTH, VOCAB), numbers.integers(0, VOCAB, BATCH, LENGTH)
    weight, bias = numbers.normal(VOCAB, HIDDEN), numbers.normal(VOCAB)
    states = numbers.normal(4, BATCH, LENGTH, HIDDEN)
    heads = [linear(states[0], weight), LinearLogits(states[1], weight, bias)]
    heads += [LinearLogits(states[2], weight, 2 * bias), LinearLogits(states[3], weight)]
    dense = [head if isinstance(head, torch.Tensor) else linear(*head) for head in heads]
    got, expected = (loss_fn(logits, targets, additional_logits=given) for given in (heads, dense))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_detached_head_and_logits_beside_it():
    inputs = make_inputs()
    logits = linear(inputs["hidden_states"].detach(), inputs["lm_head_weight"].detach()).requires_grad_()
    given = {name: value for name, value in inputs.items() if name != "hidden_states"} | {"logits": logits}
    head = [inputs["lm_head_weight"], torch.zeros(VOCAB, dtype=torch.float64, requires_grad=True)]
    for detach in (False, True):
        loss = make_loss(mtp_detach_head=detach)(**given, lm_head_bias=head[1])
        torch.testing.assert_close(loss, make_loss()(**inputs), rtol=1e-12, atol=0)
        gradients = torch.autograd.grad(loss, head, allow_unused=True)
        assert [gradient is None for gradient in gradients] == [detach, detach]
    main = LinearLogits(inputs["hidden_states"], inputs["lm_head_weight"])
    del given["lm_head_weight"]
    torch.testing.assert_close(make_loss()(**given | {"logits": main}), make_loss()(**inputs), rtol=1e-12, atol=0)


def test_rows_that_predict_nothing_may_hold_nan():
    inputs = make_inputs()
    expected = make_loss()(**inputs)
    wanted = torch.autograd.grad(expected, inputs["lm_head_weight"])
    with torch.no_grad():
        for k, states in enumerate(inputs["mtp_hidden_states"], start=1):
            predicting = rows_of_depth(inputs["targets"], inputs["segment_ids"], k)
            for b in range(BATCH):
                for t in range(LENGTH):
                    if (b, t) not in predicting:
                        states[b, t] = torch.nan
    got = make_loss()(**inputs)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(got, inputs["lm_head_weight"]), wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("active", [False, torch.tensor(False), torch.tensor([True, False])])
def test_switched_off(active):
    inputs = make_inputs()
    parts = make_loss()(**inputs, mtp_active=active, return_detailed=True)
    gradients = torch.autograd.grad(parts["total_loss"], inputs["mtp_hidden_states"])
    is_on = active.tolist() if isinstance(active, torch.Tensor) and active.dim() else [False] * BATCH
    assert [bool(gradients[0][b].any()) for b in range(BATCH)] == is_on
    assert (parts["mtp_loss"] != 0) == any(is_on)
    del inputs["mtp_hidden_states"]
    assert make_loss()(**inputs, return_detailed=True)["mtp_loss"] == 0  # as many as are given


def test_a_schedule_recompiles_nothing():
    inputs, loss_fn = make_inputs(), make_loss()
    n_graphs = 0

    def backend(graph, _):
        nonlocal n_graphs
        n_graphs += 1
        return graph.forward

    compiled = torch.compile(loss_fn, backend=backend, fullgraph=True)
    for value in (1.0, 0.5, 0.0):
        depth_weights = torch.full((DEPTHS,), value)
        expected = loss_fn(**inputs, mtp_depth_weights=depth_weights)
        torch.testing.assert_close(compiled(**inputs, mtp_depth_weights=depth_weights), expected, rtol=1e-12, atol=0)
    assert n_graphs == 1


def test_compiled_gradients():
    inputs, loss_fn = make_inputs(), make_loss(mtp_own_denominator=True)
    leaves = [inputs["lm_head_weight"], *inputs["mtp_hidden_states"]]
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")(**inputs)
    gradients = [torch.autograd.grad(loss, leaves) for loss in (compiled, loss_fn(**inputs))]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_micro_batches_add_up():
    inputs, loss_fn = make_inputs(), make_loss()
    whole, n = loss_fn(**inputs), int((inputs["targets"] != -100).sum())
    total = 0
    for b in range(BATCH):
        rows = slice(b, b + 1)
        micro = {name: inputs[name][rows] for name in ("targets", "hidden_states", "segment_ids")}
        micro["mtp_hidden_states"] = [states[rows] for states in inputs["mtp_hidden_states"]]
        total = total + loss_fn(**micro, lm_head_weight=inputs["lm_head_weight"], num_items_in_batch=n)
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)


def test_own_denominators_are_those_of_a_micro_batch():
    """As the guide says: n / N times the mean over its own rows, and 0 where it has none at a depth."""
    inputs, n_items = make_inputs(), 40
    inputs["targets"][1, 2:] = -100  # nothing at depths 2 and 3
    inputs["segment_ids"] = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    for b in range(BATCH):
        rows = slice(b, b + 1)
        micro = {name: inputs[name][rows] for name in ("targets", "hidden_states", "segment_ids")}
        micro["mtp_hidden_states"] = [states[rows] for states in inputs["mtp_hidden_states"]]
        micro["lm_head_weight"] = inputs["lm_head_weight"]
        loss_fn = make_loss(mtp_own_denominator=True)
        parts = loss_fn(**micro, num_items_in_batch=n_items, return_detailed=True)
        n = int((micro["targets"] != -100).sum())
        means = sum(parts[f"mtp_loss_depth_{k}"] for k in range(1, DEPTHS + 1))  # 0 where there is no row
        torch.testing.assert_close(parts["mtp_loss"], 0.3 / DEPTHS * n / n_items * means, rtol=1e-12, atol=0)
        assert (parts["mtp_loss_depth_3"] == 0) == (b == 1)


def test_bad_input_is_named():
    inputs, loss_fn = make_inputs(), make_loss()
    states = inputs.pop("mtp_hidden_states")
    with pytest.raises(ValueError, match=r"mtp_hidden_states of num_future_tokens = 3 times \[2, 7, 5\], got \[\[2, 7"):
        loss_fn(**inputs, mtp_hidden_states=states[:2])
    with pytest.raises(ValueError, match="expected mtp_hidden_states or additional_logits, got both"):
        loss_fn(**inputs, mtp_hidden_states=states, additional_logits=[])
    with pytest.raises(ValueError, match="mtp_active needs mtp_hidden_states or additional_logits"):
        loss_fn(**inputs, mtp_active=True)
    logits = linear(inputs.pop("hidden_states"), inputs.pop("lm_head_weight"))
    with pytest.raises(ValueError, match="mtp_hidden_states need lm_head_weight"):
        loss_fn(logits, **inputs, mtp_hidden_states=states)
    with pytest.raises(TypeError, match=r"unified_loss: expected lm_head_weight to be a torch.Tensor, got list"):
        loss_fn(logits, **inputs, mtp_hidden_states=states, lm_head_weight=[0.0])
    with pytest.raises(ValueError, match=r"additional_logits of num_future_tokens = 3 times \[2, 7, 11\]"):
        loss_fn(logits, **inputs, additional_logits=[logits])
    with pytest.raises(ValueError, match=r"expected mtp_depth_weights of shape \[3\]"):
        loss_fn(logits, **inputs, additional_logits=[logits] * 3, mtp_depth_weights=torch.ones(2))
    with pytest.raises(ValueError, match="shares the head anyway"):
        make_loss(mtp_share_head=True)


def test_depths_of_a_generator_and_what_is_no_tensor():
    inputs, loss_fn = make_inputs(), make_loss()
    states = list(inputs.pop("mtp_hidden_states"))
    expected = loss_fn(**inputs, mtp_hidden_states=states)
    torch.testing.assert_close(loss_fn(**inputs, mtp_hidden_states=(h for h in states)), expected, rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"unified_loss: expected mtp_hidden_states\[1\] to be a torch.Tensor, got"):
        loss_fn(**inputs, mtp_hidden_states=[states[0], None, states[2]])
    with pytest.raises(
        TypeError, match=r"unified_loss: additional_logits\[1\]: expected logits to be a torch.Tensor or LinearLogits"
    ):
        loss_fn(**inputs, additional_logits=[torch.zeros(2, 7, 11), None, None])


@pytest.mark.parametrize("options", [{"mtp_type": "hidden_states"}, {"use_confidence_weighting": False}])
def test_one_head_may_stand_alone(options):
    numbers = Numbers(0)
    options = {"use_mtp": True, "mtp_type": "adaptive", "num_future_tokens": 1} | options
    loss_fn = UnifiedLoss(7, primary_loss_type="standard", **options).double()
    logits, targets = numbers.normal(2, 5, 7), numbers.integers(0, 7, 2, 5)
    head = LinearLogits(numbers.normal(2, 5, 3), numbers.normal(7, 3), numbers.normal(7))
    for given in (head, head._replace(bias=None)):
        torch.testing.assert_close(
            loss_fn(logits, targets, additional_logits=given), loss_fn(logits, targets, additional_logits=[given])
        )
