"""MoE balancing: the steering term against its formula, and the state across micro-steps, resets and casts."""

import pytest
import torch
from support.processes import on_ranks
from torch import distributed

from ava_ext import UnifiedLoss
from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.auxiliary import AuxiliaryLoss
from ava_ext.losses.moe import MoEBalancer

LAYERS, EXPERTS, K = 2, 4, 2


def make_balancer(**options):
    defaults = {"num_experts": EXPERTS, "num_experts_per_token": K, "num_moe_layers": LAYERS, "use_moe_balancing": True}
    defaults |= {"gradient_balance_weight": 0.1}
    return MoEBalancer.from_config(UnifiedLossConfig(vocab_size=10, **(defaults | options)))


def random_router(seed=0, n_rows=11):
    generator = torch.Generator().manual_seed(seed)
    gate_logits = torch.randn(LAYERS, n_rows, EXPERTS, generator=generator, dtype=torch.float64)
    indices = torch.rand(LAYERS, n_rows, EXPERTS, generator=generator).topk(K).indices
    return gate_logits, indices, torch.rand(n_rows, generator=generator) < 0.7


def count(indices, mask):
    """Counts of the masked rows, one index at a time."""
    counts = torch.zeros(LAYERS, EXPERTS)
    for layer in range(LAYERS):
        for row in range(indices.shape[1]):
            for expert in indices[layer, row].tolist():
                counts[layer, expert] += float(mask[row])
    return counts


def steering_term(gate_logits, load, mask, weight=0.1):
    """The formula, layer by layer, from softmax and plain means."""
    terms = []
    for layer in range(LAYERS):
        p = gate_logits[layer][mask].softmax(-1).mean(0)
        terms.append(weight * EXPERTS * sum((load[layer, e] - 1 / EXPERTS) * p[e] for e in range(EXPERTS)))
    return sum(terms) / LAYERS


def test_term_and_metrics():
    gate_logits, indices, mask = random_router()
    balancer = make_balancer()
    first = balancer(gate_logits, indices, mask)
    assert first.term.abs() < 1e-8  # nothing is committed yet
    balancer.step()
    got = balancer(gate_logits, indices, mask)
    counts = count(indices, mask)
    load = 0.9 / EXPERTS + 0.1 * counts / counts.sum(-1, keepdim=True)
    torch.testing.assert_close(got.term, steering_term(gate_logits, load, mask).double(), rtol=1e-6, atol=1e-9)
    assert abs(got.term) > 1e-4
    cv = torch.stack([c.std(unbiased=False) / c.mean() for c in counts]).mean()
    violation = torch.stack([c.max() / c.mean() - 1 for c in counts]).mean()
    torch.testing.assert_close(got.moe_cv.float(), cv)
    torch.testing.assert_close(got.moe_max_violation.float(), violation)
    assert not got.moe_cv.requires_grad


def test_gradcheck():
    gate_logits, indices, mask = random_router(n_rows=5)
    for score in ("softmax", "sigmoid"):
        balancer = make_balancer(router_score=score).eval()
        balancer.expert_load.copy_(torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.0, 0.5, 0.5, 0.0]]))
        assert torch.autograd.gradcheck(lambda x, b=balancer: b(x, indices, mask).term, gate_logits.requires_grad_())


def test_zero_at_balance():
    balancer = make_balancer(num_moe_layers=1, num_experts_per_token=1, expert_bias_rate=0.0)
    gate_logits = torch.eye(4).mul(5).repeat(3, 1).requires_grad_()
    balancer(gate_logits)
    balancer.step()
    got = balancer(gate_logits)
    got.term.backward()
    assert got.term.abs() < 1e-8 and gate_logits.grad.abs().max() < 1e-8
    assert got.moe_cv == 0 and got.moe_max_violation == 0


def test_micro_steps_add_up_to_one_big_step():
    gate_logits, indices, mask = random_router(n_rows=20)
    whole, parts = make_balancer(), make_balancer()
    whole(gate_logits, indices, mask)
    for rows in (slice(0, 3), slice(3, 15), slice(15, 20)):
        parts(gate_logits[:, rows], indices[:, rows], mask[rows])
    assert torch.equal(parts.expert_load, torch.full((LAYERS, EXPERTS), 0.25))  # nothing is committed before step()
    assert (parts.expert_bias == 0).all()
    for balancer in (whole, parts):
        balancer.step()
        counts = count(indices, mask)
        load = 0.9 / EXPERTS + 0.1 * counts / counts.sum(-1, keepdim=True)
        torch.testing.assert_close(balancer.expert_load, load)
        expected_bias = 1e-3 * torch.sign(counts.mean(-1, keepdim=True) - counts)
        assert torch.equal(balancer.expert_bias, expected_bias)
        assert (balancer.pending_counts == 0).all()
        assert torch.equal(balancer.expert_counts, counts)
        assert balancer.total_tokens == mask.sum()
    balancer.step()  # without rows in between: nothing to learn from
    torch.testing.assert_close(balancer.expert_load, load)
    assert torch.equal(balancer.expert_bias, expected_bias)


def test_term_uses_the_load_that_was_committed_before_the_call():
    gate_logits, indices, mask = random_router()
    balancer = make_balancer()
    balancer(gate_logits[:, :4], indices[:, :4])
    balancer.step()
    load = balancer.expert_load.clone()
    balancer(gate_logits[:, 4:], indices[:, 4:])  # pending: no call reads it
    term = balancer(gate_logits, indices, mask).term
    torch.testing.assert_close(term, steering_term(gate_logits, load, mask).double(), rtol=1e-6, atol=1e-9)
    balancer.step()
    assert (balancer.expert_load - load).abs().max() > 1e-3


def test_evaluation_changes_nothing():
    gate_logits, indices, mask = random_router()
    balancer = make_balancer()
    balancer(gate_logits, indices, mask)
    balancer.step()
    before = {name: value.clone() for name, value in balancer.named_buffers()}
    expected = steering_term(gate_logits, balancer.expert_load, mask).double()
    with torch.no_grad():
        in_no_grad = balancer(gate_logits, indices, mask).term
    balancer.eval()
    for term in (in_no_grad, balancer(gate_logits, indices, mask).term):
        torch.testing.assert_close(term, expected, rtol=1e-6, atol=1e-9)
    for name, value in balancer.named_buffers():
        assert torch.equal(value, before[name]), name


def test_backward_after_the_commit():
    gate_logits, indices, mask = random_router()
    gate_logits.requires_grad_()
    for balancer in (make_balancer(), make_balancer().eval()):
        term = balancer(gate_logits, indices, mask).term
        expected = torch.autograd.grad(term, gate_logits, retain_graph=True)[0]
        balancer.train()(gate_logits, indices)
        balancer.step()
        assert torch.equal(torch.autograd.grad(term, gate_logits)[0], expected)


def test_no_counted_row():
    gate_logits, indices, mask = random_router()
    gate_logits.requires_grad_()
    balancer = make_balancer()
    balancer(gate_logits, indices, mask)
    balancer.step()
    before = {name: value.clone() for name, value in balancer.named_buffers()}
    got = balancer(gate_logits, indices, torch.zeros_like(mask))
    assert all(value == 0 for value in got)
    got.term.backward()
    assert (gate_logits.grad == 0).all()
    balancer.step()
    for name, value in balancer.named_buffers():
        assert torch.equal(value, before[name]), name


def test_loss_free_bias_balances_a_skewed_router():
    torch.manual_seed(0)
    balancer = make_balancer(num_moe_layers=1, num_experts_per_token=1, expert_bias_rate=0.005)
    gate_logits = torch.randn(200, EXPERTS) * 0.5 + torch.tensor([1.0, 0.3, 0.0, -0.5])
    before = balancer(gate_logits, gate_logits.softmax(-1).topk(1).indices).moe_max_violation
    balancer.reset_statistics()
    for _ in range(120):
        chosen = (gate_logits.softmax(-1) + balancer.expert_bias).topk(1).indices
        after = balancer(gate_logits, chosen).moe_max_violation
        balancer.step()
    assert before > 1 and after < 0.2


def test_statistics_and_reset():
    gate_logits, indices, mask = random_router()
    balancer = make_balancer()
    for _ in range(2):
        balancer(gate_logits, indices, mask)
        balancer.step()
    statistics = balancer.statistics()
    counts = 2 * count(indices, mask)
    assert torch.equal(statistics["expert_counts"], counts)
    assert statistics["total_tokens"] == 2 * mask.sum()
    torch.testing.assert_close(statistics["max_violation"], counts.amax(-1) / counts.mean(-1) - 1)
    mean_probability = gate_logits[:, mask].softmax(-1).mean(1).float()
    torch.testing.assert_close(statistics["expert_scores"], mean_probability)
    bias = balancer.expert_bias.clone()
    balancer.reset_statistics()
    assert torch.equal(statistics["expert_counts"], counts), "statistics() must not be a view of the state"
    fresh = make_balancer().statistics()
    for name, value in balancer.statistics().items():
        assert torch.equal(value, fresh[name]), name
    assert torch.equal(balancer.expert_load, torch.full((LAYERS, EXPERTS), 0.25))
    assert torch.equal(balancer.expert_bias, bias) and bias.abs().max() > 0


def test_casts_and_state_dict():
    balancer = make_balancer().bfloat16()
    gate_logits, indices, mask = random_router()
    got = balancer(gate_logits.bfloat16(), indices, mask)
    assert got.term.dtype == torch.float32
    balancer.step()
    assert all(value.dtype == torch.float32 for value in balancer.buffers() if value.is_floating_point())
    other = make_balancer()
    other.load_state_dict(balancer.state_dict(), strict=True)
    assert torch.equal(other.expert_bias, balancer.expert_bias)
    assert set(balancer.state_dict()) == {"expert_load", "expert_counts", "expert_bias", "score_sum", "total_tokens"}
    other.load_state_dict({name: value.bfloat16() for name, value in balancer.state_dict().items()}, assign=True)
    assert other.expert_bias.dtype == torch.float32


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_choices_that_are_not_given_see_the_bias_or_are_refused(score):
    gate_logits = torch.randn(64, EXPERTS, generator=torch.Generator().manual_seed(3)) + torch.tensor([2.0, 1, 0, -1])
    options = {"num_moe_layers": 1, "router_score": score, "expert_bias_rate": 0.02}
    balancer = make_balancer(**options)
    if score == "softmax":
        with pytest.raises(ValueError, match="expected expert_indices: expert_bias follows what the router chose"):
            balancer(gate_logits)
        return
    first = balancer(gate_logits).moe_max_violation
    for _ in range(100):
        bias = balancer.expert_bias.clone()
        got = balancer(gate_logits)
        chosen = (gate_logits.sigmoid() + bias).topk(K).indices
        expected = make_balancer(**options)(gate_logits, chosen)
        assert got.moe_max_violation == expected.moe_max_violation
        balancer.step()
    assert first > 0.5 and got.moe_max_violation < 0.15


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_choices_that_a_loss_is_not_given_see_the_bias_or_are_refused(score):
    logits, targets, gate_logits = torch.zeros(2, 3, 5), torch.ones(2, 3).long(), torch.zeros(6, EXPERTS)
    options = {"num_experts": EXPERTS, "num_experts_per_token": 1, "use_moe_balancing": True, "auto_step": False}
    loss_fn = UnifiedLoss(5, router_score=score, **options)
    loss_fn.moe_balancer.expert_bias[0, 2] = 0.25
    if score == "softmax":
        with pytest.raises(ValueError, match="expected expert_indices: expert_bias follows what the router chose"):
            loss_fn(logits, targets, gate_logits=gate_logits)
        return
    loss_fn(logits, targets, gate_logits=gate_logits)
    loss_fn.step()
    assert loss_fn.moe_balancer.expert_counts.tolist() == [[6.0 * (expert == 2) for expert in range(EXPERTS)]]


def test_k_comes_from_the_choices():
    gate_logits, indices, mask = random_router()
    expected = make_balancer()(gate_logits, indices, mask)
    got = make_balancer(num_experts_per_token=None)(gate_logits, indices, mask)
    torch.testing.assert_close(tuple(got), tuple(expected), rtol=0, atol=0)
    with pytest.raises(ValueError, match="expected expert_indices, or num_experts_per_token"):
        make_balancer(num_experts_per_token=None, expert_bias_rate=0.0)(gate_logits)


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_compiles_without_a_graph_break_and_updates_its_state(backend):
    """The backward reads the load that the call has read, which step() has written over in the same graph."""
    torch._dynamo.reset()
    eager, compiled = make_balancer(), make_balancer()

    def call(balancer, gate_logits, indices, mask):
        got = balancer(gate_logits, indices, mask)
        balancer.step()
        return got

    run = torch.compile(call, fullgraph=True, backend=backend)
    for seed in range(3):
        gate_logits, indices, mask = random_router(seed)
        gradients = []
        for function, balancer in ((call, eager), (run, compiled)):
            leaf = gate_logits.clone().requires_grad_()
            function(balancer, leaf, indices, mask).term.backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)
    for (name, value), other in zip(eager.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(value, other, msg=name)


def balance_on_rank(rank):
    group = distributed.group.WORLD
    options = {"num_experts": 2, "num_experts_per_token": 1, "num_moe_layers": 1, "expert_bias_rate": 0.0}
    balancer = make_balancer(**options)
    rows = [[0, 0, 0, 1], [1, 1, 1, 0]][rank]  # skewed here, balanced in all
    gate_logits = torch.tensor([[2.0, 0], [0, 2]])[rows]
    balancer(gate_logits)
    balancer.step(group)
    torch.testing.assert_close(balancer.expert_load, torch.full((1, 2), 0.5))
    assert balancer.expert_counts.tolist() == [[4.0, 4.0]]
    with_bias = make_balancer(**options | {"expert_bias_rate": 1e-3})
    with_bias(gate_logits, gate_logits.argmax(-1, keepdim=True))
    with_bias.step(group)
    assert torch.equal(with_bias.expert_bias, torch.zeros(1, 2))
    loss_fn = AuxiliaryLoss(1, load_balancing_weight=1.0, router_z_weight=0.0, process_group=group)
    torch.testing.assert_close(loss_fn(gate_logits), torch.tensor(1.0))  # f = 1/2 for both
    assert AuxiliaryLoss(1, load_balancing_weight=1.0, router_z_weight=0.0)(gate_logits) > 1.1


@pytest.mark.skipif(not distributed.is_available(), reason="torch without torch.distributed")
def test_counts_are_summed_over_the_process_group():
    on_ranks(2, balance_on_rank)


def test_bad_input_is_named():
    gate_logits, indices, mask = random_router()
    balancer = make_balancer()
    with pytest.raises(ValueError, match="num_experts = 4 columns, got 5"):
        balancer(torch.zeros(LAYERS, 3, 5), indices)
    with pytest.raises(ValueError, match="num_moe_layers = 2 layers, got shape"):
        balancer(gate_logits[0], indices)
    with pytest.raises(ValueError, match=r"row_mask of 11 rows, got shape \[10\]"):
        balancer(gate_logits, indices, mask[1:])
    with pytest.raises(ValueError, match=r"expert_indices: expected shape \[1, 11, 2\], got \[11, 1\]"):
        balancer(gate_logits, list(indices[..., :1]), mask)
    assert (balancer.pending_counts == 0).all()


def test_a_centred_bias_has_the_differences_of_the_other():
    options = {"num_moe_layers": 2, "num_experts_per_token": 1, "expert_bias_rate": 0.01}
    plain, centred = make_balancer(**options), make_balancer(**options, expert_bias_centered=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        gate_logits = torch.randn(2, 12, plain.n_experts, generator=generator) + torch.arange(plain.n_experts)
        indices = gate_logits.topk(1).indices
        for balancer in (plain, centred):
            balancer(gate_logits.requires_grad_(), indices)
            balancer.step()
        torch.testing.assert_close(centred.expert_bias.mean(-1), torch.zeros(2), rtol=0, atol=1e-8)
        assert plain.expert_bias.mean(-1).abs().max() > 1e-3  # or nothing would be tested
        difference = plain.expert_bias - plain.expert_bias.mean(-1, keepdim=True)
        torch.testing.assert_close(centred.expert_bias, difference, rtol=0, atol=1e-8)


def test_a_nan_does_not_stay_in_the_scores():
    balancer = MoEBalancer(4, 2, expert_bias_rate=0.0)
    gate_logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    with_nan = gate_logits.clone()
    with_nan[0] = torch.nan
    for given in (with_nan, gate_logits):
        balancer(given)
        balancer.step()
    expected = gate_logits.softmax(-1).mean(0, keepdim=True)
    torch.testing.assert_close(balancer.statistics()["expert_scores"], expected)
