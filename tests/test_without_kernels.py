"""CUDA tensors in a library without CUDA kernels. The operators' values are tested by the files that run on "pytorch"
(tests/conftest.py)."""

import warnings

import pytest
import torch
from emulated_cuda import has_kernel
from test_cuda_twins import defined_operators

from ava_ext.ops import without_kernels


def test_every_operator_runs_on_cuda_tensors():
    assert without_kernels.OPERATORS.keys() == defined_operators()
    assert all(has_kernel("ava_ext", name, "CUDA") for name in defined_operators())


def test_only_what_is_missing_is_registered():
    assert without_kernels.register("CPU") == []
    assert not any(has_kernel("ava_ext", name, "PrivateUse1") for name in without_kernels.OPERATORS)
    assert set(without_kernels.register("PrivateUse1")) == without_kernels.OPERATORS.keys()
    assert all(has_kernel("ava_ext", name, "PrivateUse1") for name in without_kernels.OPERATORS)


def test_one_warning_says_how_to_rebuild():
    without_kernels._warn_once.cache_clear()
    scale_rows = without_kernels._with_warning(without_kernels.OPERATORS["scale_rows_"])
    rows = torch.ones(2, 3)
    with pytest.warns(UserWarning, match=r"built without CUDA kernels.*AVA_CUDA=1 pip install"):
        scale_rows(rows, torch.tensor([2.0, 1.0]))
    assert rows.tolist() == [[2, 2, 2], [1, 1, 1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scale_rows(rows, torch.ones(2))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("row_loss", (torch.zeros(3),), r"row_loss: expected targets of shape \[2\], got \[3\]"),
        ("scale_rows_", (torch.zeros(3),), r"scale_rows_: expected factors of shape \[2\], got \[3\]"),
    ],
)
def test_wrong_shapes(name, arguments, message):
    if name == "row_loss":
        arguments = (*arguments, torch.zeros(7), None, None, None, [], 1, 4, -100, False, False)
    with pytest.raises(RuntimeError, match=message):
        without_kernels.OPERATORS[name](torch.zeros(2, 4), *arguments)
