"""A compiled loss is compiled as often as torch.nn.functional.cross_entropy: over lengths, dtypes and a reload."""

import copy
import functools

import pytest
import torch
from support.strategies import HIDDEN_SIZE, Numbers
from test_compile import BATCH, ROWS, E, V
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map

from ava_ext import UnifiedLoss

ADAPTIVE = {"primary_loss_type": "adaptive_mtp", "num_future_tokens": 2}
CONFIGURATIONS = {
    "plain": {"primary_loss_type": "standard"},
    "default": {},
    "default, step by hand": {"auto_step": False},
    "every part": {"primary_loss_type": "deepseek", "use_mtp": True, **ROWS, **BATCH},
    "adaptive heads": ADAPTIVE,
    "pairs": {"primary_loss_type": "standard", "use_contrastive_loss": True},
    "linear layer": {},
    "target probabilities": {"primary_loss_type": "standard"},
}
# a length for the second time, a new one (from now on any), and more of them; as training does
LENGTHS = (5, 5, 7, 9, 16)
CALLS = [(n_tokens, torch.float32) for n_tokens in LENGTHS]
CALLS += ["reload", (5, torch.float32), (8, torch.float32), (16, torch.float32)]
CALLS += [(n_tokens, torch.bfloat16) for n_tokens in LENGTHS]
CALLS += ["assign", (5, torch.float32), (9, torch.bfloat16)]


def arguments(name, n_tokens, dtype, seed):
    numbers, config = Numbers(seed), UnifiedLoss(V, HIDDEN_SIZE, **CONFIGURATIONS[name]).config
    given = {"logits": numbers.leaf(2, n_tokens, V), "targets": numbers.integers(0, V, 2, n_tokens)}
    if config.use_moe_balancing:
        given["hidden_states"] = numbers.leaf(2, n_tokens, HIDDEN_SIZE)
        given["gate_logits"] = numbers.leaf(2 * n_tokens, E)
        given["expert_outputs"] = numbers.leaf(E, 2 * n_tokens, HIDDEN_SIZE)
    if config.primary_loss_type == "adaptive_mtp":
        # no stack, where the second begins at a multiple of 16 bytes for some lengths only, and has a graph for each
        given["additional_logits"] = [numbers.leaf(2, n_tokens, V), numbers.leaf(2, n_tokens, V)]
        given["confidence_scores"] = numbers.uniform(2, n_tokens, low=0.1, high=0.9).requires_grad_()
    if name == "pairs":
        given["contrastive_pair"] = (numbers.leaf(n_tokens, HIDDEN_SIZE), numbers.leaf(n_tokens, HIDDEN_SIZE))
    if name == "target probabilities":
        given["target_probabilities"] = numbers.leaf(2, n_tokens, V).softmax(-1)
    if name in ("linear layer", "target probabilities"):
        del given["logits"]
        given["hidden_states"] = numbers.leaf(2, n_tokens, HIDDEN_SIZE)
        given["lm_head_weight"] = numbers.leaf(V, HIDDEN_SIZE)

    def of_dtype(tensor):
        return tensor.detach().to(dtype).requires_grad_() if tensor.is_floating_point() else tensor

    return tree_map(of_dtype, given)


def compilations(function, call):
    """How many there have been after each of CALLS. call(compiled, n_tokens, dtype, seed) -> the loss."""
    torch._dynamo.reset()
    backend, found = CompileCounterWithBackend("aot_eager"), []  # traces backward too
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for seed, what in enumerate(CALLS):
        if isinstance(what, tuple):
            call(compiled, *what, seed).backward()
        elif isinstance(function, UnifiedLoss):
            function.load_state_dict(copy.deepcopy(function.state_dict()), assign=what == "assign")
        found.append(backend.frame_count)
    return found


@functools.cache
def of_cross_entropy():
    def function(logits, targets):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return compilations(function, lambda compiled, *what: compiled(**arguments("plain", *what)))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_no_more_compilations_than_cross_entropy(name):
    allowed = of_cross_entropy()
    assert allowed[-1] == 3  # one length, any length, the other type
    loss_fn = UnifiedLoss(V, HIDDEN_SIZE, **CONFIGURATIONS[name])
    found = compilations(loss_fn, lambda compiled, *what: compiled(**arguments(name, *what)))
    assert found == allowed


def test_sizes_of_what_comes_beside_the_rows():
    """Another batch size with load balancing of every sequence, another number of negatives: any, after the second."""
    options = {"num_experts": E, "num_experts_per_token": 2, "use_auxiliary_loss": True}
    balancing = UnifiedLoss(V, primary_loss_type="standard", load_balancing_per_sequence=True, **options)
    plain = UnifiedLoss(V, primary_loss_type="standard")
    numbers = Numbers(0)

    def balanced(n):
        logits, targets = numbers.leaf(n, 3, V), numbers.integers(0, V, n, 3)
        return balancing, {"logits": logits, "targets": targets, "gate_logits": numbers.leaf(n, 3, E)}

    def with_negatives(n):
        logits, targets = numbers.leaf(2, 3, V), numbers.integers(0, V, 2, 3)
        return plain, {"logits": logits, "targets": targets, "negative_ids": numbers.integers(0, V, 2, 3, n)}

    for call in (balanced, with_negatives):
        torch._dynamo.reset()
        backend = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(lambda loss_fn, given: loss_fn(**given), backend=backend, fullgraph=True)
        for n in (2, 3, 4, 5, 7):
            compiled(*call(n)).backward()
        assert backend.frame_count == 2, call.__name__


@pytest.mark.parametrize("counts", [[10, 11, 12, 13], [10.0, 11.0, 12.0, 0.0, 2.0**24 + 1]])  # an int 0 is kept apart
def test_the_number_of_items_compiles_twice(counts):
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    loss_fn = UnifiedLoss(V, primary_loss_type="standard")
    compiled = torch.compile(loss_fn, backend=backend, fullgraph=True)
    given = arguments("plain", 5, torch.float32, seed=0)
    for n_items in counts:
        expected = loss_fn(**given, num_items_in_batch=n_items)
        torch.testing.assert_close(compiled(**given, num_items_in_batch=n_items), expected)
    assert backend.frame_count == 2
