"""Random tensors of a CPU generator while the default device is a GPU: the tests' numbers are the same on every device.

`torch.randn(..., generator=torch.Generator())` raises there: it expects a generator of the default device.
"""

import torch
from torch.overrides import TorchFunctionMode


class RandomOnCpu(TorchFunctionMode):
    """New tensors that are drawn from a CPU generator are drawn on the CPU and moved to `device`."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        generator = kwargs.get("generator")
        draws_in_place = any(isinstance(argument, torch.Tensor) for argument in args)
        if generator is None or generator.device.type != "cpu" or "device" in kwargs or draws_in_place:
            return function(*args, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        return function(*args, device="cpu", **kwargs).to(self.device).requires_grad_(requires_grad)
