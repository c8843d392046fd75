"""What the start page defines for PyTorch's own parallelism does what it says, on two ranks."""

import re
from pathlib import Path

import pytest
import torch
from support.processes import on_ranks

from ava_ext import UnifiedLoss

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
README = Path(__file__).resolve().parent.parent.parent / "README.md"
V, H, N_ITEMS = 11, 4, 24


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.lm_head = torch.nn.Embedding(V, H), torch.nn.Linear(H, V)

    def forward(self, tokens, targets):
        return self.lm_head(self.embedding(tokens), targets, num_items_in_batch=N_ITEMS)


def batch():
    return torch.randint(V, (2, 8, 3), generator=torch.Generator().manual_seed(1))


def snippets():
    section = re.search(r"^## In your training stack\n(.*?)^## ", README.read_text(), re.M | re.S)[1]
    namespace = {}
    for source in re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S):
        exec(source, namespace)
    return namespace


def whole():
    model, (tokens, targets) = Model(), batch()
    loss = UnifiedLoss(V, primary_loss_type="standard")(model.lm_head(model.embedding(tokens)), targets)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def gradients(model):
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        name.replace("lm_head.lm_head", "lm_head"): getattr(g, "full_tensor", lambda g=g: g)()
        for name, g in grads.items()
    }


def fully_sharded_worker(rank):
    model, (tokens, targets) = Model(), batch()
    model = snippets()["fully_sharded"](model, UnifiedLoss(V, primary_loss_type="standard"))
    loss = model(tokens.chunk(2)[rank], targets.chunk(2)[rank])
    (2 * loss).backward()
    loss = loss.detach()
    torch.distributed.all_reduce(loss)
    return loss, gradients(model)


def tensor_parallel_worker(rank):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    model, (tokens, targets) = Model(), batch()
    loss_of = snippets()["tensor_parallel"](model, UnifiedLoss(V, primary_loss_type="standard"), mesh)
    loss = loss_of(model.embedding(tokens), targets)
    loss.backward()
    return loss.detach(), gradients(model)


def pipeline_worker(rank):
    from torch.distributed.pipelining import PipelineStage

    model, (tokens, targets) = Model(), batch()
    stage = PipelineStage(model.lm_head if rank else model.embedding, rank, 2, torch.device("cpu"))
    schedule = snippets()["pipeline"](stage, UnifiedLoss(V, primary_loss_type="standard"), N_ITEMS)
    losses = []
    if rank:
        schedule.step(target=targets, losses=losses)
    else:
        schedule.step(tokens)
    return sum(loss.detach() for loss in losses), gradients(model)


@pytest.mark.parametrize("worker", [fully_sharded_worker, tensor_parallel_worker, pipeline_worker])
def test_the_snippets_of_the_start_page(worker):
    loss, expected = whole()
    found = on_ranks(2, worker)
    torch.testing.assert_close(found[1][0], loss)
    together = found[0][1] | found[1][1]
    torch.testing.assert_close(together, expected)
