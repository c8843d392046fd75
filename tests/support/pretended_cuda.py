"""A pytest plugin that passes CPU tensors off as CUDA ones, and raises where a GPU would: where devices are mixed.

    PYTHONPATH=.:tests python -m pytest -p support.pretended_cuda -k "cuda and not emulated" tests/ops

Tests that run on the device "cuda" then run without a GPU. Operators compute on the CPU, so values say nothing about
the kernels; what shows is a tensor that a test, or the package, left on the CPU. For a process of its own: torch's
constructors stay replaced.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import ava_ext._library

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
# CUDA takes a CPU tensor beside its own here: copies, and indices
MAY_MIX = {
    aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
    aten._index_put_impl_.default,
}  # fmt: skip


class PretendedTensor(torch.Tensor):
    """A tensor without memory of its own before one of the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner):
        # meta: torch would ask a real "cuda" for its context
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="meta",
        )  # fmt: skip
        self.inner = inner
        return self

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    is_cpu = property(lambda self: False)

    def __repr__(self, **_):
        return f"PretendedTensor({self.inner!r})"

    def get_device(self):
        return CUDA.index

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def new_tensor(self, data, *, dtype=None, device=None, requires_grad=False):
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or CUDA, requires_grad=requires_grad)

    def __setitem__(self, index, value):
        with torch.no_grad(), torch._C.DisableTorchFunction():
            self.inner[tree_map(inner_of, index)] = inner_of(value)

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return run(operator, args, kwargs or {})


# what reads a value, or the memory, of the tensor itself
for _name in ("__bool__", "__float__", "__int__", "__index__", "tolist", "item", "data_ptr", "untyped_storage"):
    setattr(PretendedTensor, _name, lambda self, _name=_name: getattr(self.inner, _name)())


def is_pretended(tensor: torch.Tensor) -> bool:
    """Also a zero gradient that autograd made, where it knows the device by a tensor's parts only."""
    return isinstance(tensor, PretendedTensor) or tensor.device.type == "meta"


def inner_of(value):
    if isinstance(value, PretendedTensor):
        return value.inner
    if isinstance(value, torch.Tensor) and is_pretended(value):
        return torch.zeros(value.shape, dtype=value.dtype, device="cpu")
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


def is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def run(operator, args, kwargs):
    """On the CPU; the results are on the device that a GPU would have them on."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    pretended = [tensor for tensor in tensors if is_pretended(tensor)]
    others = [tensor for tensor in tensors if not is_pretended(tensor)]
    is_ours = operator.namespace == "ava_ext"  # torch's own take a number of the CPU, of no dimension
    if pretended and operator not in MAY_MIX and any(is_ours or tensor.dim() > 0 for tensor in others):
        devices = [f"{tensor.device} {list(tensor.shape)}" for tensor in tensors]
        raise RuntimeError(f"{operator}: expected all tensors to be on the same device, got {', '.join(devices)}")
    result = operator(*tree_map(inner_of, args), **tree_map(inner_of, kwargs))
    device = kwargs.get("device")
    if not (is_cuda(device) if device is not None else pretended):
        return result
    # what is written in place comes back as itself
    given = {id(tensor.inner): tensor for tensor in pretended if isinstance(tensor, PretendedTensor)}

    def wrapped(value):
        if not isinstance(value, torch.Tensor):
            return value
        return given[id(value)] if id(value) in given else PretendedTensor(value)

    return tree_map(wrapped, result)


class PretendedCuda(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if is_cuda(kwargs.get("device")) or any(isinstance(leaf, PretendedTensor) for leaf in leaves):
            return run(operator, args, kwargs)
        return operator(*args, **kwargs)


# torch.tensor, torch.as_tensor and Tensor.to start CUDA before an operator is dispatched
_tensor, _as_tensor, _to = torch.tensor, torch.as_tensor, torch.Tensor.to


def default_device() -> torch.device:
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return context.device if context is not None else torch.device("cpu")


def make_tensor(original, data, dtype, device, requires_grad):
    if isinstance(data, torch.Tensor):
        result = data.detach().clone() if original is _tensor else data
        result = to(result, *([device] if device is not None else []), dtype=dtype or result.dtype)
    else:
        plain = tree_map(lambda leaf: leaf.item() if isinstance(leaf, torch.Tensor) else leaf, data)
        with torch._C.DisableTorchFunction():
            result = original(plain, dtype=dtype, device="cpu")
        if is_cuda(device or default_device()):
            result = PretendedTensor(result)
    return result.requires_grad_() if requires_grad else result


def tensor(data, *, dtype=None, device=None, requires_grad=False, pin_memory=False):
    return make_tensor(_tensor, data, dtype, device, requires_grad)


def as_tensor(data, dtype=None, device=None):
    return make_tensor(_as_tensor, data, dtype, device, False)


def to(self, *args, **options):
    dtype, device = options.get("dtype"), options.get("device")
    for argument in args:
        if isinstance(argument, torch.Tensor):
            dtype, device = argument.dtype, argument.device
        elif isinstance(argument, torch.dtype):
            dtype = argument
        elif isinstance(argument, str | torch.device):
            device = argument
    goes_to_cuda = is_cuda(device if device is not None else self.device)
    if not goes_to_cuda and not isinstance(self, PretendedTensor):
        return _to(self, *args, **options)
    dtype = dtype or self.dtype
    if goes_to_cuda == self.is_cuda and dtype == self.dtype and not options.get("copy"):
        return self
    return aten._to_copy(self, dtype=dtype, device=CUDA if goes_to_cuda else torch.device("cpu"))


torch.tensor, torch.as_tensor, torch.Tensor.to = tensor, as_tensor, to
torch.Tensor.cpu, torch.Tensor.cuda = lambda self: to(self, "cpu"), lambda self: to(self, "cuda")
torch.cuda.is_available = lambda: True
torch.cuda._lazy_init = torch.cuda.synchronize = lambda *_: None
ava_ext._library.CUDA_VERSION = "pretended"  # which makes conftest.py run tests on "cuda"
_mode = PretendedCuda()


def pytest_sessionstart():
    _mode.__enter__()


def pytest_sessionfinish():
    _mode.__exit__(None, None, None)
