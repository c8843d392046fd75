"""Uncertainty weighting: value, optimum, names."""

import pytest
import torch

from ava_ext.losses.scaling import AdaptiveLossScaling


def test_value_gradient_and_details():
    scaling = AdaptiveLossScaling(["main", "aux"]).double()
    with torch.no_grad():
        scaling.log_variance["main"].fill_(0.7)
        scaling.log_variance["aux"].fill_(-0.4)
    losses = {"aux": torch.tensor(0.3, dtype=torch.float64), "main": torch.tensor(2.0, dtype=torch.float64)}
    got = scaling(losses, return_detailed=True)
    s = torch.tensor([0.7, -0.4], dtype=torch.float64)
    parts = (-s).exp() * torch.tensor([2.0, 0.3], dtype=torch.float64) + s / 2
    torch.testing.assert_close(got["total_loss"], parts.sum())
    torch.testing.assert_close(got["main"], parts[0])
    torch.testing.assert_close(got["weight_aux"], (-s[1]).exp())
    assert not got["main"].requires_grad
    parameters = tuple(scaling.parameters())
    assert torch.autograd.gradcheck(lambda *p: scaling(losses), parameters)
    inputs = tuple(losses[name].requires_grad_() for name in ("main", "aux"))
    assert torch.autograd.gradcheck(lambda a, b: scaling({"main": a, "aux": b}), inputs)


def test_at_the_optimum_losses_of_any_scale_pull_alike():
    scaling = AdaptiveLossScaling(["small", "large"])
    losses = {"small": torch.tensor(0.01), "large": torch.tensor(100.0)}
    with torch.no_grad():
        for name, loss in losses.items():
            scaling.log_variance[name].copy_((2 * loss).log())
    got = scaling(losses, return_detailed=True)
    got["total_loss"].backward()
    for name, loss in losses.items():
        assert (got[f"weight_{name}"] * loss).item() == pytest.approx(0.5)
        assert scaling.log_variance[name].grad.item() == pytest.approx(0, abs=1e-6)


def test_compiles_without_a_graph_break():
    scaling = AdaptiveLossScaling(["main", "aux"])
    losses = {"main": torch.tensor(2.0), "aux": torch.tensor(0.3)}
    compiled = torch.compile(scaling, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(losses), scaling(losses))


def test_bad_input_is_named():
    scaling = AdaptiveLossScaling(["main", "aux"])
    with pytest.raises(ValueError, match=r"expected losses \['aux', 'main'\], got \['main'\]"):
        scaling({"main": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"a scalar for 'aux', got shape \[2\]"):
        scaling({"main": torch.tensor(1.0), "aux": torch.zeros(2)})
    with pytest.raises(TypeError, match=r"adaptive_loss_scaling: expected aux to be a torch.Tensor"):
        scaling({"main": torch.tensor(1.0), "aux": 0.5})
    for names in ("main", 2, [], ["a", "a"], ["total_loss", "a"], ["a", "weight_a"]):
        with pytest.raises(ValueError, match="a list of different names"):
            AdaptiveLossScaling(names)
