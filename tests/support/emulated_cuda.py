"""The CUDA kernels of csrc/cuda on the CPU: compiled by g++ for tests/cuda_emulator, as operators on CPU tensors.

`kernels_in_place()` makes them the CPU kernels of the package's own operators, so that the whole package, its fakes and
its autograd run over them. An operator without a CUDA kernel keeps its CPU kernel.
"""

import ctypes
import functools
import platform
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from support.ninja_library import ROOT, build_library

import ava_ext  # noqa: F401  defines the operators

AVAILABLE = platform.machine() == "x86_64"  # the emulator switches stacks in assembly
ORDERS = ("forward", "reverse", "random")
_TORCH = Path(torch.__file__).parent


class DeviceLimits(ctypes.Structure):
    """As in csrc/cuda/dialect.cuh."""

    _fields_ = [
        ("n_multiprocessors", ctypes.c_int),
        ("shared_per_multiprocessor", ctypes.c_int),
        ("shared_per_block", ctypes.c_int),
        ("shared_reserved_per_block", ctypes.c_int),
        ("largest_cluster", ctypes.c_int),
    ]


@functools.cache
def load() -> ctypes.CDLL:
    """Compiles what has changed, loads the library, and defines `torch.ops.ava_ext_emulated`."""
    emulator = "tests/cuda_emulator"
    sources = {f"{emulator}/device.cpp": [], f"{emulator}/python_interface.cpp": []}
    sources |= {str(path.relative_to(ROOT)): ["-x", "c++"] for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))}
    includes = [f"-isystem{_TORCH}/include", f"-I../../{emulator}"]
    library = build_library(
        "ava_ext_emulated",
        ".so",
        sources,
        ["-O2", "-g1", "-Wno-unknown-pragmas", *includes],
        [f"-L{_TORCH}/lib", "-ltorch", "-ltorch_cpu", "-lc10"],
    )
    definitions = torch.library.Library("ava_ext_emulated", "DEF")
    _keep_alive.append(definitions)
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("ava_ext::"):
            definitions.define(str(schema).removeprefix("ava_ext::"))
            # the package's own operators bring autograd; these are their kernels
            definitions.impl(schema.name.removeprefix("ava_ext::"), torch.library.fallthrough_kernel, "Autograd")
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


_keep_alive: list[torch.library.Library] = []  # a library's definitions end with it


def has_kernel(namespace: str, operator: str, dispatch_key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{operator}", dispatch_key)


def operators() -> set[str]:
    """Names of the operators that have a CUDA kernel."""
    load()
    names = {s.name.removeprefix("ava_ext::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("ava_ext:")}
    return {name for name in names if has_kernel("ava_ext_emulated", name, "CPU")}


@contextmanager
def cpu_kernels_replaced(kernels: dict[str, Callable]):
    """While it lasts, these operators of the package run these functions on CPU tensors."""
    implementations = torch.library.Library("ava_ext", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that a kernel is overridden, which is the point
        for name, kernel in kernels.items():
            implementations.impl(name, kernel, "CPU", allow_override=True)
    try:
        yield
    finally:
        implementations._destroy()


def kernels_in_place():
    """While it lasts, the operators on CPU tensors run the emulated CUDA kernels."""
    return cpu_kernels_replaced({name: getattr(torch.ops.ava_ext_emulated, name).default for name in operators()})


def set_schedule(order: str = "forward", seed: int = 0) -> None:
    """In which order threads and blocks run where the kernel leaves it open."""
    load().set_schedule(ORDERS.index(order), ctypes.c_uint64(seed))


@contextmanager
def device_limits(**changes: int):
    """While it lasts, the emulated device has these limits: `device_limits(largest_cluster=1)` is one below sm_90."""
    before, limits = DeviceLimits(), DeviceLimits()
    for copy in (before, limits):
        load().get_device(ctypes.byref(copy))
    for name, value in changes.items():
        setattr(limits, name, value)
    load().set_device(ctypes.byref(limits))
    try:
        yield
    finally:
        load().set_device(ctypes.byref(before))


def n_launches() -> int:
    """Kernels launched since the library was loaded."""
    load().n_launches.restype = ctypes.c_uint64
    return load().n_launches()
