"""Which operators have a CUDA kernel, and that it is the one that the tests of "cuda-emulated" run."""

import re

import pytest
import torch
from support import emulated_cuda
from support.kernel_tests import FILES_OF_KERNELS
from support.ninja_library import ROOT

from ava_ext._library import CUDA_VERSION

NO_TENSORS = {"cpu_capability", "cuda_version", "empty_cache", "has_bfloat16_products"}  # about the library itself
CPU_ONLY = {"add_weight_gradient_"}  # on a GPU, cuBLAS does it
WITHOUT_KERNEL: set[str] = set()  # no CUDA kernel yet: see ava_ext/ops/without_kernels

needs_emulator = pytest.mark.skipif(not emulated_cuda.AVAILABLE, reason="the emulator needs x86-64")


def defined_operators():
    """Those that CUDA tensors may reach."""
    definitions = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc/library.cpp").read_text())
    assert all(hasattr(torch.ops.ava_ext, name) for name in definitions)
    return set(definitions) - NO_TENSORS - CPU_ONLY


@needs_emulator
def test_every_operator_has_a_cuda_kernel():
    with_kernel = emulated_cuda.operators()
    assert with_kernel | WITHOUT_KERNEL == defined_operators()
    assert with_kernel & WITHOUT_KERNEL == set(), "take these out of WITHOUT_KERNEL"


@needs_emulator
@pytest.mark.skipif(not CUDA_VERSION, reason="this library was built without CUDA")
def test_the_library_has_the_emulated_kernels():
    on_cuda = {name for name in defined_operators() if emulated_cuda.has_kernel("ava_ext", name, "CUDA")}
    assert on_cuda == emulated_cuda.operators()


@needs_emulator
def test_emulated_kernels_take_the_place_of_the_cpu_kernels_and_leave_it():
    state = [torch.zeros(()), torch.zeros(100), torch.zeros((), dtype=torch.int64), torch.ones(()), torch.ones(())]
    step = torch.ops.ava_ext.temperature_step_
    before = emulated_cuda.n_launches()
    step(*state, 1.0, 1.0, 0.5, 2.0)
    assert emulated_cuda.n_launches() == before
    with emulated_cuda.kernels_in_place():
        step(*state, 1.0, 1.0, 0.5, 2.0)
        assert emulated_cuda.n_launches() == before + 1
    step(*state, 1.0, 1.0, 0.5, 2.0)
    assert emulated_cuda.n_launches() == before + 1


def test_every_kernel_has_a_test_file_for_every_device():
    for path in (ROOT / "csrc/cuda").glob("*.cu"):
        assert path.stem.startswith(tuple(FILES_OF_KERNELS)), path
