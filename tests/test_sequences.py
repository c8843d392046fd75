"""Texts packed into rows, labels that are not shifted yet, and what a row's context is."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.assertions import gradients, with_dense_logits
from support.strategies import HIDDEN_SIZE, Numbers, cases, seeds

from ava_ext import UnifiedLoss

V = 5
EXACT = {"rtol": 1e-11, "atol": 1e-13}
SEQUENTIAL = {
    "use_ngram_penalty": True, "ngram_size": 2, "use_immediate_repetition_penalty": True, "eos_token_id": 3,
    "min_sequence_length": 2, "use_mtp": True, "mtp_weight": 0.5, "num_future_tokens": 2, "use_contrastive_loss": True,
}  # fmt: skip
# three texts in one row of eight, said in three ways
LENGTHS = [3, 1, 4]
SEGMENT_IDS = torch.tensor([[7, 7, 7, 2, 7, 7, 7, 7]])
POSITION_IDS = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3]])
CU_SEQLENS = torch.tensor([0, 3, 4, 8])


def packed(seed, n_batch=1):
    numbers = Numbers(seed)
    return {
        "logits": numbers.leaf(n_batch, 8, V),
        "targets": numbers.integers(0, 3, n_batch, 8),
        "hidden_states": numbers.leaf(n_batch, 8, HIDDEN_SIZE),
    }


def detailed(loss_fn, arguments, **further):
    result = loss_fn(**arguments, **further, return_detailed=True)
    return result, gradients(result["total_loss"], loss_fn, arguments)


def batch_cu_seqlens(n_batch):
    return torch.cat([CU_SEQLENS[:-1] + 8 * b for b in range(n_batch)] + [torch.tensor([8 * n_batch])])


@pytest.mark.parametrize("n_batch", [1, 2])
@pytest.mark.parametrize("options", [SEQUENTIAL, {**SEQUENTIAL, "labels_are_shifted": False}])
def test_three_ways_to_say_where_texts_begin(options, n_batch):
    loss_fn = UnifiedLoss(V, HIDDEN_SIZE, **options).double().eval()
    arguments = packed(0, n_batch)
    expected = detailed(loss_fn, arguments, segment_ids=SEGMENT_IDS.expand(n_batch, 8))
    plain = loss_fn(**arguments)
    assert not torch.isclose(plain, expected[0]["total_loss"])  # else the test could not see anything
    for given_segments in (
        {"segment_ids": SEGMENT_IDS},
        {"segment_ids": SEGMENT_IDS[0]},
        {"position_ids": POSITION_IDS.expand(n_batch, 8)},
        {"position_ids": POSITION_IDS},
        {"position_ids": POSITION_IDS[0]},
        {"cu_seqlens": batch_cu_seqlens(n_batch)},
        {"cu_seqlens": batch_cu_seqlens(n_batch).int()},
        {"segment_ids": SEGMENT_IDS.int(), "position_ids": POSITION_IDS},
        # given together, each of them begins texts
        {"segment_ids": torch.zeros(1, 8).long(), "position_ids": POSITION_IDS},
        {"segment_ids": SEGMENT_IDS, "position_ids": torch.arange(8)},
        {"position_ids": POSITION_IDS, "cu_seqlens": batch_cu_seqlens(n_batch)},
        {"segment_ids": torch.zeros(1, 8).long(), "cu_seqlens": batch_cu_seqlens(n_batch)},
    ):
        torch.testing.assert_close(detailed(loss_fn, arguments, **given_segments), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool])
def test_what_tells_texts_apart_is_integers(dtype):
    loss_fn, arguments = UnifiedLoss(V, use_ngram_penalty=True), packed(0)
    for name, given_ids in {"segment_ids": SEGMENT_IDS, "position_ids": POSITION_IDS, "cu_seqlens": CU_SEQLENS}.items():
        with pytest.raises(ValueError, match=f"^unified_loss: expected {name} to be integers"):
            loss_fn(arguments["logits"], arguments["targets"], **{name: given_ids.to(dtype)})


def test_packed_flat_rows_are_one_packed_sequence():
    loss_fn = UnifiedLoss(V, HIDDEN_SIZE, **SEQUENTIAL).double().eval()
    arguments = packed(1)
    expected, expected_gradients = detailed(loss_fn, arguments, segment_ids=SEGMENT_IDS)
    flat = {name: tensor.detach().squeeze(0).requires_grad_(tensor.requires_grad) for name, tensor in arguments.items()}
    for given_segments in ({"segment_ids": SEGMENT_IDS[0]}, {"position_ids": POSITION_IDS}, {"cu_seqlens": CU_SEQLENS}):
        result, found = detailed(loss_fn, flat, **given_segments)
        torch.testing.assert_close(result, expected, **EXACT)
        for name in arguments:
            if name != "targets":
                torch.testing.assert_close(found[name], expected_gradients[name].squeeze(0), **EXACT)


@settings(max_examples=40)
@given(seeds, st.booleans(), st.booleans())
def test_nothing_leaks_across_texts(seed, labels_are_shifted, with_input_ids):
    # packed into one row, or one text a row: the rows' losses are the same
    options = {
        **SEQUENTIAL,
        "use_contrastive_loss": False,
        "reduction": "none",
        "labels_are_shifted": labels_are_shifted,
    }
    loss_fn = UnifiedLoss(V, HIDDEN_SIZE, **options).double()
    arguments = packed(seed)
    if with_input_ids:
        arguments["input_ids"] = Numbers(seed + 1).integers(0, 3, 1, 8)
    rows = loss_fn(**arguments, segment_ids=SEGMENT_IDS)
    start = 0
    for length in LENGTHS:
        text = {name: tensor[:, start : start + length] for name, tensor in arguments.items()}
        alone = loss_fn(**text)
        torch.testing.assert_close(rows[:, start : start + alone.shape[1]], alone, **EXACT)
        if not labels_are_shifted and start + length < 8:
            assert rows[0, start + length - 1] == 0  # its label is the next text's first token
        start += length


# -- labels that are not shifted yet


@settings(max_examples=60)
@given(cases())
def test_a_call_may_say_whether_its_labels_are_shifted(case):
    config, arguments = case
    is_shifted = config.labels_are_shifted
    loss_fn = UnifiedLoss(**config.to_dict()).double().eval()
    other = UnifiedLoss(**config.to_dict() | {"labels_are_shifted": not is_shifted}).double().eval()
    other.load_state_dict(loss_fn.state_dict())
    expected = loss_fn(**arguments, return_detailed=True)
    torch.testing.assert_close(
        other(**arguments, labels_are_shifted=is_shifted, return_detailed=True), expected, **EXACT
    )
    decides = ("targets", "attention_mask", "position_ids", "segment_ids", "cu_seqlens")
    given_rows = {name: arguments.get(name) for name in decides}
    counted = other.count_items(**given_rows, labels_are_shifted=is_shifted)
    torch.testing.assert_close(counted, loss_fn.count_items(**given_rows))
    with pytest.raises(TypeError, match="labels_are_shifted to be True, False or None, got int"):
        other(**arguments, labels_are_shifted=1)


@settings(max_examples=60)
@given(cases(labels_are_shifted=True, use_moe_balancing=False, use_auxiliary_loss=False, use_diversity_loss=False))
def test_unshifted_labels_are_explicit_slices(case):
    config, arguments = case
    by_label = ("targets", "attention_mask", "token_weights")
    by_row = ("logits", "primary_logits", "hidden_states", "input_ids", "negative_ids", "negative_weights")
    by_row += ("soft_target_ids", "soft_target_weights", "target_probabilities")
    is_flat = arguments["targets"].dim() == 1
    if is_flat or arguments.keys() & {"cu_seqlens", "segment_ids", "position_ids", "confidence_scores"}:
        arguments = {name: value for name, value in arguments.items() if name in (*by_label, *by_row)}
        config = type(config)(**config.to_dict() | {"use_mtp": False, "primary_loss_type": "standard"})
        config = type(config)(**config.to_dict() | {"use_contrastive_loss": False})
        arguments.pop("primary_logits", None)
    if "logits" not in arguments and "primary_logits" not in arguments and "lm_head_weight" not in arguments:
        arguments["logits"] = torch.randn(*arguments["targets"].shape, config.vocab_size, dtype=torch.float64)
    if is_flat:
        arguments = {
            name: value[None] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
        }
    if "input_ids" in arguments:
        arguments.pop("attention_mask", None)  # unshifted it masks tokens, beside shifted labels it masks labels
    sliced = dict(arguments)
    for name, value in arguments.items():
        if name in by_label:
            sliced[name] = value[:, 1:]
        elif name in by_row:
            sliced[name] = value[:, :-1]
        elif name == "additional_logits":
            sliced[name] = [head[:, :-1] for head in with_dense_logits(value)]
        elif name == "mtp_hidden_states":
            sliced[name] = [states[:, :-1] for states in value]
    shifted = UnifiedLoss(**config.to_dict()).double().eval()
    unshifted = UnifiedLoss(**config.to_dict() | {"labels_are_shifted": False}).double().eval()
    unshifted.load_state_dict(shifted.state_dict())
    got = unshifted(**arguments, return_detailed=True)
    torch.testing.assert_close(got, shifted(**sliced, return_detailed=True), **EXACT, equal_nan=True)


@pytest.mark.parametrize("mask", [None, [1] * 10, [1] * 3 + [0] * 2 + [1] * 5, [1] * 5 + [0] + [1] * 4])
def test_simctg_and_routers_of_unshifted_labels_read_no_row_behind_the_last_label_of_a_packed_text(mask):
    numbers = Numbers(3)
    options = {"use_contrastive_loss": True, "num_experts": 3, "use_auxiliary_loss": True, "labels_are_shifted": False}
    loss_fn = UnifiedLoss(V, **options, load_balancing_weight=1.0).double()
    gates, choices = numbers.normal(2, 5, 3), numbers.integers(0, 3, 2, 5, 1)
    arguments = {
        "logits": numbers.normal(2, 5, V),
        "targets": numbers.integers(0, V, 2, 5),
        "attention_mask": None if mask is None else torch.tensor(mask).view(2, 5),
        "hidden_states": numbers.normal(2, 5, HIDDEN_SIZE),
    }
    # one row for each label that is predicted, whose last tokens therefore have none
    of_rows = {"gate_logits": gates[:, :-1], "expert_indices": choices[:, :-1]}
    expected = loss_fn(**arguments, **of_rows, return_detailed=True)
    in_one_row = {name: None if x is None else x.reshape(1, 10, *x.shape[2:]) for name, x in arguments.items()}
    of_rows = {"gate_logits": gates.view(1, 10, 3)[:, :-1], "expert_indices": choices.view(1, 10, 1)[:, :-1]}
    segment_ids = torch.tensor([[0] * 5 + [1] * 5])
    found = loss_fn(**in_one_row, **of_rows, segment_ids=segment_ids, return_detailed=True)
    torch.testing.assert_close(found, expected, **EXACT)


# -- the context of a row


def immediate_penalties(targets, mask=None, **further):
    options = {"use_immediate_repetition_penalty": True, "reduction": "none", "primary_loss_type": "standard"}
    options |= further.pop("options", {})
    loss_fn = UnifiedLoss(V, **options)
    targets = torch.tensor([targets])
    result = loss_fn(torch.zeros(1, targets.shape[1], V), targets, mask, **further, return_detailed=True)
    return [value > 0 for value in result["immediate_repetition_penalty"][0].tolist()]


def test_the_context_is_the_targets_before_the_row():
    assert immediate_penalties([1, 2, 2, 3]) == [False, True, False, True]


def test_input_ids_are_the_context_up_to_the_row_itself():
    assert immediate_penalties([1, 2, 2, 3], input_ids=torch.tensor([[4, 1, 2, 2]])) == [True, True, False, True]


def test_ignored_and_masked_positions_are_no_context():
    assert immediate_penalties([1, -100, 2, 3]) == [False, False, False, True]
    assert immediate_penalties([1, 4, 2, 3], torch.tensor([[1, 0, 1, 1]])) == [False, False, False, True]
    read = {"input_ids": torch.tensor([[4, -100, 4, 4]])}
    assert immediate_penalties([1, 1, 1, 1], **read) == [True, False, True, True]
    masked = immediate_penalties([1, 1, 1, 1], torch.tensor([[1, 1, 0, 1]]), input_ids=torch.full((1, 4), 4))
    assert masked == [True, True, False, True]


def test_pad_is_no_context_and_ends_a_run():
    options = {"pad_token_id": 0, "immediate_repetition_threshold": 2}
    assert immediate_penalties([4, 4, 1, 1], options=options) == [False, False, True, False]
    assert immediate_penalties([4, 0, 4, 1, 1], options=options) == [False] * 5
    read = {"input_ids": torch.tensor([[4, 0, 4, 4]])}
    assert immediate_penalties([1, 1, 1, 1], options=options, **read) == [False, False, False, True]


def test_unshifted_the_mask_of_the_tokens_is_that_of_the_context():
    # left padding: the first token read at row 1 is a real one
    options = {"labels_are_shifted": False}
    mask, tokens = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[4, 4, 4, 4]])
    found = immediate_penalties([-100, 1, 1, 1], mask, input_ids=tokens, options=options)
    assert found == [False, True, True]


@pytest.mark.parametrize("with_input_ids", [False, True])
@pytest.mark.parametrize("position_ids", [None, [0, 1, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 1, 2, 3]])
@settings(max_examples=10)
@given(seed=seeds)
def test_the_context_crosses_the_shards_of_a_text(with_input_ids, position_ids, seed):
    """A text in two shards, of which the second is told what comes before: the loss of the whole text."""
    options = {key: value for key, value in SEQUENTIAL.items() if "mtp" not in key and "contrastive" not in key}
    loss_fn = UnifiedLoss(
        V, primary_loss_type="standard", reduction="none", pad_token_id=4, **options | {"num_future_tokens": 3}
    ).double()
    numbers = Numbers(seed)
    logits, tokens = numbers.leaf(2, 8, V), numbers.integers(0, 4, 2, 9)
    targets, arguments = tokens[:, 1:].clone(), {}
    if with_input_ids:
        arguments["input_ids"] = tokens[:, :-1]
        targets = targets.masked_fill(targets == 4, 2)  # a row that does not count, but whose token was read
    else:
        targets[0, 1] = -100
    if position_ids is not None:
        arguments["position_ids"] = torch.tensor([position_ids])
    whole = loss_fn(logits, targets, **arguments)
    shards = [{name: values[:, part] for name, values in arguments.items()} for part in (slice(0, 4), slice(4, 8))]
    prefix = (tokens if with_input_ids else targets)[:, :4]
    if position_ids is not None:  # what belongs to another text comes before nothing
        begin = len(position_ids[:4]) - position_ids[3] - 1 if position_ids[4] else 4
        prefix = torch.cat([torch.full((2, begin), -100), prefix[:, begin:]], 1)
    first = loss_fn(logits[:, :4], targets[:, :4], **shards[0])
    second = loss_fn(logits[:, 4:], targets[:, 4:], prefix_ids=prefix, **shards[1])
    torch.testing.assert_close(torch.cat([first, second], 1), whole, **EXACT)


def test_a_prefix_changes_what_repeats():
    loss_fn = UnifiedLoss(V, primary_loss_type="standard", use_ngram_penalty=True, ngram_size=2, reduction="none")
    logits, targets = torch.zeros(1, 2, V), torch.tensor([[1, 3]])
    alone = loss_fn(logits, targets)
    # behind "1 2", 1 comes again: 2 would repeat
    more = loss_fn(logits, targets, prefix_ids=torch.tensor([[1, 2]])) - alone
    torch.testing.assert_close(more, torch.tensor([[0.0, -0.1 * math.log(1 - 1 / V)]]))


def test_a_masked_token_of_the_prefix_takes_one_row_from_the_length():
    """Not two: the row before it counts, whose target was there."""
    options = {"eos_token_id": 2, "min_sequence_length": 4, "eos_penalty_weight": 1.0}
    loss_fn = UnifiedLoss(V + 1, primary_loss_type="standard", reduction="none", **options)
    logits, targets = torch.zeros(1, 3, V + 1), torch.tensor([[3, 4, 5]])
    arguments = {"input_ids": torch.tensor([[5, 3, 4]]), "prefix_ids": torch.tensor([[5, 3, -100]])}
    penalties = loss_fn(logits, targets, **arguments, return_detailed=True)["eos_penalty"]
    assert (penalties > 0).tolist() == [[True, True, False]]  # two rows of the prefix count: these come third to fifth


@pytest.mark.parametrize("name", ["input_ids", "segment_ids", None])
def test_an_empty_part_of_a_text_with_a_prefix(name):
    loss_fn = UnifiedLoss(V, primary_loss_type="standard", use_ngram_penalty=True)
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    given = {} if name is None else {name: nothing}
    assert loss_fn(torch.zeros(2, 0, V), nothing, prefix_ids=torch.ones(2, 3, dtype=torch.int64), **given) == 0


def test_prefixes_that_do_not_fit_raise():
    logits, targets = torch.zeros(2, 3, V), torch.ones(2, 3, dtype=torch.int64)
    loss_fn = UnifiedLoss(V, primary_loss_type="standard", use_immediate_repetition_penalty=True)
    for prefix, message in (
        (torch.ones(3, 3, dtype=torch.int64), r"expected prefix_ids of shape \[2, n_prefix\], got \[3, 3\]"),
        (torch.ones(3, dtype=torch.int64), r"expected prefix_ids of shape \[2, n_prefix\], got \[3\]"),
        (torch.ones(2, 3), "expected prefix_ids to be integers of shape .*, got float32"),
    ):
        with pytest.raises(ValueError, match=message):
            loss_fn(logits, targets, prefix_ids=prefix)
    with pytest.raises(TypeError, match=r"expected prefix_ids to be a torch.Tensor, got list"):
        loss_fn(logits, targets, prefix_ids=[[1], [2]])
    unshifted = UnifiedLoss(V, primary_loss_type="standard", labels_are_shifted=False)
    with pytest.raises(ValueError, match=r"prefix_ids with labels_are_shifted=False need input_ids"):
        unshifted(logits, targets, prefix_ids=targets)
