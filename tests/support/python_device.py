"""A device "toy" of PrivateUse1, made in Python: its memory is the CPU's, and every torch operator on it runs there.

For one test process of its own: torch can be told about such a device once. Views are copies here, which is enough
where nothing is written through one.
"""

import functools

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

backend_registration._setup_privateuseone_for_python_backend("toy")
_memory: dict[int, torch.Tensor] = {}  # of a storage: its elements
_keep_alive: list[object] = []  # a freed storage's address would come again


def to_toy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the device."""
    result = torch._C._acc.create_empty_tensor(tensor.size(), tensor.dtype)
    _memory[result.untyped_storage()._cdata] = tensor.detach().clone(memory_format=torch.contiguous_format).view(-1)
    _keep_alive.append(result.untyped_storage())
    return result


def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor on the device, not copied."""
    memory = _memory[tensor.untyped_storage()._cdata]
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _run_on_cpu(op, *args, **kwargs):
    given = {}

    def to_argument(value):
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if not isinstance(value, torch.Tensor) or value.device.type != "toy":
            return value
        argument = to_cpu(value)
        given[id(argument)] = argument, value  # what is written in place comes back as itself
        return argument

    def to_result(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in given:
            return to_toy(value)
        result = given[id(value)][1]
        if result.shape != value.shape:  # an empty result, for torch to resize
            result.data = to_toy(value)
        return result

    # a number in the place of a tensor
    arguments = [
        torch.tensor(value) if isinstance(value, int | float) and str(expected.type) == "Tensor" else value
        for value, expected in zip(args, op._schema.arguments, strict=False)
    ]
    return tree_map(to_result, op(*tree_map(to_argument, arguments), **tree_map(to_argument, kwargs)))


_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(_run_on_cpu, "PrivateUse1")

_ATEN = torch.library.Library("aten", "IMPL")
# torch's own writes through a view
_ATEN.impl("constant_pad_nd", functools.partial(_run_on_cpu, torch.ops.aten.constant_pad_nd.default), "PrivateUse1")


def _copy_from(source, target, non_blocking=False):
    (to_cpu(target) if target.device.type == "toy" else target).copy_(
        to_cpu(source) if source.device.type == "toy" else source
    )
    return target


_ATEN.impl("_copy_from", _copy_from, "PrivateUse1")
