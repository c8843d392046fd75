"""DeepSpeed's ZeRO around a model with the loss in its forward: the training of one process.

No extra installs deepspeed, which is built where it is installed: DS_BUILD_OPS=0 pip install --no-build-isolation
"deepspeed>=0.19,<0.20".
"""

import importlib.util
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from tiny_models import batch, tiny

from ava_ext import UnifiedLoss

pytest.importorskip("transformers", reason="transformers is not installed")
if importlib.util.find_spec("deepspeed") is None:  # not imported here: it chooses its device when it is
    pytest.skip("deepspeed is not installed", allow_module_level=True)

from ava_ext.integrations.transformers import attach_loss, fuse_lm_head

WORLD_SIZE, N_STEPS, N_MICRO_BATCHES, LEARNING_RATE = 2, 3, 2, 0.5
PARTITIONED = 4  # stage 3 with every parameter

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
    pytest.mark.filterwarnings("ignore"),
]


def model_with_loss(put):
    model = tiny("Llama", dtype=torch.float32)
    options = {"primary_loss_type": "standard", "auto_step": False, "z_loss_weight": 0.1, "use_ngram_penalty": True}
    put(model, UnifiedLoss.from_model(model, fused=put is fuse_lm_head, **options))
    return model


def steps(loss_fn):
    """Batches of four texts with N; the last text has no label."""
    for step in range(N_STEPS):
        inputs = batch(step, batch_size=4)
        inputs["labels"][3] = -100
        yield inputs, loss_fn.count_items(inputs["labels"], inputs["attention_mask"])


def run_alone(put):
    model = model_with_loss(put)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for inputs, n_items in steps(model.unified_loss):
        optimizer.zero_grad()
        model(**inputs, num_items_in_batch=n_items).loss.backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def worker(rank, folder, stage, put):
    os.environ["DS_ACCELERATOR"] = "cpu"  # on a machine with a GPU too
    import deepspeed

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    deepspeed.init_distributed(dist_backend="gloo")
    model = model_with_loss(put)
    # by default small parameters are never partitioned
    threshold = {"stage3_param_persistence_threshold": 0} if stage == PARTITIONED else {}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": N_MICRO_BATCHES,
        "gradient_clipping": 0.0,  # its default clips
        "zero_optimization": {"stage": min(stage, 3)} | threshold,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for inputs, n_items in steps(model.unified_loss):
        for row in range(rank * N_MICRO_BATCHES, (rank + 1) * N_MICRO_BATCHES):
            micro_batch = {name: value[row : row + 1] for name, value in inputs.items()}
            loss = engine(**micro_batch, num_items_in_batch=n_items).loss
            engine.backward(WORLD_SIZE * N_MICRO_BATCHES * loss)  # it divides by both
            engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage >= 3):
        kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.save(kept, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def run(stage, put):
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(worker, (folder, stage, put), WORLD_SIZE, start_method="spawn")
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize(
    ("stage", "put"), [(stage, put) for put in (fuse_lm_head, attach_loss) for stage in (1, 2, 3, PARTITIONED)]
)
def test_two_processes_train_as_one(stage, put):
    """Uneven numbers of labels, and a micro-batch without any on the last rank."""
    expected = run_alone(put)
    begin = dict(model_with_loss(put).named_parameters())
    assert all(not torch.equal(expected[name], begin[name]) for name in expected)
    for found in run(stage, put):
        assert found.keys() == expected.keys()
        for name, parameter in expected.items():
            torch.testing.assert_close(found[name], parameter, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
