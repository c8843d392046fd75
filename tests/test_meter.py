"""LossMeter over micro-batches: the values of the whole batch in one call, and no waiting for the device."""

import math

import pytest
import torch
from support.processes import on_ranks
from support.strategies import HIDDEN_SIZE, Numbers
from test_compile import BATCH, CONFIGURATIONS, ROWS, E, NoSynchronisation, V, arguments

from ava_ext import METRICS, AdaptiveLossScaling, LossMeter, UnifiedLoss
from ava_ext.losses.component import Addends, Part

AVERAGES_OF_CALLS = ("moe_cv", "moe_max_violation")  # of the balance; see LossMeter
NOT_OF_ROWS = {"use_auxiliary_loss": False, "use_contrastive_loss": False, "use_diversity_loss": False}
OPTIONS = {
    "plain": {"primary_loss_type": "standard"},
    "default": {},
    "every term of a row": {"primary_loss_type": "standard", **ROWS},
    "router": {"primary_loss_type": "standard", **BATCH, **NOT_OF_ROWS},
}


def batch(loss_fn):
    numbers = Numbers(0)
    targets = numbers.integers(1, V, 6, 5)
    for row in range(6):
        targets[row, row:] = 0 if loss_fn.pad_token_id == 0 else -100  # the first row counts nothing
    given = {"logits": numbers.leaf(6, 5, V), "targets": targets}
    if loss_fn.use_moe_balancing:
        given["gate_logits"] = numbers.leaf(30, E)
    return given


def part_of(given, rows):
    tokens = slice(5 * rows.start, 5 * rows.stop)
    sliced = {"logits": rows, "targets": rows, "gate_logits": tokens}
    return {name: value[sliced[name]] for name, value in given.items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_micro_batches_give_what_the_whole_batch_gives(name):
    loss_fn, meter, whole = UnifiedLoss(V, HIDDEN_SIZE, auto_step=False, **OPTIONS[name]), LossMeter(), LossMeter()
    given = batch(loss_fn)
    loss_fn(**given)
    loss_fn.step()  # the load of experts is no longer even
    n_items = loss_fn.count_items(given["targets"])
    parts = loss_fn(**given, num_items_in_batch=n_items, return_detailed=True)
    whole.update(parts)
    for rows in (slice(0, 1), slice(1, 3), slice(3, 6)):
        micro = loss_fn(**part_of(given, rows), num_items_in_batch=n_items, return_detailed=True)
        meter.update(micro)
    found, expected = meter.compute(), {key: value.item() for key, value in parts.items()}
    assert whole.compute() == pytest.approx(expected, rel=1e-6)
    assert all(type(value) is float for value in found.values()) and found["n_tokens"] == n_items
    assert math.isclose(found["perplexity"], math.exp(found["cross_entropy"]), rel_tol=1e-9)
    for key in AVERAGES_OF_CALLS:
        found.pop(key, None), expected.pop(key, None)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_an_update_does_not_wait_for_the_device(name):
    loss_fn, meter = UnifiedLoss(V, HIDDEN_SIZE, **{**CONFIGURATIONS[name], "reduction": "mean"}), LossMeter()
    given = [arguments(loss_fn.config, seed) for seed in range(3)]
    with NoSynchronisation():
        for values in given:
            meter.update(loss_fn(**values, return_detailed=True))
    assert meter.compute()["n_tokens"] > 0


def test_compute_waits_once(monkeypatch):
    loss_fn, meter, waits = UnifiedLoss(V), LossMeter(), []
    meter.update(loss_fn(torch.randn(2, 5, V), torch.ones(2, 5).long(), return_detailed=True))
    for name in ("item", "tolist", "cpu"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, original=original: (waits.append(1), original(self))[1])
    assert meter.compute()["temperature"] == 1
    assert len(waits) == 1


def test_a_metric_that_only_some_calls_have():
    """Its mean is that of these calls, in whichever order they come, and on whichever rank."""
    for calls in ((True, False, False), (False, True, False)):
        meter = LossMeter()
        for with_top_k in calls:
            meter.update(parts_of_a_call(with_top_k))
        check_partial_metric(meter.compute(), n_tokens=12)
    for found in on_ranks(2, metered_on_rank):
        check_partial_metric(found, n_tokens=8)


def parts_of_a_call(with_top_k):
    loss_fn = UnifiedLoss(V, primary_loss_type="standard", accuracy_top_k=(2,) if with_top_k else ())
    return loss_fn(torch.zeros(1, 4, V), torch.ones(1, 4).long(), return_detailed=True)


def metered_on_rank(rank):
    meter = LossMeter("world")
    meter.update(parts_of_a_call(with_top_k=rank == 0))
    return meter.compute()


def check_partial_metric(found, n_tokens):
    assert found["accuracy_top_2"] == 1.0 and found["n_tokens"] == n_tokens
    assert found["cross_entropy"] == pytest.approx(math.log(V), rel=1e-6)


class MeanTarget(Part):
    name, keys, METRICS = "mean_target", ("half",), ("mean_of_targets",)

    @classmethod
    def from_config(cls, config):
        return cls()

    def of_call(self, call):
        return Addends({"half": call.rows.batch_share / 2}, {"mean_of_targets": call.targets.float().mean()})


class LossWithMeanTarget(UnifiedLoss):
    PARTS = (*UnifiedLoss.PARTS, MeanTarget)


def test_a_metric_of_a_part_of_ones_own_is_a_metric():
    loss_fn, meter = LossWithMeanTarget(5, primary_loss_type="standard"), LossMeter()
    for target in (1, 3):
        parts = loss_fn(torch.zeros(1, 2, 5), torch.full((1, 2), target), num_items_in_batch=4, return_detailed=True)
        meter.update(parts)
    found = meter.compute()
    assert found["mean_of_targets"] == 2 and found["half"] == 0.5
    addends = [value for name, value in found.items() if name != "total_loss" and name not in METRICS]
    assert math.isclose(found["total_loss"], sum(addends), rel_tol=1e-6)


def test_a_refused_update_leaves_nothing():
    meter, ones = LossMeter(), torch.ones(())
    with pytest.raises(ValueError, match="expected a scalar for 'z_loss'"):
        meter.update({"n_tokens": ones, "temperature": ones, "total_loss": ones, "z_loss": torch.ones(2)})
    assert meter.compute() == {}


def test_the_dict_of_another_module_is_refused():
    parts = AdaptiveLossScaling(["main"])({"main": torch.ones(())}, return_detailed=True)
    with pytest.raises(ValueError, match=r"expected the dict of UnifiedLoss .*, with n_tokens, got \['main', 'total_l"):
        LossMeter().update(parts)


def test_the_scalar_loss_and_numbers_are_refused():
    with pytest.raises(TypeError, match=r"loss_meter: expected the dict of UnifiedLoss .*, got Tensor"):
        LossMeter().update(UnifiedLoss(V)(torch.zeros(2, V), torch.zeros(2).long()))
    with pytest.raises(TypeError, match=r"loss_meter: expected total_loss to be a torch.Tensor, got float"):
        LossMeter().update({"n_tokens": torch.ones(()), "total_loss": 1.5})


def test_what_is_given_may_change_later():
    parts = {name: torch.ones((), dtype=torch.float64) for name in ("n_tokens", "total_loss", "temperature")}
    meter = LossMeter()
    meter.update(parts)
    for value in parts.values():
        value /= 4
    assert meter.compute() == {name: 1.0 for name in parts}
