"""DistributedDataParallel at its defaults, accumulation without no_sync: the state is that of one process."""

import pytest
import torch
from support.processes import on_ranks
from support.strategies import HIDDEN_SIZE, Numbers

from ava_ext import LossMeter, UnifiedLoss
from ava_ext.losses.moe import MoEBalancer

V, E, WORLD_SIZE, N_MICRO_BATCHES, N_STEPS = 9, 3, 2, 3, 12
EXPERTS = {"num_experts": E, "num_experts_per_token": 1, "router_score": "sigmoid", "use_moe_balancing": True}
EXPERTS |= {"expert_bias_rate": 0.05, "moe_momentum": 0.5, "gradient_balance_weight": 0.0}
HEADS = {"use_mtp": True, "mtp_type": "adaptive", "num_future_tokens": 1}


class Model(torch.nn.Module):
    """What DistributedDataParallel wraps: layers that train, and the loss with every kind of state."""

    def __init__(self, process_group=None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(V, HIDDEN_SIZE)
        self.head, self.next_head = torch.nn.Linear(HIDDEN_SIZE, V), torch.nn.Linear(HIDDEN_SIZE, V)
        self.router = torch.nn.Linear(HIDDEN_SIZE, E)
        options = {"auto_step": False, "process_group": process_group, "pad_token_id": 0, "temperature_gain": 3.0}
        self.loss_fn = UnifiedLoss(V, HIDDEN_SIZE, **options, **EXPERTS, **HEADS)

    def forward(self, input_ids, targets, n_items):
        hidden_states = self.embedding(input_ids)
        parts = self.loss_fn(
            self.head(hidden_states),
            targets,
            additional_logits=[self.next_head(hidden_states)],
            confidence_scores=hidden_states.mean(-1).sigmoid(),
            gate_logits=self.router(hidden_states).flatten(0, 1),
            num_items_in_batch=n_items,
            return_detailed=True,
        )
        return parts


def micro_batches(step):
    """[N_MICRO_BATCHES, n_sequences, n_tokens] of input ids and targets; every sequence is of another length."""
    numbers = Numbers(step)
    input_ids, targets = (numbers.integers(1, V, N_MICRO_BATCHES, 2 * WORLD_SIZE, 6) for _ in range(2))
    for number in range(2 * WORLD_SIZE):
        targets[:, number, number + 2 :] = 0
    return input_ids, targets


def train(model, rank=None):
    """All micro-batches of every step, or the rank's share. Returns state, pending state and the meter's values."""
    loss_fn = getattr(model, "module", model).loss_fn
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    meter = LossMeter("world" if rank is not None else None)
    for step in range(N_STEPS):
        input_ids, targets = micro_batches(step)
        n_items = (targets != 0).sum()
        if rank is None:  # the whole batch at once
            input_ids, targets = input_ids.flatten(0, 1).unsqueeze(0), targets.flatten(0, 1).unsqueeze(0)
        else:
            input_ids, targets = input_ids[:, rank::WORLD_SIZE], targets[:, rank::WORLD_SIZE]
        optimizer.zero_grad()
        for micro_input_ids, micro_targets in zip(input_ids, targets, strict=True):
            parts = model(micro_input_ids, micro_targets, n_items)
            (parts["total_loss"] * (1 if rank is None else WORLD_SIZE)).backward()
            meter.update(parts)
        optimizer.step()
        loss_fn.step()
    # adaptive heads count calls, of which the whole batch is one
    state = {name: value.clone() for name, value in loss_fn.state_dict().items() if "adaptive_mtp" not in name}
    calls = loss_fn.adaptive_mtp.count.clone()
    return {"state": state, "calls": calls, "meter": meter.compute()}


def train_on_rank(rank):
    return train(torch.nn.parallel.DistributedDataParallel(Model("world")), rank)


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(WORLD_SIZE, train_on_rank)


@pytest.fixture(scope="module")
def whole():
    return train(Model())


pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def test_state_is_that_of_the_whole_batch_in_one_process(ranks, whole):
    expected = whole["state"]
    assert expected["temperature.value"] != 1
    assert expected["moe_balancer.expert_bias"].abs().sum() > 0
    assert expected["moe_balancer.expert_load"].std() > 0
    for found in ranks:
        torch.testing.assert_close(found["state"], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["state"], ranks[0]["state"], rtol=0, atol=0)
        for name in ("moe_balancer.expert_counts", "moe_balancer.expert_load", "temperature.count"):  # counts
            torch.testing.assert_close(found["state"][name], expected[name], rtol=1e-6, atol=0)
        assert found["calls"] == N_STEPS * N_MICRO_BATCHES * WORLD_SIZE


def test_meter_of_micro_batches_and_ranks_is_that_of_the_whole_batch(ranks, whole):
    # no means over the rows that count: of these the meter has the average of the calls
    others = {*MoEBalancer.METRICS, *(name for name in whole["meter"] if "_depth_" in name)}
    expected = {name: value for name, value in whole["meter"].items() if name not in others}
    assert expected.keys() >= {
        "total_loss",
        "main_loss",
        "mtp_loss",
        "cross_entropy",
        "perplexity",
        "accuracy",
        "entropy",
    }
    assert expected["n_tokens"] == sum((micro_batches(step)[1] != 0).sum() for step in range(N_STEPS))
    for found in ranks:
        assert found["meter"].keys() == whole["meter"].keys()
        torch.testing.assert_close({name: found["meter"][name] for name in expected}, expected, rtol=1e-4, atol=1e-6)
