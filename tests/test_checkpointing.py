"""Activation checkpointing: the second run of a forward reads what the first one read, and does not count again."""

import copy
import functools

import pytest
import torch
from support.strategies import HIDDEN_SIZE, Numbers
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ava_ext import AdaptiveAntiRepetitionLoss, UnifiedLoss
from ava_ext.losses.moe import MoEBalancer

V, E = 7, 3
EXACT = {"rtol": 1e-12, "atol": 1e-12}
MOE = {"num_experts": E, "num_experts_per_token": 1, "router_score": "sigmoid", "use_moe_balancing": True}
MOE |= {"use_auxiliary_loss": True, "gradient_balance_weight": 2.0, "expert_bias_rate": 0.05, "moe_momentum": 0.5}
CONFIGURATIONS = {
    "default": {"temperature_gain": 3.0},
    "experts": MOE,
    "adaptive heads": {"primary_loss_type": "adaptive_mtp", "num_future_tokens": 2, "adaptive_temperature": True},
    "fixed temperature": {"primary_loss_type": "standard", "z_loss_weight": 0.1},
}


def build(name, auto_step=True):
    return UnifiedLoss(V, HIDDEN_SIZE, **CONFIGURATIONS[name], auto_step=auto_step)


def arguments(loss_fn, seed):
    numbers = Numbers(seed)
    given = {"logits": numbers.leaf(2, 5, V, scale=1.0 + 3 * (seed % 2)), "targets": numbers.integers(0, V, 2, 5)}
    if loss_fn.use_moe_balancing:
        given["gate_logits"] = numbers.leaf(10, E, scale=2.0)
    if loss_fn.primary_loss_type == "adaptive_mtp":
        given["additional_logits"] = [numbers.leaf(2, 5, V) for _ in range(2)]
        given["confidence_scores"] = numbers.uniform(2, 5, low=0.1, high=0.9).requires_grad_()
    return given


def leaves(given):
    tensors = [leaf for value in given.values() for leaf in (value if isinstance(value, list) else [value])]
    return [tensor for tensor in tensors if tensor.requires_grad]


def everything_learned(loss_fn):
    """State and what is pending."""
    states = [loss_fn.get_submodule(name) for name in loss_fn._state_names]
    pending = {f"{state.statistics_name}.{name}": getattr(state, name) for state in states for name in state.PENDING}
    return {name: value.clone() for name, value in (dict(loss_fn.named_buffers()) | pending).items()}


def train(run, loss_fn, n_steps=16):
    """Gradients of every step, and what has been learned by then. run(loss_fn, given) -> the loss."""
    gradients = []
    for seed in range(n_steps):
        given = arguments(loss_fn, seed)
        gradients.append(torch.autograd.grad(run(loss_fn, given), leaves(given)))
        if not loss_fn.auto_step and seed % 2:  # two micro-batches a step
            loss_fn.step()
    return gradients, everything_learned(loss_fn)


def plainly(loss_fn, given):
    return loss_fn(**given)


def checkpointed(loss_fn, given, **options):
    return checkpoint(loss_fn, use_reentrant=False, **given, **options)


def selectively(loss_fn, given):
    """Keeps what the row kernel returns, and computes the rest again."""

    def policy(context, operator, *args, **kwargs):
        keep = operator is torch.ops.ava_ext.row_loss.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return checkpointed(loss_fn, given, context_fn=functools.partial(create_selective_checkpoint_contexts, policy))


def with_targets_of_its_own(loss_fn, given):
    """The tensor of targets is another one in the second run."""
    targets = given.pop("targets")
    return checkpoint(lambda **rest: loss_fn(targets=targets.clone(), **rest), use_reentrant=False, **given)


@pytest.mark.parametrize("auto_step", [True, False])
@pytest.mark.parametrize("run", [checkpointed, selectively, with_targets_of_its_own])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_checkpointed_call_is_a_call(name, run, auto_step):
    expected, expected_state = train(plainly, build(name, auto_step))
    found, state = train(run, build(name, auto_step))
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=0)
    if name == "default":
        assert not auto_step or state["temperature.value"] != 1
        assert state["temperature.count"] == (16 if auto_step else 8)
    if name == "experts":
        assert state["moe_balancer.expert_counts"].sum() == 16 * 10
        assert state["moe_balancer.expert_bias"].abs().sum() > 0
    if name == "adaptive heads":
        assert state["adaptive_mtp.count"] == 16


@pytest.mark.parametrize("name", ["default", "experts"])
def test_several_calls_before_one_backward(name):
    def train_on_sums(run):
        loss_fn, gradients = build(name), []
        for step in range(8):
            given = [arguments(loss_fn, 3 * step + part) for part in range(3)]
            loss = sum(run(loss_fn, values) for values in given)
            gradients.append(torch.autograd.grad(loss, [leaf for values in given for leaf in leaves(values)]))
        return gradients, everything_learned(loss_fn)

    torch.testing.assert_close(train_on_sums(checkpointed), train_on_sums(plainly), **EXACT)


def test_chunks_of_one_tensor_of_targets_are_calls_of_their_own():
    def train_on_chunks(run):
        loss_fn, gradients = build("default"), []
        for step in range(8):
            given = arguments(loss_fn, step)
            chunks = zip(given["logits"].split(2, 1), given["targets"].split(2, 1), strict=True)
            loss = sum(run(loss_fn, {"logits": logits, "targets": targets}) for logits, targets in chunks)
            gradients.append(torch.autograd.grad(loss, given["logits"])[0])
        return gradients

    torch.testing.assert_close(train_on_chunks(checkpointed), train_on_chunks(plainly), **EXACT)


def test_a_step_between_forward_and_backward():
    def gradient(run):
        loss_fn = build("experts", auto_step=False)
        train(plainly, loss_fn)
        given = arguments(loss_fn, 99)
        loss = run(loss_fn, given)
        plainly(loss_fn, arguments(loss_fn, 100))
        loss_fn.step()
        return torch.autograd.grad(loss, leaves(given))

    torch.testing.assert_close(gradient(checkpointed), gradient(plainly), **EXACT)


def test_evaluation_with_gradients_reads_the_state_too():
    def gradient(run):
        loss_fn = build("experts")
        train(plainly, loss_fn)
        given = arguments(loss_fn.eval(), 99)
        gradients = torch.autograd.grad(run(loss_fn, given), leaves(given))
        return gradients, everything_learned(loss_fn)

    torch.testing.assert_close(gradient(checkpointed), gradient(plainly), **EXACT)


def test_a_backward_may_run_twice():
    loss_fn = build("default")
    train(plainly, loss_fn)
    given = arguments(loss_fn, 99)
    loss = checkpointed(loss_fn, given)
    first = torch.autograd.grad(loss, leaves(given), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves(given)), first, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_reads_the_state_and_counts_nothing():
    loss_fn = build("experts")
    train(plainly, loss_fn)
    before = everything_learned(loss_fn)
    given = arguments(loss_fn, 99)

    def forward(logits, gate_logits):
        return loss_fn(logits, given["targets"], gate_logits=gate_logits)

    inputs = (given["logits"], given["gate_logits"])
    checkpoint(forward, *inputs, use_reentrant=True).backward()
    torch.testing.assert_close(everything_learned(loss_fn), before, rtol=0, atol=0)
    expected = torch.autograd.grad(copy.deepcopy(loss_fn)(**given), inputs)
    torch.testing.assert_close([leaf.grad for leaf in inputs], list(expected), **EXACT)


def test_what_is_remembered_goes_with_the_targets():
    loss_fn = build("default")
    given = arguments(loss_fn, 0)
    loss = checkpointed(loss_fn, given)
    memory = loss_fn.temperature.memory
    assert len(memory) == 1
    del given, loss
    assert len(memory) == 0
    plainly(loss_fn, arguments(loss_fn, 0))
    assert len(memory) == 0


def test_a_schedule_of_penalties():
    def train_with_schedule(run):
        numbers, gradients = Numbers(0), []
        loss_fn = AdaptiveAntiRepetitionLoss(V, ngram_size=1, warmup_steps=5, final_weight=9.0, auto_step=True)
        for _ in range(5):
            given = {"logits": numbers.leaf(2, 5, V), "targets": numbers.integers(0, V, 2, 5)}
            gradients.append(torch.autograd.grad(run(loss_fn, given), given["logits"])[0])
        return gradients, dict(loss_fn.state_dict())

    torch.testing.assert_close(train_with_schedule(checkpointed), train_with_schedule(plainly), **EXACT)


def test_a_router_in_a_checkpointed_layer_reads_the_bias_again():
    """The router is the user's, and chooses by a bias that must not have moved: auto_step=False."""

    def train_router(run):
        numbers, loss_fn = Numbers(0), build("experts", auto_step=False)
        weight, values = numbers.leaf(E, HIDDEN_SIZE), numbers.leaf(E, V)

        def layer(states):
            gate_logits = states @ weight.T
            scores = gate_logits.sigmoid()
            chosen = (scores + loss_fn.moe_balancer.expert_bias[0]).topk(1).indices
            return scores.gather(-1, chosen) * values[chosen.squeeze(-1)], gate_logits, chosen

        for _ in range(8):
            logits, gate_logits, chosen = run(layer, numbers.normal(2, 5, HIDDEN_SIZE))
            routing = {"gate_logits": gate_logits.flatten(0, 1), "expert_indices": chosen.flatten(0, 1)}
            loss_fn(logits, numbers.integers(0, V, 2, 5), **routing).backward()
            loss_fn.step()
        return weight.grad, values.grad, loss_fn.moe_balancer.expert_bias

    again = functools.partial(checkpoint, use_reentrant=False)
    found, expected = train_router(again), train_router(lambda layer, states: layer(states))
    assert expected[-1].abs().sum() > 0
    torch.testing.assert_close(found, expected, **EXACT)


def test_a_balancer_by_itself():
    def train_balancer(run):
        numbers, gradients = Numbers(0), []
        balancer = MoEBalancer(E, 1, router_score="sigmoid", moe_momentum=0.5)
        for _ in range(4):
            gate_logits = numbers.leaf(6, E, scale=2.0)
            loss = run(lambda gates: balancer(gates).term, gate_logits)
            balancer.step()
            gradients.append(torch.autograd.grad(loss, gate_logits)[0])
        return gradients, dict(balancer.state_dict())

    again = functools.partial(checkpoint, use_reentrant=False)
    torch.testing.assert_close(train_balancer(again), train_balancer(lambda run, x: run(x)), **EXACT)


# -- torch.compile


def compiled_outside(backend):
    """Checkpointing around a compiled loss."""
    compiled = functools.cache(lambda loss_fn: torch.compile(loss_fn, backend=backend))
    return lambda loss_fn, given: checkpointed(compiled(loss_fn), given)


def compiled_inside(backend):
    """Checkpointing in a compiled function."""
    run = torch.compile(lambda loss_fn, given: checkpointed(loss_fn, given), backend=backend)
    return lambda loss_fn, given: run(loss_fn, given)


def compiled_alone(backend):
    compiled = functools.cache(lambda loss_fn: torch.compile(loss_fn, backend=backend, fullgraph=True))
    return lambda loss_fn, given: compiled(loss_fn)(**given)


# this backend chooses what is saved for backward and what is computed again as inductor does
PARTITIONING = "aot_eager_decomp_partition"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("compiling", "auto_step"),
    [(compiled_alone, True), (compiled_outside, True), (compiled_outside, False), (compiled_inside, False)],
)
@pytest.mark.parametrize("name", ["default", "experts", "adaptive heads"])
def test_a_compiled_call_reads_what_was_committed_before_it(name, compiling, auto_step):
    torch._dynamo.reset()
    n_steps = 14 if auto_step else 22  # the temperature moves after ten
    expected, expected_state = train(plainly, build(name, auto_step), n_steps)
    found, state = train(compiling(PARTITIONING), build(name, auto_step), n_steps)
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(state, expected_state, rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("compiling", [compiled_alone, compiled_outside])
def test_inductor_reads_what_was_committed_before_it(compiling):
    torch._dynamo.reset()
    expected, expected_state = train(plainly, build("experts"), 14)
    found, state = train(compiling("inductor"), build("experts"), 14)
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(state, expected_state, rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_graph_that_writes_over_what_its_recomputation_reads_is_refused():
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        train(compiled_inside(PARTITIONING), build("default"), 1)
