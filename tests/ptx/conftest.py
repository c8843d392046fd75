"""`make ptx` runs the PTX of every CUDA kernel, in less than three minutes; `make ptx FULL=1` the whole grid.

A run of all tests takes only the interpreter's own from this folder.
"""

import platform
import sys

import pytest
from support.cuda_compiler import find_nvcc
from support.ninja_library import ROOT

sys.path.insert(0, str(ROOT / "tests/ops"))  # the router's tests, of which some run here too


def pytest_ignore_collect(collection_path, config):
    if collection_path.name.startswith("test_ptx_") and not any("ptx" in argument for argument in config.args):
        return True
    return None


def pytest_runtest_setup(item):
    if not item.path.name.startswith("test_ptx_"):
        return
    if find_nvcc() is None:
        pytest.skip("needs nvcc on PATH, or CUDA_HOME")
    if platform.machine() != "x86_64":
        pytest.skip("needs x86-64: the host code is linked with the emulated device")
