"""The PTX of the router's kernels against float64: rows in registers and rows that are too long for them."""

import pytest
import torch
from cuda_operators import H100, on_device
from test_router_rows import test_expert_bias_changes_the_choice_alone as check_expert_bias
from test_router_rows_properties import test_values_and_gradient as check_values_and_gradient

# n_experts, k, rows, dtype, score, choice, mask, n_segments, form. A block takes 128 rows or more.
CASES = [
    (8, 3, 300, torch.float32, "softmax", "int32", "rows", None, "tensor"),
    (64, 8, 150, torch.bfloat16, "softmax", "own", "layers", None, "list"),
    (60, 2, 40, torch.bfloat16, "sigmoid", "own", None, 3, "slice"),
    (128, 3, 40, torch.float32, "sigmoid", "int64", "layers", None, "parts"),
    (300, 9, 20, torch.bfloat16, "softmax", "own", "rows", 3, "tensor"),
    (520, 3, 20, torch.float32, "softmax", "own", "rows", None, "slice"),
    (256, 5, 40, torch.float16, "softmax", "own", "layers", None, "tensor"),
    (64, 3, 20, torch.float64, "sigmoid", "own", "rows", 3, "list"),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_router(number):
    n_experts, k, n_rows, dtype, score, choice, mask, n_segments, form = CASES[number]
    case = {
        "n_layers": 2,
        "n_rows": n_rows,
        "n_experts": n_experts,
        "k": k,
        "dtype": dtype,
        "score": score,
        "scale": 2.0,
        "masked_experts": False,
        "mask": mask,
        "n_segments": n_segments,
        "choice": choice,
        "form": form,
        "seed": number,
    }
    with on_device(H100, seed=number or None) as device:
        check_values_and_gradient.hypothesis.inner_test(case)
    device.require_no_findings()


def test_the_experts_bias_changes_the_choice():
    with on_device(H100) as device:
        check_expert_bias()
    device.require_no_findings()
