"""A weighted sum of modules and functions."""

import math
import re

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

from ava_ext.losses.composite import CompositeLoss
from ava_ext.losses.perplexity import PerplexityLoss
from ava_ext.losses.scaling import AdaptiveLossScaling


def test_weighted_sum():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(4)

    def details(x, y):
        return {"total_loss": x.square().mean()}

    loss_fn = CompositeLoss(
        {"ce": cross_entropy, "ppl": PerplexityLoss(), "norm": details}, weights={"ppl": 0.25, "norm": 3}
    )
    expected = {"ce": cross_entropy(logits, targets), "norm": 3 * logits.square().mean()}
    expected["ppl"] = 0.25 * expected["ce"].exp()
    got = loss_fn(logits, targets, return_detailed=True)
    assert list(got) == ["total_loss", "ce", "ppl", "norm"]
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(got["total_loss"], sum(expected.values()), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda x: loss_fn(x, targets), logits)


def test_modules_are_registered():
    scaling = AdaptiveLossScaling(["main"])
    loss_fn = CompositeLoss({"scaled": scaling, "plain": lambda losses: losses["main"]})
    assert set(loss_fn.state_dict()) == {"losses.scaled.log_variance.main"}
    assert loss_fn({"main": torch.tensor(2.0)}) == 4


def test_compiles_without_a_graph_break():
    loss_fn = CompositeLoss({"a": mse_loss, "b": torch.nn.L1Loss()}, weights={"a": 2.0})
    x, y = torch.randn(3), torch.randn(3)
    torch.testing.assert_close(torch.compile(loss_fn, fullgraph=True, backend="aot_eager")(x, y), loss_fn(x, y))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"expected weights for \['a'\], got \['b'\]"):
        CompositeLoss({"a": mse_loss}, weights={"b": 1.0})
    with pytest.raises(ValueError, match=r"expected weights\['a'\] without requires_grad: no gradient is computed"):
        CompositeLoss({"a": mse_loss}, weights={"a": torch.nn.Parameter(torch.tensor(2.0))})
    for weight in ("2", True, np.True_, torch.tensor(True), None, math.nan, -math.inf):
        message = f"expected weights['a'] to be a finite number, got {weight!r}"
        with pytest.raises(ValueError, match=re.escape(message)):
            CompositeLoss({"a": mse_loss}, weights={"a": weight})
    for losses in ({}, {"total_loss": mse_loss}):
        with pytest.raises(ValueError, match="expected named losses"):
            CompositeLoss(losses)
    with pytest.raises(TypeError, match="composite_loss: expected a dict of named losses, got list"):
        CompositeLoss([mse_loss])
    with pytest.raises(ValueError, match=r"a scalar from 'a', got shape \[3\]"):
        CompositeLoss({"a": lambda x: x})(torch.zeros(3))
    with pytest.raises(ValueError, match="a scalar from 'a', got float"):
        CompositeLoss({"a": lambda x: 1.0})(torch.zeros(3))
