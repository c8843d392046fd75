"""Rows that count for their negatives alone: which rows, what their sum is divided by, and every way to run them."""

import pytest
import torch
import torch.nn.functional as F
from support.strategies import Numbers

from ava_ext import LinearLogits, UnifiedLoss
from ava_ext.losses.negatives import absent_target

V, HIDDEN = 10, 4
TARGETS = torch.tensor([[1, -100, 2, -100, -100], [-100, 3, 4, 5, -100]])
NEGATIVES = torch.tensor(
    [
        [[-1, -1], [3, 4], [2, 5], [0, 0], [-1, -1]],  # 2 is the row's own target
        [[7, -1], [3, -1], [-1, -1], [6, -1], [8, 1]],  # 3 too: this row has none
    ]
)
ROWS = [(0, 1, (3, 4)), (0, 2, (5,)), (0, 3, (0, 0)), (1, 0, (7,)), (1, 3, (6,)), (1, 4, (8, 1))]


def make_loss(**options):
    return UnifiedLoss(V, primary_loss_type="standard", negatives_need_target=False, **options)


def penalties(logits):
    """-log(1 - p) of each row's negatives, by row."""
    p = logits.softmax(-1)
    return {(b, t): -sum(torch.log1p(-p[b, t, c]) for c in ids) for b, t, ids in ROWS}


@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_the_rows_and_their_number(ignore_index):
    logits = Numbers(0).leaf(2, 5, V)
    targets = TARGETS.masked_fill(TARGETS == -100, ignore_index)
    parts = make_loss(ignore_index=ignore_index)(logits, targets, negative_ids=NEGATIVES, return_detailed=True)
    values = penalties(logits)
    torch.testing.assert_close(parts["negative_penalty"], sum(values.values()).detach() / 6, rtol=1e-12, atol=0)
    main = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())
    torch.testing.assert_close(parts["main_loss"], main.detach(), rtol=1e-12, atol=0)
    assert parts["n_tokens"] == 5
    gradients = (torch.autograd.grad(x, logits) for x in (parts["total_loss"], main + sum(values.values()) / 6))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_without_any_target():
    logits, nothing = Numbers(0).leaf(2, 5, V), torch.full((2, 5), -100)
    loss = make_loss()(logits, nothing, negative_ids=NEGATIVES[:, :, :1])
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, 1].abs().max() > 0 and loss > 0
    assert make_loss()(logits, nothing, negative_ids=torch.full_like(NEGATIVES, -1)) == 0
    assert make_loss()(logits, nothing) == 0


def test_weights_mask_and_reductions():
    numbers = Numbers(1)
    logits, token_weights = numbers.normal(2, 5, V), numbers.uniform(2, 5)
    values = penalties(logits)
    masked = torch.ones(2, 5)
    masked[1, 4] = 0  # padding
    arguments = {"negative_ids": NEGATIVES, "token_weights": token_weights, "attention_mask": masked}
    wanted = {row: token_weights[row] * value for row, value in values.items() if row != (1, 4)}
    each = make_loss(reduction="none")(logits, TARGETS, **arguments, return_detailed=True)["negative_penalty"]
    assert each.shape == (2, 5)
    for row in [(b, t) for b in range(2) for t in range(5)]:
        torch.testing.assert_close(each[row], torch.as_tensor(wanted.get(row, 0.0)).double(), rtol=1e-12, atol=0)
    for options, given, n in (
        ({"reduction": "sum"}, {}, 1),
        ({}, {}, sum(token_weights[row] for row in wanted)),
        ({}, {"num_items_in_batch": 20}, 20),
    ):
        got = make_loss(**options)(logits, TARGETS, **arguments, **given, return_detailed=True)["negative_penalty"]
        torch.testing.assert_close(got, sum(wanted.values()) / n, rtol=1e-12, atol=0)


def test_micro_batches_of_negatives_alone_add_up():
    logits, loss_fn = Numbers(2).leaf(2, 5, V), make_loss()
    targets = torch.full((2, 5), -100)
    n = (NEGATIVES != -1).any(-1).sum()  # as the guide says
    parts = [loss_fn(logits[b], targets[b], negative_ids=NEGATIVES[b], num_items_in_batch=n) for b in range(2)]
    torch.testing.assert_close(sum(parts), loss_fn(logits, targets, negative_ids=NEGATIVES))


@pytest.mark.parametrize(
    "packed",
    [
        {"segment_ids": torch.tensor([[0, 0, 0, 1, 1]])},
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])},
        {"cu_seqlens": torch.tensor([0, 3, 5])},
    ],
)
def test_unshifted_labels_of_packed_texts(packed):
    """Behind the last label of each text there is no row, whatever the next text is."""
    logits, labels, negatives = Numbers(4).normal(1, 5, V), TARGETS.clamp(0)[:1], NEGATIVES[:1]
    loss_fn = make_loss(labels_are_shifted=False)
    given = {"negative_ids": negatives, "num_items_in_batch": 5, "return_detailed": True}
    got = loss_fn(logits, labels, **packed, **given)["negative_penalty"]
    texts = [
        loss_fn(logits[:, text], labels[:, text], **given | {"negative_ids": negatives[:, text]})["negative_penalty"]
        for text in (slice(3), slice(3, 5))
    ]
    torch.testing.assert_close(got, sum(texts), rtol=1e-12, atol=0)


def test_linear_logits_and_options_of_the_row():
    numbers = Numbers(2)
    states, weight = numbers.leaf(2, 5, HIDDEN), numbers.leaf(V, HIDDEN)
    loss_fn = make_loss(logit_softcap=3.0, initial_temperature=0.7, linear_chunk_bytes=2 * V * 8)
    arguments = {"targets": TARGETS, "negative_ids": NEGATIVES}
    got = loss_fn(hidden_states=states, lm_head_weight=weight, **arguments)
    logits = F.linear(states, weight)
    effective = 3 * torch.tanh(logits / 3) / 0.7
    main = F.cross_entropy(effective.flatten(0, 1), TARGETS.flatten())
    expected = main + sum(penalties(effective).values()) / 6
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss_fn(LinearLogits(states, weight), **arguments), expected, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(x, (states, weight)) for x in (got, expected))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-13)


def test_compiled():
    logits, loss_fn = Numbers(3).leaf(2, 5, V), make_loss()
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    got, want = (f(logits, TARGETS, negative_ids=NEGATIVES) for f in (compiled, loss_fn))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(x, logits) for x in (got, want))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_linearized():
    logits, loss_fn = Numbers(5).normal(2, 5, V), make_loss(labels_are_shifted=False)

    def loss(logits):
        return loss_fn(logits, TARGETS, negative_ids=NEGATIVES)

    _, tangent = torch.func.jvp(loss, (logits,), (logits.sin(),))
    _, linear = torch.func.linearize(loss, logits)
    torch.testing.assert_close(linear(logits.sin()), tangent, rtol=1e-12, atol=0)


def test_a_target_that_is_none_of_the_negatives():
    assert absent_target(torch.tensor([[0, 1, 2], [5, -1, 0], [1, 1, 2], [2, 0, 1]])).tolist() == [3, 1, 0, 3]


def test_bad_input_is_named():
    logits = torch.randn(2, 5, V)
    with pytest.raises(ValueError, match="expected fewer negative_ids than vocab_size = 10, got 10"):
        make_loss()(logits, TARGETS, negative_ids=NEGATIVES.repeat(1, 1, 5))
    with pytest.raises(ValueError, match="negatives_need_target=False reads the logits a second time"):
        make_loss(inplace_gradient=True)
