"""What UnifiedLoss should give, from the reference, and the comparison of values and gradients."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from ava_ext import UnifiedLoss, reference
from ava_ext.ops.linear_logits import LinearLogits

# float64 against float64; the running load of experts is float32
EXACT = {"rtol": 1e-9, "atol": 1e-11}
FLOAT32_STATE = {"rtol": 1e-6, "atol": 3e-8}


def leaves(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a call that wants a gradient, by name."""
    for path, value in tree_flatten_with_path(arguments)[0]:
        if isinstance(value, Tensor) and value.requires_grad:
            yield f"{path[0].key}{keystr(path[1:])}", value


def with_dense_logits(arguments: Any) -> Any:
    """The arguments with logits in the place of LinearLogits."""

    def dense(value):
        return F.linear(*value) if isinstance(value, LinearLogits) else value

    return tree_map(dense, arguments, is_leaf=lambda value: isinstance(value, LinearLogits))


def gradients(loss: Tensor, loss_fn: UnifiedLoss, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """d loss (weighted by position, if it has rows) / d every leaf and parameter of the loss; zeros where unused."""
    names = dict(leaves(arguments)) | dict(loss_fn.named_parameters())
    weighting = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape) if loss.dim() else 1.0
    if not names:
        return {}
    found = torch.autograd.grad((loss * weighting).sum(), list(names.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(names.items(), found, strict=True)
    }


def own_head_logits(loss_fn: UnifiedLoss, arguments: dict[str, Any]) -> Any:
    """depth -> what the loss's own head of that depth gives, as the reference wants it; None without such heads."""
    if loss_fn.mtp is None or "hidden_states" not in arguments:
        return None
    states = arguments["hidden_states"]
    if not loss_fn.config.mtp_share_head:
        return lambda depth: loss_fn.mtp.heads[depth - 1](loss_fn.mtp.norm(states))
    weight, bias = arguments["lm_head_weight"], arguments.get("lm_head_bias")
    if loss_fn.config.mtp_detach_head:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    return lambda depth: F.linear(loss_fn.mtp.heads[depth - 1](states), weight, bias)


def expected_load(loss_fn: UnifiedLoss, load: Tensor, counts: Tensor) -> Tensor:
    """The running load as it is after a training call that found `counts`; [n_layers, n_experts]."""
    momentum = loss_fn.config.moe_momentum
    return torch.stack([reference.updated_expert_load(f, c, momentum) for f, c in zip(load, counts, strict=True)])


def assert_equals_reference(loss_fn: UnifiedLoss, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Total, components, metrics and gradients of one call, in the loss's present state and mode. Returns the dict."""
    balancer = loss_fn.moe_balancer
    temperature = loss_fn.temperature.value.double()
    if not loss_fn.config.temperature_adapts:
        temperature = torch.tensor(loss_fn.config.initial_temperature, dtype=torch.float64)
    load = bias = None
    if balancer is not None:
        load, bias, counts = balancer.expert_load.clone(), balancer.expert_bias.clone(), balancer.expert_counts.clone()
    got = loss_fn(**arguments, return_detailed=True)
    if balancer is not None:
        committed = load
        if loss_fn.training and loss_fn.config.auto_step:
            committed = expected_load(loss_fn, load, balancer.expert_counts - counts)
        torch.testing.assert_close(balancer.expert_load, committed)
    want = reference.unified_loss(
        loss_fn.config,
        **with_dense_logits(arguments),
        temperature=temperature,
        expert_load=load,
        expert_bias=bias,
        mtp_logits=own_head_logits(loss_fn, arguments),
    )
    assert set(got) == set(want)
    for name, value in want.items():
        tolerance = FLOAT32_STATE if balancer is not None and name in ("total_loss", "moe_balancing_term") else EXACT
        torch.testing.assert_close(
            got[name], value, **tolerance, check_dtype=False, msg=lambda text, name=name: f"{name}: {text}"
        )
    got_gradients = gradients(got["total_loss"], loss_fn, arguments)
    for name, value in gradients(want["total_loss"], loss_fn, arguments).items():
        tolerance = FLOAT32_STATE if name.startswith("gate_logits") else EXACT
        torch.testing.assert_close(
            got_gradients[name], value, **tolerance, msg=lambda text, name=name: f"gradient of {name}: {text}"
        )
    return got


# -- Rows of logits


def assert_within(value, expected, bound, name=""):
    """|value - expected| <= bound, element by element. inf is within any bound of itself, nan of nan."""
    value = value.double()
    same = (value == expected) | (value.isnan() & expected.isnan())
    wrong = ~same & ~((value - expected).abs() <= bound)
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(place)} is {value[place].item()!r}, expected {expected[place].item()!r} within "
            f"{bound[place].item():.3g}; {int(wrong.sum())} of {wrong.numel()} are wrong"
        )


def relative_error(value, expected):
    """|value - expected| / |expected| in the L2 norm."""
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_bitwise_equal(value, expected, name=""):
    """The same bits, nan included; 0 and -0 are the same."""
    torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}")
