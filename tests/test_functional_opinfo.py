"""PyTorch's own samples of cross_entropy and linear_cross_entropy: the same values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from ava_ext.functional import cross_entropy, linear_cross_entropy

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")

from torch.testing._internal.common_methods_invocations import op_db

OPERATORS = {op.name: op for op in op_db if op.name.startswith("nn.functional.") and op.variant_test_name == ""}


def samples(name):
    for number, sample in enumerate(OPERATORS[name].sample_inputs("cpu", torch.float64, requires_grad=True)):
        yield number, (sample.input, *sample.args), sample.kwargs


def assert_same(ours, theirs, arguments, keywords, what):
    leaves = [value for value in (*arguments, *keywords.values()) if isinstance(value, torch.Tensor)]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    got, want = ours(*arguments, **keywords), theirs(*arguments, **keywords)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12, msg=lambda text: f"{what}: {text}")
    gradients = (torch.autograd.grad(value.sum(), leaves) for value in (got, want))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11, msg=lambda text: f"{what}: {text}")


@pytest.mark.filterwarnings("ignore")
def test_cross_entropy():
    n_compared = 0
    for number, (logits, target), keywords in samples("nn.functional.cross_entropy"):
        assert_same(cross_entropy, F.cross_entropy, (logits, target), keywords, f"sample {number}, {keywords}")
        n_compared += 1
    assert n_compared >= 21


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif("nn.functional.linear_cross_entropy" not in OPERATORS, reason="this torch has no such function")
def test_linear_cross_entropy():
    """But for heads of more than one dimension of classes, which no language model has."""
    n_compared = 0
    for number, (states, weight, target), keywords in samples("nn.functional.linear_cross_entropy"):
        if weight.dim() != 2:
            continue
        arguments, what = (states, weight, target), f"sample {number}, {keywords}"
        assert_same(linear_cross_entropy, F.linear_cross_entropy, arguments, keywords, what)
        n_compared += 1
    assert n_compared >= 60
