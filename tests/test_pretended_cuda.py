"""Tests of every device keep to their own: a tensor left on the CPU is an error on a GPU. Shown without one."""

import re

import pytest
from support.new_python import run_pytest, run_python

# the fixed cases of these files. Hypothesis' tests draw from the same strategies; those left out by name take minutes
# here, compile, or ask torch for what it knows of a device
FILES = [
    "test_softmax_rows_autograd.py", "test_softmax_rows_edges.py", "test_softmax_statistics.py", "test_repetition.py",
    "test_router_rows_autograd.py", "test_softmax_rows_tail.py",
]  # fmt: skip
LEFT_OUT = ["emulated", "compile", "opcheck", "gradcheck", "long_text", "two_billion", "400000"]


@pytest.mark.slow
def test_tests_keep_to_their_device():
    names = " and ".join(["cuda", *(f"not {name}" for name in LEFT_OUT)])
    files = [f"tests/ops/{name}" for name in FILES]
    options = ["-p", "support.pretended_cuda", "--tb=short", "-m", "not hypothesis", "-k", names]
    result = run_pytest(*options, *files)
    assert result.returncode == 0, result.stdout
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 150


def test_a_tensor_made_at_import_is_found():
    """It would be on the CPU: what the test above is for."""
    code = """if True:
        import torch
        from support import pretended_cuda
        from ava_ext.ops.row_fields import row_options
        from ava_ext.ops.softmax_rows import row_loss
        targets = torch.tensor([1, 2])
        pretended_cuda.pytest_sessionstart()
        torch.set_default_device("cuda")
        logits = torch.zeros(2, 5)
        assert row_loss(logits, torch.tensor([1, 2]), row_options(logits)).loss.device.type == "cuda"
        row_loss(logits, targets, row_options(logits))
    """
    result = run_python(code)
    assert re.search(r"expected .*(targets|all tensors).* on .*device", result.stderr.splitlines()[-1]), result.stderr
