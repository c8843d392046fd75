"""Devices for which the library has no kernels. The operators' values are tested by the files that run on "pytorch"
(tests/conftest.py); here, that every device reaches them."""

import warnings

import pytest
import torch
from support.emulated_cuda import has_kernel
from support.new_python import run_python
from test_cuda_twins import defined_operators

from ava_ext._library import CUDA_VERSION
from ava_ext.ops import without_kernels
from ava_ext.ops.row_fields import N_OPTIONS
from ava_ext.ops.without_kernels.dtypes import widest_dtype

OTHER_DEVICES = ["MPS", "XPU", "HPU", "MTIA", "PrivateUse1"]


def kernel_of(operator, dispatch_key):
    """Where what this operator runs for this dispatch key was registered."""
    table = torch._C._dispatch_dump_table(f"ava_ext::{operator}")
    return next(line for line in table.splitlines() if line.startswith(f"{dispatch_key}: "))


@pytest.mark.parametrize("dispatch_key", OTHER_DEVICES + ["CUDA"] * (not CUDA_VERSION))
def test_every_operator_runs_on_every_device(dispatch_key):
    assert without_kernels.OPERATORS.keys() == defined_operators()
    for name in defined_operators():
        assert "without_kernels" in kernel_of(name, dispatch_key)


@pytest.mark.parametrize("dispatch_key", ["CPU"] + ["CUDA"] * bool(CUDA_VERSION))
def test_kernels_come_first(dispatch_key):
    for name in defined_operators():
        assert f"csrc/{dispatch_key.lower()}/" in kernel_of(name, dispatch_key)


def test_fakes_come_first():
    for name in defined_operators():
        assert has_kernel("ava_ext", name, "Meta")
        assert "without_kernels" not in kernel_of(name, "Meta")


@pytest.mark.skipif(not hasattr(torch._C, "_acc"), reason="this torch knows no devices made in Python")
def test_the_values_on_another_device():
    result = run_python("import warnings; warnings.simplefilter('always'); import support.on_another_device")
    assert result.returncode == 0, result.stdout + result.stderr
    assert set(result.stdout.split()) == defined_operators() | {"cross_entropy"}
    assert result.stderr.count("ava_ext: this library has no kernels for toy tensors") == 1


@pytest.mark.parametrize(("device", "rebuilds"), [("cuda", True), ("mps", False)])
def test_one_warning(monkeypatch, device, rebuilds):
    monkeypatch.setattr(without_kernels, "_warned", [])
    with pytest.warns(UserWarning, match=f"has no kernels for {device} tensors") as caught:
        without_kernels._warn_once(torch.device(device))
    assert ("AVA_CUDA=1 pip install" in str(caught[0].message)) == rebuilds
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        without_kernels._warn_once(torch.device("xpu"))


def test_devices_without_float64():
    assert widest_dtype(torch.device("cpu")) == torch.float64
    assert widest_dtype(torch.device("mps")) == torch.float32


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("row_loss", (torch.zeros(3),), r"row_loss: expected targets of shape \[2\], got \[3\]"),
        ("scale_rows_", (torch.zeros(3),), r"scale_rows_: expected factors of shape \[2\], got \[3\]"),
    ],
)
def test_wrong_shapes(name, arguments, message):
    if name == "row_loss":
        arguments = (*arguments, torch.zeros(N_OPTIONS), None, None, None, [], 1, 4, -100, False, False)
    with pytest.raises(RuntimeError, match=message):
        without_kernels.OPERATORS[name](torch.zeros(2, 4), *arguments)
