"""Two processes with half of the batch each do what one process does with all of it."""

import pytest
import torch
import torch.distributed
from support.processes import on_ranks
from support.strategies import HIDDEN_SIZE, Numbers

from ava_ext import UnifiedLoss

V, E, WORLD_SIZE = 9, 3, 2


class Model(torch.nn.Module):
    """Embedding, head and router, and the loss with heads of its own: what DistributedDataParallel wraps."""

    def __init__(self, is_fused, process_group=None):
        super().__init__()
        self.is_fused = is_fused
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(V, HIDDEN_SIZE)
        self.head = torch.nn.Linear(HIDDEN_SIZE, V)
        self.router = torch.nn.Linear(HIDDEN_SIZE, E)
        options = {"use_mtp": True, "num_future_tokens": 2, "use_ngram_penalty": True, "ngram_size": 1}
        # router_z is a mean over tokens, so that it adds up over ranks; the load is averaged over them by step()
        options |= {"use_auxiliary_loss": True, "load_balancing_weight": 0.0, "router_z_weight": 0.1}
        options |= {"num_experts": E, "num_experts_per_token": 1, "router_score": "sigmoid", "pad_token_id": 0}
        options |= {"use_moe_balancing": True, "gradient_balance_weight": 0.0}
        self.loss_fn = UnifiedLoss(V, HIDDEN_SIZE, auto_step=False, process_group=process_group, **options)
        self.double()

    def forward(self, input_ids, targets, num_items_in_batch):
        hidden_states = self.embedding(input_ids)
        if self.is_fused:
            head = {"lm_head_weight": self.head.weight, "lm_head_bias": self.head.bias}
        else:
            head = {"logits": self.head(hidden_states)}
        return self.loss_fn(
            **head,
            targets=targets,
            hidden_states=hidden_states,
            gate_logits=self.router(hidden_states).flatten(0, 1),
            num_items_in_batch=num_items_in_batch,
        )


def batch(step):
    numbers = Numbers(step)
    input_ids, targets = numbers.integers(0, V, 4, 6), numbers.integers(0, V, 4, 6)
    targets[0, :5] = 0  # padding: the ranks count different numbers of rows
    return input_ids, targets, (targets != 0).sum()


def run(model, rows, factor, n_steps=12):
    """Trains; returns the gradients of the last step and the buffers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(n_steps):
        input_ids, targets, n_items = batch(step)
        optimizer.zero_grad()
        (factor * model(input_ids[rows], targets[rows], n_items)).backward()
        optimizer.step()
        getattr(model, "module", model).loss_fn.step()
    names = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    buffers = getattr(model, "module", model).named_buffers()
    kept = {
        name: buffer.clone()
        for name, buffer in buffers
        if not name.endswith(("score_sum", "expert_counts", "total_tokens"))
    }
    return {name: parameter.grad.clone() for name, parameter in names.items()} | kept


def on_rank(rank, is_fused):
    model = Model(is_fused, torch.distributed.group.WORLD)
    model = torch.nn.parallel.DistributedDataParallel(model)
    half = slice(2 * rank, 2 * rank + 2)
    # as documented: N over all ranks, and the averaging of DistributedDataParallel undone by the world size
    return run(model, half, WORLD_SIZE)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("is_fused", [False, True])
def test_two_processes_train_as_one(is_fused):
    expected = run(Model(not is_fused), slice(0, 4), 1)
    ranks = on_ranks(WORLD_SIZE, on_rank, is_fused)
    assert expected["loss_fn.temperature.value"] != 1.0
    assert expected["loss_fn.moe_balancer.expert_bias"].abs().sum() > 0
    for found in ranks:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
