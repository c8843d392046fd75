"""A model whose head's vocabulary is spread over ranks: the loss takes its logits as they are."""

import pytest
import torch
import torch.distributed
from support.processes import on_ranks
from tiny_models import batch, gradients, loss_of, own_loss, tiny

from ava_ext import UnifiedLoss

pytest.importorskip("transformers", reason="transformers is not installed")

from ava_ext.integrations.transformers import attach_loss, fuse_lm_head, unfuse


def loss_and_gradients(rank):
    from torch.distributed.tensor import Shard, init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model, mesh = tiny("Llama"), init_device_mesh("cpu", (2,))
    columns = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model.lm_head, mesh, columns)
    attach_loss(model, UnifiedLoss.from_model(model, fused=False, primary_loss_type="standard"))
    loss, _ = loss_of(model, **batch())
    found = {name: getattr(g, "full_tensor", lambda g=g: g)() for name, g in gradients(model).items()}
    unfuse(model)
    fuse_lm_head(model, UnifiedLoss.from_model(model, primary_loss_type="standard"))
    with pytest.raises(TypeError, match=r"uses .placements of its logits: use attach_loss"):
        model(**batch())
    return loss.detach(), found


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_head_in_columns():
    expected = own_loss(tiny("Llama"), **batch())
    for found in on_ranks(2, loss_and_gradients):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
