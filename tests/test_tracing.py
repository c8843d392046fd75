"""A first call on fake tensors, or under a tracer, leaves nothing behind: later calls are as if it had not been."""

import copy
import pickle

import pytest
import torch
from support.strategies import HIDDEN_SIZE
from test_compile import CONFIGURATIONS, V, arguments
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from ava_ext import ConsistencyLoss, UnifiedLoss, functional
from ava_ext.functional import cross_entropy, linear_cross_entropy


def copy_given(given):
    return tree_map_only(torch.Tensor, lambda leaf: leaf.detach().clone().requires_grad_(leaf.requires_grad), given)


def faked(function, given):
    """Forward and backward on fake tensors; what the module holds is made fake by torch itself."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = tree_map_only(torch.Tensor, mode.from_tensor, given)
        result = function(**fakes)
        assert all(isinstance(value, FakeTensor) for value in result.values())
        result["total_loss"].sum().backward()


def traced(function, given):
    """make_fx runs the function on real tensors, and records."""
    make_fx(lambda values: function(**values)["total_loss"])(copy_given(given))


def traced_on_fakes(function, given):
    make_fx(lambda values: function(**values)["total_loss"], tracing_mode="fake", _allow_non_fake_inputs=True)(
        copy_given(given)
    )


def traced_on_symbols(function, given):
    make_fx(lambda values: function(**values)["total_loss"], tracing_mode="symbolic", _allow_non_fake_inputs=True)(
        copy_given(given)
    )


def script(function, given):
    return torch.jit.trace(function, given, check_trace=False)


def fx_graph(function, given):
    return make_fx(function)(*given)


def in_inference_mode(function, given):
    with torch.inference_mode():
        function(**given)


FIRST_CALLS = [faked, traced, traced_on_fakes, traced_on_symbols, in_inference_mode]


def results(loss_fn, seeds):
    found = []
    for seed in seeds:
        given = arguments(loss_fn.config, seed)
        result = loss_fn(**given, return_detailed=True)
        leaves = [value for value in given.values() if isinstance(value, torch.Tensor) and value.requires_grad]
        gradients = torch.autograd.grad(result["total_loss"].sum(), leaves, allow_unused=True)
        found.append(({name: value.detach() for name, value in result.items()}, gradients))
    return found


@pytest.mark.parametrize("first_call", FIRST_CALLS)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_module(name, first_call):
    loss_fn = UnifiedLoss(V, HIDDEN_SIZE, **CONFIGURATIONS[name])
    other = copy.deepcopy(loss_fn)
    loss_fn.eval()  # a recorded training call is another matter: it counts
    first_call(lambda **values: loss_fn(**values, return_detailed=True), arguments(loss_fn.config, 50))
    loss_fn.train()
    for owner in loss_fn.modules():
        for key, value in vars(owner).items():
            assert not isinstance(value, FakeTensor), key
    torch.testing.assert_close(results(loss_fn, range(12)), results(other, range(12)), rtol=0, atol=0)
    torch.testing.assert_close(dict(loss_fn.state_dict()), dict(other.state_dict()), rtol=0, atol=0)
    pickle.dumps(loss_fn)


@pytest.mark.parametrize("first_call", FIRST_CALLS)
def test_packed_texts_that_are_balanced_by_themselves(first_call):
    options = {"num_experts": 3, "num_experts_per_token": 1, "use_auxiliary_loss": True}
    loss_fn = UnifiedLoss(V, primary_loss_type="standard", load_balancing_per_sequence=True, **options)
    given = arguments(loss_fn.config, 0)
    given["gate_logits"] = given["gate_logits"].detach().unflatten(0, (2, 6)).requires_grad_()
    expected = loss_fn(**given)
    first_call(lambda **values: loss_fn(**values, return_detailed=True), given)
    torch.testing.assert_close(loss_fn(**given), expected, rtol=0, atol=0)


def test_a_trace_serves_any_number_of_packed_texts():
    options = {"num_experts": 3, "num_experts_per_token": 1, "use_auxiliary_loss": True, "load_balancing_weight": 1.0}
    loss_fn = UnifiedLoss(V, primary_loss_type="standard", load_balancing_per_sequence=True, **options)
    logits, targets, gate_logits = torch.randn(2, 6, V), torch.ones(2, 6).long(), torch.randn(2, 6, 3)

    def loss_of(segment_ids):
        return loss_fn(logits, targets, gate_logits=gate_logits, segment_ids=segment_ids)

    one, several = torch.zeros(1, 6).long(), torch.tensor([[0, 0, 1, 1, 1, 2]])
    torch.testing.assert_close(make_fx(loss_of)(one)(several), loss_of(several))


@pytest.mark.parametrize("first_call", FIRST_CALLS)
def test_functions(first_call):
    functional._make_row_terms.cache_clear()
    generator = torch.Generator().manual_seed(0)
    given = {
        "logits": torch.randn(5, V, generator=generator).requires_grad_(),
        "states": torch.randn(5, HIDDEN_SIZE, generator=generator).requires_grad_(),
        "weight": torch.randn(V, HIDDEN_SIZE, generator=generator).requires_grad_(),
        "targets": torch.tensor([1, 2, -100, 0, 3]),
    }
    options = {"z_loss_weight": 0.125, "label_smoothing": 0.1, "initial_temperature": 0.75}

    def losses(logits, states, weight, targets):
        total = cross_entropy(logits, targets, **options) + linear_cross_entropy(states, weight, targets, **options)
        return {"total_loss": total}

    def values():
        leaves = (given["logits"], given["states"], given["weight"])
        total = losses(**given)["total_loss"]
        return total.detach(), torch.autograd.grad(total, leaves)

    expected = values()
    functional._make_row_terms.cache_clear()
    first_call(losses, given)
    torch.testing.assert_close(values(), expected, rtol=0, atol=0)
    eager = torch.nn.functional.cross_entropy(given["logits"] / 0.75, given["targets"], label_smoothing=0.1)
    lse = (given["logits"] / 0.75).logsumexp(-1)[given["targets"] != -100]
    both = eager + 0.125 * lse.square().mean()
    torch.testing.assert_close(cross_entropy(given["logits"], given["targets"], **options), both)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("trace", [script, fx_graph])
def test_a_graph_serves_other_numbers(trace):
    """What the host sees of the example, its texts and masked columns, is not part of the graph."""
    options = {"num_experts": 3, "num_experts_per_token": 1, "use_auxiliary_loss": True}
    loss_fn = UnifiedLoss(V, primary_loss_type="standard", load_balancing_per_sequence=True, **options).eval()

    def balance(logits, segment_ids):
        targets = torch.zeros(1, 6, dtype=torch.int64)
        return loss_fn(logits, targets, gate_logits=logits[..., :3].flatten(0, 1), segment_ids=segment_ids)

    logits, one_text = torch.randn(1, 6, V), torch.zeros(1, 6, dtype=torch.int64)
    texts, masked = torch.arange(6).unsqueeze(0), logits.index_fill(-1, torch.tensor([V - 1]), -torch.inf)
    for function, example, other in (
        (balance, (logits, one_text), (logits, texts)),
        (ConsistencyLoss("js"), (logits, logits + 1), (masked, masked + 1)),
    ):
        torch.testing.assert_close(trace(function, example)(*other), function(*other))
