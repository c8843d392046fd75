"""What forward() is given: where logits come from, what is missing or does not fit, what is not copied."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.allocations import Allocations
from support.strategies import HIDDEN_SIZE, Numbers, seeds
from torch.nn.utils import prune

from ava_ext import ConsistencyLoss, ContrastiveLoss, PerplexityLoss, UnifiedLoss
from ava_ext.ops import repeated_ngram_mask

V = 6
TARGETS = torch.tensor([[0, 1, 2, 3], [4, 5, 0, -100]])


def logits(*shape, n_columns=V):
    return torch.zeros(*(shape or TARGETS.shape), n_columns)


# -- where the logits come from


def test_hidden_states_and_head_are_logits():
    numbers = Numbers(0)
    states, weight, bias = numbers.leaf(2, 4, HIDDEN_SIZE), numbers.leaf(V + 2, HIDDEN_SIZE), numbers.leaf(V + 2)
    loss_fn = UnifiedLoss(V, label_smoothing=0.1)
    fused = loss_fn(targets=TARGETS, hidden_states=states, lm_head_weight=weight, lm_head_bias=bias)
    unfused = loss_fn(torch.nn.functional.linear(states, weight, bias), TARGETS)
    torch.testing.assert_close(fused, unfused, rtol=1e-12, atol=0)
    got, want = (torch.autograd.grad(loss, (states, weight, bias)) for loss in (fused, unfused))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def test_primary_logits_stand_in_for_logits():
    numbers = Numbers(1)
    values, heads = numbers.normal(2, 4, V), numbers.normal(3, 2, 4, V)
    loss_fn = UnifiedLoss(V, primary_loss_type="adaptive_mtp", use_confidence_weighting=False)
    given_by_name = loss_fn(primary_logits=values, targets=TARGETS, additional_logits=heads)
    torch.testing.assert_close(given_by_name, loss_fn(values, TARGETS, additional_logits=list(heads)), rtol=0, atol=0)


@given(seeds, st.booleans())
def test_flat_confidence_is_that_of_the_rows(seed, with_last_dimension):
    numbers = Numbers(seed)
    heads, values, targets = numbers.normal(2, 5, V), numbers.normal(5, V), numbers.integers(0, V, 5)
    scores, segment_ids = numbers.uniform(5), torch.zeros(5, dtype=torch.int64)
    loss_fn = UnifiedLoss(V, primary_loss_type="adaptive_mtp", num_future_tokens=2)
    flat_scores = scores[:, None] if with_last_dimension else scores
    flat = loss_fn(values, targets, additional_logits=heads, confidence_scores=flat_scores, segment_ids=segment_ids)
    rows = {"additional_logits": heads[:, None], "confidence_scores": scores[None]}
    torch.testing.assert_close(flat, loss_fn(values[None], targets[None], **rows), rtol=1e-14, atol=0)


# -- nothing of the size of the logits is copied


@pytest.mark.parametrize("labels_are_shifted", [True, False])
def test_logits_are_never_copied(labels_are_shifted):
    n_columns = 501
    parent = torch.randn(2, 9, n_columns + 3, requires_grad=True)
    values = parent[:, :8, 1:-2]  # a slice in every dimension
    targets = torch.randint(0, 500, (2, 8))
    options = {"use_ngram_penalty": True, "z_loss_weight": 0.1, "labels_are_shifted": labels_are_shifted}
    loss_fn = UnifiedLoss(500, **options)
    with Allocations(n_columns) as seen:
        loss = loss_fn(values, targets, torch.ones_like(targets))
    assert len(seen.blocks - {parent.untyped_storage().data_ptr()}) <= 1  # the gradient that the same pass writes
    with torch.no_grad(), Allocations(n_columns) as seen:
        loss_fn(values, targets, torch.ones_like(targets))
    assert not seen.blocks - {parent.untyped_storage().data_ptr()}
    loss.backward()
    outside = torch.ones_like(parent, dtype=torch.bool)
    outside[:, : 8 if labels_are_shifted else 7, 1:501] = False
    assert (parent.grad[outside] == 0).all()
    assert (parent.grad[~outside] != 0).all()


# -- what is missing

MISSING = [
    ({}, {"targets": TARGETS}, "expected logits, or hidden_states and lm_head_weight"),
    (
        {},
        {"targets": TARGETS, "hidden_states": torch.zeros(2, 4, 3)},
        "expected logits, or hidden_states and lm_head_wei",
    ),
    ({}, {"logits": logits()}, "expected targets, got None"),
    ({"use_mtp": True, "hidden_size": 3}, {}, "use_mtp needs hidden_states, got None"),
    (
        {"use_mtp": True, "mtp_share_head": True, "hidden_size": 3},
        {"hidden_states": torch.zeros(2, 4, 3)},
        "mtp_share_head=True needs lm_head_weight, got None",
    ),
    ({"use_mtp": True, "mtp_type": "adaptive"}, {"mtp_active": True}, "mtp_active needs additional_logits, got None"),
    (
        {"primary_loss_type": "adaptive_mtp", "num_future_tokens": 1},
        {"additional_logits": [logits()]},
        "use_confidence_weighting=True needs confidence_scores, got None",
    ),
    ({"use_moe_balancing": True, "num_experts": 2}, {}, "use_moe_balancing needs gate_logits, got None"),
    ({"use_auxiliary_loss": True}, {}, "use_auxiliary_loss needs gate_logits, got None"),
    ({"use_diversity_loss": True}, {}, "use_diversity_loss needs expert_outputs, got None"),
    ({"use_contrastive_loss": True}, {}, "use_contrastive_loss needs contrastive_pair or hidden_states, got None"),
    ({}, {"negative_weights": torch.ones(2, 4, 1)}, "negative_weights need negative_ids, got None"),
    ({}, {"soft_target_weights": torch.ones(2, 4, 1)}, "soft_target_weights need soft_target_ids, got None"),
    ({}, {"soft_target_ids": TARGETS[..., None]}, "soft_target_ids need soft_target_weights, got None"),
    (
        {"distillation_weight": 0.0},
        {"soft_target_ids": TARGETS[..., None], "soft_target_weights": torch.ones(2, 4, 1)},
        "soft_target_ids need distillation_weight above 0, got 0",
    ),
    (
        {"use_focal_loss": True},
        {"logits": logits(), "targets": TARGETS, "target_probabilities": logits().detach()},
        "use_focal_loss needs one target for each row, got target_probabilities",
    ),
    (
        {"label_smoothing": 0.1, "smoothing_mode": "exclude_target"},
        {"logits": logits(), "targets": TARGETS, "target_probabilities": logits().detach()},
        "smoothing_mode='exclude_target' needs one target for each row, got target_probabilities",
    ),
]


@pytest.mark.parametrize(("options", "arguments", "message"), MISSING)
def test_what_is_missing_is_named_with_the_option_that_wants_it(options, arguments, message):
    if arguments and ("targets" in arguments or "logits" in arguments):
        given_arguments = arguments
    else:
        given_arguments = {"logits": logits(), "targets": TARGETS, **arguments}
    with pytest.raises(ValueError, match=message):
        UnifiedLoss(V, **options)(**given_arguments)


NEED_SEQUENCES = [
    ({"use_ngram_penalty": True}, "ngram_penalty"),
    ({"use_immediate_repetition_penalty": True}, "immediate_repetition_penalty"),
    ({"eos_token_id": 1}, "eos_penalty"),
    ({"use_mtp": True, "hidden_size": 3}, "mtp_loss"),
    ({"primary_loss_type": "adaptive_mtp"}, "mtp_loss"),
    ({"labels_are_shifted": False}, "labels_are_shifted=False"),
]


@pytest.mark.parametrize(("options", "name"), NEED_SEQUENCES)
def test_rows_without_order_are_refused_where_order_matters(options, name):
    with pytest.raises(
        ValueError, match=f"unified_loss: {name} needs sequences: .*segment_ids, position_ids or cu_seq"
    ):
        UnifiedLoss(V, **options)(logits(5), torch.zeros(5, dtype=torch.int64))


# -- what does not fit

MISFITS = [
    ({"targets": TARGETS[:, :3]}, r"expected targets of shape \[2, 4\], got \[2, 3\]"),
    ({"targets": TARGETS.float()}, "expected targets to be integers of shape .*, got float32"),
    (  # -100 in int64: the row would not count
        {"targets": torch.full((2, 4), 2**64 - 100, dtype=torch.uint64)},
        "expected targets to be integers of shape .*, got uint64",
    ),
    ({"targets": TARGETS.bool()}, "expected targets to be integers of shape .*, got bool"),
    ({"logits": logits(n_columns=V - 1)}, r"at least vocab_size = 6 columns, got shape \[2, 4, 5\]"),
    (
        {"logits": logits(2, 4, 1), "targets": torch.zeros(2, 4, 1).long()},
        r"expected targets of shape .*\[n_rows\], got \[2, 4, 1\]",
    ),
    ({"attention_mask": torch.ones(2, 1, 4, 4)}, r"expected attention_mask of shape \[2, 4\], got \[2, 1, 4, 4\]"),
    ({"token_weights": torch.ones(4)}, r"expected token_weights of shape \[2, 4\], got \[4\]"),
    ({"token_weights": torch.ones(2, 4, requires_grad=True)}, "expected token_weights without requires_grad"),
    ({"input_ids": TARGETS[:1]}, r"expected input_ids of shape \[2, 4\], got \[1, 4\]"),
    ({"input_ids": TARGETS.double()}, "expected input_ids to be integers of shape .*, got float64"),
    ({"segment_ids": torch.zeros(2, 3)}, r"expected segment_ids of shape \[2, 4\], got \[2, 3\]"),
    ({"position_ids": torch.zeros(3, 4)}, r"expected position_ids of shape \[2, 4\], got \[3, 4\]"),
    ({"cu_seqlens": torch.zeros(1, 3)}, r"expected cu_seqlens of shape \[n_segments \+ 1\], got \[1, 3\]"),
    ({"target_probabilities": torch.ones(2, 4, 3)}, r"expected target_probabilities of shape \[2, 4, "),
    (
        {"target_probabilities": torch.ones(2, 4, V).long()},
        "expected target_probabilities of floating point, got torch.int64",
    ),
    ({"negative_ids": TARGETS}, r"expected negative_ids of shape \[2, 4, n_negatives\], got \[2, 4\]"),
    ({"negative_ids": torch.ones(2, 4, 1)}, "expected negative_ids to be integers of shape .*, got float32"),
    (
        {"negative_ids": TARGETS[..., None], "negative_weights": torch.ones(2, 4)},
        r"expected negative_weights of shape \[2, 4, 1\], got \[2, 4\]",
    ),
    (
        {"negative_ids": TARGETS[..., None], "negative_weights": torch.ones(2, 4, 1, requires_grad=True)},
        "weights without requires_grad",
    ),
    (
        {"soft_target_ids": TARGETS, "soft_target_weights": torch.ones(2, 4)},
        r"expected soft_target_ids of shape \[2, 4, n_soft_targets\], got \[2, 4\]",
    ),
    (
        {"soft_target_ids": TARGETS[..., None], "soft_target_weights": torch.ones(2, 4)},
        r"expected soft_target_weights of shape \[2, 4, 1\], got \[2, 4\]",
    ),
    (
        {"hidden_states": torch.zeros(2, 3, 5)},
        r"expected hidden_states of shape \[2, 4, hidden_size\], got \[2, 3, 5\]",
    ),
    ({"primary_logits": logits()}, "expected primary_logits with adaptive heads only"),
    ({"lm_head_weight": torch.zeros(V, 3)}, "expected logits or lm_head_weight, got both"),
]


@pytest.mark.parametrize(("arguments", "message"), MISFITS)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        UnifiedLoss(V)(**{"logits": logits(), "targets": TARGETS, **arguments})


def test_a_call_that_fails_its_checks_can_be_printed():
    """pytest, and what reports errors, prints what the frames of an exception hold."""
    with pytest.raises(ValueError, match="expected targets of shape") as caught:
        UnifiedLoss(V)(torch.zeros(2, 3, V), TARGETS)
    frames = [entry.frame.f_locals for entry in caught.traceback]
    printed = [repr(local["call"]) for local in frames if "call" in local]
    assert printed and all(text.startswith("Call(") for text in printed)


def test_a_head_that_does_not_fit_the_hidden_states_is_named():
    with pytest.raises(ValueError, match=r"expected lm_head_weight of shape \[vocab_size, 3\] .*, got \[6, 4\]"):
        UnifiedLoss(V)(targets=TARGETS, hidden_states=torch.zeros(2, 4, 3), lm_head_weight=torch.zeros(V, 4))


def test_a_head_of_another_vocabulary_is_named():
    message = r"expected lm_head_weight with at least vocab_size = 6 rows, got shape \[5, 3\]"
    with pytest.raises(ValueError, match=message):
        UnifiedLoss(V)(targets=TARGETS, hidden_states=torch.zeros(2, 4, 3), lm_head_weight=torch.zeros(V - 1, 3))


TWO_SOURCES = [
    ({"logits": logits(), "lm_head_weight": torch.zeros(V, 3)}, "expected logits or lm_head_weight, got both"),
    ({"primary_logits": logits(), "lm_head_weight": torch.zeros(V, 3)}, "expected primary_logits or lm_head_weight"),
    ({"logits": logits(), "lm_head_bias": torch.zeros(V)}, "lm_head_bias needs lm_head_weight, got None"),
]


@pytest.mark.parametrize(("arguments", "message"), TWO_SOURCES)
def test_two_sources_of_logits_are_named(arguments, message):
    loss_fn = UnifiedLoss(V, primary_loss_type="adaptive_mtp", num_future_tokens=1, use_confidence_weighting=False)
    with pytest.raises(ValueError, match=message):
        loss_fn(targets=TARGETS, additional_logits=[logits()], **arguments)


def test_another_number_of_heads_is_named():
    loss_fn = UnifiedLoss(V, primary_loss_type="adaptive_mtp", num_future_tokens=2, use_confidence_weighting=False)
    with pytest.raises(ValueError, match="expected additional_logits of num_future_tokens = 2 times"):
        loss_fn(logits(), TARGETS, additional_logits=[logits()])


@pytest.mark.parametrize("outside", [V, -1])
def test_a_counted_target_out_of_range_is_named(outside):
    targets = TARGETS.clone()
    targets[1, 1] = outside
    with pytest.raises(IndexError, match=rf"got {outside} at position 5"):
        UnifiedLoss(V)(logits(), targets)


# -- masks of floats

STATES = torch.randn(2, 4, 3)
MASKED = {
    "unified_loss": lambda mask: UnifiedLoss(V)(logits(), TARGETS, mask),
    "unified_loss, items": lambda mask: UnifiedLoss(V).count_items(TARGETS, mask),
    "consistency_loss": lambda mask: ConsistencyLoss()(logits(), logits() + STATES.mean(), mask),
    "perplexity_loss": lambda mask: PerplexityLoss()(logits(), TARGETS, mask),
    "contrastive_loss": lambda mask: ContrastiveLoss()(STATES, attention_mask=mask),
    "contrastive_loss, pairs": lambda mask: ContrastiveLoss()(STATES[0], STATES[1], mask[0]),
    "repeated_ngram_mask": lambda mask: repeated_ngram_mask(TARGETS, 2, mask=mask),
}


@pytest.mark.parametrize("name", MASKED)
def test_an_additive_mask_is_refused(name):
    """Its 0 is what counts; of any other mask what does not."""
    owner, function = name.split(",")[0], MASKED[name]
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0]])
    torch.testing.assert_close(function(mask), function(mask.bool()))
    for lowest in (-torch.inf, torch.finfo(torch.float32).min, -1.0):
        with pytest.raises(ValueError, match=rf"{owner}: expected \w*mask of bools, .* got numbers below 0"):
            function((1 - mask) * lowest if lowest > -torch.inf else torch.zeros(2, 4).masked_fill(mask == 0, lowest))


def test_a_graph_asserts_that_a_mask_is_not_additive():
    loss_fn = UnifiedLoss(V, primary_loss_type="standard")
    compiled = torch.compile(loss_fn, backend="aot_eager", fullgraph=True)
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0]])
    torch.testing.assert_close(compiled(logits(), TARGETS, mask), loss_fn(logits(), TARGETS, mask))
    with pytest.raises(RuntimeError, match="unified_loss: expected attention_mask without numbers below 0"):
        compiled(logits(), TARGETS, -mask)


# -- what is no tensor, or on another device

ARGUMENTS = {
    "attention_mask": torch.ones(2, 4),
    "token_weights": torch.ones(2, 4),
    "input_ids": TARGETS,
    "position_ids": TARGETS,
    "segment_ids": TARGETS,
    "cu_seqlens": torch.tensor([0, 8]),
    "negative_ids": TARGETS[..., None],
    "negative_weights": torch.ones(2, 4, 1),
    "soft_target_ids": TARGETS[..., None],
    "soft_target_weights": torch.ones(2, 4, 1),
    "confidence_scores": torch.ones(2, 4),
    "mtp_depth_weights": torch.ones(3),
    "global_expert_counts": torch.ones(1, 4),
}


@pytest.mark.parametrize("convert", [torch.Tensor.tolist, torch.Tensor.numpy])
@pytest.mark.parametrize("name", ["targets", *ARGUMENTS])
def test_what_is_no_tensor_is_named(name, convert):
    arguments = {"logits": logits(), "targets": TARGETS, **ARGUMENTS}
    value = convert(arguments[name])
    message = f"unified_loss: expected {name} to be a torch.Tensor, got {torch.typename(value)}"
    with pytest.raises(TypeError, match=message):
        UnifiedLoss(V)(**{**arguments, name: value})


@pytest.mark.parametrize("name", ["targets", *ARGUMENTS])
def test_another_device_is_named(name):
    arguments = {"logits": logits(), "targets": TARGETS, **ARGUMENTS}
    with pytest.raises(ValueError, match=f"unified_loss: expected {name} on cpu as the logits, got meta"):
        UnifiedLoss(V)(**{**arguments, name: arguments[name].to("meta")})


@pytest.mark.parametrize("name", ["targets", *ARGUMENTS])
def test_complex_numbers_are_named(name):
    """A conversion would drop their imaginary part."""
    arguments = {"logits": logits(), "targets": TARGETS, **ARGUMENTS}
    with pytest.raises(ValueError, match=f"unified_loss: expected {name} of real numbers, got complex64"):
        UnifiedLoss(V)(**{**arguments, name: arguments[name].to(torch.complex64)})


STATES, HEAD = torch.zeros(2, 4, 3), torch.nn.Linear(3, V)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": logits().numpy()}, "expected logits to be a torch.Tensor, LinearLogits or a model's output"),
        ({"logits": (logits(),)}, "expected logits to be a torch.Tensor, LinearLogits or .*, got tuple"),
        ({"hidden_states": STATES.numpy(), "lm_head_weight": HEAD}, "expected hidden_states to be a torch.Tensor"),
        ({"hidden_states": (), "lm_head_weight": HEAD}, "expected hidden_states to be a torch.Tensor, got tuple"),
        ({"logits": logits(), "hidden_states": STATES.tolist()}, "expected hidden_states to be a torch.Tensor, got li"),
        ({"hidden_states": STATES, "lm_head_weight": "head"}, "expected lm_head_weight to be a torch.Tensor, got str"),
        (
            {"hidden_states": STATES, "lm_head_weight": torch.nn.Sequential(HEAD)},
            "expected lm_head_weight to be a torch.Tensor or a torch.nn.Linear, got Sequential, which may do more",
        ),
        (
            {"hidden_states": STATES, "lm_head_weight": HEAD.weight, "lm_head_bias": [0.0] * V},
            "expected lm_head_bias to be a torch.Tensor, got list",
        ),
    ],
)
def test_a_source_of_logits_that_is_none_is_named(arguments, message):
    with pytest.raises(TypeError, match=f"unified_loss: {message}"):
        UnifiedLoss(V)(targets=TARGETS, **arguments)


@pytest.mark.parametrize("pair", [(STATES[0], None), (STATES[0],), STATES.tolist()])
def test_a_contrastive_pair_that_is_none_is_named(pair):
    with pytest.raises(TypeError, match="unified_loss: expected contrastive_pair to be two tensors, got"):
        UnifiedLoss(V, use_contrastive_loss=True)(logits(), TARGETS, contrastive_pair=pair)


class ModelOutput(dict):
    """As transformers': a dict whose entries are attributes."""

    __getattr__ = dict.get


def test_a_models_output_stands_for_its_logits():
    values = Numbers(3).leaf(2, 4, V)
    loss = UnifiedLoss(V)(ModelOutput(logits=values, loss=None), TARGETS)
    expected = UnifiedLoss(V)(values, TARGETS)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    got, want = (torch.autograd.grad(value, values)[0] for value in (loss, expected))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"or a model's output with .logits, got ModelOutput"):
        UnifiedLoss(V)(ModelOutput(last_hidden_state=values), TARGETS)
    heads = {"primary_loss_type": "adaptive_mtp", "num_future_tokens": 1, "use_confidence_weighting": False}
    loss = UnifiedLoss(V, **heads)(primary_logits=ModelOutput(logits=values), targets=TARGETS)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_hidden_states_of_every_layer_and_the_head_itself(bias):
    numbers = Numbers(4)
    layers = tuple(numbers.leaf(2, 4, HIDDEN_SIZE) for _ in range(3))
    head = torch.nn.Linear(HIDDEN_SIZE, V, bias=bias).double()
    loss = UnifiedLoss(V)(targets=TARGETS, hidden_states=layers, lm_head_weight=head)
    expected = UnifiedLoss(V)(
        targets=TARGETS, hidden_states=layers[-1], lm_head_weight=head.weight, lm_head_bias=head.bias
    )
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(loss, UnifiedLoss(V)(head(layers[-1]), TARGETS), rtol=1e-12, atol=0)
    trained = (layers[-1], *head.parameters())
    got, want = (torch.autograd.grad(value, trained) for value in (loss, expected))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("made", [prune.identity, torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_head_whose_weight_its_hooks_make_is_refused(made):
    """Only a call of the head would make it anew."""
    head = made(torch.nn.Linear(3, V), name="weight")
    given = {"targets": TARGETS, "hidden_states": STATES}
    with pytest.raises(TypeError, match=r"got Linear, which may do more .* or whose weight a hook makes"):
        UnifiedLoss(V)(**given, lm_head_weight=head)
    torch.testing.assert_close(
        UnifiedLoss(V)(**given, lm_head_weight=head.weight, lm_head_bias=head.bias),
        UnifiedLoss(V)(head(STATES), TARGETS),
    )


def test_a_head_with_parametrizations_has_its_weight():
    head = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, V))
    with torch.no_grad():
        head.parametrizations.weight.original0.mul_(2)
    loss = UnifiedLoss(V)(targets=TARGETS, hidden_states=STATES + 1, lm_head_weight=head)
    torch.testing.assert_close(loss, UnifiedLoss(V)(head(STATES + 1), TARGETS))


def test_the_head_of_shared_depths_may_be_a_layer():
    numbers = Numbers(5)
    states, head = numbers.leaf(2, 4, HIDDEN_SIZE), torch.nn.Linear(HIDDEN_SIZE, V).double()
    loss_fn = UnifiedLoss(V, HIDDEN_SIZE, use_mtp=True, mtp_share_head=True, num_future_tokens=2).double()
    given_arguments = {"logits": numbers.normal(2, 4, V), "targets": TARGETS, "hidden_states": states}
    loss = loss_fn(**given_arguments, lm_head_weight=head)
    expected = loss_fn(**given_arguments, lm_head_weight=head.weight, lm_head_bias=head.bias)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


# -- integer types, empty batches

INTEGERS = [
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32
]  # fmt: skip


@pytest.mark.parametrize("labels_are_shifted", [True, False])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_ids_of_every_integer_type(dtype, labels_are_shifted):
    values, ids = Numbers(2).leaf(2, 8, V), torch.tensor([[0, 1, 2, 3, 3, 5, 2, 2], [4, 5, 0, 1, 0, 0, 0, 4]])
    # ignore_index is in the type's range, or not
    for ignore_index in (-100, 3):
        loss_fn = UnifiedLoss(
            V,
            ignore_index=ignore_index,
            labels_are_shifted=labels_are_shifted,
            use_ngram_penalty=True,
            ngram_size=2,  # padding matches no padding
            use_immediate_repetition_penalty=True,
            pad_token_id=2,
            eos_token_id=1,
            hidden_size=HIDDEN_SIZE,
            use_mtp=True,
            num_future_tokens=2,
        ).double()

        def loss(integer_type, loss_fn=loss_fn):
            position_ids = torch.arange(8).remainder(7)[None]
            given_arguments = {
                "targets": ids, "input_ids": ids.roll(1), "segment_ids": ids // 6, "position_ids": position_ids,
                "negative_ids": ids.roll(1, 1)[..., None], "cu_seqlens": torch.tensor([0, 8, 16]),
                "attention_mask": (ids != 5).long(),
            }  # fmt: skip
            given_arguments = {name: value.to(integer_type) for name, value in given_arguments.items()}
            loss = loss_fn(values, hidden_states=Numbers(9).normal(2, 8, HIDDEN_SIZE), **given_arguments)
            return loss, torch.autograd.grad(loss, values)[0]

        torch.testing.assert_close(loss(dtype), loss(torch.int64), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_what_is_masked_is_no_token_in_any_integer_type(dtype):
    """-100 in uint8 would be 156, a token of a vocabulary like this."""
    text = torch.tensor([[1, 2, 3, 4, 2, 3, 2, 3]])
    mask = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1]])
    loss_fn = UnifiedLoss(200, use_ngram_penalty=True, ngram_size=1, ngram_slots=8, ngram_penalty_weight=1.0)
    logits = Numbers(3).normal(1, 8, 200)
    loss = loss_fn(logits, text, input_ids=text.to(dtype), attention_mask=mask, return_detailed=True)
    expected = loss_fn(logits, text, input_ids=text, attention_mask=mask, return_detailed=True)
    assert expected["ngram_penalty"] > 0
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


@pytest.mark.parametrize("as_given", [lambda indices: indices, list], ids=["tensor", "list of layers"])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_experts_of_every_integer_type(dtype, as_given):
    loss_fn = UnifiedLoss(V, num_experts=4, use_auxiliary_loss=True, use_moe_balancing=True, num_moe_layers=2).eval()
    numbers, indices = Numbers(6), torch.tensor([[0, 1], [3, 0], [1, 2], [2, 3], [0, 3], [1, 0], [2, 1], [3, 1]])
    given = {"logits": numbers.normal(2, 4, V), "targets": TARGETS, "gate_logits": numbers.normal(2, 8, 4)}
    indices = torch.stack([indices, indices.flip(0)])
    loss = loss_fn(**given, expert_indices=as_given(indices.to(dtype)))
    torch.testing.assert_close(loss, loss_fn(**given, expert_indices=indices), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint64])
def test_experts_that_are_no_integers_are_named(dtype):
    loss_fn = UnifiedLoss(V, num_experts=4, use_auxiliary_loss=True)
    message = f"expected expert_indices to be integers of shape .*, got {str(dtype)[6:]}"
    with pytest.raises(ValueError, match=message):
        loss_fn(logits(), TARGETS, gate_logits=torch.zeros(8, 4), expert_indices=torch.zeros(8, 1, dtype=dtype))


@pytest.mark.parametrize("labels_are_shifted", [True, False])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_empty_batches(shape, labels_are_shifted):
    options = {"use_ngram_penalty": True, "eos_token_id": 1, "use_mtp": True, "hidden_size": HIDDEN_SIZE}
    loss_fn = UnifiedLoss(V, labels_are_shifted=labels_are_shifted, **options)
    values, states = torch.zeros(*shape, V, requires_grad=True), torch.zeros(*shape, HIDDEN_SIZE)
    targets = torch.zeros(shape, dtype=torch.int64)
    given_arguments = {"hidden_states": states, "position_ids": targets, "segment_ids": targets}
    result = loss_fn(values, targets, **given_arguments, return_detailed=True)
    result["total_loss"].backward()
    assert result["total_loss"].item() == 0
    assert (result["n_tokens"].item(), result["perplexity"].item(), result["accuracy"].item()) == (0, 1, 0)
