"""torch.set_default_dtype changes nothing that is computed: a quotient of integers would follow it."""

import contextlib
import functools

import pytest
import torch
from support.strategies import HIDDEN_SIZE, Numbers
from test_compile import CONFIGURATIONS, arguments

import ava_ext
from ava_ext import UnifiedLoss

DTYPES = [torch.float16, torch.bfloat16, torch.float64]
V, E = 7, 3


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def trained(name, initial, n_steps=12):
    """Every detailed dict and gradient of a few steps, and the state behind them."""
    loss_fn = UnifiedLoss(V, HIDDEN_SIZE, **CONFIGURATIONS[name]).float()  # heads have the default type, as torch's own
    loss_fn.load_state_dict(initial)
    results = []
    for seed in range(n_steps):
        given = arguments(loss_fn.config, seed)
        result = loss_fn(**given, return_detailed=True)
        leaves = [value for value in given.values() if isinstance(value, torch.Tensor) and value.requires_grad]
        gradients = torch.autograd.grad(result["total_loss"].sum(), leaves, allow_unused=True)
        results.append(({key: value.detach() for key, value in result.items()}, gradients))
    return results, dict(loss_fn.state_dict()), loss_fn.get_loss_statistics()


@functools.cache
def expected_training(name):
    initial = UnifiedLoss(V, HIDDEN_SIZE, **CONFIGURATIONS[name]).state_dict()
    return initial, trained(name, initial)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_training(name, dtype):
    initial, expected = expected_training(name)
    with default_dtype(dtype):
        found = trained(name, initial)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("step", "warmup_steps"), [(333, 1000), (70000, 100000), (1, 3)])
def test_a_schedule_is_as_fine_as_float32(step, warmup_steps, dtype):
    with default_dtype(dtype):
        loss_fn = ava_ext.AdaptiveAntiRepetitionLoss(
            V, initial_weight=0.25, final_weight=2.0, warmup_steps=warmup_steps
        )
        loss_fn.steps.fill_(step)
        factor = loss_fn.penalty_factor()
    assert factor.dtype == torch.float32
    assert factor.item() == pytest.approx(0.25 + 1.75 * step / warmup_steps, rel=1e-6)


def others():
    """Losses that stand by themselves, and functions, on float32 and integers."""
    numbers = Numbers(0)

    def float32(*shape):
        return numbers.normal(*shape).float()

    logits, targets, mask = float32(2, 6, V), numbers.integers(0, V, 2, 6), numbers.uniform(2, 6) < 0.7
    gates = [float32(2, 6, E) for _ in range(2)]
    row_mask = mask.reshape(-1)
    balancer = ava_ext.AuxiliaryFreeMoEBalancer(E, 1, num_moe_layers=2, router_score="sigmoid")
    scaling = ava_ext.AdaptiveLossScaling(["a", "b"], 0.5).float()
    meter = ava_ext.LossMeter()
    results = {
        "balancer": balancer(gates, None, row_mask, return_detailed=True),
        "auxiliary": ava_ext.AuxiliaryLoss(1)(gates, None, row_mask, return_detailed=True),
        "per sequence": ava_ext.AuxiliaryLoss(1, per_sequence=True)(gates, None, row_mask, return_detailed=True),
        "diversity": ava_ext.DiversityLoss()(float32(E, 12, 4), row_mask, return_detailed=True),
        "pairs": ava_ext.ContrastiveLoss()(float32(5, 4), float32(5, 4)),
        "tokens": ava_ext.ContrastiveLoss()(float32(2, 6, 4), attention_mask=mask),
        "consistency": ava_ext.ConsistencyLoss("js")(float32(2, 6, V), float32(2, 6, V), mask),
        "perplexity": ava_ext.PerplexityLoss()(logits, targets),
        "scaling": scaling({"a": logits.sum(), "b": logits.abs().sum()}, return_detailed=True),
        "cross_entropy": ava_ext.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), z_loss_weight=0.1),
        "candidates": ava_ext.NGramRepetitionPenalty(1, vocab_size=V)(logits, targets, num_items_in_batch=3),
        "n_items": UnifiedLoss(V)(logits, targets, num_items_in_batch=torch.tensor(70001)),
        "log_probs": ava_ext.token_log_probs(logits, targets),
    }
    balancer.step()
    results["balancer state"] = dict(balancer.state_dict()) | balancer.statistics()
    meter.update(UnifiedLoss(V)(logits, targets, return_detailed=True))
    results["meter"] = meter.compute()
    return results


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_stands_by_itself(dtype):
    expected = others()
    with default_dtype(dtype):
        found = others()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
