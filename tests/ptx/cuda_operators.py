"""The CUDA operators on the CPU: their host code compiled by g++, their kernels as the PTX that nvcc makes of them.

    with on_device(H200, architecture="sm_90") as device:
        loss = ava_ext.functional.cross_entropy(logits, targets)    # CPU tensors; every operator of the package
    assert not device.findings

The operators of csrc/cuda run as they are, so plans, launch sizes and the parameters of the kernels are the real ones.
An operator gets copies of its arguments in the interpreter's memory, where memory beside a tensor is not mapped; what
it allocates comes from there too. Every launch calls back to Python, which looks up the PTX of the kernel and runs it.

An element with the bits of `uninitialised` counts as never written: a kernel that reads it is found.
"""

import ctypes
import functools
import re
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from simt import Launch, Memory, Module
from simt.memory import UNINITIALISED
from simt.module import Kernel
from support.cuda_compiler import SOURCES, compile_ptx
from support.emulated_cuda import DeviceLimits, cpu_kernels_replaced, has_kernel
from support.ninja_library import build_library
from torch.utils._pytree import tree_map

NAMESPACE = "ava_ext_ptx"  # of the operators, as in host/emulated_launch.h
_TORCH = Path(torch.__file__).parent
_RunKernel = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_ubyte),
    ctypes.c_size_t,
)

# multiprocessors; shared memory of one, of a block, reserved for each block; blocks of a cluster
H100 = H200 = DeviceLimits(132, 228 * 1024, 227 * 1024, 1024, 8)


# -- The PTX


@functools.cache
def _module(architecture: str, stem: str) -> Module:
    return Module((compile_ptx(architecture, [stem]) / f"{stem}.ptx").read_text())


@functools.cache
def stems_of_kernels() -> dict[str, str]:
    """The source of every kernel, by the kernel's plain name; the same for all architectures."""
    entry = re.compile(r"^(?:\.visible )?\.entry (\w+)\(", re.M)
    folder = compile_ptx("sm_90")
    found = {}
    for source in SOURCES:
        found |= {plain_name(name): source.stem for name in entry.findall((folder / f"{source.stem}.ptx").read_text())}
    return found


def plain_name(symbol: str) -> str:
    """A mangled name as both compilers would have it: g++ marks static functions, nvcc spells dependent names out."""
    symbol = re.sub(r"^(_ZN3ava)L", r"\1", symbol)
    return re.sub(r"sr3std(\w+?)E(E\d+value)", r"srSt\1\2", symbol)


@functools.cache
def find_kernel(plain: str, architecture: str = "sm_90") -> Kernel:
    if plain not in stems_of_kernels():
        raise LookupError(f"no PTX of {plain}")
    module = _module(architecture, stems_of_kernels()[plain])
    return module.kernel(next(name for name in module.kernel_names if plain_name(name) == plain))


# -- The operators


@functools.cache
def load() -> ctypes.CDLL:
    """Compiles what has changed and defines the operators."""
    sources = {"tests/cuda_emulator/device.cpp": [], "tests/ptx/host/python_interface.cpp": []}
    sources |= {str(source): ["-x", "c++"] for source in SOURCES}
    # the text of the kernels never runs: nothing to optimise
    flags = ["-O0", "-Wno-unknown-pragmas", "-Wno-unused", f"-isystem{_TORCH}/include"]
    flags += ["-I../../tests/ptx/host", "-I../../tests/cuda_emulator"]
    library = build_library(NAMESPACE, ".so", sources, flags, [f"-L{_TORCH}/lib", "-ltorch", "-ltorch_cpu", "-lc10"])
    definitions = torch.library.Library(NAMESPACE, "DEF")
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("ava_ext::"):
            definitions.define(str(schema).removeprefix("ava_ext::"))
    torch.ops.load_library(library)
    loaded = ctypes.CDLL(str(library))
    loaded.set_run_kernel(_run_kernel)
    loaded.definitions = definitions  # end with the object
    return loaded


@functools.cache
def _symbols() -> tuple[dict[int, str], int]:
    """Names of the functions of the library by their offset, and the address of the library."""
    library = load()
    names = {}
    for line in subprocess.check_output(["nm", "--defined-only", library._name], text=True).splitlines():
        offset, _, name = line.split(None, 2)
        names[int(offset, 16)] = name
    anchor = next(offset for offset, name in names.items() if name == "set_run_kernel")
    return names, ctypes.cast(library.set_run_kernel, ctypes.c_void_p).value - anchor


@functools.cache
def operators() -> list[str]:
    load()
    names = [s.name.removeprefix("ava_ext::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("ava_ext:")]
    return [name for name in names if has_kernel(NAMESPACE, name, "CPU")]


@dataclass
class Device:
    """What the operators run on, and what was found on it."""

    limits: DeviceLimits
    architecture: str
    launch_options: dict[str, object]  # of simt.Launch
    kernels: dict[str, Kernel] = field(default_factory=dict)  # in place of those of this name: mutants
    launches: list[Launch] = field(default_factory=list)
    error: Exception | None = None  # of the last launch

    def run(self, plain: str, grid: tuple[int, int], block: int, shared_bytes: int, cluster: int, data: bytes) -> None:
        kernel = self.kernels.get(plain) or find_kernel(plain, self.architecture)
        options = dict(self.launch_options)
        if options.get("seed") is not None:
            options["seed"] += len(self.launches)
        launch = Launch(kernel, MEMORY, grid, block, shared_bytes, cluster, **options)
        self.launches.append(launch)
        launch.run(data)

    @property
    def findings(self) -> list[str]:
        return [
            f"{launch.kernel.name}: {text} ({times} times; {where})"
            for launch in self.launches
            for text, (times, where) in launch.findings.items()
        ]

    def require_no_findings(self) -> None:
        if self.findings:
            raise AssertionError("\n".join(self.findings))


MEMORY = Memory(1 << 26)  # cleared for each call of an operator
_device: Device | None = None


@_RunKernel
def _run_kernel(kernel, grid, block, shared_bytes, cluster_size, parameters, n_bytes):
    try:
        names, base = _symbols()
        if grid[2] != 1 or block[1] != 1 or block[2] != 1:
            raise NotImplementedError("a grid of three dimensions, or a block of two")
        data = bytes(parameters[:n_bytes])
        name = plain_name(names[kernel - base])
        _device.run(name, (grid[0], grid[1]), block[0], shared_bytes, cluster_size, data)
    except Exception as error:
        _device.error = error
        return 1
    return 0


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return MEMORY.empty(size, dtype or torch.get_default_dtype())


def _sort_stable(values, *, stable, dim=-1, descending=False):
    """aten::sort, whose results would not lie in the interpreter's memory."""
    order = np.argsort(values.numpy(), axis=dim, kind="stable")
    assert stable and not descending
    sorted_values = np.take_along_axis(values.numpy(), order, dim)
    return MEMORY.copy_of(torch.from_numpy(sorted_values)), MEMORY.copy_of(torch.from_numpy(order))


def _on_interpreter(name: str):
    """The operator as a function over ordinary tensors."""
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    is_written = [a.alias_info is not None and a.alias_info.is_write for a in operator._schema.arguments]

    def call(*arguments, **options):
        MEMORY.clear()
        copies, copied_options = tree_map(
            lambda x: MEMORY.copy_of(x) if isinstance(x, torch.Tensor) else x, (arguments, options)
        )
        allocations = torch.library.Library("aten", "IMPL")
        allocations.impl("empty.memory_format", _empty, "CPU", allow_override=True)
        allocations.impl("sort.stable", _sort_stable, "CPU", allow_override=True)
        try:
            results = operator(*copies, **copied_options)
        except RuntimeError:
            if _device.error is None:
                raise
            error, _device.error = _device.error, None
            raise error from None
        finally:
            allocations._destroy()
        for argument, copy, written in zip(arguments, copies, is_written, strict=False):
            if written:
                argument.copy_(copy)
        return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, results)

    return call


@contextmanager
def on_device(limits: DeviceLimits, architecture: str = "sm_90", **launch_options):
    """While it lasts, the operators on CPU tensors run their PTX. Yields the Device."""
    global _device
    load().set_device(ctypes.byref(limits))
    _device = Device(limits, architecture, launch_options)
    try:
        with cpu_kernels_replaced({name: _on_interpreter(name) for name in operators()}):
            yield _device
    finally:
        _device = None


def uninitialised(size, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that no kernel may read."""
    n_bytes = torch.Size(size).numel() * dtype.itemsize
    return torch.from_numpy(np.resize(UNINITIALISED, n_bytes)).view(dtype).view(size)
