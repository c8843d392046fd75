"""A model whose head's vocabulary is spread over ranks: the loss takes its logits as they are."""

import gc
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from tiny_models import batch, gradients, loss_of, own_loss, tiny

from ava_ext import UnifiedLoss

pytest.importorskip("transformers", reason="transformers is not installed")

from ava_ext.integrations.transformers import attach_loss, fuse_lm_head, unfuse


def worker(rank, folder):
    from torch.distributed.tensor import Shard, init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, mesh = tiny("Llama"), init_device_mesh("cpu", (2,))
    columns = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model.lm_head, mesh, columns)
    attach_loss(model, UnifiedLoss.from_model(model, fused=False, primary_loss_type="standard"))
    loss, _ = loss_of(model, **batch())
    found = {name: getattr(g, "full_tensor", lambda g=g: g)() for name, g in gradients(model).items()}
    torch.save((loss, found), Path(folder) / f"{rank}.pt")
    unfuse(model)
    fuse_lm_head(model, UnifiedLoss.from_model(model, primary_loss_type="standard"))
    with pytest.raises(TypeError, match=r"uses .placements of its logits: use attach_loss"):
        model(**batch())
    gc.collect()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_head_in_columns():
    expected = own_loss(tiny("Llama"), **batch())
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(worker, (folder,), 2, start_method="fork")
        ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
    for found in ranks:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
