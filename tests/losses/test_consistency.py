"""Consistency against F.kl_div and against explicit mixtures."""

import math

import pytest
import torch
from torch.nn.functional import kl_div

from ava_ext.losses.consistency import ConsistencyLoss


def random_pair(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) * 2 for _ in range(2)]


def oracle(logits, targets, divergence, temperature):
    p, q = (targets / temperature).softmax(-1), (logits / temperature).softmax(-1)
    if divergence == "kl":
        rows = kl_div(q.log(), p, reduction="none").sum(-1)
    else:
        m = (p + q) / 2
        rows = (kl_div(m.log(), p, reduction="none") + kl_div(m.log(), q, reduction="none")).sum(-1) / 2
    return temperature**2 * rows.mean()


@pytest.mark.parametrize("divergence", ["kl", "js"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient(divergence, temperature):
    logits, targets = (x.requires_grad_() for x in random_pair(2, 3, 7))
    loss_fn = ConsistencyLoss(divergence, temperature)
    torch.testing.assert_close(
        loss_fn(logits, targets), oracle(logits, targets, divergence, temperature), rtol=1e-12, atol=0
    )
    assert torch.autograd.gradcheck(loss_fn, (logits, targets))


def test_hand_worked_values():
    same = torch.randn(3, 5)
    far = torch.tensor([[200.0, 0]]), torch.tensor([[0, 200.0]])
    assert ConsistencyLoss("kl")(same, same) == 0
    assert ConsistencyLoss("js")(*far).item() == pytest.approx(math.log(2))
    assert ConsistencyLoss("kl")(*far).item() == pytest.approx(200)


@pytest.mark.parametrize("divergence", ["kl", "js"])
def test_masked_columns_and_rows(divergence):
    logits, targets = random_pair(4, 7)
    mask = torch.tensor([1, 0, 1, 1])
    keep = mask.bool()
    expected = oracle(logits[keep][:, :5], targets[keep][:, :5], divergence, 1.0)
    for x in (logits, targets):
        x[:, 5:] = -torch.inf
        x[1] = torch.nan
        x.requires_grad_()
    loss = ConsistencyLoss(divergence)(logits, targets, mask)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    for x in (logits, targets):
        assert x.grad.isfinite().all() and (x.grad[1] == 0).all() and (x.grad[:, 5:] == 0).all()
        assert x.grad.abs().max() > 0


@pytest.mark.parametrize("divergence", ["kl", "js"])
def test_no_counted_row(divergence):
    logits = torch.full((3, 4), torch.nan, requires_grad=True)
    loss = ConsistencyLoss(divergence)(logits, logits.detach(), torch.zeros(3))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()
    assert ConsistencyLoss(divergence)(logits[:0], logits[:0]) == 0


def test_detached_targets_and_details():
    logits, targets = (x.bfloat16().requires_grad_() for x in random_pair(3, 4))
    got = ConsistencyLoss("js", detach_targets=True)(logits, targets, return_detailed=True)
    got["total_loss"].backward()
    assert targets.grad is None and logits.grad.abs().max() > 0
    assert got["total_loss"].dtype == torch.float32 and not got["consistency_loss"].requires_grad


def test_compiles_without_a_graph_break():
    logits, targets = random_pair(3, 4)
    compiled = torch.compile(ConsistencyLoss("js"), fullgraph=True, backend="aot_eager")
    mask = torch.tensor([1, 1, 0])
    torch.testing.assert_close(
        compiled(logits, targets, mask), ConsistencyLoss("js")(logits, targets, mask), rtol=1e-12, atol=0
    )


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"targets of shape \[3, 4\], got \[3, 5\]"):
        ConsistencyLoss()(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"attention_mask of shape \[3\], got \[4\]"):
        ConsistencyLoss()(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(4))
    with pytest.raises(ValueError, match="consistency_loss: expected logits of real numbers, got complex64"):
        ConsistencyLoss()(torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match="got 'tv'"):
        ConsistencyLoss("tv")
