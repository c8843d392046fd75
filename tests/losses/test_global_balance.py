"""Load balancing of a global batch: micro-batches and ranks add up to the whole batch, value and gradient."""

import pytest
import torch
from support.strategies import Numbers

from ava_ext import UnifiedLoss
from ava_ext.losses.auxiliary import global_load_balancing_loss, load_balancing_loss
from ava_ext.ops import router_statistics

E, K, LAYERS = 5, 2, 3
EXACT = {"rtol": 1e-12, "atol": 1e-15}
# of 8 texts: 4 micro-batches of 2, 2 ranks of 4, and shares of different sizes, one of them empty
SPLITS = {"4 x 2": [2, 2, 2, 2], "2 ranks": [4, 4], "uneven": [1, 0, 5, 2]}


def make_batch():
    numbers = Numbers(0)
    return numbers.leaf(LAYERS, 8, 6, E, scale=2.0), numbers.true(0.7, 8, 6)


def statistics(gates, mask):
    return router_statistics(gates.flatten(1, 2), None, mask.flatten(), k=K)


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS.keys())
@pytest.mark.parametrize("convention", ["switch", "huggingface"])
@pytest.mark.parametrize("k", [K, None])
def test_parts_add_up(sizes, convention, k):
    gates, mask = make_batch()
    whole = load_balancing_loss(statistics(gates, mask), k=k, convention=convention)
    parts = [
        statistics(*part) for part in zip(gates.split(sizes, 1), mask.split(sizes), strict=True) if part[1].numel()
    ]
    counts = sum(part.counts for part in parts)
    total = sum(global_load_balancing_loss(part, counts, k=k, convention=convention) for part in parts)
    torch.testing.assert_close(total, whole, **EXACT)
    (gradient,), (expected,) = (torch.autograd.grad(loss, gates) for loss in (total, whole))
    torch.testing.assert_close(gradient, expected, **EXACT)


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS.keys())
def test_in_the_whole_loss(sizes):
    gates, mask = make_batch()
    numbers = Numbers(1)
    logits, targets = numbers.leaf(8, 6, 7), numbers.integers(0, 7, 8, 6)
    targets[:, :3] = -100  # prompts are routed too: rows of the router are not those that count
    n_items = int(((targets != -100) & mask).sum())
    loss_fn = UnifiedLoss(
        7,
        primary_loss_type="standard",
        num_experts=E,
        num_experts_per_token=K,
        num_moe_layers=LAYERS,
        use_auxiliary_loss=True,
        load_balancing_weight=0.5,
        router_z_weight=0.0,
    )
    whole = loss_fn(logits, targets, mask, gate_logits=gates)
    counts = statistics(gates.detach(), mask).counts
    total = 0
    for rows in torch.arange(8).split(sizes):
        if len(rows):
            given = {"gate_logits": gates[:, rows], "global_expert_counts": counts, "num_items_in_batch": n_items}
            total = total + loss_fn(logits[rows], targets[rows], mask[rows], **given)
    torch.testing.assert_close(total, whole, **EXACT)
    gradients = (torch.autograd.grad(loss, (gates, logits)) for loss in (total, whole))
    torch.testing.assert_close(*gradients, **EXACT)


def test_no_choice_and_compiled():
    gates, mask = make_batch()
    part = statistics(gates, torch.zeros_like(mask))
    assert global_load_balancing_loss(part, torch.zeros(LAYERS, E)) == 0
    assert global_load_balancing_loss(part, torch.ones(LAYERS, E)) == 0

    def loss(gates):
        return global_load_balancing_loss(statistics(gates, mask), torch.ones(LAYERS, E), k=K)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(gates)
    torch.testing.assert_close(compiled, loss(gates), **EXACT)


def test_bad_input_is_named():
    gates, mask = make_batch()
    part = statistics(gates, mask)
    with pytest.raises(ValueError, match=r"expected global_counts of shape \[3, 5\], got \[5\]"):
        global_load_balancing_loss(part, torch.ones(E))
    with pytest.raises(ValueError, match="expected convention to be one of"):
        global_load_balancing_loss(part, torch.ones(LAYERS, E), convention="other")
    loss_fn = UnifiedLoss(7, num_experts=E, use_auxiliary_loss=True, load_balancing_per_sequence=True)
    given = {
        "gate_logits": gates[0],
        "expert_indices": gates[0].topk(K).indices,
        "global_expert_counts": part.counts[:1],
    }
    with pytest.raises(ValueError, match="expected no global_expert_counts with load_balancing_per_sequence=True"):
        loss_fn(torch.randn(8, 6, 7).double(), torch.zeros(8, 6, dtype=torch.int64), **given)
