"""Which rows count, and what their sum is divided by."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.assertions import assert_equals_reference
from support.strategies import HIDDEN_SIZE, Numbers, cases, seeds

from ava_ext import UnifiedLoss

F64 = torch.float64
EXACT = {"rtol": 1e-12, "atol": 1e-14}
V = 7


def rows_of(logits, targets):
    """Cross-entropy of every row, by torch.nn.functional."""
    flat = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return flat.reshape(targets.shape)


# -- which rows count


def counted_by(mask=None, **options):
    numbers = Numbers(0)
    logits, targets = numbers.normal(2, 6, V), torch.tensor([[0, 1, 2, 3, 0, 0], [4, 0, 5, -100, 6, 2]])
    loss_fn = UnifiedLoss(V, primary_loss_type="standard", reduction="none", eos_penalty_weight=0.0, **options)
    result = loss_fn(logits, targets, mask, return_detailed=True)
    counted = result["total_loss"] != 0
    assert result["n_tokens"] == counted.sum()
    torch.testing.assert_close(result["total_loss"][counted], rows_of(logits, targets)[counted], **EXACT)
    return counted, targets


def test_ignored_targets_do_not_count():
    counted, targets = counted_by()
    assert torch.equal(counted, targets != -100)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_masked_rows_do_not_count(dtype):
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]).to(dtype)
    counted, targets = counted_by(mask)
    assert torch.equal(counted, (mask != 0) & (targets != -100))


def test_pad_targets_do_not_count():
    counted, targets = counted_by(pad_token_id=0)
    assert torch.equal(counted, (targets != -100) & (targets != 0))


@pytest.mark.parametrize("eos", [0, (3, 0)])
def test_pad_that_is_eos_counts(eos):
    counted, targets = counted_by(pad_token_id=0, eos_token_id=eos)
    assert torch.equal(counted, targets != -100)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    counted, targets = counted_by(mask, pad_token_id=0, eos_token_id=eos)
    assert torch.equal(counted, (targets != -100) & (mask == 1))


# -- N


def test_mean_sum_and_none():
    numbers = Numbers(1)
    logits, targets = numbers.normal(3, 4, V), numbers.integers(0, V, 3, 4)
    targets[0, :3] = -100
    weights = numbers.uniform(3, 4, low=0.5, high=2.0)
    rows, counted = rows_of(logits, targets), targets != -100
    expected = {
        ("mean", False): rows.sum() / 9,
        ("sum", False): rows.sum(),
        ("none", False): rows,
        ("mean", True): (rows * weights).sum() / weights[counted].sum(),
        ("sum", True): (rows * weights).sum(),
        ("none", True): rows * weights,
    }
    for (reduction, weighted), value in expected.items():
        loss_fn = UnifiedLoss(V, primary_loss_type="standard", reduction=reduction)
        got = loss_fn(logits, targets, token_weights=weights if weighted else None)
        torch.testing.assert_close(got, value, **EXACT)


@pytest.mark.parametrize("n_items", [5, 7.5, torch.tensor(5), torch.tensor(7.5)])
def test_num_items_in_batch_is_the_denominator(n_items):
    numbers = Numbers(2)
    logits, targets = numbers.normal(3, 4, V), numbers.integers(0, V, 3, 4)
    weights = numbers.uniform(3, 4)
    loss_fn = UnifiedLoss(V, primary_loss_type="standard")
    got = loss_fn(logits, targets, token_weights=weights, num_items_in_batch=n_items)
    torch.testing.assert_close(got, (rows_of(logits, targets) * weights).sum() / float(n_items), **EXACT)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_num_items_in_batch_needs_a_mean(reduction):
    loss_fn = UnifiedLoss(V, primary_loss_type="standard", reduction=reduction)
    logits, targets = torch.zeros(2, 5, V), torch.zeros(2, 5, dtype=torch.int64)
    expected = f"^unified_loss: num_items_in_batch needs reduction='mean', got '{reduction}'"
    with pytest.raises(ValueError, match=expected):
        loss_fn(logits, targets, num_items_in_batch=5)
    assert loss_fn.count_items(targets) == 10


def test_zero_items_and_zero_weights_give_zero():
    logits, targets = torch.randn(2, 3, V), torch.zeros(2, 3, dtype=torch.int64)
    loss_fn = UnifiedLoss(V, primary_loss_type="standard")
    assert loss_fn(logits, targets, token_weights=torch.zeros(2, 3)) == 0
    assert loss_fn(logits, torch.full((2, 3), -100), num_items_in_batch=0) == 0


def test_num_items_in_batch_on_meta_is_named():
    with pytest.raises(ValueError, match="unified_loss: expected num_items_in_batch on cpu, got meta"):
        UnifiedLoss(V)(torch.zeros(2, V), torch.tensor([1, 2]), num_items_in_batch=torch.ones((), device="meta"))


@pytest.mark.parametrize(
    "n_items",
    [torch.tensor([8]), torch.tensor([[8.0]]), torch.tensor(8, dtype=torch.int16), np.int64(8), np.array([8])],
)
def test_num_items_in_batch_is_one_element_of_any_shape(n_items):
    numbers = Numbers(4)
    logits, targets = numbers.normal(2, 5, V), numbers.integers(0, V, 2, 5)
    loss = UnifiedLoss(V, primary_loss_type="standard")(logits, targets, num_items_in_batch=n_items)
    assert loss.shape == ()
    torch.testing.assert_close(loss, rows_of(logits, targets).sum() / 8, **EXACT)
    # a term of the whole batch is multiplied by a share, not divided row by row
    loss_fn = UnifiedLoss(V, primary_loss_type="standard", use_contrastive_loss=True)
    given = {"contrastive_pair": (numbers.normal(3, 2), numbers.normal(3, 2)), "return_detailed": True}
    found = loss_fn(logits, targets, num_items_in_batch=n_items, **given)
    expected = loss_fn(logits, targets, num_items_in_batch=8.0, **given)
    assert found["total_loss"].shape == found["contrastive_loss"].shape == ()
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize(
    ("n_items", "error", "message"),
    [
        (torch.tensor([1, 1]), ValueError, r"of one element, got shape \[2\]"),
        (torch.arange(5), ValueError, r"of one element, got shape \[5\]"),
        (torch.zeros(0), ValueError, r"of one element, got shape \[0\]"),
        (torch.tensor(8, dtype=torch.bfloat16), ValueError, r"of integers, float32 .*: pass float\(n\)"),
        (torch.tensor([8], dtype=torch.float16), ValueError, "of integers, float32 or float64, got torch.float16"),
        (torch.tensor(3 + 4j), ValueError, "of real numbers, got complex64"),
        (-5, ValueError, "to be >= 0, got -5"),
        (-0.5, ValueError, "to be >= 0, got -0.5"),
        (math.nan, ValueError, "to be >= 0, got nan"),
        (math.inf, ValueError, "to be >= 0, got inf"),
        (True, TypeError, "to be a number or a torch.Tensor, got bool"),
        (torch.tensor(True), TypeError, "to be a number or a torch.Tensor, got one of bools"),
        ("5", TypeError, "to be a number or a torch.Tensor, got str"),
        ([5], TypeError, "to be a number or a torch.Tensor, got list"),
    ],
)
def test_another_num_items_in_batch_is_refused(n_items, error, message):
    loss_fn = UnifiedLoss(V, primary_loss_type="standard")
    with pytest.raises(error, match=f"^unified_loss: expected num_items_in_batch {message}"):
        loss_fn(torch.zeros(2, 5, V), torch.zeros(2, 5, dtype=torch.int64), num_items_in_batch=n_items)


@settings(max_examples=40)
@given(seeds, st.sampled_from(["int", "float", "tensor"]), st.booleans())
def test_micro_batches_add_up_to_the_whole_batch(seed, kind, labels_are_shifted):
    # terms of the batch are averages over tokens: they add up where the micro-batches' rows differ in number only by N
    numbers = Numbers(seed)
    logits, states = numbers.leaf(4, 5, V), numbers.leaf(4, 5, HIDDEN_SIZE)
    gates, targets = numbers.leaf(20, 3), numbers.integers(0, V, 4, 5)
    options = {"use_mtp": True, "use_ngram_penalty": True, "ngram_size": 1, "z_loss_weight": 0.1, "eos_token_id": 2}
    options |= {"use_auxiliary_loss": True, "num_experts_per_token": 1, "load_balancing_weight": 0.0}
    options |= {"router_z_weight": 0.3, "label_smoothing": 0.1}
    loss_fn = UnifiedLoss(V, HIDDEN_SIZE, labels_are_shifted=labels_are_shifted, **options).double().eval()

    def arguments(part):
        rows = gates.unflatten(0, (4, 5))[part].flatten(0, 1)
        return {"targets": targets[part], "hidden_states": states[part], "gate_logits": rows}

    whole = loss_fn(logits, **arguments(slice(None)), return_detailed=True)
    n_items = {"int": int, "float": float, "tensor": lambda n: n.clone()}[kind](whole["n_tokens"])
    parts = [
        loss_fn(logits[part], **arguments(part), num_items_in_batch=n_items, return_detailed=True)
        for part in (slice(0, 1), slice(1, 4))
    ]
    for name in ("total_loss", "main_loss", "mtp_loss", "ngram_penalty", "eos_penalty", "aux_router_z"):
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name], rtol=1e-10, atol=1e-13)
    leaves = (logits, states, gates, *loss_fn.parameters())
    got = torch.autograd.grad(parts[0]["total_loss"] + parts[1]["total_loss"], leaves)
    torch.testing.assert_close(got, torch.autograd.grad(whole["total_loss"], leaves), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("labels_are_shifted", [True, False])
def test_one_micro_batch_is_the_whole_batch(labels_are_shifted):
    numbers = Numbers(3)
    arguments = {
        "logits": numbers.normal(2, 5, V),
        "targets": numbers.integers(0, V, 2, 5),
        "gate_logits": numbers.normal(10, 3),
        "expert_outputs": numbers.normal(3, 10, HIDDEN_SIZE),
        "contrastive_pair": (numbers.normal(3, 4), numbers.normal(3, 4)),
    }
    options = {"use_moe_balancing": True, "use_auxiliary_loss": True, "use_diversity_loss": True}
    options |= {"num_experts": 3, "num_experts_per_token": 1, "expert_bias_rate": 0.0, "use_contrastive_loss": True}
    options |= {"labels_are_shifted": labels_are_shifted}
    loss_fn = UnifiedLoss(V, **options).eval()
    whole = loss_fn(**arguments, return_detailed=True)
    torch.testing.assert_close(loss_fn(**arguments, num_items_in_batch=whole["n_tokens"]), whole["total_loss"])


@settings(max_examples=40)
@given(cases(reduction="mean"))
def test_scaling_every_token_weight_changes_nothing_of_the_tokens(case):
    config, arguments = case
    arguments = {**arguments, "token_weights": torch.full(arguments["targets"].shape, 3.0)}
    arguments.pop("num_items_in_batch", None)
    loss_fn = UnifiedLoss(**config.to_dict()).double().eval()
    weighted = loss_fn(**arguments, return_detailed=True)
    plain = loss_fn(**{**arguments, "token_weights": None}, return_detailed=True)
    torch.testing.assert_close(weighted, plain, rtol=1e-10, atol=1e-12)


# -- metrics


def test_metrics_are_unweighted_means_over_the_rows_that_count():
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 9.0]]], dtype=F64)
    targets = torch.tensor([[0, 0, -100]])
    loss_fn = UnifiedLoss(3, primary_loss_type="standard", label_smoothing=0.3, use_focal_loss=True)
    result = loss_fn(logits, targets, token_weights=torch.tensor([[1.0, 5.0, 2.0]]), return_detailed=True)
    rows = rows_of(logits, targets)[0, :2]
    p = torch.softmax(logits[0, 0], -1)
    torch.testing.assert_close(result["cross_entropy"], rows.mean(), **EXACT)
    torch.testing.assert_close(result["perplexity"], rows.mean().exp(), **EXACT)
    torch.testing.assert_close(result["entropy"], -(p * p.log()).sum(), **EXACT)
    assert (result["accuracy"], result["n_tokens"], result["temperature"]) == (0.5, 2, 1.0)
    torch.testing.assert_close(result["focal_loss"], result["main_loss"], rtol=0, atol=0)


def test_accuracy_takes_the_first_of_equal_logits():
    loss_fn = UnifiedLoss(3, primary_loss_type="standard")
    for target, expected in ((0, 1.0), (1, 0.0), (2, 0.0)):
        result = loss_fn(torch.zeros(1, 4, 3), torch.full((1, 4), target), return_detailed=True)
        assert result["accuracy"] == expected


# -- what leaves padding out besides the tokens


@pytest.mark.parametrize("labels_are_shifted", [True, False])
@pytest.mark.parametrize("n_columns", [5, 4])
def test_routers_leave_padding_out(labels_are_shifted, n_columns):
    # unshifted: a router over all tokens is masked by the mask of the tokens, one over the rows by that of the labels
    numbers = Numbers(4)
    targets = numbers.integers(0, V, 2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]])
    keep = mask if n_columns == 5 else mask[:, 1:]
    if labels_are_shifted and n_columns == 4:
        keep = torch.ones(2, 4)  # rows that are not those of the targets: nothing is known of them
    options = {"use_auxiliary_loss": True, "use_diversity_loss": True, "labels_are_shifted": labels_are_shifted}
    loss_fn = UnifiedLoss(V, num_experts=3, num_experts_per_token=1, expert_bias_rate=0.0, **options)
    gates, outputs = numbers.normal(2, n_columns, 3), numbers.normal(3, 2, n_columns, 4)
    arguments = {"targets": targets, "attention_mask": mask, "gate_logits": gates, "expert_outputs": outputs}
    result = loss_fn(numbers.normal(2, 5, V), **arguments, return_detailed=True)
    expected = loss_fn.auxiliary(gates, row_mask=keep != 0, return_detailed=True)
    for name in ("aux_load_balancing", "aux_router_z"):
        torch.testing.assert_close(result[name], expected[name], **EXACT)
    torch.testing.assert_close(result["diversity_loss"], loss_fn.diversity(outputs, keep != 0), **EXACT)


def test_reduction_none_against_the_reference_with_a_row_of_padding():
    numbers = Numbers(5)
    for options in ({"labels_are_shifted": False}, {"use_mtp": True, "hidden_size": HIDDEN_SIZE}):
        loss_fn = UnifiedLoss(V, reduction="none", pad_token_id=0, **options).double()
        targets = torch.tensor([[0, 0, 1, 2], [3, 4, 5, 0], [0, 0, 0, 0]])
        states = numbers.leaf(3, 4, HIDDEN_SIZE)
        assert_equals_reference(loss_fn, {"logits": numbers.leaf(3, 4, V), "targets": targets, "hidden_states": states})
