"""Auxiliary router losses against hand-worked values, transformers' formula and one-hot sums."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.auxiliary import (
    AuxiliaryLoss,
    load_balancing_loss,
    marginal_entropy,
    router_z_loss,
    squared_variation,
    token_entropy,
)
from ava_ext.ops.router_rows import router_statistics

EXPERTS, K = 4, 2


def random_router(seed=0, n_layers=3, n_rows=12):
    generator = torch.Generator().manual_seed(seed)
    gate_logits = torch.randn(n_layers, n_rows, EXPERTS, generator=generator, dtype=torch.float64) * 2
    indices = torch.rand(n_layers, n_rows, EXPERTS, generator=generator).topk(K).indices
    return gate_logits, indices, torch.rand(n_rows, generator=generator) < 0.7


def transformers_load_balancing(gate_logits, top_k, attention_mask):
    """transformers' load_balancing_loss_func, re-derived: layers concatenated, one_hot of the top-k, weighted means."""
    n_layers, n_experts = len(gate_logits), gate_logits[0].shape[-1]
    probability = torch.cat(list(gate_logits)).softmax(-1)
    expert_mask = one_hot(probability.topk(top_k, dim=-1).indices, n_experts).to(
        probability.dtype
    )  # [rows, k, experts]
    weight = attention_mask.reshape(-1).to(probability.dtype).repeat(n_layers)
    tokens_per_expert = (expert_mask * weight[:, None, None]).sum(0) / weight.sum()
    router_probability = (probability * weight[:, None]).sum(0) / weight.sum()
    return n_experts * (tokens_per_expert * router_probability.unsqueeze(0)).sum()


def test_huggingface_convention_is_transformers_formula():
    gate_logits, _, _ = random_router()
    attention_mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
    for mask in (attention_mask, torch.ones(2, 6, dtype=torch.long)):
        loss_fn = AuxiliaryLoss(
            K, load_balancing_weight=0.3, router_z_weight=0.0, load_balancing_convention="huggingface"
        )
        got = loss_fn(tuple(gate_logits), row_mask=mask.bool())
        torch.testing.assert_close(got, 0.3 * transformers_load_balancing(gate_logits, K, mask), rtol=1e-12, atol=0)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_switch_convention_with_one_hot(score):
    gate_logits, indices, mask = random_router()
    expected = 0.0
    for layer in range(3):
        p = gate_logits[layer][mask].softmax(-1) if score == "softmax" else gate_logits[layer][mask].sigmoid()
        p = p / p.sum(-1, keepdim=True)
        f = one_hot(indices[layer][mask], EXPERTS).double().mean(dim=(0, 1))
        expected += EXPERTS * (f * p.mean(0)).sum() / 3
    got = AuxiliaryLoss(K, load_balancing_weight=1.0, router_z_weight=0.0, router_score=score)(
        gate_logits, indices, mask
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("convention", "expected"), [("switch", 0.01), ("huggingface", 0.02)])
def test_perfect_balance_gives_alpha_or_k_alpha(convention, expected):
    indices = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]])
    loss_fn = AuxiliaryLoss(K, load_balancing_weight=0.01, router_z_weight=0.0, load_balancing_convention=convention)
    assert loss_fn(torch.zeros(4, EXPERTS), indices).item() == pytest.approx(expected, rel=1e-6)


def test_collapse_onto_one_expert_gives_n_experts_times_alpha():
    gate_logits = torch.tensor([50.0, 0, 0, 0]).repeat(5, 1)
    got = AuxiliaryLoss(1, load_balancing_weight=0.01, router_z_weight=0.0)(gate_logits)
    assert got.item() == pytest.approx(0.04, rel=1e-6)


def test_opposite_imbalances_cancel_only_where_layers_are_concatenated():
    layers = [torch.tensor([9.0, 0]).repeat(6, 1), torch.tensor([0.0, 9]).repeat(6, 1)]
    loss = {
        convention: AuxiliaryLoss(
            1, load_balancing_weight=1.0, router_z_weight=0.0, load_balancing_convention=convention
        )(layers)
        for convention in ("switch", "huggingface")
    }
    assert loss["switch"] > 1.99
    assert loss["huggingface"].item() == pytest.approx(1.0, rel=1e-5)


def test_per_sequence_is_the_mean_over_sequences_with_rows():
    gate_logits, indices, _ = random_router()
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()  # 3 sequences of 4
    loss_fn = AuxiliaryLoss(K, load_balancing_weight=1.0, router_z_weight=0.5, per_sequence=True)
    got = loss_fn(list(gate_logits.view(3, 3, 4, EXPERTS)), list(indices), mask, return_detailed=True)
    one = AuxiliaryLoss(K, load_balancing_weight=1.0, router_z_weight=0.0)
    parts = [one(gate_logits[:, rows], indices[:, rows]) for rows in (slice(0, 3), slice(8, 12))]
    torch.testing.assert_close(got["aux_load_balancing"], sum(parts) / 2, rtol=1e-12, atol=0)
    z = 0.5 * gate_logits[:, mask.view(-1)].logsumexp(-1).square().mean()
    torch.testing.assert_close(got["aux_router_z"], z, rtol=1e-12, atol=0)


def test_z_loss_entropies_and_variation():
    gate_logits, indices, mask = random_router()
    statistics = router_statistics(gate_logits, indices, mask, k=K)
    z = gate_logits[:, mask]
    p = z.softmax(-1)
    expect = {
        router_z_loss(statistics): z.logsumexp(-1).square().mean(),
        token_entropy(statistics): -(p * p.log()).sum(-1).mean(),
        marginal_entropy(statistics): -(p.mean(1) * p.mean(1).log()).sum(-1).mean(),
    }
    importance = (p * one_hot(indices[:, mask], EXPERTS).sum(2)).sum(1)
    variation = (importance.std(-1, unbiased=False) / importance.mean(-1)).square().mean()
    expect[squared_variation(statistics.importance_sum)] = variation
    for got, expected in expect.items():
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_hand_worked_values():
    uniform = router_statistics(torch.zeros(1, 8, EXPERTS), None, None, k=1)
    assert router_z_loss(uniform).item() == pytest.approx(math.log(4) ** 2)
    assert token_entropy(uniform).item() == marginal_entropy(uniform).item() == pytest.approx(math.log(4))
    sure = router_statistics(torch.eye(4)[None] * 1e3, None, None, k=1)
    assert token_entropy(sure) == 0
    assert marginal_entropy(sure).item() == pytest.approx(math.log(4))
    assert load_balancing_loss(sure, k=1) == 1
    assert squared_variation(torch.tensor([[1.0, 3.0], [2.0, 2.0]])).item() == pytest.approx(0.125)


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("own_choice", [False, True])
def test_gradcheck(per_sequence, own_choice):
    gate_logits, indices, mask = random_router(n_layers=2, n_rows=6)
    loss_fn = AuxiliaryLoss(K, load_balancing_weight=1.0, router_z_weight=0.7, per_sequence=per_sequence)
    gate_logits = gate_logits.view(2, 2, 3, EXPERTS).requires_grad_()
    indices = None if own_choice else indices
    assert torch.autograd.gradcheck(lambda x: loss_fn(x, indices, mask), gate_logits)


def test_gradcheck_of_the_other_functions():
    gate_logits, indices, mask = random_router(n_layers=2, n_rows=5)

    def losses(gate_logits):
        s = router_statistics(gate_logits, indices, mask, k=K)
        return token_entropy(s), marginal_entropy(s), squared_variation(s.importance_sum)

    assert torch.autograd.gradcheck(losses, gate_logits.requires_grad_())


@pytest.mark.parametrize("convention", ["switch", "huggingface"])
def test_no_counted_row(convention):
    gate_logits = torch.full((2, 5, EXPERTS), torch.nan, requires_grad=True)
    mask = torch.zeros(5, dtype=torch.bool)
    loss = AuxiliaryLoss(K, load_balancing_convention=convention)(gate_logits, None, mask)
    s = router_statistics(gate_logits, None, mask, k=K)
    loss = loss + token_entropy(s) + marginal_entropy(s) + squared_variation(s.importance_sum)
    loss.backward()
    assert loss == 0 and (gate_logits.grad == 0).all()


def test_detailed_adds_up_and_is_detached():
    gate_logits, indices, mask = random_router()
    gate_logits.requires_grad_()
    loss_fn = AuxiliaryLoss.from_config(
        UnifiedLossConfig(
            vocab_size=9, use_auxiliary_loss=True, num_experts=EXPERTS, num_experts_per_token=K, num_moe_layers=3
        )
    )
    got = loss_fn(gate_logits, indices, mask, return_detailed=True)
    assert set(got) == {"total_loss", "aux_load_balancing", "aux_router_z"}
    torch.testing.assert_close(got["total_loss"], got["aux_load_balancing"] + got["aux_router_z"], rtol=1e-12, atol=0)
    torch.testing.assert_close(got["total_loss"], loss_fn(gate_logits, indices, mask), rtol=0, atol=0)
    assert got["total_loss"].requires_grad and not got["aux_router_z"].requires_grad


def test_compiles_without_a_graph_break():
    gate_logits, indices, mask = random_router()
    for convention in ("switch", "huggingface"):
        loss_fn = AuxiliaryLoss(K, load_balancing_convention=convention)
        compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
        x, y = (gate_logits.clone().requires_grad_() for _ in range(2))
        loss_fn(tuple(x), indices, mask).backward()
        compiled(tuple(y), indices, mask).backward()
        torch.testing.assert_close(y.grad, x.grad, rtol=1e-12, atol=1e-18)


def test_bad_input_is_named():
    gate_logits, indices, mask = random_router()
    with pytest.raises(ValueError, match=r"one of .*, got 'mixtral'"):
        AuxiliaryLoss(K, load_balancing_convention="mixtral")
    with pytest.raises(ValueError, match="per_sequence=True needs"):
        AuxiliaryLoss(K, load_balancing_convention="huggingface", per_sequence=True)
    with pytest.raises(ValueError, match=r"per_sequence=True expects .* got \[12, 4\]"):
        AuxiliaryLoss(K, per_sequence=True)(gate_logits)
    with pytest.raises(ValueError, match=r"row_mask of 12 rows, got shape \[11\]"):
        AuxiliaryLoss(K)(gate_logits, indices, mask[1:])
    with pytest.raises(ValueError, match="num_experts = 8 columns, got 4"):
        AuxiliaryLoss(K, num_experts=8)(gate_logits)
    with pytest.raises(ValueError, match="between 1 and n_experts = 4, got 5"):
        AuxiliaryLoss(5)(gate_logits)
