"""Quantile balancing: the bias against exact quantiles in float64, and the parts of a step against the whole."""

import math

import pytest
import torch
from support.processes import on_ranks
from support.strategies import Numbers
from torch import distributed

from ava_ext import UnifiedLoss
from ava_ext.losses.moe import MoEBalancer
from ava_ext.losses.quantile_balancing import N_BINS

LAYERS, E, K, N_ROWS = 2, 8, 2, 4096
SKEW = torch.linspace(2, -2, E)


def make_balancer(**options):
    fixed = {"num_moe_layers": LAYERS, "router_score": "sigmoid", "expert_bias_update": "quantile"}
    return MoEBalancer(E, K, **(fixed | options))


def gate_logits(seed=0, n_rows=N_ROWS):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(LAYERS, n_rows, E, generator=generator) + SKEW
    return logits, torch.rand(n_rows, generator=generator) < 0.7


def exact_bias(
    logits,  # [n_layers, n_rows, n_experts], of the rows that count
    bias,  # [n_layers, n_experts]
):
    """The rule row by row, expert by expert, from sorted numbers."""
    n_rows, found = logits.shape[1], []
    for scores, b in zip(logits.double().sigmoid(), bias.double(), strict=True):
        threshold = (scores + b).sort(descending=True).values[:, K]
        required = (threshold.unsqueeze(-1) - scores).sort(dim=0).values
        of_layer = required[math.ceil(n_rows * K / E) - 1]
        found.append(of_layer - of_layer.mean())
    return torch.stack(found)


def width(bias):
    """Of the bins of each layer, [n_layers, 1]."""
    return ((bias.amax(-1) - bias.amin(-1) + 2) / N_BINS).unsqueeze(-1)


def violation(logits, bias):
    """Max load / mean load - 1 of the top-k that sees the bias, [n_layers]."""
    chosen = (logits.sigmoid() + bias.unsqueeze(1)).topk(K).indices
    counts = torch.stack([layer.flatten().bincount(minlength=E) for layer in chosen]).double()
    return counts.amax(-1) / counts.mean(-1) - 1


@pytest.mark.parametrize("spread", [0, 1])
def test_the_bias_is_the_quantile(spread):
    logits, mask = gate_logits()
    balancer = make_balancer()
    balancer.expert_bias.copy_(spread * SKEW)
    for _ in range(4):
        before = balancer.expert_bias.clone()
        balancer(logits, None, mask)
        balancer.step()
        error = (balancer.expert_bias - exact_bias(logits[:, mask], before)).abs()
        assert (error <= 1.5 * width(before)).all()  # a bin, and what the mean moves
        assert balancer.expert_bias.mean(-1).abs().max() < 1e-6
    assert error.max() > 0 and balancer.expert_bias.std() > 0.1


def test_a_mask_of_integers():
    logits, mask = gate_logits(n_rows=64)
    of_bools, of_integers = make_balancer(), make_balancer()
    of_bools(logits, None, mask)
    of_integers(logits, None, 2 * mask.long())
    assert torch.equal(of_integers.pending_required_bias, of_bools.pending_required_bias)


def test_it_balances_in_a_few_steps():
    logits, _ = gate_logits()
    balancer = make_balancer()
    assert violation(logits, balancer.expert_bias).min() > 1
    for _ in range(6):
        balancer(logits)
        balancer.step()
    assert violation(logits, balancer.expert_bias).max() < 0.05
    signs = make_balancer(expert_bias_update="sign")
    for _ in range(6):
        signs(logits)
        signs.step()
    assert violation(logits, signs.expert_bias).min() > 1


@pytest.mark.parametrize("sizes", [[512] * 8, [1024] * 4, [1, 0, 4095]])
def test_micro_batches_are_the_whole_batch(sizes):
    logits, mask = gate_logits()
    whole, parts = make_balancer(), make_balancer()
    for seed in range(3):
        logits, mask = gate_logits(seed)
        whole(logits, None, mask)
        whole.step()
        for rows in torch.arange(N_ROWS).split(sizes):
            if len(rows):
                parts(logits[:, rows], None, mask[rows])
        assert not torch.equal(parts.expert_bias, whole.expert_bias)
        parts.step()
        assert torch.equal(parts.expert_bias, whole.expert_bias)


def balance_on_rank(rank):
    logits, mask = gate_logits()
    whole, part = make_balancer(), make_balancer()
    rows = slice(0, 1000) if rank == 0 else slice(1000, N_ROWS)
    for _ in range(2):
        whole(logits, None, mask)
        whole.step()
        part(logits[:, rows], None, mask[rows])
        part.step(distributed.group.WORLD)
    assert torch.equal(part.expert_bias, whole.expert_bias)


@pytest.mark.skipif(not distributed.is_available(), reason="torch without torch.distributed")
def test_ranks_are_the_whole_batch():
    on_ranks(2, balance_on_rank)


def test_in_the_whole_loss():
    """Padding is left out, a call that is recomputed counts once, evaluation counts nothing."""
    numbers = Numbers(0)
    options = {"num_experts": E, "num_experts_per_token": K, "num_moe_layers": LAYERS, "router_score": "sigmoid"}
    loss_fn = UnifiedLoss(
        5, primary_loss_type="standard", use_moe_balancing=True, expert_bias_update="quantile", **options
    )
    logits, targets = numbers.normal(3, 40, 5).float(), numbers.integers(0, 5, 3, 40)
    gates, mask = gate_logits(n_rows=120)[0].requires_grad_(), numbers.true(0.7, 3, 40)

    def run(gates):
        return loss_fn(logits, targets, mask, gate_logits=gates)

    torch.utils.checkpoint.checkpoint(run, gates, use_reentrant=False).backward()
    expected = make_balancer()
    expected(gates.detach().requires_grad_(), None, mask.flatten())
    expected.step()
    assert torch.equal(loss_fn.moe_balancer.expert_bias, expected.expert_bias)
    loss_fn.eval()
    run(gates)
    loss_fn.step()
    assert torch.equal(loss_fn.moe_balancer.expert_bias, expected.expert_bias)


def test_rows_that_do_not_count_may_hold_anything():
    logits, mask = gate_logits()
    clean, dirty = make_balancer(), make_balancer()
    clean(logits, None, mask)
    dirty(logits.masked_fill(~mask.unsqueeze(-1), math.nan), None, mask)
    clean.step(), dirty.step()
    assert torch.equal(dirty.expert_bias, clean.expert_bias)
    dirty(logits, None, torch.zeros_like(mask))
    dirty.step()
    assert torch.equal(dirty.expert_bias, clean.expert_bias)


def test_compiled():
    eager, compiled = make_balancer(), make_balancer()

    def call(balancer, logits, mask):
        balancer(logits, None, mask)
        balancer.step()

    run = torch.compile(call, fullgraph=True, backend="aot_eager_decomp_partition")
    for seed in range(3):
        logits, mask = gate_logits(seed)
        call(eager, logits, mask), run(compiled, logits, mask)
    torch.testing.assert_close(compiled.expert_bias, eager.expert_bias)


def test_what_it_cannot_balance_is_refused():
    with pytest.raises(ValueError, match="expert_bias_update='quantile' needs router_score='sigmoid', got 'softmax'"):
        make_balancer(router_score="softmax")
    with pytest.raises(ValueError, match="expert_bias_update='quantile' expected k below num_experts = 8, got 8"):
        MoEBalancer(E, router_score="sigmoid", expert_bias_update="quantile")(
            torch.zeros(4, E), torch.arange(E).expand(4, E)
        )
