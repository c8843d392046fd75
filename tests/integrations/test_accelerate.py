"""A loop with accelerate: the loss times accumulation steps (and ranks), since Accelerator.backward divides by them."""

import copy
import inspect

import pytest
import torch
import torch.distributed
from support.processes import on_new_ranks
from tiny_models import batch, forget_accelerate, gradients, own_loss, tiny

from ava_ext import UnifiedLoss

pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from ava_ext.integrations.transformers import attach_loss, fuse_lm_head


@pytest.mark.parametrize("put", [fuse_lm_head, attach_loss])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_micro_batches_are_the_batch(put, precision):
    """3 micro-batches of 1 = 1 batch of 3, with different numbers of labels."""
    dtype = torch.float64 if precision == "no" else torch.float32
    model = tiny("Llama", dtype=dtype)
    inputs = batch()
    expected_loss, expected = own_loss(model, **inputs)
    fused = put is fuse_lm_head
    loss_fn = UnifiedLoss.from_model(model, fused=fused, primary_loss_type="standard")
    put(model, loss_fn)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3, mixed_precision=precision)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(dict(model.named_parameters()))
    prepared, optimizer = accelerator.prepare(model, optimizer)
    n_items = loss_fn.count_items(inputs["labels"], inputs["attention_mask"], group="world")
    total = 0.0
    for row in range(3):
        with accelerator.accumulate(prepared):
            micro_batch = {name: value[row : row + 1] for name, value in inputs.items()}
            loss = prepared(**micro_batch, num_items_in_batch=n_items).loss
            accelerator.backward(loss * accelerator.num_processes * accelerator.gradient_accumulation_steps)
            total = total + loss.detach()
            found = gradients(model)
            optimizer.step()
            optimizer.zero_grad()
    tolerance = {"rtol": 1e-9, "atol": 1e-13} if precision == "no" else {"rtol": 5e-2, "atol": 5e-3}
    torch.testing.assert_close(total, expected_loss, **tolerance)
    torch.testing.assert_close(found, expected, **tolerance)
    stepped = {name: before[name] - 0.1 * g for name, g in expected.items()}
    torch.testing.assert_close(dict(model.named_parameters()), stepped, **tolerance)


def test_an_unwrapped_model_keeps_its_loss():
    """Without the wrapper of mixed precision, too, whose forward accelerate unwraps as far as it can."""
    model = tiny("Llama", dtype=torch.float32)
    fuse_lm_head(model, UnifiedLoss.from_model(model, primary_loss_type="standard"))
    inputs = batch() | {"labels": batch()["input_ids"]}  # the mask, which the model hands to no loss, decides
    parameters = inspect.signature(model.forward).parameters
    assert {"input_ids", "labels"} <= parameters.keys() and "self" not in parameters
    expected = model(**inputs).loss
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    unwrapped = accelerator.unwrap_model(accelerator.prepare(model), keep_fp32_wrapper=False)
    assert torch.equal(unwrapped(**inputs).loss, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("put", [fuse_lm_head, attach_loss])
def test_regional_compilation(put):
    """What runs is a shallow copy whose head is compiled; loss and log are those of the model."""
    model = tiny("Llama", dtype=torch.float32)
    loss_fn = UnifiedLoss.from_model(model, fused=put is fuse_lm_head, use_mtp=True, auto_step=False)
    put(model, loss_fn)
    model.report_parts = True
    before = copy.deepcopy(model)
    expected = before(**batch()).loss
    expected.backward()
    plugin = accelerate.utils.TorchDynamoPlugin(backend="eager", use_regional_compilation=True)
    accelerator = accelerate.Accelerator(cpu=True, dynamo_plugin=plugin)
    prepared = accelerator.prepare(model)
    assert prepared is not model and hasattr(prepared.lm_head, "_orig_mod")
    loss = prepared(**batch()).loss
    accelerator.backward(loss)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients(model), gradients(before), rtol=1e-5, atol=1e-8)
    assert model.has_computed_loss and torch.equal(model.loss_parts["total_loss"], loss)
    loss_fn.step()
    assert loss_fn.get_loss_statistics()["temperature"]["count"] == 1
    torch.testing.assert_close(prepared.eval()(**batch()).logits, before.eval()(**batch()).logits)


def trained(put, rows, process_group=None):
    """Parameters after three steps of an optimizer, each of two micro-batches of one text."""
    forget_accelerate()
    model = tiny("Llama")
    options = {"primary_loss_type": "standard", "z_loss_weight": 0.1, "fused": put is fuse_lm_head}
    loss_fn = UnifiedLoss.from_model(model, **options, process_group=process_group)
    put(model, loss_fn)
    n_steps = len(rows)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=n_steps)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    for step in range(3):
        inputs = batch(step, batch_size=4)
        inputs["labels"][3] = -100  # a micro-batch without labels
        own = [{name: value[row : row + 1] for name, value in inputs.items()} for row in rows]
        counts = [loss_fn.count_items(part["labels"], part["attention_mask"]) for part in own]
        n_items = accelerator.reduce(sum(counts))
        for part in own:
            with accelerator.accumulate(prepared):
                loss = prepared(**part, num_items_in_batch=n_items).loss
                accelerator.backward(loss * accelerator.num_processes * n_steps)
                optimizer.step()
                optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train_on_rank(rank, put):
    return trained(put, [2 * rank, 2 * rank + 1], "world")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("put", [fuse_lm_head, attach_loss])
def test_two_processes_train_as_one(put):
    """2 ranks x 2 micro-batches of 1 = 4 micro-batches of 1."""
    expected = trained(put, [0, 1, 2, 3])
    for found in on_new_ranks(2, train_on_rank, put):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
