"""UnifiedLoss as a whole: against the reference and torch.nn.functional, its detailed results, hostile values."""

import importlib.util
import math
import sys

missing = [name for name in ("pytest", "xdist", "hypothesis") if importlib.util.find_spec(name) is None]
if __name__ == "__main__" and missing:
    from ava_ext.self_check import self_check

    print(
        f"not installed: {', '.join(missing)} (pip install '.[test]' brings them); the self-check of this build alone:"
    )
    checks = self_check()
    for check in checks:
        print(f"{'✓' if check.passes else '✗'} {check.name}, {check.dtype}, {check.device}: value and gradient")
    passed = all(check.passes for check in checks)
    print("All tests passed! ✓" if passed else "Some tests failed ✗")
    sys.exit(not passed)

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.assertions import assert_equals_reference
from support.strategies import HIDDEN_SIZE, Numbers, cases, seeds

from ava_ext import METRICS, UnifiedLoss

F64 = torch.float64


# -- against the reference


@pytest.mark.slow
@settings(max_examples=150)
@given(cases(), st.booleans())
def test_equals_the_reference(case, training):
    config, arguments = case
    loss_fn = UnifiedLoss(**config.to_dict()).double().train(training)
    if loss_fn.moe_balancer is not None:  # the state of a new loss is balanced: its term is 0
        numbers = Numbers(1)
        load = numbers.uniform(config.num_moe_layers, config.num_experts)
        loss_fn.moe_balancer.expert_load.copy_(load / load.sum(-1, keepdim=True))
        if config.expert_bias_rate > 0:
            loss_fn.moe_balancer.expert_bias.copy_(numbers.normal(*load.shape, scale=0.2))
    assert_equals_reference(loss_fn, arguments)


@pytest.mark.slow
@settings(max_examples=60)
@given(st.sampled_from(["standard", "adaptive_mtp"]).flatmap(lambda name: cases(primary_loss_type=name, use_mtp=True)))
def test_heads_of_every_kind_equal_the_reference(case):
    """Few of the cases of all components have heads, and fewer switch them off for some sequences."""
    config, arguments = case
    without_experts = {"use_moe_balancing": False, "use_auxiliary_loss": False}
    assert_equals_reference(UnifiedLoss(**config.to_dict() | without_experts).double(), arguments)


@settings(max_examples=20)
@given(cases(labels_are_shifted=True, use_contrastive_loss=False), seeds)
def test_flat_rows_in_one_segment_equal_one_sequence(case, seed):
    config, _ = case
    numbers, n_rows = Numbers(seed), 6
    row_wise = config.to_dict() | {"use_mtp": False, "use_moe_balancing": False, "use_auxiliary_loss": False}
    row_wise |= {"use_diversity_loss": False, "primary_loss_type": "standard"}
    loss_fn = UnifiedLoss(**row_wise)
    logits, targets = numbers.normal(n_rows, config.vocab_size), numbers.integers(0, config.vocab_size, n_rows)
    flat = loss_fn(logits, targets, segment_ids=torch.zeros(n_rows, dtype=torch.int64))
    torch.testing.assert_close(flat, loss_fn(logits[None], targets[None]).reshape(flat.shape), rtol=0, atol=0)


# -- against torch.nn.functional.cross_entropy


@pytest.mark.parametrize("labels_are_shifted", [True, False])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_standard_is_cross_entropy(reduction, label_smoothing, labels_are_shifted):
    numbers = Numbers(0)
    logits, targets = numbers.leaf(3, 5, 11, scale=3.0), numbers.integers(0, 11, 3, 5)
    targets[0, 1] = targets[2, 4] = 7
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "ignore_index": 7}
    loss = UnifiedLoss(11, primary_loss_type="standard", labels_are_shifted=labels_are_shifted, **options)(
        logits, targets
    )
    rows, labels = (logits, targets) if labels_are_shifted else (logits[:, :-1], targets[:, 1:])
    expected = F.cross_entropy(rows.flatten(0, 1), labels.flatten(), **options).reshape(loss.shape)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    (got,), (want,) = (torch.autograd.grad(value.sum(), logits, retain_graph=True) for value in (loss, expected))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_flat_rows_of_every_dtype():
    numbers = Numbers(1)
    logits, targets = numbers.normal(40, 33, scale=3.0), numbers.integers(0, 33, 40)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)):
        rounded = logits.to(dtype)
        loss = UnifiedLoss(33, primary_loss_type="standard")(rounded, targets)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, F.cross_entropy(rounded.double(), targets).float(), rtol=tolerance, atol=0)


# -- the detailed dict


@settings(max_examples=60)
@given(cases())
def test_entries_that_are_no_metrics_add_up_to_the_total(case):
    config, arguments = case
    result = UnifiedLoss(**config.to_dict()).double()(**arguments, return_detailed=True)
    addends = [value for name, value in result.items() if name != "total_loss" and name not in METRICS]
    torch.testing.assert_close(torch.stack(addends).sum(0), result["total_loss"].detach(), rtol=1e-12, atol=1e-12)
    for name, value in result.items():
        assert name == "total_loss" or not value.requires_grad, name


@settings(max_examples=40)
@given(cases())
def test_keys_depend_on_the_configuration_only(case):
    config, arguments = case
    loss_fn = UnifiedLoss(**config.to_dict()).double()
    plain = {**arguments, "negative_ids": None, "negative_weights": None, "attention_mask": None, "input_ids": None}
    everything_off = {**plain, "mtp_active": False, "targets": torch.full_like(plain["targets"], config.ignore_index)}
    keys = set(loss_fn(**arguments, return_detailed=True))
    assert set(loss_fn(**plain, return_detailed=True)) == keys
    assert set(loss_fn.eval()(**everything_off, return_detailed=True)) == keys


@settings(max_examples=30)
@given(cases())
def test_detailed_total_is_the_plain_loss(case):
    config, arguments = case
    loss_fn = UnifiedLoss(**config.to_dict()).double().eval()
    detailed = loss_fn(**arguments, return_detailed=True)["total_loss"]
    torch.testing.assert_close(loss_fn(**arguments), detailed, rtol=0, atol=0)


def test_row_wise_entries_have_the_shape_of_the_targets():
    numbers = Numbers(2)
    options = {"reduction": "none", "use_ngram_penalty": True, "ngram_size": 1, "use_mtp": True, "hidden_size": 4}
    for shifted, shape in ((True, (2, 5)), (False, (2, 4))):
        loss_fn = UnifiedLoss(6, labels_are_shifted=shifted, **options).double()
        arguments = {"targets": numbers.integers(0, 6, 2, 5), "hidden_states": numbers.normal(2, 5, 4)}
        result = loss_fn(numbers.normal(2, 5, 6), **arguments, return_detailed=True)
        for name in ("total_loss", "main_loss", "ngram_penalty", "negative_penalty", "mtp_loss"):
            assert result[name].shape == shape, name
        assert result["cross_entropy"].shape == result["mtp_loss_depth_1"].shape == ()


# -- gradients

# name -> options, and what they read beside the logits
ALONE = {
    "main": ({}, ()),
    "label smoothing": ({"label_smoothing": 0.2}, ()),
    "exclude_target": ({"label_smoothing": 0.2, "smoothing_mode": "exclude_target"}, ()),
    "soft cap": ({"logit_softcap": 2.0}, ()),
    "scale": ({"logit_scale": 1.4}, ()),
    "temperature": ({"initial_temperature": 1.7}, ()),
    "focal": ({"use_focal_loss": True, "focal_gamma": 1.5}, ()),
    "z": ({"z_loss_weight": 0.4}, ()),
    "confidence": ({"confidence_penalty_weight": 0.4}, ()),
    "n-gram": ({"use_ngram_penalty": True, "ngram_size": 1, "ngram_penalty_weight": 2.0}, ()),
    "immediate repetition": ({"use_immediate_repetition_penalty": True}, ()),
    "early end": ({"eos_token_id": 2, "eos_penalty_weight": 0.8}, ()),
    "soft targets at a temperature": ({"distillation_temperature": 2.0, "distillation_weight": 0.7}, ()),
    "own heads": ({"use_mtp": True}, ("hidden_states",)),
    "shared head": ({"use_mtp": True, "mtp_share_head": True}, ("hidden_states", "lm_head_weight")),
    # a target probability is a constant to the calibration: its gradient is compared with the reference's
    "adaptive heads": ({"primary_loss_type": "adaptive_mtp", "confidence_reg_strength": 0.0}, ("additional_logits",)),
    "balancing": ({"use_moe_balancing": True, "gradient_balance_weight": 3.0}, ("gate_logits",)),
    "auxiliary": ({"use_auxiliary_loss": True, "load_balancing_weight": 0.3, "router_z_weight": 0.4}, ("gate_logits",)),
    "diversity": ({"use_diversity_loss": True}, ("expert_outputs",)),
    "contrastive": ({"use_contrastive_loss": True}, ("hidden_states",)),
}
ROUTER = {"num_experts": 3, "num_experts_per_token": 1, "expert_bias_rate": 0.0}
EVERYTHING = {name: value for options, _ in ALONE.values() for name, value in options.items()}
EVERYTHING["smoothing_mode"] = "uniform"
TOGETHER = (EVERYTHING, ("hidden_states", "lm_head_weight", "additional_logits", "gate_logits", "expert_outputs"))


@pytest.mark.parametrize("name", [*ALONE, "everything"])
def test_gradcheck(name):
    options, names = (ALONE | {"everything": TOGETHER})[name]
    numbers, targets = Numbers(3), torch.tensor([[1, 1, 0, 2], [3, 3, -100, 0]])
    options = {"primary_loss_type": "standard", **ROUTER, "num_future_tokens": 1} | options
    loss_fn = UnifiedLoss(4, 3, **options).double().eval()
    if loss_fn.moe_balancer is not None:
        loss_fn.moe_balancer.expert_load.copy_(torch.tensor([[0.5, 0.3, 0.2]]))
    leaves = {
        "hidden_states": numbers.leaf(2, 4, 3),
        "lm_head_weight": numbers.leaf(4, 3),
        "additional_logits": numbers.leaf(1, 2, 4, 4),
        "gate_logits": numbers.leaf(8, 3),
        "expert_outputs": numbers.leaf(3, 8, 3),
    }
    fixed = {"confidence_scores": numbers.uniform(2, 4), "negative_ids": torch.tensor([[[3, -1]] * 4] * 2)}
    fixed |= {"soft_target_ids": torch.tensor([[[3, 1, -1]] * 4] * 2), "soft_target_weights": numbers.uniform(2, 4, 3)}

    def loss(logits, *given):
        return loss_fn(logits, targets, **dict(zip(names, given, strict=True)), **fixed)

    assert torch.autograd.gradcheck(loss, (numbers.leaf(2, 4, 4), *(leaves[name] for name in names)))


@pytest.mark.parametrize("shape", [(12, 9), (3, 4, 9)])
def test_in_place_gradient_is_the_gradient(shape):
    numbers = Numbers(4)
    values, targets = numbers.leaf(*shape), numbers.integers(0, 9, *shape[:-1])
    expected = UnifiedLoss(9, primary_loss_type="standard", z_loss_weight=0.1)(values, targets)
    (expected_gradient,) = torch.autograd.grad(expected, values)
    logits = values * 1
    loss = UnifiedLoss(9, primary_loss_type="standard", z_loss_weight=0.1, inplace_gradient=True)(logits, targets)
    torch.testing.assert_close(logits, values, rtol=0, atol=0)  # readable until backward
    (gradient,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(logits, expected_gradient, rtol=1e-12, atol=1e-14)  # it has been written over the logits


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:, :-1], lambda x: x.flatten(0, 1)])
def test_in_place_gradient_never_over_a_leaf(view):
    logits = view(torch.randn(2, 4, 9, requires_grad=True))
    loss_fn = UnifiedLoss(9, primary_loss_type="standard", inplace_gradient=True)
    with pytest.raises(ValueError, match="inplace_gradient=True would write over a leaf"):
        loss_fn(logits, torch.zeros(logits.shape[:-1], dtype=torch.int64))


def test_upstream_gradients_second_users_and_double_backward():
    numbers = Numbers(5)
    values, targets = numbers.leaf(4, 7), numbers.integers(0, 7, 4)
    loss_fn = UnifiedLoss(7, primary_loss_type="standard")
    logits = values * 1
    loss = 3.0 * loss_fn(logits, targets) + logits.square().sum()
    (expected,) = torch.autograd.grad(3.0 * F.cross_entropy(values, targets) + values.square().sum(), values)
    torch.testing.assert_close(torch.autograd.grad(loss, values)[0], expected, rtol=1e-12, atol=1e-13)
    (gradient,) = torch.autograd.grad(loss_fn(values, targets), values, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_training_after_inference_mode():
    for dtype, options in ((torch.float16, {}), (torch.float32, {"inplace_gradient": True})):
        loss_fn = UnifiedLoss(5, primary_loss_type="standard", use_ngram_penalty=True, **options)
        targets = torch.ones(1, 3, dtype=torch.int64)
        with torch.inference_mode():
            loss_fn(torch.zeros(1, 3, 5, dtype=dtype), targets)
        logits = torch.zeros(1, 3, 5, dtype=dtype, requires_grad=True)
        loss_fn(logits * 1, targets).backward()
        assert logits.grad.abs().sum() > 0


# -- hostile values


def test_nothing_counted_is_zero_and_stays_in_the_graph():
    numbers = Numbers(6)
    options = EVERYTHING | {"primary_loss_type": "deepseek", "use_mtp": True, "mtp_share_head": False}
    for extra in ({}, {"num_items_in_batch": 7}):
        loss_fn = UnifiedLoss(5, HIDDEN_SIZE, **ROUTER, **options).double()
        arguments = {
            "logits": numbers.leaf(2, 4, 5),
            "hidden_states": numbers.leaf(2, 4, HIDDEN_SIZE),
            "gate_logits": numbers.leaf(8, 3),
            "expert_outputs": numbers.leaf(3, 8, HIDDEN_SIZE),
        }
        loss = loss_fn(targets=torch.full((2, 4), -100), **arguments, **extra)
        assert loss.item() == 0
        loss.backward()
        for name, tensor in {**arguments, **dict(loss_fn.named_parameters())}.items():
            assert tensor.grad is not None, name
            assert (tensor.grad == 0).all(), name


@pytest.mark.parametrize("wild", [math.nan, math.inf, -math.inf])
def test_ignored_rows_are_not_looked_at(wild):
    numbers = Numbers(7)
    loss_fn = UnifiedLoss(5, primary_loss_type="standard", z_loss_weight=0.1, confidence_penalty_weight=0.1)
    values, targets = numbers.normal(1, 4, 5), torch.tensor([[1, -100, 2, 999]])
    clean, dirty = values.clone(), values.clone()
    dirty[:, 1::2] = wild
    mask = torch.tensor([[1, 1, 1, 0]])
    weights = torch.tensor([[1.0, math.nan, 2.0, math.inf]])
    results = []
    for logits in (clean, dirty):
        logits.requires_grad_()
        result = loss_fn(logits, targets, mask, token_weights=weights, return_detailed=True)
        result["total_loss"].backward()
        results.append((result, logits.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert (results[1][1][:, 1::2] == 0).all()


def test_nan_in_a_counted_row_is_seen():
    logits = torch.zeros(2, 3, 5, dtype=F64)
    logits[1, 1, 2] = math.nan
    assert UnifiedLoss(5, label_smoothing=0.1)(logits, torch.zeros(2, 3, dtype=torch.int64)).isnan()


def test_autocast_keeps_the_statistics_in_float32():
    torch.manual_seed(0)
    head, hidden_states = torch.nn.Linear(8, 50), torch.randn(4, 6, 8)
    targets = torch.randint(0, 50, (4, 6))
    loss_fn = UnifiedLoss(50, 8, use_mtp=True, z_loss_weight=1e-3, use_ngram_penalty=True)
    expected = loss_fn(head(hidden_states), targets, hidden_states=hidden_states)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(hidden_states)
        loss = loss_fn(logits, targets, hidden_states=hidden_states)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    loss.backward()
    assert head.weight.grad.isfinite().all()


class _LinePerTest:
    """Prints a line for each test that has run."""

    @staticmethod
    def pytest_runtest_logreport(report):
        if report.when == "call" or report.outcome != "passed":
            mark = {"passed": "✓", "failed": "✗", "skipped": "-"}[report.outcome]
            print(f"{mark} {report.nodeid.split('::', 1)[-1]}")
        if report.failed:
            print(report.longreprtext)


if __name__ == "__main__":
    status = pytest.main([__file__, "-q", "-p", "no:terminalreporter", *sys.argv[1:]], plugins=[_LinePerTest()])
    print("All tests passed! ✓" if status == 0 else "Some tests failed ✗")
    sys.exit(status)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_entries_share_no_memory(reduction):
    """What is done to one in place, such as a sum over ranks, changes no other, and not the loss."""
    options = {"use_focal_loss": True, "use_mtp": True, "mtp_type": "adaptive", "num_future_tokens": 1}
    loss_fn = UnifiedLoss(6, primary_loss_type="standard", reduction=reduction, **options)
    numbers = Numbers(0)
    given = {"additional_logits": [numbers.normal(2, 5, 6)], "confidence_scores": numbers.uniform(2, 5)}
    result = loss_fn(numbers.normal(2, 5, 6), numbers.integers(0, 6, 2, 5), **given, return_detailed=True)
    before = {name: value.clone() for name, value in result.items()}
    for name, value in result.items():
        value.add_(1)
        for other in result:
            expected = before[other] + 1 if other == name else before[other]
            torch.testing.assert_close(result[other], expected, rtol=0, atol=0, msg=f"{name} changes {other}")
        value.copy_(before[name])
