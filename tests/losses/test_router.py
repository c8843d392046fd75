"""A call's router: layers without one, choices that are not given, and what both router losses see of them."""

import pytest
import torch
from support.strategies import Numbers

from ava_ext import AuxiliaryLoss, UnifiedLoss
from ava_ext.losses.moe import MoEBalancer

V, E, K, N_ROWS = 5, 4, 2, 6
OPTIONS = {
    "primary_loss_type": "standard", "num_experts": E, "num_experts_per_token": K, "num_moe_layers": 2,
    "use_moe_balancing": True, "use_auxiliary_loss": True, "load_balancing_weight": 0.5, "router_z_weight": 0.2,
    "router_score": "sigmoid",
}  # fmt: skip


def call(loss_fn, **router):
    numbers = Numbers(0)
    return loss_fn(numbers.normal(2, 3, V), numbers.integers(0, V, 2, 3), **router, return_detailed=True)


# -- layers without a router: None, as transformers' mixed models return them


@pytest.mark.parametrize("with_indices", [False, True])
@pytest.mark.parametrize("where", [(0,), (1, 3), (4,), (0, 1, 2)])
def test_layers_without_a_router_are_left_out(where, with_indices):
    numbers = Numbers(1)
    gates = [numbers.leaf(N_ROWS, E) for _ in range(2)]
    indices = [gate.topk(K).indices for gate in gates]

    def mixed(layers):
        layers = list(layers)
        for position in where:
            layers.insert(position, None)
        return tuple(layers)

    def run(form):
        loss_fn = UnifiedLoss(V, **OPTIONS)
        loss_fn.moe_balancer.expert_load.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.0, 0.0]]))
        router = {"gate_logits": form(gates), "expert_indices": form(indices) if with_indices else None}
        result = call(loss_fn, **router)
        return result, torch.autograd.grad(result["total_loss"], gates), dict(loss_fn.state_dict())

    torch.testing.assert_close(run(mixed), run(tuple), rtol=0, atol=0)
    auxiliary = AuxiliaryLoss(K)
    torch.testing.assert_close(auxiliary(mixed(gates)), auxiliary(gates), rtol=0, atol=0)
    balancer = MoEBalancer(E, K, num_moe_layers=2)
    torch.testing.assert_close(balancer(mixed(gates), mixed(indices)), balancer(gates, indices), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("router", "error", "message"),
    [
        ({"gate_logits": ()}, ValueError, "gate_logits: expected num_moe_layers = 2 layers, got 0"),
        ({"gate_logits": (None, None)}, ValueError, "gate_logits: expected num_moe_layers = 2 layers, got 0"),
        ({"gate_logits": (None, torch.zeros(6, E))}, ValueError, "gate_logits: expected num_moe_layers = 2 .* got 1"),
        ({"gate_logits": None}, ValueError, "unified_loss: use_moe_balancing needs gate_logits, got None"),
        (
            {"gate_logits": [torch.zeros(6, E), [[0.0] * E] * 6]},
            TypeError,
            "gate_logits: expected a torch.Tensor or None in every layer, got list in layer 1",
        ),
        (
            {"gate_logits": torch.zeros(2, 6, E), "expert_indices": [torch.zeros(6, K).long(), None]},
            ValueError,
            "expert_indices: expected 2 layers, got 1",
        ),
    ],
)
def test_layers_that_are_missing_are_named(router, error, message):
    with pytest.raises(error, match=message):
        call(UnifiedLoss(V, **OPTIONS), **router)


@pytest.mark.parametrize(
    ("outputs", "error", "message"),
    [
        ([], ValueError, "expected expert_outputs of at least 1 expert, got 0"),
        ([None, torch.zeros(6, 3)], TypeError, r"expected expert_outputs\[0\] to be a torch.Tensor, got NoneType"),
        ([torch.zeros(6, 3), None], TypeError, r"expected expert_outputs\[1\] to be a torch.Tensor, got NoneType"),
    ],
)
def test_expert_outputs_that_are_missing_are_named(outputs, error, message):
    with pytest.raises(error, match=message):
        call(UnifiedLoss(V, use_diversity_loss=True), expert_outputs=outputs)


@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        ([], ValueError, r"additional_logits of num_future_tokens = 2 times .*, got \[\]"),
        ([torch.zeros(2, 3, V), None], TypeError, r"additional_logits\[1\]: expected logits to be a torch.Tensor"),
        ([None] * 2, TypeError, r"additional_logits\[0\]: expected logits .* got NoneType"),
    ],
)
def test_heads_that_are_missing_are_named(heads, error, message):
    loss_fn = UnifiedLoss(V, primary_loss_type="adaptive_mtp", num_future_tokens=2, use_confidence_weighting=False)
    with pytest.raises(error, match=message):
        call(loss_fn, additional_logits=heads)


# -- choices that are not given


def test_a_bias_that_follows_our_own_choices_balances_a_skewed_router():
    """A DeepSeek-V3 router: it adds expert_bias to its sigmoid scores before its top-k, and tells the loss nothing."""
    loss_fn = UnifiedLoss(V, **OPTIONS | {"num_moe_layers": 1, "expert_bias_rate": 0.01})
    n_rows = 300
    numbers = Numbers(2)
    gates = numbers.normal(n_rows, E) + torch.tensor([1.5, 0.5, 0.0, -1.0])
    logits, targets = numbers.normal(n_rows, V), numbers.integers(0, V, n_rows)

    def violation(counts):
        return (counts.max() / counts.mean() - 1).item()

    seen = []
    for _ in range(120):
        chosen = (gates.sigmoid() + loss_fn.moe_balancer.expert_bias.double()).topk(K).indices
        models_own = torch.bincount(chosen.flatten(), minlength=E).double()

        result = loss_fn(logits, targets, gate_logits=gates, return_detailed=True)
        seen.append(violation(models_own))
        assert result["moe_max_violation"].item() == pytest.approx(seen[-1], rel=1e-12)
    counts = loss_fn.moe_balancer.expert_counts
    assert counts.sum() == 120 * n_rows * K
    assert seen[0] > 0.4
    assert seen[-1] < 0.1


def test_the_load_balancing_term_sees_the_choice_that_the_bias_makes():
    numbers = Numbers(3)
    gates, bias = numbers.normal(2, N_ROWS, E), numbers.normal(2, E)
    loss_fn = UnifiedLoss(V, **OPTIONS)
    loss_fn.moe_balancer.expert_bias.copy_(bias)
    chosen = (gates.sigmoid() + bias.float().double().unsqueeze(1)).topk(K).indices
    assert not torch.equal(chosen.sort().values, gates.topk(K).indices.sort().values)
    given = UnifiedLoss(V, **OPTIONS)
    expected = call(given, gate_logits=gates, expert_indices=chosen)
    torch.testing.assert_close(call(loss_fn, gate_logits=gates), expected, rtol=1e-12, atol=0)


def test_a_softmax_routers_choices_have_to_be_given():
    options = OPTIONS | {"router_score": "softmax"}
    gates = Numbers(4).normal(2, N_ROWS, E)
    with pytest.raises(ValueError, match="expected expert_indices: expert_bias follows what the router chose"):
        call(UnifiedLoss(V, **options), gate_logits=gates)
    without_bias = UnifiedLoss(V, **options, expert_bias_rate=0.0)
    given = call(UnifiedLoss(V, **options), gate_logits=gates, expert_indices=gates.topk(K).indices)
    torch.testing.assert_close(call(without_bias, gate_logits=gates), given, rtol=0, atol=0)
