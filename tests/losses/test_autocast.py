"""What computes in float32 on purpose does so under torch.autocast too, where values nearly cancel."""

import pytest
import torch
from support.strategies import Numbers

from ava_ext import AuxiliaryLoss, ConsistencyLoss, ContrastiveLoss, DiversityLoss, PerplexityLoss
from ava_ext.losses.auxiliary import global_load_balancing_loss
from ava_ext.losses.moe import MoEBalancer
from ava_ext.losses.quantile_balancing import count_required_bias
from ava_ext.ops import router_statistics
from ava_ext.ops.without_kernels import router_rows

E, K = 8, 2


def alike(numbers, *shape, distance=1e-3):
    """Vectors that are nearly one and the same."""
    return (numbers.normal(shape[-1]) + distance * numbers.normal(*shape)).float()


def balanced(gates):
    balancer = MoEBalancer(E, K, expert_bias_rate=0.0)
    balancer.expert_load.copy_(torch.linspace(0.1, 0.15, E))
    return balancer(gates)[0]


def globally_balanced(gates):
    statistics = router_statistics([gates.unsqueeze(0)], k=K)
    return global_load_balancing_loss(statistics, statistics.counts * 3, k=K, convention="switch")


CASES = {
    "info_nce": lambda x: ContrastiveLoss(temperature=0.06)(5 * x[0], x[0]),
    "simctg": lambda x: ContrastiveLoss(margin=1e-4)(x),
    "cosine": lambda x: DiversityLoss()(x),
    "dot": lambda x: DiversityLoss(similarity="dot")(x),
    "l2": lambda x: DiversityLoss(similarity="l2")(x),
    "kl": lambda x: ConsistencyLoss("kl")(x[0], x[1]),
    "js": lambda x: ConsistencyLoss("js")(x[0], x[1]),
    "perplexity": lambda x: PerplexityLoss()(x, torch.zeros(x.shape[:-1], dtype=torch.int64)),
    "auxiliary": lambda x: AuxiliaryLoss(K)(x[0]),
    "sequences": lambda x: AuxiliaryLoss(K, per_sequence=True)(x.unsqueeze(0)),
    "balance": lambda x: balanced(x[0]),
    "global": lambda x: globally_balanced(x[0]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_nothing(name, dtype):
    given = alike(Numbers(20), 3, 40, E).requires_grad_()
    expected = CASES[name](given)
    with torch.autocast("cpu", dtype):
        got = CASES[name](given)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    gradients = (torch.autograd.grad(value, given)[0] for value in (got, expected))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_autocast_changes_no_quantile():
    gates, bias = alike(Numbers(21), 1, 300, E), torch.zeros(1, E)
    expected = count_required_bias([gates], None, bias, K)
    with torch.autocast("cpu", torch.bfloat16):
        assert (count_required_bias([gates], None, bias, K) == expected).all()


# autocast leaves float64 as it is; a device without it has float32
def test_autocast_changes_nothing_on_a_device_without_float64(monkeypatch):
    monkeypatch.setattr(router_rows, "widest_dtype", lambda device: torch.float32)
    gates = alike(Numbers(22), 1, 3000, E)

    def run():
        measured = router_rows.router_statistics([gates], None, None, None, None, 1, K, False)
        upstream = Numbers(22)
        of_experts = (upstream.normal(1, E).float() for _ in range(2))
        of_groups = (upstream.normal(1).float() for _ in range(2))
        gradient = router_rows.router_gradient(
            [gates], None, measured[-1], None, None, *of_experts, *of_groups, 1, False
        )
        return (*measured, gradient)

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(), expected, rtol=0, atol=0)
