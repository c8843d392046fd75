"""Adaptive temperature: what a run records, when a temperature is used, and that nothing else moves it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.assertions import assert_equals_reference
from support.strategies import Numbers, seeds

from ava_ext import UnifiedLoss, reference

V = 6
FLOAT32 = {"rel": 1e-5, "abs": 0}


def call(loss_fn, numbers, scale=1.0, **further):
    logits, targets = numbers.leaf(2, 4, V, scale=scale), numbers.integers(0, V, 2, 4)
    return loss_fn(logits, targets, **further, return_detailed=True)


@settings(max_examples=25)
@given(
    seeds,
    st.sampled_from([(0.5, 2.0), (0.95, 1.04)]),
    st.sampled_from([0.0, 1.0, 3.0]),
    st.sampled_from([1.0, 0.97]),
    st.floats(0.0, 3.0),
)
def test_a_run_of_training_steps(seed, bounds, gain, initial, volatility):
    numbers = Numbers(seed)
    options = {"temperature_bounds": bounds, "temperature_gain": gain, "initial_temperature": initial}
    loss_fn = UnifiedLoss(V, use_focal_loss=True, label_smoothing=0.1, logit_scale=0.7, **options).double()
    history = []
    for step in range(14):
        assert loss_fn.temperature.value.item() == pytest.approx(
            reference.adaptive_temperature(loss_fn.config, history), **FLOAT32
        )
        scale = math.exp(volatility * math.sin(step))
        arguments = {"logits": numbers.leaf(2, 4, V, scale=scale), "targets": numbers.integers(0, V, 2, 4)}
        if step in (2, 11):  # nothing counts: not recorded
            arguments["targets"] = torch.full((2, 4), -100)
            loss_fn(**arguments)
            continue
        result = assert_equals_reference(loss_fn, arguments)  # with the temperature from before the call
        history.append(result["cross_entropy"].item())
    assert loss_fn.temperature.count.item() == len(history) == 12
    torch.testing.assert_close(
        loss_fn.temperature.history[:12].double(), torch.tensor(history).double(), rtol=1e-6, atol=0
    )


def test_only_the_last_hundred_losses_matter():
    numbers, history = Numbers(0), []
    loss_fn = UnifiedLoss(V, temperature_gain=2.0, temperature_bounds=(0.1, 10.0))
    for step in range(130):
        scale = 30.0 if step < 40 else 1.0 + step % 3
        history.append(call(loss_fn, numbers, scale)["cross_entropy"].item())
    expected = reference.adaptive_temperature(loss_fn.config, history)
    assert loss_fn.temperature.value.item() == pytest.approx(expected, **FLOAT32)
    assert abs(expected - reference.adaptive_temperature(loss_fn.config, history[:100])) > 0.05


def test_micro_steps_are_one_step():
    numbers = Numbers(1)
    loss_fn = UnifiedLoss(V, auto_step=False)
    history = []
    for _ in range(12):
        sums = rows = 0
        for n_counted in (8, 3):
            logits, targets = numbers.normal(2, 4, V), numbers.integers(0, V, 2, 4)
            targets.view(-1)[n_counted:] = -100
            before = loss_fn.temperature.state_dict()
            result = loss_fn(logits, targets, return_detailed=True)
            sums, rows = sums + result["cross_entropy"].item() * n_counted, rows + n_counted
            torch.testing.assert_close(dict(loss_fn.temperature.state_dict()), dict(before), rtol=0, atol=0)
        loss_fn.step()
        history.append(sums / rows)
        expected = reference.adaptive_temperature(loss_fn.config, history)
        assert loss_fn.temperature.value.item() == pytest.approx(expected, **FLOAT32)
    assert loss_fn.temperature.value != 1.0


def test_only_training_with_grad_records():
    loss_fn = UnifiedLoss(V)
    with torch.no_grad():
        call(loss_fn, Numbers(2))
    with torch.inference_mode():
        call(loss_fn, Numbers(2))
    call(loss_fn.eval(), Numbers(2))
    assert loss_fn.temperature.count == 0
    call(loss_fn.train(), Numbers(2))
    assert loss_fn.temperature.count == 1


@pytest.mark.parametrize("wild", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_not_recorded(wild):
    numbers, loss_fn = Numbers(3), UnifiedLoss(V)
    logits = numbers.normal(2, 4, V)
    logits[0, 0] = wild
    loss_fn(logits, numbers.integers(0, V, 2, 4))
    assert loss_fn.temperature.count == 0
    call(loss_fn, numbers)
    assert loss_fn.temperature.count == 1
    assert loss_fn.temperature.history.isfinite().all()


def test_constant_losses_leave_a_steady_temperature():
    loss_fn, logits, targets = UnifiedLoss(V), Numbers(4).normal(2, 4, V), torch.ones(2, 4, dtype=torch.int64)
    values = []
    for _ in range(30):
        # the loss itself depends on the temperature: give the temperature its losses
        loss_fn.temperature.record(True, pending_loss=torch.tensor(20.0), pending_rows=torch.tensor(8.0))
        loss_fn.step()
        values.append(loss_fn.temperature.value.item())
    assert values[:9] == [1.0] * 9
    assert values[9:] == pytest.approx([1 - 0.075] * 21, rel=1e-5)  # no drift
    result = loss_fn.eval()(logits, targets, return_detailed=True)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1) / (1 - 0.075), targets.flatten())
    torch.testing.assert_close(result["total_loss"], expected, rtol=1e-5, atol=0)
    assert result["temperature"].item() == pytest.approx(values[-1])


@pytest.mark.parametrize(
    ("options", "adapts"),
    [
        ({"primary_loss_type": "standard"}, False),
        ({"primary_loss_type": "deepseek"}, True),
        ({"primary_loss_type": "standard", "adaptive_temperature": True}, True),
        ({"primary_loss_type": "deepseek", "adaptive_temperature": False}, False),
    ],
)
def test_which_losses_adapt(options, adapts):
    numbers, loss_fn = Numbers(5), UnifiedLoss(V, **options)
    for step in range(12):
        result = call(loss_fn, numbers, scale=1.0 + 4 * (step % 2))
    assert (loss_fn.temperature.count == 12) == adapts
    assert (loss_fn.temperature.value != 1.0) == adapts
    if not adapts:
        assert result["temperature"] == 1.0


def test_the_returned_temperature_does_not_change_later():
    numbers, loss_fn = Numbers(6), UnifiedLoss(V)
    results = [call(loss_fn, numbers, scale=1.0 + 4 * (step % 2)) for step in range(12)]
    values = [result["temperature"].item() for result in results]
    assert values[:10] == [1.0] * 10
    assert values[10] != 1.0


def test_reset_forgets_everything():
    numbers, loss_fn = Numbers(7), UnifiedLoss(V, initial_temperature=1.2)
    for step in range(12):
        call(loss_fn, numbers, scale=1.0 + 4 * (step % 2))
    statistics = loss_fn.get_loss_statistics()["temperature"]
    assert statistics["count"] == 12
    assert statistics["value"] == loss_fn.temperature.value
    assert statistics["mean_loss"].item() == pytest.approx(loss_fn.temperature.history[:12].mean().item())
    loss_fn.reset_statistics()
    fresh = UnifiedLoss(V, initial_temperature=1.2)
    torch.testing.assert_close(dict(loss_fn.named_buffers()), dict(fresh.named_buffers()), rtol=0, atol=0)
    assert statistics["count"] == 12  # copies


def test_a_count_below_zero_is_none():
    """Of a damaged checkpoint: it is no place in the history."""
    loss_fn = UnifiedLoss(5)
    state = loss_fn.state_dict() | {"temperature.count": torch.tensor(-7)}
    loss_fn.load_state_dict(state)
    loss_fn(torch.randn(2, 3, 5), torch.randint(5, (2, 3)))
    loss_fn.step()
    assert loss_fn.get_loss_statistics()["temperature"]["count"] == 1
