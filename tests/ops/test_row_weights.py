"""Which rows count and their weights, against the definition in Python numbers."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.strategies import Numbers, seeds

from ava_ext.ops.row_weights import count_rows

IGNORED = -100
N_CLASSES = 5


def definition(targets, keep, token_weights, class_weights, n_items, ignore_index, is_mean):
    """Lists of the targets and weights, and n_counted, for nested lists of numbers or None."""
    counts = [
        [target != ignore_index and (keep is None or keep[b][t]) for t, target in enumerate(row)]
        for b, row in enumerate(targets)
    ]
    weights = [
        [(1.0 if token_weights is None else token_weights[b][t]) if count else 0.0 for t, count in enumerate(row)]
        for b, row in enumerate(counts)
    ]
    n = 1.0
    if is_mean:
        n = math.fsum(w for row in weights for w in row)
        if class_weights is not None:
            pairs = [pair for row in zip(weights, targets, strict=True) for pair in zip(*row, strict=True)]
            of_classes = [weight * class_weights[target] for weight, target in pairs if weight]
            n = math.fsum(of_classes) or n
        n = (n if n_items is None else n_items) or 1.0
    counted = [
        [y if count else ignore_index for y, count in zip(ys, row, strict=True)]
        for ys, row in zip(targets, counts, strict=True)
    ]
    return counted, sum(map(sum, counts)), [[w / n for w in row] for row in weights]


def as_lists(tensor):
    return None if tensor is None else tensor.tolist()


@settings(max_examples=60)
@given(
    seeds,
    st.sampled_from([(1, 1), (3, 5), (2, 37), (5, 300), (0, 4), (2, 0)]),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([IGNORED, 0]),
    st.sets(st.sampled_from(["keep", "token", "class", "n_items", "sliced", "none counts", "zero"])),
    st.booleans(),
)
# a device without kernels gets few examples, and maybe none with a given N or with classes
@example(0, (3, 5), torch.float32, IGNORED, {"keep", "token", "n_items"}, True)
@example(0, (3, 5), torch.float32, IGNORED, {"token", "class"}, True)
def test_the_definition(device, seed, shape, dtype, ignore_index, given_too, is_mean):
    numbers = Numbers(seed)
    wide = (shape[0], 2 * shape[1] + 1) if "sliced" in given_too else shape

    def made(values):
        return values[:, 1::2].to(device) if "sliced" in given_too else values.to(device)

    targets = numbers.integers(0, N_CLASSES, *wide)
    targets[numbers.uniform(*wide) < (1.0 if "none counts" in given_too else 0.3)] = ignore_index
    keep = numbers.uniform(*wide) < 0.7 if "keep" in given_too else None
    token_weights = numbers.uniform(*wide, low=0.5, high=2.0).to(dtype) if "token" in given_too else None
    targets, keep, token_weights = (None if value is None else made(value) for value in (targets, keep, token_weights))
    low = 0.0 if "zero" in given_too else 0.5
    class_weights = n_items = None
    if "class" in given_too:
        class_weights = numbers.uniform(N_CLASSES, low=low, high=4 * low).to(device, dtype)
    if "n_items" in given_too:
        n_items = torch.tensor(7 * low, dtype=dtype, device=device)
    got = count_rows(targets, keep, token_weights, class_weights, n_items, ignore_index, is_mean, dtype)
    lists = [as_lists(value) for value in (targets, keep, token_weights, class_weights, n_items)]
    counted, n_counted, weights = definition(*lists, ignore_index, is_mean)
    assert [tensor.dtype for tensor in got] == [torch.int64, dtype, dtype]
    assert got[0].tolist() == counted
    assert got[1].item() == n_counted
    expected = torch.tensor(weights, dtype=dtype, device=device).reshape(shape)
    # N is a sum of up to 1500 numbers, one after the other
    torch.testing.assert_close(got[2], expected, rtol=1e-6 if dtype == torch.float32 else 2e-13, atol=0)


def test_flat_rows(device):
    targets = torch.tensor([1, IGNORED, 3, 0], device=device)
    counted, n_counted, weights = count_rows(targets, None, None, None, None, IGNORED, True, torch.float32)
    assert torch.equal(counted, targets)
    assert n_counted.item() == 3
    assert weights.tolist() == [pytest.approx(1 / 3), 0, pytest.approx(1 / 3), pytest.approx(1 / 3)]


def test_what_does_not_count_is_not_read(device):
    targets = torch.tensor([[2, IGNORED, 1]], device=device)
    token_weights = torch.tensor([[1.0, math.nan, 3.0]], device=device)
    _, _, weights = count_rows(targets, None, token_weights, None, None, IGNORED, True, torch.float32)
    assert weights.tolist() == [[0.25, 0.0, 0.75]]


def test_a_nan_is_not_hidden(device):
    targets = torch.tensor([[2, 0]], device=device)
    token_weights = torch.tensor([[1.0, math.nan]], device=device)
    _, _, weights = count_rows(targets, None, token_weights, None, None, IGNORED, True, torch.float32)
    assert weights.isnan().all()


def test_many_rows_are_counted_exactly(device):
    """Beyond 2^24 a float counts no further."""
    targets = torch.zeros(1, 1, dtype=torch.int64, device=device).expand(4099, 4099)
    _, n_counted, weights = count_rows(targets, None, None, None, None, IGNORED, True, torch.float64)
    assert n_counted.item() == 4099**2
    assert weights[-1, -1].item() == 1 / 4099**2


@pytest.mark.parametrize("given_too", [False, True])
def test_opcheck(given_too):
    targets = torch.tensor([[1, IGNORED, 3], [0, 2, 2]])
    more = [targets > 0, torch.rand(2, 3), torch.rand(4), torch.tensor(5.0)] if given_too else [None] * 4
    torch.library.opcheck(torch.ops.ava_ext.count_rows.default, (targets, *more, IGNORED, True, False))
