"""The examples of docstrings run, and print what they say.

An example may use what a reader has at hand: a model, an optimizer, a batch and the tensors of a forward, which
`names_at_hand` makes anew for each docstring. An example that gives a value has to show or to assign it.
"""

import doctest
import functools
import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import nn

import ava_ext
from ava_ext import functional, ops
from ava_ext.ops import RowFlags, row_loss, row_options

V, H, E = 32000, 512, 8  # vocab_size, hidden_size and n_experts of the examples


@functools.cache
def lm_head():  # a tenth of a second to make, and examples do not change it
    return nn.Linear(H, V)


def head_loss(logits, targets, row_weights):
    options, flags = row_options(row_weights), RowFlags.CROSS_ENTROPY
    return row_loss(logits, targets, options, flags=flags, row_weights=row_weights, reduction="sum")


def names_at_hand():
    """What the examples may use without making it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, 4), nn.Linear(4, V))
    input_ids, targets = torch.randint(V, (2, 6)), torch.randint(V, (2, 6))
    hidden_states, gate_logits = torch.randn(2, 6, H, requires_grad=True), torch.randn(12, E, requires_grad=True)
    return {
        "torch": torch,
        "nn": nn,
        "model": model,
        "lm_head": lm_head(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "input_ids": input_ids,
        "targets": targets,
        "attention_mask": torch.ones_like(targets),
        "hidden_states": hidden_states,
        "logits": model(input_ids),  # [2, 6, V]
        "heads": [model(input_ids) for _ in range(2)],
        "confidence": torch.rand(2, 6),
        "head_loss": head_loss,
        "gate_logits": gate_logits,  # [12, E]
        "expert_indices": gate_logits.topk(2).indices,
        "actions": targets,
        "advantages": torch.randn(2, 6),
        "loss": nn.functional.cross_entropy(model(input_ids).flatten(0, 1), targets.flatten()),
    }


def heads_at_hand():
    """What the example of LinearLogits shows the use of: a loss with heads of the model."""
    loss_fn = ava_ext.AdaptiveMTPLoss(V, num_future_tokens=2)
    return {"h": torch.randn(2, 6, H), "further_heads": [lm_head()] * 2, "loss_fn": loss_fn}


def modules():
    """All but the library, and what wants other stacks or ranks: tests/integrations and tests/distributed run those."""
    names = (module.name for module in pkgutil.walk_packages(ava_ext.__path__, "ava_ext."))
    left_out = ("ava_ext._C", "ava_ext.integrations", "ava_ext.distributed")
    return [importlib.import_module(name) for name in names if not name.startswith(left_out)]


def examples():
    """{name of a class or function: its module and its doctest}, where there is an example.

    Of ava_ext.ops, what is public; in the other modules, everything.
    """
    finder, found = doctest.DocTestFinder(), {}
    for module in modules():
        for test in finder.find(module, module.__name__):
            own_name = test.name.removeprefix(module.__name__).lstrip(".").partition(".")[0]
            is_internal = module.__name__.startswith("ava_ext.ops.") and own_name not in ops.__all__
            if test.examples and not is_internal:
                found[test.name] = (module, test)
    return found


EXAMPLES = examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs_and_prints_what_it_says(name):
    module, test = EXAMPLES[name]
    public = {name: getattr(owner, name) for owner in (ops, ava_ext) for name in owner.__all__}
    own_name = name.rpartition(".")[2]
    test.globs = {"ava_ext": ava_ext} | public | names_at_hand()
    if hasattr(module, own_name):  # not a method
        test.globs[own_name] = getattr(module, own_name)
    if own_name == "LinearLogits":
        test.globs |= heads_at_hand()
    messages = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=messages.append, clear_globs=False)
    assert not messages, "".join(messages)


def public_objects():
    for module in (ava_ext, ops, functional):
        for name in getattr(module, "__all__", ("cross_entropy", "linear_cross_entropy")):
            value = getattr(module, name)
            is_record = inspect.isclass(value) and issubclass(value, (tuple, int))  # fields, or flags
            if callable(value) and not is_record:
                yield f"{value.__module__}.{value.__qualname__}"


@pytest.mark.parametrize("name", sorted(set(public_objects())))
def test_public_names_have_an_example(name):
    assert name in EXAMPLES
