"""The small tensors of numbers that the kernels read: made on their device, by nothing that waits for it."""

import inspect
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ava_ext.ops.repetition import N_REPETITION_WEIGHTS, repetition_weights
from ava_ext.ops.row_fields import N_OPTIONS, row_options


class Recorder(TorchDispatchMode):
    """The operators that run, and on which devices their tensors are."""

    def __init__(self):
        super().__init__()
        self.operators, self.devices = set(), set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.operators.add(operator.overloadpacket.__name__)
        self.devices.add(result.device.type)
        return result


@pytest.mark.parametrize("make, n", [(row_options, N_OPTIONS), (repetition_weights, N_REPETITION_WEIGHTS)])
def test_nothing_is_copied_from_the_host(make, n):
    """meta stands for a GPU: a copy to it would wait, and could not be captured in a CUDA graph."""
    with Recorder() as recorder:
        numbers = make(torch.zeros(0, device="meta"))
    assert numbers.shape == (n,) and numbers.device.type == "meta"
    assert recorder.devices == {"meta"}
    assert recorder.operators <= {"zeros", "full", "stack", "cat"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_and_types(dtype):
    like = torch.zeros(2, dtype=dtype)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    options = row_options(like, temperature=0.7, focal_alpha=0.25, z_loss_weight=1e-4, logit_softcap=30.0)
    expected = torch.tensor([0.7, 0.0, 0.25, 2.0, 1e-4, 0.0, 30.0, 1.0], dtype=real)
    torch.testing.assert_close(options, expected, rtol=0, atol=0)
    scaled = row_options(like, temperature=0.7, logit_softcap=30.0, logit_scale=0.25)
    torch.testing.assert_close(scaled[[0, 6]], torch.tensor([2.8, 120.0], dtype=real), rtol=0, atol=0)
    weights = repetition_weights(like, eos_penalty_weight=0.3)
    torch.testing.assert_close(weights, torch.tensor([0.5, 1.0, 0.3, 0.1], dtype=real), rtol=0, atol=0)


@pytest.mark.parametrize("make", [row_options, repetition_weights])
def test_numbers_that_would_be_constants_or_no_weights_are_refused(make):
    like = torch.zeros(0)
    for name in [name for name in inspect.signature(make).parameters if name != "like"]:
        with pytest.raises(ValueError, match=f"^{make.__name__}: expected .* without requires_grad: no gradient is"):
            make(like, **{name: torch.tensor(0.5, requires_grad=True)})
        for number in (-1.0, math.nan, math.inf, 1e39):
            with pytest.raises(ValueError, match=f"^{make.__name__}: expected .* to be a number .*, got "):
                make(like, **{name: number})


def test_scales_of_0_and_a_smoothing_above_1_are_refused():
    for name in ("temperature", "logit_softcap", "logit_scale"):
        with pytest.raises(ValueError, match=rf"^row_options: expected {name}.* to be a number > 0 .*, got 0.0"):
            row_options(torch.zeros(0), **{name: 0.0})
    with pytest.raises(ValueError, match=r"^row_options: expected temperature to be a number > 0 .*, got -1.0"):
        row_options(torch.zeros(0), temperature=-1.0, logit_scale=-2.0)  # whose quotient is above 0
    with pytest.raises(ValueError, match=r"label_smoothing to be a number in \[0, 1\], got 1.5"):
        row_options(torch.zeros(0), label_smoothing=1.5)
