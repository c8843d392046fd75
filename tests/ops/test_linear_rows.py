"""Losses and statistics of logits that never exist as a whole, against those of the same logits, made."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.assertions import relative_error
from support.new_python import run_python
from support.strategies import Numbers, seeds

from ava_ext import LinearLogits, UnifiedLoss, softmax_statistics, token_log_probs
from ava_ext.ops import Candidates, RowFlags, linear_rows, row_loss, row_options
from ava_ext.ops.linear_logits import rows_of_a_chunk

V, HIDDEN = 13, 5
EVERY_TERM = int(
    RowFlags.CROSS_ENTROPY
    | RowFlags.FOCAL
    | RowFlags.LABEL_SMOOTHING
    | RowFlags.Z_LOSS
    | RowFlags.CONFIDENCE_PENALTY
    | RowFlags.SOFTCAP
    | RowFlags.ENTROPY
)
OPTIONS = {
    "temperature": 0.8,
    "label_smoothing": 0.1,
    "focal_gamma": 1.5,
    "z_loss_weight": 0.1,
    "confidence_penalty_weight": 0.2,
    "logit_softcap": 5.0,
}


def make_head(numbers, *rows, dtype=torch.float64, with_bias=True):
    """Leaves hidden_states [*rows, HIDDEN], weight [V, HIDDEN] and bias [V]."""
    parts = [numbers.normal(*rows, HIDDEN), numbers.normal(V, HIDDEN)] + ([numbers.normal(V)] if with_bias else [])
    return LinearLogits(*(part.to(dtype).requires_grad_() for part in parts))


def leaves(logits):
    return [part for part in logits if part is not None]


def make_rows(numbers, *rows):
    """Targets with ignored rows, weights and candidates."""
    targets = numbers.integers(0, V, *rows).masked_fill(numbers.true(0.3, *rows), -100)
    ids = numbers.integers(-1, V, *rows, 3).int()
    candidates = Candidates(torch.where(ids == targets.unsqueeze(-1), -1, ids), numbers.uniform(*rows, 3), (1, 2))
    return targets, {"row_weights": numbers.uniform(*rows), "candidates": candidates, "flags": EVERY_TERM}


# -- the loss


@given(seeds, st.integers(1, 9), st.sampled_from(["sum", "none"]), st.booleans(), st.integers(0, 2))
def test_equals_the_loss_of_the_logits(seed, chunk_rows, reduction, with_bias, n_padding):
    numbers = Numbers(seed)
    head = make_head(numbers, 2, 4, with_bias=with_bias)
    targets, keywords = make_rows(numbers, 2, 4)
    targets = torch.where(targets < V - n_padding, targets, 0)
    ids, weights, groups = keywords["candidates"]
    keywords["candidates"] = Candidates(torch.where(ids < V - n_padding, ids, -1), weights, groups)
    keywords |= {"options": row_options(head.weight, **OPTIONS), "vocab_size": V - n_padding}
    got = row_loss(head, targets, reduction=reduction, chunk_bytes=chunk_rows * V * 8, **keywords)
    want = row_loss(F.linear(*head), targets, **keywords)
    upstream = numbers.normal(2, 4) if reduction == "none" else numbers.normal()
    expected = want.loss if reduction == "none" else want.loss.sum()
    torch.testing.assert_close(got.loss, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got.terms, want.terms, rtol=1e-12, atol=1e-13)
    assert not got.terms.requires_grad
    gradients = torch.autograd.grad(got.loss, leaves(head), upstream)
    expected_gradients = torch.autograd.grad(expected, leaves(head), upstream)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck(reduction):
    numbers = Numbers(0)
    head = make_head(numbers, 6)
    targets, keywords = make_rows(numbers, 6)
    options = row_options(head.weight, **OPTIONS)

    def loss(*parts):
        return row_loss(
            LinearLogits(*parts), targets, options, reduction=reduction, chunk_bytes=2 * V * 8, **keywords
        ).loss

    assert torch.autograd.gradcheck(loss, tuple(head))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_kept_graph_gives_the_same_twice_and_keeps_its_hands_off(reduction):
    numbers = Numbers(1)
    head = make_head(numbers, 6)
    targets, keywords = make_rows(numbers, 6)
    loss = row_loss(head, targets, row_options(head.weight, **OPTIONS), reduction=reduction, **keywords).loss.sum()
    first = torch.autograd.grad(3 * loss, leaves(head), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(-2 * loss, leaves(head))
    torch.testing.assert_close(list(first), kept, rtol=0, atol=0)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one / 3, other / -2, rtol=1e-13, atol=0)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("frozen", ["hidden_states", "weight", "bias"])
def test_what_is_frozen_costs_no_product_and_changes_nothing(reduction, frozen, monkeypatch):
    products = []
    monkeypatch.setattr(linear_rows, "_add_product", lambda *tensors: products.append("weight"))
    numbers = Numbers(2)
    head = make_head(numbers, 6)
    targets, keywords = make_rows(numbers, 6)
    part = getattr(head, frozen)
    others = [leaf for leaf in head if leaf is not part]
    loss = row_loss(head, targets, row_options(part, **OPTIONS), reduction=reduction, **keywords).loss.sum()
    products.clear()
    if frozen != "weight":
        torch.autograd.grad(loss, others)
        return
    expected = torch.autograd.grad(
        row_loss(F.linear(*head), targets, row_options(part, **OPTIONS), **keywords)[0].sum(), others
    )
    part.requires_grad_(False)
    loss = row_loss(head, targets, row_options(part, **OPTIONS), reduction=reduction, **keywords).loss.sum()
    torch.testing.assert_close(torch.autograd.grad(loss, others), expected, rtol=1e-10, atol=1e-13)
    assert not products


def test_without_grad_there_are_statistics_only(monkeypatch):
    head, targets = make_head(Numbers(3), 6), torch.arange(6)
    monkeypatch.setattr(torch.ops.ava_ext, "row_loss_", None)  # what would write a gradient
    with torch.no_grad():
        loss = row_loss(head, targets, row_options(head.weight), reduction="sum").loss
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(*head), targets, reduction="sum"))
    detached = LinearLogits(*(part.detach() for part in head))
    assert not row_loss(detached, targets, row_options(head.weight), reduction="sum").loss.requires_grad


@pytest.mark.parametrize("compute", ["loss", "statistics"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_double_backward_raises(compute, reduction):
    head, targets = make_head(Numbers(4), 6), torch.arange(6)
    if compute == "loss":
        loss = row_loss(head, targets, row_options(head.weight), reduction=reduction).loss.sum()
    else:
        loss = token_log_probs(head, targets)[int(reduction == "none")].sum()
    for leaf in leaves(head):
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            torch.autograd.grad(gradient.square().sum(), leaf)


@pytest.mark.parametrize("n_rows", [0, 1])
def test_no_row_and_one(n_rows):
    head, targets = make_head(Numbers(5), n_rows), torch.zeros(n_rows, dtype=torch.int64)
    loss = row_loss(head, targets, row_options(head.weight), reduction="sum").loss
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(*head), targets, reduction="sum"))
    expected = torch.autograd.grad(F.cross_entropy(F.linear(*head), targets, reduction="sum"), leaves(head))
    torch.testing.assert_close(torch.autograd.grad(loss, leaves(head)), expected)


# -- precision


@pytest.mark.parametrize("n_chunks", [1, 7])
def test_the_gradient_of_a_bfloat16_weight_is_summed_in_float32(n_chunks):
    generator = torch.Generator().manual_seed(0)
    n_rows, hidden_size, vocab_size = 448, 48, 800
    states = torch.randn(n_rows, hidden_size, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(vocab_size, hidden_size, generator=generator) / 7).bfloat16().requires_grad_()
    targets = torch.randint(0, vocab_size, (n_rows,), generator=generator)
    budget = -(-n_rows // n_chunks) * vocab_size * 2
    logits = LinearLogits(states, weight)
    loss = row_loss(logits, targets, row_options(weight), chunk_bytes=budget, reduction="sum").loss
    got = torch.autograd.grad(loss, (states, weight))
    # against the same with one product in float32, both measured from what float64 makes of the same bfloat16 logits
    made = (states @ weight.t()).detach().double()
    grad_logits = made.softmax(-1) - F.one_hot(targets, vocab_size)
    exact = (grad_logits @ weight.double(), grad_logits.t() @ states.double())
    rounded = grad_logits.bfloat16().float()
    unchunked = ((rounded @ weight.float()).bfloat16(), (rounded.t() @ states.float()).bfloat16())
    for name, gradient, one, true in zip(("hidden_states", "weight"), got, unchunked, exact, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert relative_error(gradient, true) <= 1.2 * relative_error(one, true), name


@pytest.mark.parametrize("way", ["freed", "kept", "batched", "compiled"])
def test_the_factor_of_a_bfloat16_gradient_is_not_rounded(way):
    numbers = Numbers(7)
    head = make_head(numbers, 64, dtype=torch.bfloat16)
    targets = numbers.integers(0, V, 64)

    def compute(*head):
        return row_loss(LinearLogits(*head), targets, row_options(head[1]), reduction="sum").loss

    loss = (torch.compile(compute) if way == "compiled" else compute)(*head)
    factor = torch.tensor(1.0038)  # bfloat16 has 1 and 1.0078
    one = torch.autograd.grad(compute(*head), leaves(head))
    options = {"retain_graph": way == "kept", "is_grads_batched": way == "batched"}
    gradients = torch.autograd.grad(loss, leaves(head), factor.expand(2) if way == "batched" else factor, **options)
    for name, gradient, of_one in zip(head._fields, gradients, one, strict=True):
        expected = (of_one.float() * factor).bfloat16().expand_as(gradient)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("scale", [1.0, 2.0**6, 2.0**10])
def test_float16_gradients_live_on_the_scaler(scale):
    # rows weigh 2^-26: before the scaler's factor every float16 gradient would be 0
    numbers = Numbers(6)
    head = make_head(numbers, 8, dtype=torch.float16, with_bias=False)
    targets, weights = numbers.integers(0, V, 8), torch.full((8,), 2.0**-26)
    loss = row_loss(head, targets, row_options(head.weight), row_weights=weights, reduction="sum").loss
    gradients = torch.autograd.grad(loss * scale * 2.0**26, leaves(head))
    logits = F.linear(*(part.float() if part is not None else None for part in head))
    expected = torch.autograd.grad(scale * F.cross_entropy(logits, targets, reduction="sum"), leaves(head))
    for gradient, other in zip(gradients, expected, strict=True):
        assert relative_error(gradient, other) < 4e-3


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_autocast_computes_as_linear_does(reduction):
    numbers = Numbers(7)
    head = make_head(numbers, 8, dtype=torch.float32)
    targets, keywords = make_rows(numbers, 8)
    keywords["row_weights"] = keywords["row_weights"].float()
    keywords["candidates"] = keywords["candidates"]._replace(weights=keywords["candidates"].weights.float())
    with torch.autocast("cpu", torch.bfloat16):
        got = row_loss(head, targets, row_options(head.weight, **OPTIONS), reduction=reduction, **keywords).loss.sum()
        logits = F.linear(*head)
        assert logits.dtype == torch.bfloat16
        want = row_loss(logits, targets, row_options(head.weight, **OPTIONS), **keywords).loss.sum()
        gradients = torch.autograd.grad(got, leaves(head))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    exact = LinearLogits(*(part.detach().double().requires_grad_() for part in head))
    keywords["row_weights"] = keywords["row_weights"].double()
    keywords["candidates"] = keywords["candidates"]._replace(weights=keywords["candidates"].weights.double())
    true = row_loss(F.linear(*exact), targets, row_options(exact.weight, **OPTIONS), **keywords).loss.sum()
    true_gradients = torch.autograd.grad(true, leaves(exact))
    naive = torch.autograd.grad(want, leaves(head))
    for gradient, other, expected in zip(gradients, naive, true_gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, expected) <= 1.5 * relative_error(other, expected)


# -- within PyTorch


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_compiles_without_a_graph_break(reduction):
    numbers = Numbers(8)
    head = make_head(numbers, 2, 4)
    targets, keywords = make_rows(numbers, 2, 4)

    def loss(head, targets, keywords):
        options = row_options(head.weight, **OPTIONS)
        rows = row_loss(head, targets, options, reduction=reduction, chunk_bytes=3 * V * 8, **keywords)
        return 3 * rows.loss.sum()

    eager, compiled = loss(head, targets, keywords), torch.compile(loss, fullgraph=True)(head, targets, keywords)
    torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(value, leaves(head)) for value in (compiled, eager))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("wanted", [[False] * 3, [True] * 3, [False, True, False]])
def test_opcheck(wanted):
    numbers = Numbers(10)
    head = make_head(numbers, 6)
    targets, keywords = make_rows(numbers, 6)
    ids, weights, groups = keywords["candidates"]
    options, row_weights = row_options(head.weight, **OPTIONS), keywords["row_weights"]
    arguments = (*head, targets, options, row_weights, ids, weights, list(groups), EVERY_TERM, V, -100, 4)
    arguments = (*arguments, torch.float64, None, wanted)
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.ava_ext.linear_row_loss, arguments, test_utils=utilities)
    statistics = (*head, ids, None, options, int(RowFlags.ENTROPY), V, 4, torch.float64, None)
    torch.library.opcheck(torch.ops.ava_ext.linear_row_statistics, statistics, test_utils=utilities)


def test_activation_checkpointing():
    head, targets = make_head(Numbers(11), 2, 4), Numbers(11).integers(0, V, 2, 4)
    loss_fn = UnifiedLoss(V, primary_loss_type="standard")

    def loss(states, weight):
        return loss_fn(targets=targets, hidden_states=states.tanh(), lm_head_weight=weight)

    checkpointed = torch.utils.checkpoint.checkpoint(loss, *head[:2], use_reentrant=False)
    gradients = (torch.autograd.grad(value, head[:2]) for value in (checkpointed, loss(*head[:2])))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


def test_tied_embeddings_and_accumulation():
    numbers = Numbers(12)
    embedding = torch.nn.Parameter(numbers.normal(V, HIDDEN))
    batches = [(numbers.integers(0, V, 2, 4), numbers.integers(0, V, 2, 4)) for _ in range(2)]
    loss_fn = UnifiedLoss(V, primary_loss_type="standard")
    expected = torch.zeros(V, HIDDEN, dtype=torch.float64)
    for inputs, targets in batches:
        logits = F.linear(F.embedding(inputs, embedding).tanh(), embedding)
        expected += (
            torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), embedding)[0]
            / 16
        )
        states = F.embedding(inputs, embedding).tanh()
        loss_fn(targets=targets, hidden_states=states, lm_head_weight=embedding, num_items_in_batch=16).backward()
    torch.testing.assert_close(embedding.grad, expected, rtol=1e-12, atol=1e-15)


def test_gradients_can_be_stolen():
    # a gradient that something else still refers to would be copied into .grad
    head, targets = make_head(Numbers(13), 6), torch.arange(6)
    written = []
    scale = torch.ops.ava_ext.scale_rows_

    def watch(rows, factors):
        written.append(rows.data_ptr())
        return scale(rows, factors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.ava_ext, "scale_rows_", watch)
        row_loss(head, targets, row_options(head.weight), reduction="sum").loss.backward()
    assert written == [part.grad.data_ptr() for part in head]


MEMORY = """
import torch
from pathlib import Path
from ava_ext import UnifiedLoss

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

states = torch.randn(512, 8).requires_grad_()
weight = torch.randn(50_000, 8).requires_grad_()
targets = torch.randint(0, 50_000, (512,))
loss_fn = UnifiedLoss(50_000, primary_loss_type="standard", linear_chunk_bytes=4 << 20, z_loss_weight=0.1)

def step(n):
    loss_fn(targets=targets[:n], hidden_states=states[:n], lm_head_weight=weight).backward()
    states.grad = weight.grad = None

step(2)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
step(512)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs")
def test_no_more_memory_than_a_chunk():
    result = run_python(MEMORY)
    assert result.returncode == 0, result.stderr
    logits, chunk, grad_weight = 512 * 50_000 * 4, 4 << 20, 50_000 * 8 * 4
    extra = int(result.stdout)
    assert extra < 2 * chunk + 2 * grad_weight < logits / 8


# -- statistics


@given(seeds, st.integers(1, 9), st.booleans(), st.booleans())
def test_statistics_equal_those_of_the_logits(seed, chunk_rows, is_capped, with_bias):
    numbers = Numbers(seed)
    head = make_head(numbers, 2, 4, with_bias=with_bias)
    ids, mask = numbers.integers(-1, V - 1, 2, 4, 2), numbers.true(0.7, 2, 4)
    keywords = {"row_mask": mask, "temperature": 0.7, "logit_softcap": 4.0 if is_capped else None, "vocab_size": V - 1}
    got = softmax_statistics(head, ids, chunk_bytes=chunk_rows * V * 8, **keywords)
    want = softmax_statistics(F.linear(*head), ids, **keywords)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    upstream = [numbers.normal(*value.shape) for value in got]
    gradients = (torch.autograd.grad(values, leaves(head), upstream) for values in (got, want))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


def test_token_log_probs_equal_those_of_the_logits():
    numbers = Numbers(14)
    head = make_head(numbers, 2, 4)
    targets = numbers.integers(0, V, 2, 4).masked_fill(numbers.true(0.3, 2, 4), -100)
    got = token_log_probs(head, targets, temperature=torch.tensor(0.7, dtype=torch.float64), chunk_bytes=300)
    want = token_log_probs(F.linear(*head), targets, temperature=0.7)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    upstream = [numbers.normal(2, 4), numbers.normal(2, 4)]
    gradients = (torch.autograd.grad(values, leaves(head), upstream) for values in (got, want))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_statistics_compile_without_a_graph_break():
    head, targets = make_head(Numbers(15), 2, 4), Numbers(15).integers(0, V, 2, 4)

    def loss(states, weight):
        log_prob, entropy = token_log_probs(LinearLogits(states, weight), targets, chunk_bytes=300)
        return (log_prob.exp() + 0.1 * entropy).sum()

    compiled = torch.compile(loss, fullgraph=True)(*head[:2])
    gradients = (torch.autograd.grad(value, head[:2]) for value in (compiled, loss(*head[:2])))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


# -- bad input


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.zeros(V, 4)}, r"expected (lm_head_)?weight of shape \[vocab_size, 5\] .* got \[13, 4\]"),
        ({"bias": torch.zeros(4)}, r"expected (lm_head_)?bias of shape \[13\], got \[4\]"),
        ({"weight": torch.zeros(V, HIDDEN).bfloat16()}, "expected (lm_head_)?weight of hidden_states' type"),
        ({"weight": torch.zeros(V, HIDDEN, device="meta")}, "expected (lm_head_)?weight on cpu, got meta"),
    ],
)
def test_a_head_that_does_not_fit_is_named(change, message):
    head = LinearLogits(torch.zeros(6, HIDDEN), torch.zeros(V, HIDDEN), torch.zeros(V))._replace(**change)
    targets = torch.arange(6)
    with pytest.raises(ValueError, match=message):
        row_loss(head, targets, row_options(torch.zeros(0)), reduction="sum")
    with pytest.raises(ValueError, match=message):
        token_log_probs(head, targets)
    with pytest.raises(ValueError, match=message):
        UnifiedLoss(V)(
            targets=targets, hidden_states=head.hidden_states, lm_head_weight=head.weight, lm_head_bias=head.bias
        )


def test_bad_rows_are_named():
    head, targets = make_head(Numbers(18), 6), torch.arange(6)
    options = row_options(head.weight)
    with pytest.raises(ValueError, match=r"row_loss: expected targets of shape \[6\], got \[5\]"):
        row_loss(head, targets[:5], options, reduction="sum")
    with pytest.raises(ValueError, match="expected row_weights without requires_grad"):
        row_loss(head, targets, options, row_weights=torch.ones(6).double().requires_grad_(), reduction="sum")
    with pytest.raises(IndexError, match="got 13 at position 5"):
        row_loss(head, torch.tensor([0, 1, 2, 3, 4, 13]), options, reduction="sum")
    with pytest.raises(ValueError, match=r"token_log_probs: expected targets of shape \[6\], got \[5\]"):
        token_log_probs(LinearLogits(*head[:2]), targets[:5])
    with pytest.raises(ValueError, match=r"expected ids of shape \[6, n_ids\], got \[5, 1\]"):
        softmax_statistics(LinearLogits(*head[:2]), targets[:5, None])
    with pytest.raises(ValueError, match=r"expected row_mask of shape \[6\], got \[5\]"):
        softmax_statistics(LinearLogits(*head[:2]), None, row_mask=torch.ones(5, dtype=torch.bool))


@pytest.mark.parametrize("rows", [(5,), (2, 3), ()], ids=str)
def test_what_belongs_to_other_rows_is_named(rows):
    """As many numbers in another shape are no less wrong: each row would get another row's."""
    head, targets = LinearLogits(torch.zeros(*rows, HIDDEN), torch.zeros(V, HIDDEN)), torch.zeros(rows).long()
    options, shape = row_options(head.weight), ", ".join(map(str, rows))
    of_ids, of_weights = (", ".join([*map(str, rows), last]) for last in ("n_candidates", "2"))
    others = [(9,), (3, 2), (6,), (5, 1), (1,)]
    for other in others:
        with pytest.raises(ValueError, match=rf"row_loss: expected row_weights of shape \[{shape}\], got"):
            row_loss(head, targets, options, row_weights=torch.ones(other), reduction="sum")
        candidates = Candidates(torch.zeros(*other, 2).long(), torch.ones(*other, 2), (2,))
        with pytest.raises(ValueError, match=rf"row_loss: expected candidate_ids of shape \[{of_ids}\], got"):
            row_loss(head, targets, options, candidates=candidates)
        candidates = candidates._replace(ids=torch.zeros(*rows, 2).long())
        with pytest.raises(ValueError, match=rf"row_loss: expected candidate_weights of shape \[{of_weights}\], got"):
            row_loss(head, targets, options, candidates=candidates)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_first_chunk_overwrites_the_weight_s_gradient(dtype):
    """Nothing is zeroed before, so nothing of what the memory held may show."""
    grad_logits, states = torch.randn(9, 300, dtype=dtype), torch.randn(9, 16, dtype=dtype)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    grad_weight = torch.full((300, 16), math.nan, dtype=real)
    expected = grad_logits.to(real).t() @ states.to(real)
    for factor, is_first in ((1, True), (2, False), (1, True)):
        linear_rows._add_product(grad_weight, grad_logits, states, is_first)
        torch.testing.assert_close(grad_weight, factor * expected, rtol=1e-5, atol=1e-5)


def test_no_row_that_counts_leaves_a_gradient_of_zeros():
    states, weight = (torch.randn(n, 4, requires_grad=True) for n in (3, 7))
    loss = row_loss(LinearLogits(states, weight), torch.full((3,), -100), row_options(weight), reduction="sum").loss
    for gradient in torch.autograd.grad(loss, (states, weight)):
        assert not gradient.any()


def test_chunks_on_a_gpu():
    """Whole tiles, within the budget; all rows where a chunk and the float32 accumulator take as much."""
    cuda, dtype, vocab_size, hidden_size = torch.device("cuda"), torch.bfloat16, 128_256, 4096
    accumulator = 4 * vocab_size * hidden_size

    def rows(n_rows, budget=None, accumulator=0):
        return rows_of_a_chunk(n_rows, vocab_size, dtype, cuda, budget, accumulator)

    assert rows(8192) == 2816  # 3 chunks, of 11 tiles each
    assert rows(8192, budget=2816 * vocab_size * 2 - 1) == 2560  # of 2731 that would fit
    assert rows(3000) == 3000 and rows(0) == 1  # one chunk is what it is
    assert rows(8192, budget=100 * vocab_size * 2) == 100  # less than a tile
    assert rows(8192, accumulator=accumulator) == 8192
    assert rows(8192, budget=1, accumulator=accumulator) == 8192
    assert rows(65536, accumulator=accumulator) < 4000
    assert rows_of_a_chunk(8192, vocab_size, dtype, torch.device("cpu"), 2731 * vocab_size * 2) == 2731
