"""The oracle against facts that do not come from it: torch.nn.functional, closed forms, examples worked by hand."""

import itertools
import math

import mpmath
import pytest
import torch
import torch.nn.functional as F

from ava_ext import reference
from ava_ext.config import UnifiedLossConfig

F64 = torch.float64
EXACT = {"rtol": 1e-12, "atol": 1e-13}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randn(*shape, scale=1.0):
    return (torch.randn(*shape, dtype=F64) * scale).requires_grad_()


def standard(vocab_size, **options):
    return UnifiedLossConfig(vocab_size=vocab_size, primary_loss_type="standard", **options)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def assert_same(loss, expected, *inputs):
    torch.testing.assert_close(loss, expected, **EXACT)
    for got, want in zip(gradients(loss.sum(), *inputs), gradients(expected.sum(), *inputs), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def sets(weights):
    """[1, T, V] -> per row {id: weight}."""
    return [{c: round(w, 9) for c, w in enumerate(row) if w} for row in weights[0].tolist()]


# -- cross-entropy


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_cross_entropy(reduction, label_smoothing):
    logits = randn(3, 5, 11, scale=3)
    targets = torch.randint(0, 11, (3, 5))
    targets[0, 1] = targets[2, 4] = -100
    loss = reference.unified_loss(standard(11, reduction=reduction, label_smoothing=label_smoothing), logits, targets)[
        "total_loss"
    ]
    expected = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction=reduction, label_smoothing=label_smoothing
    )
    assert_same(loss, expected.reshape(loss.shape), logits)


def test_flat_rows_equal_batched_rows():
    logits, targets = randn(6, 7), torch.randint(0, 7, (6,))
    loss = reference.unified_loss(standard(7, reduction="none"), logits, targets)["total_loss"]
    assert_same(loss, F.cross_entropy(logits, targets, reduction="none"), logits)


def test_temperature_softcap_and_padded_vocabulary():
    logits = randn(4, 9, scale=10)
    with torch.no_grad():
        logits[:, 7:] = torch.nan
    targets = torch.randint(0, 7, (4,))
    loss = reference.unified_loss(standard(7, logit_softcap=5.0), logits, targets, temperature=1.7)["total_loss"]
    narrow = logits[:, :7]
    expected = F.cross_entropy(5 * torch.tanh(narrow / 5) / 1.7, targets)
    (gradient,), (expected_gradient,) = gradients(loss, logits), gradients(expected, narrow)
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(gradient[:, :7], expected_gradient, **EXACT)
    assert (gradient[:, 7:] == 0).all()


def test_token_weights_and_num_items():
    logits, targets = randn(2, 4, 6), torch.tensor([[0, 1, -100, 3], [4, 5, 0, 1]])
    weights = torch.rand(2, 4, dtype=F64)
    weights[0, 2] = torch.nan  # the row does not count
    rows = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none") * weights.nan_to_num().flatten()
    for options, n in (({}, weights.nansum()), ({"num_items_in_batch": 20}, 20.0)):
        loss = reference.unified_loss(standard(6), logits, targets, token_weights=weights, **options)["total_loss"]
        assert_same(loss, rows.sum() / n, logits)
    loss = reference.unified_loss(standard(6, reduction="sum"), logits, targets, token_weights=weights)["total_loss"]
    assert_same(loss, rows.sum(), logits)


def test_exclude_target_is_the_explicit_distribution():
    logits, targets, e = randn(5, 6), torch.randint(0, 6, (5,)), 0.3
    q = torch.full((5, 6), e / 5, dtype=F64).scatter(1, targets[:, None], 1 - e)
    expected = -(q * torch.log_softmax(logits, -1)).sum(-1)
    assert_same(reference.cross_entropy(logits, targets, e, "exclude_target"), expected, logits)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_from_its_definition(gamma):
    logits, targets = randn(5, 6, scale=2), torch.randint(0, 6, (5,))
    log_p = torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)
    assert_same(reference.focal(logits, targets, 0.7, gamma), -0.7 * (1 - log_p.exp()) ** gamma * log_p, logits)


# -- masked columns, ignored rows, non-finite values

EVERY_ROW_TERM = {
    "label_smoothing": 0.1, "z_loss_weight": 0.3, "confidence_penalty_weight": 0.2, "use_focal_loss": True,
    "use_ngram_penalty": True, "ngram_size": 1, "use_immediate_repetition_penalty": True, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("smoothing_mode", ["uniform", "exclude_target"])
def test_masked_columns_are_left_out_of_everything(smoothing_mode):
    logits, targets = randn(2, 6, 8), torch.randint(0, 5, (2, 6))
    wide = torch.cat([logits, torch.full((2, 6, 3), -math.inf, dtype=F64)], -1)
    wide.retain_grad()
    negative_ids = torch.full((2, 6, 1), 9)  # masked, so p = 0
    options = EVERY_ROW_TERM | {"smoothing_mode": smoothing_mode}
    narrow_loss = reference.unified_loss(standard(8, **options), logits, targets)["total_loss"]
    expected = gradients(narrow_loss, logits)[0]
    wide_loss = reference.unified_loss(standard(11, **options), wide, targets, negative_ids=negative_ids)["total_loss"]
    torch.testing.assert_close(wide_loss, narrow_loss, **EXACT)
    wide_loss.backward()
    torch.testing.assert_close(logits.grad, expected, **EXACT)
    assert (wide.grad[..., 8:] == 0).all()


@pytest.mark.parametrize("shift", [-2000.0, 2000.0])
def test_terms_do_not_see_a_shift(shift):
    """Far from 0, where exp of an unshifted logit over- or underflows, with masked columns."""
    logits, targets = randn(1, 6, 8), torch.randint(0, 5, (1, 6))
    masked = torch.where(torch.arange(8) == 6, -math.inf, logits)
    config = standard(7, **EVERY_ROW_TERM | {"z_loss_weight": 0.0})
    expected, moved = (reference.unified_loss(config, x, targets)["total_loss"] for x in (masked, masked + shift))
    torch.testing.assert_close(moved, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(gradients(moved, logits), gradients(expected, logits), rtol=1e-9, atol=1e-12)


def test_target_in_a_masked_column():
    logits = torch.tensor([[1.0, -math.inf, 2.0]], dtype=F64, requires_grad=True)
    for gamma in (0.0, 2.0):
        loss = reference.focal(reference.effective_logits(logits), torch.tensor([1]), 1.0, gamma)
        assert loss.item() == math.inf
        p = 1 / (1 + math.e)
        torch.testing.assert_close(gradients(loss.sum(), logits)[0], torch.tensor([[p, 0, 1 - p]], dtype=F64), **EXACT)


def test_one_column():
    logits = torch.tensor([[3.0, -math.inf]], dtype=F64, requires_grad=True)
    z, target = reference.effective_logits(logits), torch.tensor([0])
    for term in (
        reference.cross_entropy(z, target, 0.1, "exclude_target"),
        reference.focal(z, target, 1.0, 2.0),
        reference.confidence_penalty(z),
    ):
        assert term.item() == 0
        assert (gradients(term.sum(), logits)[0] == 0).all()
    assert math.isfinite(reference.unlikelihood(z, torch.ones(1, 2)).item())


def test_no_row_counts():
    logits = torch.full((2, 3, 7), math.nan, dtype=F64, requires_grad=True)
    pair = randn(4, 3), randn(4, 3)
    result = reference.unified_loss(
        standard(7, use_contrastive_loss=True, **EVERY_ROW_TERM),
        logits,
        torch.full((2, 3), -100),
        contrastive_pair=pair,
    )
    assert result["total_loss"].item() == 0
    for gradient in gradients(result["total_loss"], logits, *pair):
        assert (gradient == 0).all()
    assert (result["cross_entropy"], result["perplexity"], result["n_tokens"], result["accuracy"]) == (0, 1, 0, 0)


def test_ignored_rows_are_not_looked_at_and_nan_is_not_hidden():
    logits, targets = randn(1, 4, 7), torch.tensor([[3, 1, 1, 0]])
    config = standard(7, pad_token_id=0, **EVERY_ROW_TERM)
    expected = gradients(reference.unified_loss(config, logits[:, :3], targets[:, :3])["total_loss"], logits)[0]
    broken = torch.where(torch.arange(4)[:, None] == 3, math.nan, logits)
    assert_same(
        reference.unified_loss(config, broken, targets)["total_loss"],
        reference.unified_loss(config, logits[:, :3], targets[:, :3])["total_loss"],
        logits,
    )
    assert (expected[:, 3] == 0).all()
    for bad in (math.nan, math.inf):
        spoiled = torch.where(torch.arange(7) == 5, bad, logits)
        assert reference.unified_loss(standard(7), spoiled, targets)["total_loss"].isnan()


def test_target_out_of_range_names_row_and_value():
    with pytest.raises(IndexError, match="got 7 in row 4"):
        reference.unified_loss(standard(7), randn(2, 3, 7), torch.tensor([[0, 1, -100], [2, 7, 1]]))


# -- closed forms and accuracy


def test_uniform_logits():
    z = torch.full((1, 16), 0.7, dtype=F64)
    assert reference.confidence_penalty(z).item() == pytest.approx(0, abs=1e-15)
    assert reference.z_loss(z).item() == pytest.approx((0.7 + math.log(16)) ** 2, rel=1e-14)
    assert reference.unlikelihood(z, 2 * F.one_hot(torch.tensor([3]), 16)).item() == pytest.approx(
        2 * math.log(16 / 15)
    )
    statistics = reference.softmax_statistics(z, torch.tensor([[3, -1]]))
    torch.testing.assert_close(statistics.log_probs, torch.tensor([[-math.log(16), 0]], dtype=F64), **EXACT)
    torch.testing.assert_close(statistics.log_rest, torch.tensor([math.log(15)], dtype=F64), **EXACT)
    torch.testing.assert_close(statistics.mean_log_prob, torch.tensor([-math.log(16)], dtype=F64), **EXACT)


def test_statistics_from_log_softmax():
    logits, ids = randn(3, 4, 9, scale=2), torch.randint(0, 9, (3, 4, 2))
    statistics = reference.softmax_statistics(logits, ids)
    log_p = torch.log_softmax(logits, -1)
    assert_same(statistics.log_probs, log_p.gather(-1, ids), logits)
    assert_same(statistics.entropy, -(log_p.exp() * log_p).sum(-1), logits)
    assert_same(statistics.lse, logits.logsumexp(-1), logits)
    assert_same(statistics.mean_log_prob, log_p.mean(-1), logits)
    ordered = logits.sort(-1, descending=True).values
    assert_same(statistics.log_rest, ordered[..., 1:].logsumexp(-1) - ordered[..., 0], logits)


@pytest.mark.parametrize("gap", [0.5, 16, 37, 80, 300])
def test_peaked_row_against_many_digits(gap):
    """Unlikelihood of the sure token and of another one, entropy and cross-entropy, to 12 digits at every gap."""
    values = [0.0, -float(gap), -float(gap) - 1.5]
    logits = torch.tensor([values], dtype=F64, requires_grad=True)
    with mpmath.workdps(400):
        exponentials = [mpmath.e ** mpmath.mpf(v) for v in values]
        p = [x / sum(exponentials) for x in exponentials]
        odds = [p[c] / (1 - p[c]) for c in range(3)]
        for c in range(3):
            loss = reference.unlikelihood(logits, F.one_hot(torch.tensor([c]), 3))
            assert loss.item() == pytest.approx(float(-mpmath.log(1 - p[c])), rel=1e-12, abs=0)
            # d(-log(1 - p_c)) / dz_j = r_c (1(j = c) - p_j), r_c = p_c / (1 - p_c)
            expected = [float(p[c] if j == c else -odds[c] * p[j]) for j in range(3)]
            got = gradients(loss.sum(), logits)[0][0].tolist()
            assert got == pytest.approx(expected, rel=1e-11, abs=0)
            nll = reference.negative_log_likelihood(logits, torch.tensor([c]))
            assert nll.item() == pytest.approx(float(-mpmath.log(p[c])), rel=1e-12, abs=0)
        statistics = reference.softmax_statistics(logits, torch.tensor([[0]]))
        assert statistics.entropy.item() == pytest.approx(float(-sum(x * mpmath.log(x) for x in p)), rel=1e-12, abs=0)
        assert statistics.log_rest.item() == pytest.approx(float(mpmath.log((1 - p[0]) / p[0])), rel=1e-12, abs=0)


def test_gradient_sums_to_that_of_the_z_loss():
    logits, targets = randn(2, 9, 8, scale=3), torch.randint(0, 8, (2, 9))
    logits = torch.where(torch.rand(2, 9, 8) < 0.2, -math.inf, logits.detach()).scatter(-1, targets[..., None], 0.5)
    logits.requires_grad_()
    negative_ids = torch.randint(-1, 8, (2, 9, 3))
    config = standard(8, reduction="sum", **EVERY_ROW_TERM)
    loss = reference.unified_loss(config, logits, targets, negative_ids=negative_ids)["total_loss"]
    sums = gradients(loss, logits)[0].sum(-1)
    torch.testing.assert_close(sums, (2 * 0.3 * logits.logsumexp(-1)).detach(), **EXACT)


def test_gradcheck_of_every_component():
    n_experts, hidden, vocab = 3, 4, 7
    config = UnifiedLossConfig(
        vocab_size=vocab, hidden_size=hidden, use_mtp=True, num_future_tokens=2, num_experts=n_experts,
        use_moe_balancing=True, use_auxiliary_loss=True, use_diversity_loss=True, use_contrastive_loss=True,
        logit_softcap=4.0, **EVERY_ROW_TERM,
    )  # fmt: skip
    targets, load = torch.randint(0, vocab, (2, 4)), torch.tensor([[0.5, 0.3, 0.2]])

    def total(logits, first, second, states, gates, outputs):
        return reference.unified_loss(
            config, logits, targets, hidden_states=states, gate_logits=gates, expert_outputs=outputs,
            expert_indices=torch.arange(8)[:, None] % n_experts, expert_load=load, mtp_logits=[first, second],
        )["total_loss"]  # fmt: skip

    rows = [randn(2, 4, vocab) for _ in range(3)]
    inputs = (*rows, randn(2, 4, hidden), randn(8, n_experts), randn(n_experts, 8, hidden))
    torch.autograd.gradcheck(total, inputs, fast_mode=True)


# -- candidates, worked by hand


def candidates(weights_of, targets, config, segments=None, **inputs):
    targets = torch.tensor([targets])
    segments = torch.zeros_like(targets) if segments is None else torch.tensor([segments])
    inputs = {name: torch.tensor([value]) for name, value in inputs.items()}
    counted = reference.counted_rows(config, targets, inputs.get("attention_mask"))
    return sets(weights_of(config, targets, counted, segments, **inputs))


def ngrams(targets, segments=None, *, n=2, **options):
    inputs = {name: options.pop(name) for name in ("input_ids", "attention_mask") if name in options}
    config = standard(20, use_ngram_penalty=True, ngram_size=n, ngram_penalty_weight=1.0, **options)
    return [set(row) for row in candidates(reference.ngram_weights, targets, config, segments, **inputs)]


def test_ngram_followers():
    # row 5: the context ends in 1 2, which 3 followed; row 8: 3 and 4 did
    assert ngrams([1, 2, 3, 1, 2, 4, 1, 2, 5], n=3) == [set()] * 5 + [{3}, set(), set(), {3, 4}]
    # constant text: the repeat is banned only where it is not the target
    assert ngrams([7, 7, 7, 8], n=3) == [set(), set(), set(), {7}]
    assert ngrams([1, 2, 3], n=1) == [set(), {1}, {1, 2}]


def test_ngram_never_candidates_come_before_the_cut():
    # contexts of the last row: 1 followed by 2, 3, 4, 5 (latest), then 1
    text = [1, 2, 1, 3, 1, 4, 1, 5, 1, 9]
    assert ngrams(text)[-1] == {2, 3, 4, 5}
    assert ngrams(text, ngram_slots=2)[-1] == {4, 5}
    assert ngrams([*text[:-1], 5], ngram_slots=2)[-1] == {3, 4}
    assert ngrams(text, ngram_slots=2, pad_token_id=5)[-1] == {3, 4}
    assert ngrams(text, ngram_slots=2, pad_token_id=5, eos_token_id=5)[-1] == {4, 5}
    assert ngrams(text, ngram_slots=2, repetition_allow_list=(4,))[-1] == {3, 5}
    assert ngrams([1, 2, 1, 3, 1, 2, 1, 9], ngram_slots=1)[-1] == {2}  # most recent, not first


def test_ngram_window_counts_followers():
    text = [1, 2, 1, 3, 1, 4, 1, 9]  # followers of 1 at 1, 3, 5 of a context of 7 tokens
    assert [ngrams(text, ngram_window_size=w)[-1] for w in (1, 2, 3, 4, 5, 6)] == [
        set(),
        {4},
        {4},
        {3, 4},
        {3, 4},
        {2, 3, 4},
    ]


def test_ngram_voids_segments_and_ids_outside_the_vocabulary():
    assert ngrams([1, 2, 1, -100, 1, 9])[-1] == {2}  # the ignored position follows nothing
    assert ngrams([1, -100, 2, 1, -100, 9], n=3)[-1] == set()  # and matches nothing as a key
    assert ngrams([1, 2, 1, 9], [0, 1, 1, 1])[-1] == set()
    assert ngrams([1, 2, 1, 2, 1, 9], [0, 0, 1, 1, 1, 1])[-1] == {2}
    assert ngrams([1, 2, 3, 1, 9], attention_mask=[1, 0, 1, 1, 1])[-1] == set()
    # 99 is a key, and never a candidate; the context of row t reaches input_ids[t]
    assert ngrams([5, 6, 7, 8], input_ids=[99, 3, 99, 99]) == [set(), set(), {3}, {3}]


def immediate(targets, segments=None, **options):
    inputs = {name: options.pop(name) for name in ("input_ids", "attention_mask") if name in options}
    config = standard(20, use_immediate_repetition_penalty=True, immediate_repetition_weight=0.5, **options)
    return candidates(reference.immediate_repetition_weights, targets, config, segments, **inputs)


def test_immediate_repetition():
    assert immediate([4, 4, 5, 6]) == [{}, {}, {4: 0.5}, {5: 0.5}]
    growing = immediate([4, 4, 4, 4, 4, 9], immediate_repetition_growth=2.0)
    assert growing == [{}] * 5 + [{4: 2.0}]  # 0.5 * min(2^4, 4)
    assert immediate([4, 4, 5], immediate_repetition_growth=3.0)[-1] == {4: 1.5}
    assert immediate([4, 5, 5, 6], immediate_repetition_threshold=2) == [{}, {}, {}, {5: 0.5}]
    assert immediate([4, 5, 6], [0, 1, 1]) == [{}, {}, {5: 0.5}]
    assert immediate([4, -100, 6]) == [{}, {}, {}]
    assert immediate([4, -100, 4, 6], immediate_repetition_growth=2.0)[-1] == {4: 0.5}  # the run ends at the void
    assert immediate([4, 5, 6], repetition_allow_list=(4,), pad_token_id=5) == [{}, {}, {}]
    assert immediate([4, 5, 6], input_ids=[7, 4, 99]) == [{7: 0.5}, {4: 0.5}, {}]


def early_eos(targets, segments=None, minimum=2, **options):
    inputs = {name: options.pop(name) for name in ("attention_mask",) if name in options}
    config = standard(20, min_sequence_length=minimum, eos_penalty_weight=0.5, **options)
    targets = torch.tensor([targets])
    segments = torch.zeros_like(targets) if segments is None else torch.tensor([segments])
    counted = reference.counted_rows(config, targets, *(torch.tensor([x]) for x in inputs.values()))
    return [set(row) for row in sets(reference.early_eos_weights(config, targets, counted, segments))]


def test_early_eos():
    assert early_eos([1, 2, 3, 4], eos_token_id=9) == [{9}, {9}, set(), set()]
    assert early_eos([1, 9, 3, 4], eos_token_id=(8, 9), minimum=3) == [{8, 9}, set(), {8, 9}, set()]
    # left padding, prompt masking and pad targets do not shift it
    assert early_eos([-100, 0, 1, 2, 3], eos_token_id=9, pad_token_id=0) == [set(), set(), {9}, {9}, set()]
    assert early_eos([5, 1, 2, 3], eos_token_id=9, attention_mask=[0, 1, 1, 1]) == [set(), {9}, {9}, set()]
    assert early_eos([1, 2, 3, 1], [0, 0, 0, 1], eos_token_id=9) == [{9}, {9}, set(), {9}]


def test_given_negatives():
    config = standard(20)
    targets, ids = torch.tensor([[1, 2, -100]]), torch.tensor([[[3, 3, -1], [2, 4, -100], [5, 5, 5]]])
    weights = torch.tensor([[[0.5, 1.0, 9.0], [1.0, 2.0, 1.0], [1.0, 1.0, 1.0]]])
    counted = reference.counted_rows(config, targets)
    assert sets(reference.negative_weights_dense(config, targets, counted, ids)) == [{3: 2.0}, {4: 1.0}, {}]
    assert sets(reference.negative_weights_dense(config, targets, counted, ids, weights)) == [{3: 1.5}, {4: 2.0}, {}]


def test_penalties_are_unlikelihood_of_their_candidates():
    logits, targets = randn(1, 3, 6), torch.tensor([[4, 3, 5]])
    config = standard(6, use_immediate_repetition_penalty=True, immediate_repetition_weight=0.5)
    result = reference.unified_loss(config, logits, targets)
    p = logits.softmax(-1)
    expected = -0.5 * (torch.log(1 - p[0, 1, 4]) + torch.log(1 - p[0, 2, 3])) / 3
    torch.testing.assert_close(result["immediate_repetition_penalty"], expected.detach(), **EXACT)
    assert_same(result["total_loss"], F.cross_entropy(logits[0], targets[0]) + expected, logits)


# -- masks, segments, shift


def test_counted_rows():
    targets, mask = torch.tensor([[5, -100, 0, 7]]), torch.tensor([[1, 1, 1, 0]])
    assert reference.counted_rows(standard(9, pad_token_id=0), targets, mask).tolist() == [[True, False, False, False]]
    both = standard(9, pad_token_id=0, eos_token_id=(3, 0))
    assert reference.counted_rows(both, targets, mask).tolist() == [[True, False, True, False]]


def test_segments():
    def numbers(n_batch=1, **given):
        return reference.segment_numbers(n_batch, 5, **given).tolist()

    assert numbers(2) == [[0] * 5] * 2
    assert numbers(2, segment_ids=torch.tensor([[3, 3, 1, 1, 3]])) == [[0, 0, 1, 1, 2]] * 2
    assert numbers(position_ids=torch.tensor([[0, 1, 0, 0, 1]])) == [[0, 0, 1, 2, 2]]
    assert numbers(2, cu_seqlens=torch.tensor([0, 2, 5, 9])) == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]


def test_flat_rows_are_one_packed_sequence():
    logits, targets = randn(6, 8), torch.tensor([1, 1, 2, 2, 1, 3])
    config = standard(8, use_immediate_repetition_penalty=True, reduction="none")
    with pytest.raises(ValueError, match="use_immediate_repetition_penalty needs sequences"):
        reference.unified_loss(config, logits, targets)
    flat = reference.unified_loss(config, logits, targets, cu_seqlens=torch.tensor([0, 4, 6]))
    parts = [reference.unified_loss(config, logits[None, s], targets[None, s]) for s in (slice(0, 4), slice(4, 6))]
    assert_same(flat["total_loss"], torch.cat([part["total_loss"][0] for part in parts]), logits)


def test_unshifted_labels_by_hand():
    logits, labels = randn(1, 5, 8), torch.tensor([[1, 1, 2, 3, 3]])
    segments = torch.tensor([[0, 0, 0, 1, 1]])
    config = standard(
        8, labels_are_shifted=False, use_immediate_repetition_penalty=True, immediate_repetition_weight=1.0
    )
    loss = reference.unified_loss(config, logits, labels, segment_ids=segments)["total_loss"]
    log_p = logits.log_softmax(-1)[0]
    # row 0 predicts 1, row 1 predicts 2 after having seen the label 1; row 2 would predict the next document; row 3
    # predicts 3
    penalty = -torch.log1p(-log_p[1, 1].exp())
    assert_same(loss, (-log_p[0, 1] - log_p[1, 2] + penalty - log_p[3, 3]) / 3, logits)
    mask = torch.tensor([[1, 1, 0, 1, 1]])  # shifts with the labels: row 1 predicts position 2
    masked = reference.unified_loss(config, logits, labels, mask, segment_ids=segments)["total_loss"]
    assert_same(masked, (-log_p[0, 1] - log_p[3, 3]) / 2, logits)


# -- multi-token prediction


def test_mtp_deepseek():
    logits, heads = randn(1, 4, 6), [randn(1, 4, 6), randn(1, 4, 6)]
    targets, weights = torch.tensor([[-100, 2, 3, 4]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=F64)
    config = standard(6, hidden_size=1, use_mtp=True, num_future_tokens=2, mtp_weight=0.5)
    result = reference.unified_loss(config, logits, targets, token_weights=weights, mtp_logits=heads)
    main, first, second = (x.log_softmax(-1)[0] for x in (logits, *heads))
    n = 9
    main_loss = -(2 * main[1, 2] + 3 * main[2, 3] + 4 * main[3, 4]) / n
    depth_1 = -(2 * first[0, 2] + 3 * first[1, 3] + 4 * first[2, 4]) / n
    depth_2 = -(3 * second[0, 3] + 4 * second[1, 4]) / n
    assert_same(result["total_loss"], main_loss + 0.5 * (depth_1 + depth_2) / 2, logits, *heads)
    torch.testing.assert_close(result["mtp_loss_depth_2"], -(second[0, 3] + second[1, 4]).detach() / 2, **EXACT)
    packed = reference.unified_loss(config, logits, targets, mtp_logits=heads, segment_ids=torch.tensor([[0, 0, 0, 1]]))
    expected = -0.5 * (first[0, 2] + first[1, 3] + second[0, 3]) / 2 / 3
    torch.testing.assert_close(packed["mtp_loss"], expected.detach(), **EXACT)


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 3), (2, 3, 1)])
def test_mtp_adaptive(shape):
    logits, heads = randn(2, 3, 6), randn(1, 2, 3, 6)
    targets = torch.tensor([[1, 2, 3], [4, 5, -100]])
    confidence = torch.rand(shape, dtype=F64, requires_grad=True)
    config = UnifiedLossConfig(
        vocab_size=6, primary_loss_type="adaptive_mtp", num_future_tokens=1, mtp_weight=0.5, confidence_reg_strength=0.2
    )
    inputs = {"additional_logits": heads, "confidence_scores": confidence}
    result = reference.unified_loss(config, None, targets, primary_logits=logits, **inputs)
    per_row = confidence.reshape(2, -1).expand(2, 3)
    log_p = heads.log_softmax(-1)[0]
    hits = [(0, 0, 2), (0, 1, 3), (1, 0, 5)]
    main = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    mtp = -0.5 * sum(per_row[b, t].detach() * log_p[b, t, y] for b, t, y in hits) / 5
    bce = -sum(
        log_p[b, t, y].exp().detach() * per_row[b, t].log()
        + (1 - log_p[b, t, y].exp().detach()) * (1 - per_row[b, t]).log()
        for b, t, y in hits
    )
    assert_same(result["total_loss"], main + mtp + 0.2 * bce / 5, logits, heads, confidence)
    off = reference.unified_loss(config, None, targets, primary_logits=logits, mtp_active=False)
    assert off["total_loss"].item() == pytest.approx(main.item())
    assert off.keys() == result.keys()


# -- mixture of experts, diversity, contrastive, temperature


def test_load_balancing_at_balance_is_alpha():
    gate_logits = torch.zeros(8, 4, dtype=F64)
    indices = torch.tensor([[0, 1], [2, 3]] * 4)
    loss = {}
    for convention in ("switch", "huggingface"):
        config = standard(
            5, use_auxiliary_loss=True, load_balancing_weight=0.25, router_z_weight=0.5,
            load_balancing_convention=convention, num_experts=4, num_experts_per_token=2,
        )  # fmt: skip
        targets = torch.randint(0, 5, (2, 4))
        loss[convention] = reference.unified_loss(
            config, randn(2, 4, 5), targets, gate_logits=gate_logits, expert_indices=indices
        )
    assert loss["switch"]["aux_load_balancing"].item() == pytest.approx(0.25)
    assert loss["huggingface"]["aux_load_balancing"].item() == pytest.approx(0.5)
    assert loss["switch"]["aux_router_z"].item() == pytest.approx(0.5 * math.log(4) ** 2)
    assert loss["switch"]["moe_cv"].item() == loss["switch"]["moe_max_violation"].item() == 0


def transformers_load_balancing(gates, k, mask):
    """transformers' load_balancing_loss_func with attention mask, written out for gates [layers, N, E] and mask [N]."""
    probabilities = torch.cat(list(gates)).softmax(-1)
    mask = mask.repeat(len(gates)).to(probabilities.dtype)
    expert_mask = F.one_hot(probabilities.topk(k, -1).indices, gates.shape[-1])
    tokens = (expert_mask * mask[:, None, None]).sum(0) / mask.sum()
    router = (probabilities * mask[:, None]).sum(0) / mask.sum()
    return (tokens * router).sum() * gates.shape[-1]


def test_huggingface_convention():
    gates, targets = randn(2, 8, 4, scale=2), torch.randint(1, 5, (2, 4))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    config = standard(
        5, use_auxiliary_loss=True, load_balancing_weight=1.0, router_z_weight=0.0,
        load_balancing_convention="huggingface", num_experts=4, num_experts_per_token=2, num_moe_layers=2,
    )  # fmt: skip
    result = reference.unified_loss(config, randn(2, 4, 5), targets, mask, gate_logits=gates)
    expected = transformers_load_balancing(gates, 2, mask.flatten())
    torch.testing.assert_close(result["aux_load_balancing"], expected.detach(), **EXACT)
    torch.testing.assert_close(gradients(result["total_loss"], gates)[0], gradients(expected, gates)[0], **EXACT)


def test_moe_steering_and_state():
    gates = torch.tensor([[2.0, 0.0], [1.0, 0.0], [9.0, 0.0]], dtype=F64, requires_grad=True)
    config = standard(5, num_experts=2, num_experts_per_token=1, use_moe_balancing=True, gradient_balance_weight=0.5)
    inputs = {"gate_logits": gates, "attention_mask": torch.tensor([[1, 1, 0]])}
    result = reference.unified_loss(
        config, randn(1, 3, 5), torch.tensor([[0, 1, 2]]), expert_load=torch.tensor([[0.8, 0.2]], dtype=F64), **inputs
    )
    mean_first = (torch.sigmoid(torch.tensor([2.0, 1.0], dtype=F64))).mean()
    expected = 0.5 * 2 * (0.3 * mean_first - 0.3 * (1 - mean_first))
    torch.testing.assert_close(result["moe_balancing_term"], expected, **EXACT)
    assert (gradients(result["total_loss"], gates)[0][:2, 0] > 0).all()  # descent lowers the overloaded expert
    assert result["moe_cv"].item() == result["moe_max_violation"].item() == 1  # counts 2, 0
    counts = torch.tensor([2.0, 0.0])
    torch.testing.assert_close(
        reference.updated_expert_load(torch.tensor([0.5, 0.5]), counts, 0.9), torch.tensor([0.55, 0.45])
    )
    load = torch.tensor([0.7, 0.3])
    assert reference.updated_expert_load(load, 0 * counts, 0.9) is load
    assert reference.updated_expert_bias(torch.zeros(3), torch.tensor([3.0, 2.0, 1.0]), 0.5).tolist() == [-0.5, 0, 0.5]


def test_own_top_k_uses_the_bias_and_sigmoid_scores_sum_to_one():
    config = standard(5, num_experts=3, num_experts_per_token=1, router_score="sigmoid", use_moe_balancing=True)
    gates, keep = torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.0, 0.0]], dtype=F64), torch.ones(2, dtype=torch.bool)
    assert reference.router_statistics(config, gates, keep).counts.tolist() == [2, 0, 0]  # ties: lowest
    bias = torch.tensor([0.0, 0.2, 0.0])
    assert reference.router_statistics(config, gates, keep, None, bias).counts.tolist() == [0, 2, 0]
    torch.testing.assert_close(reference.router_probabilities(gates, "sigmoid").sum(-1), torch.ones(2, dtype=F64))


def test_diversity_identity():
    outputs = randn(4, 5, 3)
    units = outputs / outputs.norm(dim=-1, keepdim=True)
    expected = ((units.sum(0).square().sum(-1) - units.square().sum(-1).sum(0)) / 12).mean()
    keep = torch.ones(5, dtype=torch.bool)
    assert_same(reference.diversity(outputs, keep), expected, outputs)
    assert reference.diversity(outputs[:1], keep).item() == 0
    assert reference.diversity(torch.ones(3, 5, 2, dtype=F64), keep).item() == pytest.approx(1)


def test_contrastive():
    identity = torch.eye(3, dtype=F64)
    assert reference.info_nce(identity, 2 * identity, 0.5).item() == pytest.approx(math.log(1 + 2 * math.exp(-2)))
    # cosines 1 (hinge 0.5), 0.6 (0.1), 0 (0); the last token is padding, the first of its own segment
    tokens = torch.tensor([[[1.0, 0], [1, 0], [2, 0], [0.6, 0.8], [5, 0]]], dtype=F64)
    keep, segments = torch.tensor([[True] * 4 + [False]]), torch.tensor([[0, 1, 1, 1, 1]])
    assert reference.simctg(tokens, keep, segments).item() == pytest.approx((0.5 + 0.1 + 0.1) / 3)


def test_adaptive_temperature():
    config = UnifiedLossConfig(vocab_size=5, initial_temperature=1.2)
    assert reference.adaptive_temperature(config, [1.0, 3.0] * 4 + [9.0]) == 1.2
    assert reference.adaptive_temperature(config, [7.0] * 300) == pytest.approx(1.2 * (1 - 0.075))
    assert reference.adaptive_temperature(config, [50.0] * 20 + [1.0, 3.0] * 50) == pytest.approx(
        1.2 * (1 + 0.5 - 0.075)
    )
    assert reference.adaptive_temperature(config, [0.0] * 99 + [1.0]) == 2.0


# -- the whole


def test_addends_add_up_and_keys_follow_the_configuration():
    config = standard(8, use_contrastive_loss=True, **EVERY_ROW_TERM)
    logits, targets, states = randn(2, 6, 8), torch.randint(0, 8, (2, 6)), randn(2, 6, 3)
    result = reference.unified_loss(config, logits, targets, hidden_states=states)
    addends = [name for name in result if name != "total_loss" and name not in reference.METRICS]
    assert addends == [
        "main_loss", "z_loss", "confidence_penalty", "ngram_penalty", "immediate_repetition_penalty", "eos_penalty",
        "negative_penalty", "distillation_loss", "contrastive_loss",
    ]  # fmt: skip
    torch.testing.assert_close(sum(result[name] for name in addends), result["total_loss"].detach(), **EXACT)
    assert [name for name in result if result[name].requires_grad] == ["total_loss"]
    torch.testing.assert_close(
        result["cross_entropy"], F.cross_entropy(logits.flatten(0, 1), targets.flatten()).detach()
    )
    assert result["accuracy"].item() == (logits.argmax(-1) == targets).double().mean().item()
    given = reference.unified_loss(
        config, logits, targets, hidden_states=states, negative_ids=torch.ones(2, 6, 1).long()
    )
    assert given.keys() == result.keys()
    assert given["negative_penalty"] > 0


def test_micro_batches_add_up_to_the_batch():
    config = standard(8, use_contrastive_loss=True, **EVERY_ROW_TERM)
    logits, targets = randn(4, 5, 8), torch.randint(0, 8, (4, 5))
    targets[0, :3] = -100
    pair = randn(3, 4), randn(3, 4)
    whole = reference.unified_loss(config, logits, targets, contrastive_pair=pair)["total_loss"]
    n = int((targets != -100).sum())
    parts = [
        reference.unified_loss(config, logits[s], targets[s], contrastive_pair=pair, num_items_in_batch=n)["total_loss"]
        for s in (slice(0, 1), slice(1, 4))
    ]
    assert_same(sum(parts), whole, logits, *pair)


def test_missing_inputs_are_named():
    logits, targets = randn(1, 3, 5), torch.tensor([[0, 1, 2]])
    for options, argument in (
        ({"use_contrastive_loss": True}, "contrastive_pair or hidden_states"),
        ({"use_auxiliary_loss": True}, "gate_logits"),
        ({"use_diversity_loss": True}, "expert_outputs"),
        ({"use_mtp": True, "mtp_type": "adaptive"}, "additional_logits"),
    ):
        with pytest.raises(ValueError, match=f"needs {argument}, got None"):
            reference.unified_loss(standard(5, **options), logits, targets, mtp_active=True)


def test_fused_linear_arguments_and_empty_batches():
    states, weight, bias = randn(2, 3, 4), randn(6, 4), randn(6)
    targets = torch.randint(0, 6, (2, 3))
    inputs = {"hidden_states": states, "lm_head_weight": weight, "lm_head_bias": bias}
    loss = reference.unified_loss(standard(6), None, targets, **inputs)["total_loss"]
    expected = F.cross_entropy(F.linear(states, weight, bias).flatten(0, 1), targets.flatten())
    assert_same(loss, expected, states, weight, bias)
    for shape in itertools.product((0, 1), (0, 3)):
        empty = torch.zeros(*shape, 6, dtype=F64)
        result = reference.unified_loss(standard(6, **EVERY_ROW_TERM), empty, torch.full(shape, -100))
        assert result["total_loss"].item() == 0
