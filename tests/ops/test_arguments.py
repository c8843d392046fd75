"""What is said of arguments that do not fit: ids out of range, temperatures, devices, and what is no tensor."""

import copy
import math
import re

import numpy as np
import pytest
import torch

from ava_ext import SequenceUnlikelihoodLoss, UnifiedLoss, functional
from ava_ext.losses.consistency import ConsistencyLoss
from ava_ext.losses.contrastive import ContrastiveLoss
from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.repetition import repetition_candidates, repetition_weights
from ava_ext.ops.router_rows import router_statistics
from ava_ext.ops.row_fields import (
    N_OPTIONS,
    N_ROW_COEFFICIENTS,
    N_STATISTICS,
    TARGET_PROBABILITIES,
    Candidates,
    RowFlags,
    row_options,
)
from ava_ext.ops.row_weights import count_rows
from ava_ext.ops.softmax_rows import row_loss
from ava_ext.ops.softmax_statistics import softmax_statistics, token_log_probs
from ava_ext.ops.token_metrics import token_metrics
from ava_ext.ops.weight_gradient import has_bfloat16_products
from ava_ext.presets import AuxiliaryFreeMoEBalancer

V = 30
LOGITS = {
    "dense": torch.randn(2, V, generator=torch.Generator().manual_seed(0)),
    "linear": LinearLogits(torch.zeros(2, 4), torch.zeros(V, 4)),
}
# what becomes another id, or an absent one, where only 32 bits of it are read
BEYOND = [-1, -2, V, 2**31, 2**32 - 1, 2**32 + 1, 2**33 - 1, -(2**32) + 1, -(2**63)]
both_kinds = pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS.keys())


# -- ids


@both_kinds
@pytest.mark.parametrize("value", BEYOND)
def test_a_target_out_of_range(logits, value):
    targets = torch.tensor([3, value])
    with pytest.raises(IndexError, match=rf"expected ids in \[0, {V}\), got {value} at position 1"):
        token_log_probs(logits, targets)
    with pytest.raises(IndexError, match=rf"expected targets in \[0, {V}\) or -100, got {value} at position 1"):
        row_loss(logits, targets, row_options(torch.zeros(0)), reduction="sum")


@both_kinds
@pytest.mark.parametrize("value", BEYOND[1:])
def test_an_id_out_of_range(logits, value):
    message = re.escape(f"row_statistics: expected ids in [0, {V}) or -1, got {value} at position 3")
    with pytest.raises(IndexError, match=message):
        softmax_statistics(logits, torch.tensor([[3, -1], [0, value]]))


@both_kinds
@pytest.mark.parametrize("value", BEYOND[1:])
def test_a_candidate_out_of_range(logits, value):
    candidates = Candidates(torch.tensor([[3, -1], [0, value]]), torch.ones(2, 2), (2,))
    with pytest.raises(IndexError, match=r"expected candidate_ids in \[0, 30\) or -1, got .* at position 3"):
        row_loss(logits, torch.tensor([1, 2]), row_options(torch.zeros(0)), candidates=candidates)


def test_an_id_out_of_range_in_a_later_chunk():
    logits, targets = LOGITS["linear"], torch.tensor([3, 99])
    one_row = V * logits.dtype.itemsize
    with pytest.raises(IndexError, match=r"got 99 at position 1 \(row 1\)$"):
        token_log_probs(logits, targets, chunk_bytes=one_row)
    with pytest.raises(IndexError, match=r"got 99 at position 1$"):
        row_loss(logits, targets, row_options(torch.zeros(0)), reduction="sum", chunk_bytes=one_row)


def test_what_is_ignored_may_be_any_number():
    logits, expected = LOGITS["dense"], LOGITS["dense"].log_softmax(-1)[0, 7]
    for ignored in (-100, -1, 2**32 + 1, 5):
        log_prob, entropy = token_log_probs(logits, torch.tensor([7, ignored]), ignore_index=ignored)
        torch.testing.assert_close(log_prob, torch.stack([expected, torch.zeros(())]))
        assert entropy[0] > 0 and entropy[1] == 0


def test_ids_of_every_integer_type():
    logits = LOGITS["dense"]
    targets, options = torch.tensor([7, 5]), row_options(LOGITS["dense"])
    expected = token_log_probs(logits, targets)
    candidates = Candidates(torch.tensor([[3], [-1]]), torch.ones(2, 1), (1,))
    penalised = row_loss(logits, targets, options, candidates=candidates._replace(ids=candidates.ids.int()))
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        torch.testing.assert_close(token_log_probs(logits, targets.to(dtype)), expected, rtol=0, atol=0)
        statistics = softmax_statistics(logits, targets.to(dtype).unsqueeze(-1))
        torch.testing.assert_close(statistics.log_probs[:, 0], expected[0], rtol=0, atol=0)
        if dtype != torch.uint8:
            ids = candidates._replace(ids=candidates.ids.to(dtype))
            torch.testing.assert_close(row_loss(logits, targets, options, candidates=ids), penalised, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint64])
def test_numbers_that_are_no_integers(dtype):
    logits, targets, options = LOGITS["dense"], torch.tensor([1, 0]).to(dtype), row_options(LOGITS["dense"])
    for name, call in {
        "row_loss: expected targets": lambda: row_loss(logits, targets, options),
        "token_log_probs: expected targets": lambda: token_log_probs(logits, targets),
        "softmax_statistics: expected ids": lambda: softmax_statistics(logits, targets.unsqueeze(-1)),
        "row_loss: expected candidate_ids": lambda: row_loss(
            logits, torch.tensor([1, 2]), options, candidates=Candidates(targets[:, None], torch.ones(2, 1), (1,))
        ),
    }.items():
        with pytest.raises(ValueError, match=f"{name} to be integers"):
            call()


@pytest.mark.parametrize("value", [7.0, True, torch.tensor(3.7)])
def test_counts_that_are_no_integers(value):
    logits, head, targets, options = (
        LOGITS["dense"],
        LOGITS["linear"],
        torch.tensor([1, 2]),
        row_options(torch.zeros(0)),
    )
    gates = torch.zeros(2, 4)
    for name, call in {
        "row_loss: expected vocab_size": lambda: row_loss(logits, targets, options, vocab_size=value),
        "cross_entropy: expected ignore_index": lambda: functional.cross_entropy(logits, targets, ignore_index=value),
        "row_loss: expected chunk_bytes": lambda: row_loss(head, targets, options, chunk_bytes=value),
        "softmax_statistics: expected vocab_size": lambda: softmax_statistics(logits, None, vocab_size=value),
        "softmax_statistics: expected chunk_bytes": lambda: softmax_statistics(head, None, chunk_bytes=value),
        "token_log_probs: expected ignore_index": lambda: token_log_probs(logits, targets, ignore_index=value),
        "router_statistics: expected k": lambda: router_statistics(gates, k=value),
        "router_statistics: expected n_segments": lambda: router_statistics(gates, k=1, n_segments=value),
    }.items():
        with pytest.raises(TypeError, match=f"{name} to be an integer, got "):
            call()


@both_kinds
def test_a_row_mask_of_integers_as_tokenizers_give_it(logits):
    mask = torch.tensor([True, False])
    expected = softmax_statistics(logits, None, row_mask=mask).lse
    assert torch.equal(softmax_statistics(logits, None, row_mask=2 * mask.long()).lse, expected)
    with pytest.raises(ValueError, match=r"softmax_statistics: expected row_mask of bool, got float32"):
        softmax_statistics(logits, None, row_mask=mask.float())


def test_a_row_mask_that_is_no_tensor():
    with pytest.raises(TypeError, match=r"softmax_statistics: expected row_mask to be a torch.Tensor, got list"):
        softmax_statistics(LOGITS["dense"], None, row_mask=[True, True])


# -- temperature, soft cap and scale


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, 1e-40, 1e39])  # the last two: in float32
@pytest.mark.parametrize("name", ["temperature", "logit_softcap", "logit_scale"])
def test_a_scale_of_the_logits_out_of_range(name, value):
    targets, given = torch.tensor([1, 2]), {name: value}
    options = {"initial_temperature" if name == "temperature" else name: value}
    expected = re.escape(f"{name} to be a number > 0 in the range of float32") + f".*, got {re.escape(str(value))}"
    for owner, call in {
        "softmax_statistics: expected ": lambda: softmax_statistics(LOGITS["dense"], None, **given),
        "token_log_probs: expected ": lambda: token_log_probs(LOGITS["linear"], targets, **given),
        "token_metrics: expected ": lambda: token_metrics(LOGITS["dense"], targets, **given),
        "unified_loss: expected ": lambda: UnifiedLoss(V, **options),
        "expected ": lambda: functional.cross_entropy(LOGITS["dense"], targets, **options),
    }.items():
        with pytest.raises(ValueError, match=f"{owner}(initial_)?{expected}"):
            call()


@pytest.mark.parametrize("value", [None, "x", [1.0]])
def test_a_scale_of_the_logits_that_is_no_number(value):
    expected = re.escape(f"to be a number > 0 in the range of float32, got {value!r}")
    for match, call in {
        "softmax_statistics: expected temperature": lambda: softmax_statistics(
            LOGITS["dense"], None, temperature=value
        ),
        "softmax_statistics: expected logit_scale": lambda: softmax_statistics(
            LOGITS["dense"], None, logit_scale=value
        ),
        "row_options: expected temperature": lambda: row_options(LOGITS["dense"], temperature=value),
        "row_options: expected logit_scale": lambda: row_options(LOGITS["dense"], logit_scale=value),
        "contrastive_loss: expected temperature": lambda: ContrastiveLoss(temperature=value),
        "consistency_loss: expected temperature": lambda: ConsistencyLoss(temperature=value),
    }.items():
        with pytest.raises(ValueError, match=f"^{match} {expected}"):
            call()


def test_a_quotient_of_scales_out_of_range():
    message = "row_options: expected {} / logit_scale to be a number > 0 in the range of float32, got {}"
    with pytest.raises(ValueError, match=message.format("temperature", "1e-40")):
        softmax_statistics(LOGITS["dense"], None, temperature=1e-20, logit_scale=1e20)
    with pytest.raises(ValueError, match=message.format("logit_softcap", "1e-40")):
        UnifiedLoss(V, logit_softcap=1e-20, logit_scale=1e20)


# -- what is no tensor


def test_what_is_no_tensor_is_named():
    logits, targets, options = LOGITS["dense"], torch.tensor([1, 2]), row_options(LOGITS["dense"])
    arrays = {"logits": logits.numpy(), "targets": [1, 2], "ids": np.zeros((2, 1), dtype=np.int64)}
    kind = {"logits": "a torch.Tensor or LinearLogits, got numpy.ndarray", "targets": "a torch.Tensor, got list"}
    for name, message in kind.items():
        arguments = {"logits": logits, "targets": targets, name: arrays[name]}
        with pytest.raises(TypeError, match=f"row_loss: expected {name} to be {message}"):
            row_loss(**arguments, options=options)
        with pytest.raises(TypeError, match=f"token_log_probs: expected {name} to be {message}"):
            token_log_probs(**arguments)
    with pytest.raises(TypeError, match=f"softmax_statistics: expected logits to be {kind['logits']}"):
        softmax_statistics(arrays["logits"], None)
    with pytest.raises(TypeError, match=r"softmax_statistics: expected ids to be a torch.Tensor, got numpy\.ndarray"):
        softmax_statistics(logits, arrays["ids"])


def test_what_stands_beside_the_logits_is_no_tensor():
    logits, targets, options = LOGITS["dense"], torch.tensor([1, 2]), row_options(LOGITS["dense"])
    gates, candidates = torch.zeros(2, 3), Candidates(targets[:, None], [[1.0], [1.0]], (1,))
    text, of_text = targets[None], {"vocab_size": V, "weights": repetition_weights(logits)}
    for match, call in {
        "row_loss: expected options": lambda: row_loss(logits, targets, options.tolist()),
        "row_loss: expected row_weights": lambda: row_loss(logits, targets, options, row_weights=[1.0, 1.0]),
        "row_loss: expected candidate_weights": lambda: row_loss(logits, targets, options, candidates=candidates),
        "row_loss: expected target_probabilities": lambda: row_loss(
            logits, targets, options, target_probabilities=logits.tolist()
        ),
        "row_loss: expected smoothing_weights": lambda: row_loss(logits, targets, options, smoothing_weights=[1.0] * V),
        "softmax_statistics: expected row_mask": lambda: softmax_statistics(logits, None, row_mask=[True, False]),
        "cross_entropy: expected weight": lambda: functional.cross_entropy(logits, targets, weight=[1.0] * V),
        "router_statistics: expected expert_indices": lambda: router_statistics(gates, [[0], [1]]),
        "router_statistics: expected row_mask": lambda: router_statistics(gates, row_mask=np.ones(2), k=1),
        "repetition_candidates: expected tokens": lambda: repetition_candidates(text.numpy(), text, **of_text),
        "repetition_candidates: expected targets": lambda: repetition_candidates(text, [[1, 2]], **of_text),
        "repetition_candidates: expected segments": lambda: repetition_candidates(
            text, text, segments=[[0, 0]], **of_text
        ),
        "sequence_unlikelihood: expected tokens": lambda: SequenceUnlikelihoodLoss(V)(logits, [1, 2]),
        r"router_statistics: expected gate_logits\[1\]": lambda: router_statistics([gates, None], k=1),
        "moe_balancer: expected row_mask": lambda: AuxiliaryFreeMoEBalancer(3)(gates, targets[:, None], [1, 1]),
    }.items():
        with pytest.raises(TypeError, match=f"^{match} to be a torch.Tensor, got "):
            call()


@both_kinds
def test_other_rows_are_named_by_what_was_called(logits):
    for match, call in {
        "token_metrics: expected targets": lambda: token_metrics(logits, torch.tensor([1])),
        "token_log_probs: expected targets": lambda: token_log_probs(logits, torch.tensor([1])),
        "softmax_statistics: expected row_mask": lambda: softmax_statistics(
            logits, None, row_mask=torch.ones(1, dtype=torch.bool)
        ),
    }.items():
        with pytest.raises(ValueError, match=rf"^{match} of shape \[2\], got \[1\]"):
            call()
    with pytest.raises(ValueError, match=r"^softmax_statistics: expected ids of shape \[2, n_ids\], got \[1, 3\]"):
        softmax_statistics(logits, torch.zeros(1, 3).long())
    with pytest.raises(ValueError, match=r"^token_metrics: expected targets to be integers"):
        token_metrics(logits, torch.zeros(2))


def test_logits_of_no_dimension():
    scalar, targets, weight = torch.zeros(()), torch.tensor([1]), torch.zeros(V, 4)
    linear = LinearLogits(scalar, weight)
    for match, call in {
        "softmax_statistics: expected logits": lambda: softmax_statistics(scalar, None),
        "softmax_statistics: expected hidden_states": lambda: softmax_statistics(linear, None),
        "token_log_probs: expected logits": lambda: token_log_probs(scalar, targets),
        "token_metrics: expected logits": lambda: token_metrics(scalar, targets),
        "token_metrics: expected hidden_states": lambda: token_metrics(linear, targets),
        "cross_entropy: expected input": lambda: functional.cross_entropy(scalar, targets),
        "linear_cross_entropy: expected input": lambda: functional.linear_cross_entropy(scalar, weight, targets),
        "unified_loss: expected hidden_states": lambda: UnifiedLoss(V)(
            targets=targets, hidden_states=scalar, lm_head_weight=weight
        ),
    }.items():
        with pytest.raises(ValueError, match=f"^{match} of at least one dimension, got a scalar"):
            call()
    with pytest.raises(ValueError, match=r"expected weight of shape \[vocab_size, 4\] .*, got \[\]"):
        softmax_statistics(LinearLogits(weight, scalar), None)
    with pytest.raises(ValueError, match=r"unified_loss: expected targets of shape \[\], got \[1\]"):
        UnifiedLoss(V)(scalar, targets)


# -- devices


def on_meta(value):
    if isinstance(value, LinearLogits):
        return LinearLogits(*(None if part is None else part.to("meta") for part in value))
    return value.to("meta")


@both_kinds
def test_everything_runs_on_meta(logits):
    logits = on_meta(logits)
    parts = [
        part.requires_grad_() for part in (logits if isinstance(logits, LinearLogits) else [logits]) if part is not None
    ]
    targets, options = torch.zeros(2, dtype=torch.int64, device="meta"), row_options(torch.zeros(0, device="meta"))
    for reduction in ("sum", "none"):
        rows = row_loss(logits, targets, options, reduction=reduction)
        assert rows.loss.device.type == "meta" and rows.loss.shape == (() if reduction == "sum" else (2,))
        gradients = torch.autograd.grad(rows.loss.sum(), parts)
        assert [gradient.shape for gradient in gradients] == [part.shape for part in parts]
    log_prob, entropy = token_log_probs(logits, targets)
    gradients = torch.autograd.grad((log_prob + entropy).sum(), parts)
    assert [gradient.shape for gradient in gradients] == [part.shape for part in parts]


@both_kinds
def test_another_device_is_named(logits):
    targets, options = torch.tensor([1, 2]), row_options(torch.zeros(0))
    with pytest.raises(RuntimeError, match="row_loss: expected targets on cpu, got meta"):
        row_loss(logits, targets.to("meta"), options)
    with pytest.raises(RuntimeError, match="row_loss: expected options on cpu, got meta"):
        row_loss(logits, targets, options.to("meta"))
    with pytest.raises(RuntimeError, match="row_loss: expected row_weights on cpu, got meta"):
        row_loss(logits, targets, options, row_weights=torch.ones(2, device="meta"))
    for name, shape in (("target_probabilities", (2, V)), ("smoothing_weights", (V,))):
        with pytest.raises(RuntimeError, match=f"row_loss: expected {name} on cpu, got meta"):
            row_loss(logits, targets, options, **{name: torch.ones(shape, device="meta")})
    with pytest.raises(RuntimeError, match="softmax_statistics: expected ids on cpu, got meta"):
        softmax_statistics(logits, targets.unsqueeze(-1).to("meta"))
    with pytest.raises(RuntimeError, match="expected ids on cpu, got meta"):
        token_log_probs(logits, targets.to("meta"))


OF_ROWS = {"targets": torch.zeros(2).long(), "options": torch.ones(N_OPTIONS), "row_weights": torch.ones(2)}
CANDIDATES = {"candidate_ids": torch.zeros(2, 1).long(), "candidate_weights": torch.ones(2, 1), "candidate_groups": [1]}
OF_LOSS = OF_ROWS | CANDIDATES | {"column_weights": torch.ones(2, V)}
OF_LOSS |= {"flags": int(RowFlags.CROSS_ENTROPY) | TARGET_PROBABILITIES, "vocab_size": V, "ignore_index": -100}
LOGITS_OF = {"logits": torch.zeros(2, V)}
HEAD = {"hidden_states": torch.zeros(2, 4), "weight": torch.zeros(V, 4), "bias": torch.zeros(V)}
IDS = {"ids": torch.zeros(2, 1, dtype=torch.int32), "options": torch.ones(N_OPTIONS), "flags": 0, "vocab_size": V}
MASK = {"row_mask": torch.ones(2, dtype=torch.bool)}
GRADIENT = {"statistics": torch.ones(2, N_STATISTICS), "row_coefficients": torch.ones(2, N_ROW_COEFFICIENTS + 1)}
WEIGHTED = {"column_weights": torch.ones(2, V), "flags": TARGET_PROBABILITIES}
CHUNKS = {"chunk_bytes": None, "dtype": torch.float32, "max_counted_rows": None}
TEXT = torch.zeros(2, 3, dtype=torch.int64)
ROUTER = {"gate_logits": [torch.zeros(1, 2, 3)] * 2, "expert_indices": torch.zeros(2, 2, 1).long(), **MASK}
ROUTER |= {"segment_ids": torch.zeros(2).long(), "n_segments": 1, "is_sigmoid": False}
SEARCH = {
    "tokens_include_row": False, "vocab_size": V, "ignore_index": -100, "repetition_allow_list": [],
    "use_immediate_repetition_penalty": True, "immediate_repetition_threshold": 1, "ngram_size": 0,
    "ngram_window_size": 0, "ngram_slots": 1, "eos_ids": [], "min_sequence_length": 0,
}  # fmt: skip
# every operator with all the tensors that it takes
OPERATORS = {
    "row_loss": LOGITS_OF | OF_LOSS | {"with_gradient": True, "with_statistics": False},
    "row_loss_": LOGITS_OF | OF_LOSS,
    "row_statistics": LOGITS_OF | IDS | MASK,
    "row_gradient": LOGITS_OF | IDS | GRADIENT | WEIGHTED,
    "row_gradient_": LOGITS_OF | IDS | GRADIENT | WEIGHTED,
    "scale_rows_": {"rows": torch.ones(2, V), "factors": torch.ones(2), "targets": torch.zeros(2).long()}
    | {"ignore_index": -100},
    "linear_row_loss": HEAD | OF_LOSS | CHUNKS | {"gradients": [False] * 3},
    "linear_row_statistics": HEAD | IDS | MASK | CHUNKS,
    "linear_row_gradient": HEAD | IDS | MASK | GRADIENT | CHUNKS | {"gradients": [True] * 3},
    "router_statistics": ROUTER | {"expert_bias": torch.zeros(2, 3), "k": 1},
    "router_gradient": ROUTER | {"expert_choice": torch.zeros(2, 2, 1, dtype=torch.uint8)}
    | {f"grad_{name}_sum": torch.ones(2, 3) for name in ("probability", "importance")}
    | {f"grad_{name}_sum": torch.ones(2) for name in ("lse_squared", "entropy")},
    "repetition_candidates": {"tokens": TEXT, "targets": TEXT, "segments": TEXT, "weights": torch.ones(4)} | SEARCH,
    "count_rows": {"targets": TEXT, "keep": TEXT == 0, "token_weights": torch.ones(2, 3)}
    | {"class_weights": torch.ones(V), "n_items": torch.tensor(5.0)}
    | {"ignore_index": -100, "is_mean": True, "is_double": False},
    "temperature_step_": {name: torch.zeros(()) for name in ("value", "pending_loss", "pending_rows")}
    | {"history": torch.zeros(100), "count": torch.tensor(0), "initial": 1.0, "gain": 1.0, "low": 1.0, "high": 1.0},
    "committed": {"value": torch.ones(2), "previous": torch.ones(2)},
    "add_weight_gradient_": {"grad_weight": torch.zeros(V, 4), "grad_logits": torch.zeros(2, V).bfloat16()}
    | {"hidden_states": torch.zeros(2, 4).bfloat16()},
}  # fmt: skip


def test_every_operator_of_several_tensors_is_listed():
    several = {
        schema.name.removeprefix("ava_ext::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("ava_ext::") and sum("Tensor" in str(a.type) for a in schema.arguments) > 1
    }
    assert several == set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_one_tensor_on_another_device_is_named(name):
    """With one tensor on meta an operator is its fake: without a check, its outputs are memory that nobody wrote."""
    operator = getattr(torch.ops.ava_ext, name).default
    tensors = [argument.name for argument in operator._schema.arguments if "Tensor" in str(argument.type)]
    given = OPERATORS[name]
    assert set(given) == {argument.name for argument in operator._schema.arguments}
    # router_gradient takes choices in one form or the other
    if name != "router_gradient" and (name != "add_weight_gradient_" or has_bfloat16_products()):
        operator(**{key: copy.deepcopy(value) for key, value in given.items()})
    first, *others = tensors
    for other in others:
        with pytest.raises(RuntimeError, match=rf"^\w+: expected {other} on cpu, got meta$"):
            operator(**given | {other: given[other].to("meta")})
    if isinstance(given[first], list):
        with pytest.raises(RuntimeError, match=rf"^\w+: expected {first}\[1\] on cpu, got meta$"):
            operator(**given | {first: [given[first][0], given[first][1].to("meta")]})
    else:
        with pytest.raises(RuntimeError, match=rf"^\w+: expected {others[0]} on meta, got cpu$"):
            operator(**given | {first: given[first].to("meta")})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": torch.zeros(2, 3, 4).long()}, r"targets of shape \[batch_size, n_tokens\] or \[n_rows\]"),
        ({"targets": torch.zeros(2, 3)}, "targets of type int64, got float32"),
        ({"keep": torch.ones(2, 4, dtype=torch.bool)}, r"keep of shape \[2, 3\], got \[2, 4\]"),
        ({"keep": torch.ones(2, 3)}, "keep of type bool, got float32"),
        ({"token_weights": torch.ones(2, 3).double()}, "token_weights of type float32, got float64"),
        ({"class_weights": torch.ones(2, 3)}, r"dense class_weights of shape \[n_classes\], got \[2, 3\]"),
        ({"n_items": torch.ones(1)}, r"n_items of shape \[\], got \[1\]"),
    ],
)  # fmt: skip
def test_rows_to_count_that_do_not_fit(arguments, message):
    given_too = {"targets": torch.zeros(2, 3, dtype=torch.int64), "keep": None, "token_weights": None}
    given_too |= {"class_weights": None, "n_items": None} | arguments
    with pytest.raises(RuntimeError, match=f"^count_rows: expected {message}"):
        count_rows(**given_too, ignore_index=-100, is_mean=True, dtype=torch.float32)
