"""What the benchmarks claim to compare is the same loss, and their ratios are those of paired rounds."""

import linear
import pytest
import recipes
import router
import row_loss
import targets
import torch
import torch.nn.functional as F
import vocabulary_parallel

from ava_ext.bench import timing


@pytest.fixture(scope="module")
def case():
    return row_loss.Case(256, 509, torch.float64)


def loss_and_gradient(case, name):
    case.refill()
    loss, gradient = row_loss.make_variants(case)[name].call()
    return loss.detach().clone(), gradient.clone()


@pytest.mark.parametrize("name", ["ours", "ours_inplace", "ours_kernel"])
def test_plain_variants_equal_cross_entropy(case, name):
    loss, gradient = loss_and_gradient(case, name)
    leaf = case.source.clone().requires_grad_()
    expected = F.cross_entropy(leaf, case.targets)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0], rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("prefix", ["terms", "softcap"])
@pytest.mark.parametrize("ours", ["ours", "ours_inplace"])
def test_composition_equals_unified_loss(case, prefix, ours):
    expected_loss, expected_gradient = loss_and_gradient(case, f"{prefix}_eager")
    loss, gradient = loss_and_gradient(case, f"{prefix}_{ours}")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-15)


def test_form_for_the_compiler_equals_the_eager_one(case, monkeypatch):
    expected = loss_and_gradient(case, "softcap_eager")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for actual, wanted in zip(loss_and_gradient(case, "softcap_eager"), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-15)


def test_every_term_weighs_in_the_comparison(case):
    _, with_all = loss_and_gradient(case, "terms_eager")
    weights = case.candidates()[1]
    assert weights.shape == (256, 32)
    assert (weights > 0).double().mean() > 0.8  # slots are filled
    for term, off in {name: 0.0 for name in row_loss.DENSE_TERMS}.items():
        options = {**row_loss.DENSE_TERMS, term: off, "logit_softcap": None}
        case.refill()
        loss = row_loss.composed_loss(case.logits, case.targets, *case.candidates(), **options)
        without = torch.autograd.grad(loss, case.logits)[0]
        assert (without - with_all).norm() > 1e-6 * with_all.norm(), term


def test_refill_hides_what_an_inplace_gradient_wrote(case):
    loss_and_gradient(case, "ours_inplace")
    assert not torch.equal(case.buffer, case.source)
    case.refill()
    assert torch.equal(case.logits, case.source)
    assert not case.logits.is_leaf and case.logits.requires_grad
    assert case.logits.data_ptr() == case.buffer.data_ptr()


@pytest.mark.parametrize("name", ["compiled", "ours"])
def test_router_variants_are_one_loss(name):
    variants = router.router_variants(router.RouterCase(200, 16, 2, torch.float64))
    expected_loss, expected_gradient = variants["eager"].call()
    loss, gradient = variants[name].call()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-15)


def test_forward_of_the_router_measures_what_it_says():
    case = router.RouterCase(200, 16, 2, torch.float64)
    variants = router.router_variants(case)
    p, z = case.logits.softmax(-1), case.logits.logsumexp(-1).square().mean()
    share = F.one_hot(case.expert_indices, 16).double().mean((0, 1))
    expected = 16 * (share * p.mean(0)).sum() + z
    torch.testing.assert_close(variants["ours_forward"].call(), expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(variants["read"].call(), case.logits.detach().sum(), rtol=1e-12, atol=0)


def test_diversity_variants_are_one_loss():
    variants = router.diversity_variants(router.ExpertsCase(4, 10, 8, torch.float64))
    (expected_loss, expected_gradient), (loss, gradient) = (variants[name].call() for name in ("pairwise", "ours"))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-15)


def test_ratio_is_the_median_of_paired_rounds():
    times = timing.Times({"ours": [1.0, 10.0, 2.0, 1.0], "eager": [3.0, 50.0, 8.0, None]})
    assert times.ratio("eager", "ours") == 4.0  # of 3, 5 and 4; the ratio of the medians would be 8 / 1.5
    assert times.median("ours") == 1.5
    assert times.quartiles("ours") == (1.0, 4.0)
    assert timing.Times({"slow": [7.0, None]}).quartiles("slow") == (7.0, 7.0)
    with pytest.raises(ValueError, match="same rounds"):
        timing.Times({"a": [1.0, None], "b": [None, 1.0]}).ratio("a", "b")


def test_interleave_runs_every_variant_once_a_round():
    seen, prepared = [], []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = timing.interleave(calls, rounds=4, before=lambda: prepared.append(1), every={"c": 3}, warm_ups=1)
    # warm-up; then abc, bca backwards without c, cab without c, abc backwards
    assert "".join(seen) == "abcabcababcba"
    assert len(prepared) == len(seen)
    assert [value is None for value in times.milliseconds["c"]] == [False, True, True, False]


def test_verdicts_compare_in_their_direction():
    assert targets.Verdict("", 10.0, ">=", 9.0).is_met and not targets.Verdict("", 8.0, ">=", 9.0).is_met
    assert targets.Verdict("", 1.0, "<=", 1.3).is_met and not targets.Verdict("", 1.4, "<=", 1.3).is_met


@pytest.mark.parametrize("make", [linear.make_variants, linear.make_mtp_variants])
def test_linear_variants_give_the_same_loss_and_gradients(make):
    variants = make(linear.Case(40, 8, 70, torch.float64))
    ours = variants.pop("mtp_ours" if "mtp_ours" in variants else "ours").call()
    for name, variant in variants.items():
        if name not in ("products", "ours", "ours_half", "ours_terms"):  # which are another computation
            torch.testing.assert_close(variant.call(), ours, rtol=1e-9, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")
    if "products" in variants:
        assert [tuple(gradient.shape) for gradient in variants["products"].call()] == [(40, 8), (70, 8)]


def test_variants_of_the_recipes_give_the_same_loss_and_gradients():
    case = recipes.Case(4, 6, 8, 40)
    ours = recipes.step(case, "ours")
    for name in recipes.VARIANTS:
        torch.testing.assert_close(recipes.step(case, name), ours, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_vocabulary_parallel_is_the_loss_of_the_whole_logits():
    ranks = vocabulary_parallel.measure(n_rows=64, vocab_size=301, n_ranks=2, rounds=1)
    found = vocabulary_parallel.summary(ranks, n_rows=64)
    assert found["loss_error"] < 1e-6 and found["gradient_error"] < 1e-6
    assert found["n_collectives"] == [1, 1]
    # 6 statistics and the target, 32 candidates, and where the columns are
    assert found["bytes_of_a_row"] == [4 * (6 + 1 + vocabulary_parallel.N_CANDIDATES) + 8 / 64] * 2
    assert all(len(rank["milliseconds"][name]) == 1 for rank in ranks for name in vocabulary_parallel.VARIANTS)
