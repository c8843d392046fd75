"""Buffers that a cast of the model must not touch."""

import pytest
import torch
from torch import nn

from ava_ext.losses.float32_buffers import Float32Buffers


class Running(Float32Buffers):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("average", torch.tensor([1.001, 2.0]))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("absent", None)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_cast_leaves_buffers(cast):
    model = getattr(nn.Sequential(Running()), cast)()
    assert model[0].average.dtype == torch.float32
    assert model[0].average[0] == torch.tensor(1.001)  # not through bfloat16 and back
    assert model[0].count.dtype == torch.int64
    assert model[0].scale.dtype == getattr(torch, {"half": "float16", "double": "float64"}.get(cast, cast))


def test_moves_between_devices_still_happen():
    moved = Running().to("meta", torch.bfloat16)
    assert moved.average.device.type == "meta" and moved.average.dtype == torch.float32
    assert moved.to_empty(device="cpu").average.device.type == "cpu"


def test_buffers_that_are_cast_one_by_one_are_float32_again():
    module = Running()
    average = module.average
    for buffer in module.buffers():  # FullyShardedDataParallel with a buffer_dtype
        if buffer.is_floating_point():
            buffer.data = buffer.to(torch.bfloat16)
    module.restore_precision()
    assert module.average is average and average.dtype == torch.float32
    assert module.count.dtype == torch.int64
