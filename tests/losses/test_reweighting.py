"""Token reweighting against plain PyTorch: the weights, that they are constants, and every way to the logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.strategies import Numbers

from ava_ext import LinearLogits, UnifiedLoss
from ava_ext.functional import cross_entropy, linear_cross_entropy

V = 11


def weights(logits, targets, kind, exponent):
    log_p = logits.log_softmax(-1)
    if kind == "dft":
        share = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1).exp()
    else:
        share = -(log_p.exp() * log_p).sum(-1) / math.log(logits.shape[-1])
    return share.pow(exponent).detach()


@pytest.mark.parametrize("exponent", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("kind", ["dft", "eaft"])
def test_weighted_cross_entropy(kind, exponent):
    numbers = Numbers(1)
    logits, targets = numbers.leaf(2, 6, V, scale=3.0), numbers.integers(0, V, 2, 6)
    targets[1, 3:] = -100
    options = {"token_reweighting": kind, "reweighting_exponent": exponent}
    got = UnifiedLoss(V, primary_loss_type="standard", **options)(logits, targets, return_detailed=True)
    counted = targets != -100
    each = F.cross_entropy(logits[counted], targets[counted], reduction="none")
    wanted = (weights(logits[counted], targets[counted], kind, exponent) * each).mean()
    torch.testing.assert_close(got["total_loss"], wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(got["cross_entropy"], each.detach().mean(), rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(value, logits)[0] for value in (got["total_loss"], wanted))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ["dft", "eaft"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hidden_states(kind, reduction):
    """One of the two is computed in forward, the other again in backward."""
    numbers = Numbers(2)
    states, weight, targets = numbers.leaf(7, 5), numbers.leaf(V, 5), numbers.integers(0, V, 7)
    options = {"token_reweighting": kind, "reduction": reduction, "linear_chunk_bytes": 200}
    got = linear_cross_entropy(states, weight, targets, **options)
    logits = F.linear(states, weight)
    wanted = weights(logits, targets, kind, 1.0) * F.cross_entropy(logits, targets, reduction="none")
    wanted = wanted if reduction == "none" else wanted.mean()
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    upstream = numbers.normal(*wanted.shape)
    gradients = (torch.autograd.grad(value, (states, weight), upstream) for value in (got, wanted))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(cross_entropy(LinearLogits(states, weight, None), targets, **options), got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_of_zero_hides_an_infinite_term(dtype):
    """A target whose column is masked has p = 0, and 0 times infinity must not be nan. A sure row has no entropy."""
    logits = torch.tensor([[0.0, 1.0, -math.inf], [500.0, 0.0, -500.0]], dtype=dtype, requires_grad=True)
    for kind, targets in (("dft", [2, 1]), ("eaft", [0, 0])):
        each = cross_entropy(logits, torch.tensor(targets), token_reweighting=kind, reduction="none")
        (gradient,) = torch.autograd.grad(each.sum(), logits)
        assert each.isfinite().all() and gradient.isfinite().all()
        assert each[1] <= 1e-200 and gradient[1].abs().max() <= 1e-200
    masked = cross_entropy(logits, torch.tensor([2, 1]), token_reweighting="dft", reduction="none")
    assert masked[0] == 0


def test_further_terms_and_heads_are_not_weighted():
    numbers = Numbers(3)
    arguments = {"logits": numbers.leaf(2, 6, V), "targets": numbers.integers(0, V, 2, 6)}
    arguments["hidden_states"] = numbers.leaf(2, 6, 4)
    options = {"primary_loss_type": "standard", "z_loss_weight": 0.1, "use_mtp": True, "num_future_tokens": 1}
    torch.manual_seed(0)
    plain = UnifiedLoss(V, 4, **options).double()
    torch.manual_seed(0)
    weighted = UnifiedLoss(V, 4, token_reweighting="dft", **options).double()
    parts = [loss_fn(**arguments, return_detailed=True) for loss_fn in (plain, weighted)]
    assert parts[1]["main_loss"] < parts[0]["main_loss"]
    for name in ("z_loss", "mtp_loss", "cross_entropy"):
        assert parts[1][name] == parts[0][name], name
