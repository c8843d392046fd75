"""DistributedDataParallel and FSDP2 around a model with the loss in its forward, with the heads that the loss owns."""

import contextlib

import pytest
import torch
import torch.distributed
from support.processes import on_ranks
from tiny_models import batch, tiny

from ava_ext import UnifiedLoss

pytest.importorskip("transformers", reason="transformers is not installed")

from ava_ext.integrations.transformers import attach_loss, fuse_lm_head

WORLD_SIZE, N_STEPS = 2, 3


def model_with_loss(put, process_group):
    model = tiny("Llama")
    torch.manual_seed(2)
    options = {"use_mtp": True, "num_future_tokens": 1, "auto_step": False, "process_group": process_group}
    put(model, UnifiedLoss.from_model(model, fused=put is fuse_lm_head, **options))
    return model.double()


def run(model, rows, factor):
    """Trains; returns parameters and buffers. Every row is a micro-batch."""
    inner = getattr(model, "module", model)
    loss_fn = inner.unified_loss
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(N_STEPS):
        inputs = batch(step, batch_size=4)
        inputs["labels"][3] = -100
        n_items = loss_fn.count_items(inputs["labels"], inputs["attention_mask"])
        optimizer.zero_grad()
        for row in rows:
            micro_batch = {name: value[row : row + 1] for name, value in inputs.items()}
            is_last = row == rows[-1]
            with contextlib.nullcontext() if is_last else getattr(model, "no_sync", contextlib.nullcontext)():
                (factor * model(**micro_batch, num_items_in_batch=n_items).loss).backward()
        optimizer.step()
        loss_fn.step()
    kept = {name: value.detach().clone() for name, value in inner.state_dict().items()}
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in kept.items()}


def wrapped(model, way):
    """The model as a stack has it. Units of fully_shard: the layers, maybe the head, and the rest."""
    if way == "DistributedDataParallel":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    if "head" in way:
        fully_shard(model.lm_head, reshard_after_forward="kept" not in way)
    return fully_shard(model)


def run_on_rank(rank, put, way):
    return run(wrapped(model_with_loss(put, "world"), way), [2 * rank, 2 * rank + 1], WORLD_SIZE)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["DistributedDataParallel", "fully_shard", "head", "head, kept"])
@pytest.mark.parametrize("put", [fuse_lm_head, attach_loss])
def test_two_processes_train_as_one(put, way):
    """Uneven numbers of labels, and a micro-batch without any on the last rank."""
    expected = run(model_with_loss(put, None), [0, 1, 2, 3], 1)
    begin = model_with_loss(put, None).state_dict()
    assert all(not torch.equal(expected[name], begin[name]) for name in expected if "mtp.heads" in name)
    for found in on_ranks(WORLD_SIZE, run_on_rank, put, way):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)  # buffers are float32


def updates_in_mixed_precision(rank, put):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = model_with_loss(put, "world").float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    begin = {name: p.detach().clone() for name, p in model.named_parameters()}
    for unit in (*model.model.layers, model.lm_head, model):
        fully_shard(unit, mp_policy=policy)
    trained = run(model, [2 * rank, 2 * rank + 1], WORLD_SIZE)
    return {name: trained[name] - before for name, before in begin.items()}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mixed_precision_of_a_head_that_is_sharded_by_itself():
    """Its weight is bfloat16 in its forward alone; with attach_loss the logits are made there."""
    found, expected = (on_ranks(WORLD_SIZE, updates_in_mixed_precision, put)[0] for put in (fuse_lm_head, attach_loss))
    for name, update in expected.items():
        assert (found[name] - update).norm() < 0.03 * update.norm(), name
