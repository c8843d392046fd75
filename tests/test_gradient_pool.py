"""Gradients of a megabyte and more come from a small pool: reused once released, never while anyone holds them."""

import ctypes
import gc
import os
from pathlib import Path

import pytest
import torch
from support.assertions import assert_bitwise_equal

from ava_ext import empty_cache
from ava_ext.ops.row_fields import row_options
from ava_ext.ops.softmax_rows import row_loss

SIZES = [(64, 8192), (300, 5003), (1024, 9001)]  # of 2, 6 and 37 MB, some of them no whole number of pages


def gradient_of(logits, targets=None):
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64) if targets is None else targets
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(row_loss(logits, targets, row_options(logits)).loss.sum(), logits)[0]


def random_logits(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SIZES)
def test_released_memory_is_used_again(shape):
    logits = random_logits(shape, 0)
    gradient_of(logits)
    gc.collect()
    places = set()
    for _ in range(5):
        gradient = gradient_of(logits)
        places.add(gradient.data_ptr())
        del gradient
    assert len(places) == 1


@pytest.mark.parametrize("shape", SIZES)
def test_held_memory_is_never_used_again(shape):
    held, copies = [], []
    for seed in range(4):
        gradient = gradient_of(random_logits(shape, seed))
        held.append(gradient)
        copies.append(gradient.clone())
    views = [gradient[1:].view(-1) for gradient in held]  # a view holds it, too
    assert len({gradient.data_ptr() for gradient in held}) == 4
    for gradient, copy in zip(held, copies, strict=True):
        assert_bitwise_equal(gradient, copy)
    del held, gradient
    for seed in range(4, 7):
        gradient_of(random_logits(shape, seed))
    for view, copy in zip(views, copies, strict=True):
        assert_bitwise_equal(view, copy[1:].view(-1))


def test_smaller_and_larger_gradients_in_turn():
    """Whatever the pool hands out has room for all of it."""
    for seed, n_rows in enumerate([300, 100, 290, 1000, 40, 600, 299]):
        logits = random_logits((n_rows, 3001), seed)
        expected = logits.softmax(-1)
        expected[:, 0] -= 1
        torch.testing.assert_close(gradient_of(logits), expected, rtol=1e-5, atol=1e-7)


def test_a_gradient_that_a_leaf_keeps():
    """AccumulateGrad may keep the pool's own tensor as leaf.grad: the next step must not write into it."""
    leaves = [random_logits((100, 4000), seed).requires_grad_() for seed in range(3)]
    expected = [gradient_of(leaf) for leaf in leaves]
    for leaf in leaves:
        row_loss(leaf, torch.zeros(100, dtype=torch.int64), row_options(leaf)).loss.sum().backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert_bitwise_equal(leaf.grad, gradient)


def test_a_gradient_outlives_its_graph_and_can_be_written():
    logits = random_logits((64, 8192), 1)
    gradient = gradient_of(logits)
    gradient.mul_(2).add_(1)
    expected = gradient.clone()
    other = gradient_of(logits)
    assert_bitwise_equal(gradient, expected)
    torch.testing.assert_close(other * 2 + 1, expected)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_idle_memory_can_be_freed():
    gradient_of(random_logits((1024, 9001), 0))
    gc.collect()
    before = resident_bytes()
    freed = empty_cache()
    assert freed >= 1024 * 9001 * 4
    assert before - resident_bytes() > freed * 0.9
    assert empty_cache() == 0


@pytest.mark.parametrize("shape", [(8, 8), (128, 4096)], ids=["torch's own", "the pool's"])
def test_memory_of_sizes_that_are_gone_is_freed(shape):
    empty_cache()
    gradients = [gradient_of(random_logits((1024, 9001), seed)) for seed in range(2)]
    del gradients
    gc.collect()
    before = resident_bytes()
    logits = random_logits(shape, 0)
    for _ in range(40):
        gradient_of(logits)
    gc.collect()
    assert before - resident_bytes() > 2 * 1024 * 9001 * 4 * 0.8  # both blocks
    assert empty_cache() < 1024 * 9001 * 4


@pytest.fixture
def free_heap():
    """400 MB that malloc has on its heap, free, so that it takes blocks from there and not from the system."""
    malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
    malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    free(malloc(31 << 20))  # glibc: blocks of up to so much come from the heap from now on
    *places, behind = [malloc(30 << 20) for _ in range(15)]
    for place in places:  # without the last: malloc returns free memory at the end of its heap
        free(place)
    yield range(min(places), max(places))
    free(behind)


def test_memory_of_the_heap_is_returned(free_heap):
    empty_cache()
    gradient = gradient_of(random_logits((1024, 9001), 0))
    assert gradient.data_ptr() in free_heap
    del gradient
    gc.collect()
    before = resident_bytes()
    freed = empty_cache()
    assert before - resident_bytes() > freed * 0.9 > 0


def test_memory_of_sizes_in_turn_is_kept():
    empty_cache()
    large, small = random_logits((1024, 9001), 0), random_logits((8, 8), 0)
    places = set()
    for _ in range(4):
        gradient = gradient_of(large)
        places.add(gradient.data_ptr())
        del gradient
        for _ in range(20):
            gradient_of(small)
    assert len(places) == 1


def too_large():
    """Logits whose gradient takes 2^48 bytes, more than a process can address, and targets."""
    logits = torch.zeros(1, 2**23, dtype=torch.float64).expand(2**22, 2**23)
    return logits, torch.zeros(1, dtype=torch.int64).expand(2**22)


def test_out_of_memory_is_what_torch_raises():
    logits, targets = too_large()
    message = f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {2**48} bytes"
    with pytest.raises(RuntimeError, match=message):
        torch.empty(logits.shape, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=message):
        gradient_of(logits, targets)
    with pytest.raises(RuntimeError, match="can't allocate memory"):  # a small tensor of torch's own, for each row
        torch.ops.ava_ext.row_statistics(logits[:1, :2].expand(2**46, 2), None, None, row_options(logits), 0, 2)


def test_idle_memory_goes_first_where_memory_is_short():
    gradient_of(random_logits((1024, 9001), 0))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        gradient_of(*too_large())
    assert empty_cache() == 0
