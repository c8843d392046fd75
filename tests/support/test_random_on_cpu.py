"""Numbers of a CPU generator on another default device. "meta" stands for the GPU: it has no numbers, but a place."""

import pytest
import torch
from support.random_on_cpu import RandomOnCpu


@pytest.fixture
def elsewhere():
    torch.set_default_device("meta")
    with RandomOnCpu("meta"):
        yield
    torch.set_default_device(None)


def test_drawn_on_the_cpu_and_moved(elsewhere):
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(4, generator=generator, requires_grad=True)
    assert drawn.device.type == "meta" and drawn.is_leaf and drawn.requires_grad
    assert torch.randint(2, 5, (2, 3), generator=generator, dtype=torch.int32).dtype == torch.int32

    same = torch.Generator().manual_seed(3)
    for _ in range(4):
        torch.randn((), generator=same, device="cpu")
    torch.randint(2, 5, (2, 3), generator=same, dtype=torch.int32, device="cpu")
    # the generator went on by what was drawn, so that later numbers are the same too
    assert torch.rand((), generator=generator, device="cpu") == torch.rand((), generator=same, device="cpu")


def test_everything_else_is_as_it_was(elsewhere):
    assert torch.zeros(2).device.type == torch.rand(2).device.type == "meta"
    assert torch.rand(2, device="cpu").device.type == "cpu"
    generator = torch.Generator().manual_seed(0)
    assert torch.empty(3, device="cpu").normal_(generator=generator).device.type == "cpu"


def test_the_numbers_are_those_of_the_cpu():
    with RandomOnCpu("cpu"):
        drawn = torch.randn(5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn, torch.randn(5, generator=torch.Generator().manual_seed(1)))
