"""Whether ava_ext computes on a device what the reference computes in float64 on the CPU, or the CPU kernels compute.

    python benchmarks/gpu_check.py [--device cuda|cpu] [--small]

For machines without pytest, and a program for compute-sanitizer (--small). The tests check more.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import DeviceLostError, require_device
from row_loss import EVERY_TERM
from torch import Tensor

from ava_ext import (
    AuxiliaryLoss,
    UnifiedLoss,
    UnifiedLossConfig,
    build_info,
    functional,
    reference,
    repetition_candidates,
    softmax_statistics,
)
from ava_ext.ops import RowFlags, row_options

# relative L2 error of a gradient, without the entries of targets and candidates: one rounding, or float32 arithmetic
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}
_OF_VALUES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
# rows of one warp, of a block, of a cluster, and too long for that; odd, so that no row but
# the first is aligned
VOCAB_SIZES = (61, 4099, 50257, 128257, 1000003)
SMALL_VOCAB_SIZES = (61, 4099, 128257)
OPTIONS: dict[str, Any] = {**EVERY_TERM, "primary_loss_type": "standard", "min_sequence_length": 4}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "every term": OPTIONS,
    "every term, soft cap, in place": OPTIONS | {"logit_softcap": 30.0, "inplace_gradient": True},
    "cross-entropy": {"primary_loss_type": "standard"},
}

Check = tuple[str, Callable[[], None]]


def assert_close(name: str, value: Tensor, expected: Tensor, tolerance: float) -> None:
    """|value - expected| <= tolerance |expected| in the L2 norm; on the CPU in float64."""
    value, expected = value.detach().double().cpu(), expected.detach().double()
    error, size = (value - expected).norm().item(), expected.norm().item()
    if not error <= tolerance * size:
        raise AssertionError(f"{name}: relative error {error / size if size else error:.3g}, wanted <= {tolerance:.3g}")


def assert_gradient(name: str, value: Tensor, expected: Tensor, tolerance: float) -> None:
    """Large entries (targets, candidates) and the others of a gradient [..., vocab_size], each by themselves.

    The others are 0.3% of the norm at V = 128k: a gradient with zeros there would pass for the whole.
    """
    places = expected.abs().topk(min(64, expected.shape[-1] // 2), dim=-1).indices
    is_large = torch.zeros(expected.shape, dtype=torch.bool).scatter(-1, places, True)
    value = value.detach().double().cpu()
    assert_close(f"{name}, large entries", value.where(is_large, 0.0), expected.where(is_large, 0.0), tolerance)
    assert_close(f"{name}, other entries", value.where(~is_large, 0.0), expected.where(~is_large, 0.0), tolerance)


class Batch:
    """Logits [batch_size, n_tokens, vocab_size] as a slice of a wider tensor, so that rows start anywhere."""

    def __init__(self, shape: tuple[int, int], vocab_size: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(vocab_size)
        batch_size, n_tokens = shape
        self.wide = torch.full((batch_size, n_tokens + 1, vocab_size + 2), torch.nan, dtype=dtype)
        self.wide[:, :-1, 1:-1] = torch.randn(*shape, vocab_size, generator=generator) * 2
        words = torch.randint(1, vocab_size, (3,), generator=generator)
        self.targets = words[torch.randint(3, shape, generator=generator)]
        self.targets[0, 1] = -100
        self.wide[0, 1] = torch.nan  # a row that does not count may hold anything
        self.negative_ids = torch.randint(-1, vocab_size, (*shape, 5), generator=generator)

    def arguments(self, device: torch.device | str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """The wide leaf, and what UnifiedLoss takes."""
        leaf = self.wide.to(device, dtype, copy=True).requires_grad_()
        given = {"targets": self.targets, "negative_ids": self.negative_ids}
        # times 1: an output of an operation, as inplace_gradient wants it
        return leaf, {
            "logits": (leaf * 1)[:, :-1, 1:-1],
            **{name: value.to(device) for name, value in given.items()},
        }


def check_unified_loss(
    device: torch.device, shape: tuple[int, int], vocab_size: int, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Loss, components and gradient against the reference; the same bits the second time."""
    batch = Batch(shape, vocab_size, dtype)
    config = UnifiedLossConfig(vocab_size=vocab_size, **options)
    upstream = 1024.0 if dtype == torch.float16 else 1.0  # as a gradient scaler has it, or most gradients are 0
    leaf, arguments = batch.arguments("cpu", torch.float64)
    wanted = reference.unified_loss(replace(config, inplace_gradient=False), **arguments)
    wanted_gradient = torch.autograd.grad(wanted["total_loss"] * upstream, leaf)[0][:, :-1, 1:-1]

    def run() -> tuple[dict[str, Tensor], Tensor]:
        leaf, arguments = batch.arguments(device, dtype)
        got = UnifiedLoss(vocab_size, **options).to(device)(**arguments, return_detailed=True)
        gradient = torch.autograd.grad(got["total_loss"] * upstream, leaf)[0]
        outside = gradient.clone()
        outside[:, :-1, 1:-1] = 0
        if outside.any():
            raise AssertionError("gradient: written outside of the logits")
        return got, gradient[:, :-1, 1:-1]

    got, gradient = run()
    for name, value in wanted.items():
        assert_close(name, got[name], value, _OF_VALUES[dtype])
    assert_gradient("gradient", gradient, wanted_gradient, TOLERANCES[dtype])
    again, gradient_again = run()
    if not torch.equal(gradient, gradient_again) or not torch.equal(got["total_loss"], again["total_loss"]):
        raise AssertionError("another result from the same inputs")


def check_kernel_in_place(device: torch.device, vocab_size: int, dtype: torch.dtype) -> None:
    """row_loss_ over its own buffer against F.cross_entropy."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, vocab_size, generator=generator).to(dtype)
    targets, weights = torch.tensor([0, vocab_size - 1, -100]), torch.tensor([1.0, 2.0, 3.0])
    leaf = logits.double().requires_grad_()
    losses = F.cross_entropy(leaf, targets, reduction="none") * weights
    buffer = logits.to(device)
    coefficients = row_options(buffer)
    options = (None, None, [], int(RowFlags.CROSS_ENTROPY), vocab_size, -100)
    got, _ = torch.ops.ava_ext.row_loss_(
        buffer, targets.to(device), coefficients, weights.to(device, coefficients.dtype), *options
    )
    assert_close("row_loss", got, losses, _OF_VALUES[dtype])
    if dtype != torch.float16:  # whose gradients need a scaler's factor
        gradient = torch.autograd.grad(losses.sum(), leaf)[0]
        assert_gradient("gradient", buffer, gradient, TOLERANCES[dtype])


def check_many_short_rows(device: torch.device, dtype: torch.dtype) -> None:
    """More rows than a device has warps: one takes several at once, and each has the bits that it has among few."""
    n_rows, few, vocab_size = 30_000, 1000, 61
    generator = torch.Generator().manual_seed(5)
    logits = (torch.randn(n_rows, vocab_size, generator=generator) * 3).to(dtype)
    targets = torch.randint(vocab_size, (n_rows,), generator=generator)
    targets[::7] = -100

    def run(logits: Tensor, targets: Tensor, loss_fn: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        losses = loss_fn(leaf, targets, label_smoothing=0.1, reduction="none")
        return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]

    wanted = run(logits.double(), targets, F.cross_entropy)
    together = run(logits.to(device), targets.to(device), functional.cross_entropy)
    apart = [
        run(logits[i : i + few].to(device), targets[i : i + few].to(device), functional.cross_entropy)
        for i in range(0, n_rows, few)
    ]
    for name, value, parts, expected, tolerance in zip(
        ("loss", "gradient"), together, zip(*apart, strict=True), wanted, (_OF_VALUES, TOLERANCES), strict=True
    ):
        assert_close(name, value, expected, tolerance[dtype])
        if not torch.equal(value, torch.cat(parts)):
            raise AssertionError(f"{name}: other bits than the same rows have among {few}")


def check_statistics(device: torch.device, vocab_size: int, dtype: torch.dtype) -> None:
    """softmax_statistics and its gradient, with a masked column."""
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(3, vocab_size, generator=generator) * 3).to(dtype)
    logits[1, 2] = -torch.inf
    ids = torch.tensor([[0, 1], [5, -1], [vocab_size - 1, 3]])
    # a sum of statistics has a gradient of the order of 1, which float16 holds
    leaf, expected_leaf = logits.to(device).requires_grad_(), logits.double().requires_grad_()
    got = softmax_statistics(leaf, ids.to(device), temperature=0.8, logit_softcap=20.0)
    expected = reference.softmax_statistics(expected_leaf, ids, temperature=0.8, logit_softcap=20.0)
    for name in expected._fields:
        assert_close(name, getattr(got, name), getattr(expected, name), _OF_VALUES[dtype])
    gradient = torch.autograd.grad(got.log_probs.sum() + got.entropy.sum(), leaf)[0]
    wanted = torch.autograd.grad(expected.log_probs.sum() + expected.entropy.sum(), expected_leaf)[0]
    assert_close("gradient", gradient, wanted, TOLERANCES[dtype])


def check_linear(device: torch.device, dtype: torch.dtype) -> None:
    """Hidden states and weight in place of logits, several chunks, against logits in float64."""
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(40, 64, generator=generator).to(dtype)
    weight = (torch.randn(1000, 64, generator=generator) / 4).to(dtype)
    targets = torch.randint(1000, (40,), generator=generator)
    expected_leaves = [tensor.double().requires_grad_() for tensor in (states, weight)]
    expected = F.cross_entropy(F.linear(*expected_leaves), targets)
    leaves = [tensor.to(device).requires_grad_() for tensor in (states, weight)]
    loss_fn = UnifiedLoss(1000, primary_loss_type="standard", linear_chunk_bytes=13 * 1000 * dtype.itemsize)
    loss_fn.to(device)
    loss = loss_fn(targets=targets.to(device), hidden_states=leaves[0], lm_head_weight=leaves[1])
    # logits in 16 bits are rounded: the loss and the gradients have that error
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}[dtype]
    assert_close("loss", loss, expected, tolerance)
    gradients = torch.autograd.grad(loss * 64, leaves), torch.autograd.grad(expected * 64, expected_leaves)
    for name, got, wanted in zip(("hidden_states", "lm_head_weight"), *gradients, strict=True):
        assert_close(f"gradient of {name}", got, wanted, tolerance)


def check_repetition(device: torch.device) -> None:
    """Exactly the candidates that the CPU finds."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(6, (3, 700), generator=generator)
    options: dict[str, Any] = {
        "vocab_size": 6,
        "use_immediate_repetition_penalty": True,
        "use_ngram_penalty": True,
        "ngram_size": 3,
        "eos_token_id": 0,
    }
    weights = torch.tensor([0.5, 1.5, 0.25, 1.0])
    expected = repetition_candidates(text, text, weights=weights, min_sequence_length=50, **options)
    text = text.to(device)
    got = repetition_candidates(text, text, weights=weights.to(device), min_sequence_length=50, **options)
    for name, value, wanted in zip(("ids", "weights"), got[:2], expected[:2], strict=True):
        assert_close(name, value, wanted, 0.0)


def check_router(device: torch.device, dtype: torch.dtype) -> None:
    """Balancing and z-loss of a router, and its gradient, in float64 on the CPU."""
    generator = torch.Generator().manual_seed(4)
    logits = (torch.randn(3, 777, 24, generator=generator) * 2).to(dtype)
    mask = torch.rand(777, generator=generator) < 0.8
    loss_fn = AuxiliaryLoss(4, load_balancing_weight=100.0, router_z_weight=10.0)
    expected_leaf, leaf = logits.double().requires_grad_(), logits.to(device).requires_grad_()
    expected = loss_fn(expected_leaf, None, mask)
    loss = loss_fn(leaf, None, mask.to(device))
    assert_close("loss", loss, expected, _OF_VALUES[dtype])
    gradients = torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(expected, expected_leaf)[0]
    assert_close("gradient", *gradients, TOLERANCES[dtype])


def check_temperature(device: torch.device) -> None:
    """The adaptive temperature takes the steps it takes on the CPU."""
    values = []
    for place in ("cpu", device):
        loss_fn = UnifiedLoss(50).to(place)
        for step in range(12):
            logits = torch.randn(4, 6, 50, generator=torch.Generator().manual_seed(step)) * (1 + step)
            targets = torch.randint(50, (4, 6), generator=torch.Generator().manual_seed(step))
            loss_fn(logits.to(place).requires_grad_(), targets.to(place)).backward()
        values.append(loss_fn.temperature.value)
    if values[0] == 1:
        raise AssertionError("temperature: expected it to have moved")
    assert_close("temperature", values[1], values[0], 1e-5)


def check_errors(device: torch.device) -> None:
    """Bad input raises before a launch."""
    logits, targets = torch.zeros(2, 3, 7, device=device), torch.zeros(2, 3, dtype=torch.long, device=device)
    loss_fn = UnifiedLoss(7, primary_loss_type="standard")
    bad: list[tuple[Tensor, Tensor]] = [(logits, targets[:, :2]), (logits.to(torch.int32), targets)]
    if device.type == "cuda":
        bad.append((logits, targets.cpu()))
    for arguments in bad:
        try:
            loss_fn(*arguments)
        except (ValueError, RuntimeError, TypeError):
            continue
        raise AssertionError("errors: expected bad input to raise")


def checks(device: torch.device, is_small: bool) -> Iterator[Check]:
    for dtype in TOLERANCES:
        name = str(dtype).removeprefix("torch.")
        for vocab_size in SMALL_VOCAB_SIZES if is_small else VOCAB_SIZES:
            shape = (1, 3) if is_small or vocab_size > 10_000 else (2, 6)  # the reference is slow
            at = f"{name} [{shape[0]}, {shape[1]}, {vocab_size}]"
            for title, options in CONFIGURATIONS.items():
                if vocab_size > 1_000_000 and title != "every term":
                    continue
                arguments = (device, shape, vocab_size, dtype, options)
                yield f"unified_loss {at}, {title}", lambda arguments=arguments: check_unified_loss(*arguments)
            arguments = (device, vocab_size, dtype)
            yield f"row_loss_ {at}", lambda arguments=arguments: check_kernel_in_place(*arguments)
            yield f"softmax_statistics {at}", lambda arguments=arguments: check_statistics(*arguments)
        yield f"many short rows {name}", lambda dtype=dtype: check_many_short_rows(device, dtype)
        yield f"linear {name}", lambda dtype=dtype: check_linear(device, dtype)
        yield f"router {name}", lambda dtype=dtype: check_router(device, dtype)
    yield "repetition_candidates", lambda: check_repetition(device)
    yield "temperature", lambda: check_temperature(device)
    yield "errors", lambda: check_errors(device)


def main(arguments: list[str] | None = None) -> int:
    """Runs all; returns 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="few small rows, for compute-sanitizer")
    parsed = parser.parse_args(arguments)
    print(f"ava_ext {build_info()}, torch {torch.__version__}, on {parsed.device}", flush=True)
    n_failed = n_checks = 0
    start = time.monotonic()
    for name, check in checks(torch.device(parsed.device), parsed.small):
        n_checks += 1
        try:
            check()
        except Exception as error:
            n_failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
            try:
                require_device(torch.device(parsed.device), name)
            except DeviceLostError as lost:  # what would come now fails for that reason alone
                print(f"FAILED {lost}", flush=True)
                break
    print(f"{n_checks} checks, {n_failed} failed, {time.monotonic() - start:.0f} s")
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
