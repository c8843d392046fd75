"""Router statistics and their gradient against float64 autograd, over shapes, dtypes, masks, segments and layers."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ava_ext import UnifiedLossConfig, reference
from ava_ext.ops.router_rows import RouterStatistics, router_statistics

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# relative to the sum of absolute addends; a low-precision gradient is rounded once more
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float64: 1e-13}
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 0.0}


def scores_of(logits, score):
    return logits if score == "softmax" else torch.nn.functional.logsigmoid(logits)


def best(scores, k):
    """[..., k] of the largest, of equals the lowest index."""
    return torch.argsort(scores, dim=-1, descending=True, stable=True)[..., :k]


def expected_statistics(logits, indices, mask, segment_ids, n_segments, k, score):
    """From float64 logits [n_layers, n_rows, n_experts], with a one-hot of every choice and of every segment."""
    n_layers, _, n_experts = logits.shape
    config = UnifiedLossConfig(
        vocab_size=2, num_experts=n_experts, num_experts_per_token=k, router_score=score, use_moe_balancing=True
    )
    groups = []
    for layer in range(n_layers):
        for segment in range(n_segments):
            keep = mask[layer] & (segment_ids == segment)
            by_reference = reference.router_statistics(
                config, logits[layer], keep, indices[layer].clamp(0, n_experts - 1)
            )
            z = logits[layer][keep]
            y = scores_of(z, score)
            chosen = torch.nn.functional.one_hot(indices[layer][keep].long(), n_experts).sum(1)
            log_p = y.log_softmax(-1)
            plogp = torch.where(log_p.isneginf(), 0.0, log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0.0))
            groups.append(
                RouterStatistics(
                    by_reference.counts,
                    log_p.exp().sum(0),
                    (log_p.exp() * chosen).sum(0),
                    z.logsumexp(-1).square().sum(),
                    -plogp.sum(),
                    by_reference.n_rows.double(),
                )
            )
            if keep.any() and not logits.isneginf().any():
                torch.testing.assert_close(by_reference.probability, groups[-1].probability_sum, rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(by_reference.lse_squared, groups[-1].lse_squared_sum)
    return RouterStatistics(*(torch.stack(field) for field in zip(*groups, strict=True)))


@st.composite
def routers(draw):
    n_experts = draw(st.sampled_from([1, 2, 5, 8, 16, 17, 40, 64, 100, 128, 257, 512, 600]))
    n_rows = draw(st.sampled_from([0, 1, 3, 4, 5, 63, 64, 65, 130, 600] if n_experts <= 64 else [0, 1, 4, 7, 65]))
    return {
        "n_layers": draw(st.integers(1, 3)),
        "n_rows": n_rows,
        "n_experts": n_experts,
        "k": draw(st.integers(1, min(n_experts, 8))),
        "dtype": draw(st.sampled_from(DTYPES)),
        "score": draw(st.sampled_from(["softmax", "sigmoid"])),
        "scale": draw(st.sampled_from([0.01, 1.0, 5.0, 40.0])),
        "masked_experts": draw(st.booleans()) and n_experts > 1,
        "mask": draw(st.sampled_from([None, "rows", "layers"])),
        "n_segments": draw(st.sampled_from([None, 1, 3])),
        "choice": draw(st.sampled_from(["own", "int64", "int32"])),
        "form": draw(st.sampled_from(["tensor", "list", "slice", "parts"])),
        "seed": draw(st.integers(0, 2**31)),
    }


def arrange(logits, form):
    """The layers as one tensor, as a list, as a slice of more memory, or as two tensors of some layers each."""
    n_layers, n_rows, n_experts = logits.shape
    if form == "list":
        return list(logits.unbind(0))
    if form == "slice":
        memory = torch.full((n_layers, n_rows + 2, n_experts + 3), torch.nan, dtype=logits.dtype)
        memory[:, 1 : n_rows + 1, 2 : n_experts + 2] = logits
        return memory[:, 1 : n_rows + 1, 2 : n_experts + 2]
    return [logits[:1], logits[1:]] if form == "parts" else logits


@given(case=routers())
@example(
    case={
        "n_layers": 2, "n_rows": 1100, "n_experts": 64, "k": 2, "dtype": torch.float32, "score": "softmax",
        "scale": 1.0, "masked_experts": False, "mask": None, "n_segments": None, "choice": "int64",
        "form": "tensor", "seed": 0,
    }
)  # fmt: skip
def test_values_and_gradient(case):
    generator = torch.Generator().manual_seed(case["seed"])
    shape = (case["n_layers"], case["n_rows"], case["n_experts"])
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * case["scale"]).to(case["dtype"])
    if case["masked_experts"]:
        logits[..., 1:].masked_fill_(torch.rand(shape, generator=generator)[..., 1:] < 0.1, -torch.inf)
    layers = shape[:1]
    mask_shape = {None: (), "rows": shape[1:2], "layers": shape[:2]}[case["mask"]]
    mask = torch.rand(mask_shape, generator=generator) < 0.7 if case["mask"] else None
    full_mask = torch.ones(shape[:2], dtype=torch.bool) if mask is None else mask.expand(shape[:2])
    n_segments = case["n_segments"]
    segment_ids = torch.randint(-1, n_segments, shape[1:2], generator=generator) if n_segments else None
    full_segments = torch.zeros(shape[1:2], dtype=torch.int64) if segment_ids is None else segment_ids
    indices = None
    if case["choice"] != "own":
        random_scores = torch.rand(shape, generator=generator)
        indices = random_scores.topk(case["k"]).indices.to(getattr(torch, case["choice"]))
        indices[~(full_mask & (full_segments >= 0))] = 10**6  # not looked at

    given_logits = arrange(logits, case["form"])
    leaves = [given_logits] if isinstance(given_logits, torch.Tensor) else given_logits
    leaves = [leaf.requires_grad_() if leaf.is_leaf else leaf.detach().requires_grad_() for leaf in leaves]
    got = router_statistics(
        leaves[0] if isinstance(given_logits, torch.Tensor) else leaves, indices, mask,
        k=case["k"], score=case["score"], segment_ids=segment_ids, n_segments=n_segments or 1,
    )  # fmt: skip

    exact = logits.detach().double().requires_grad_()
    chosen = best(exact.detach(), case["k"]) if indices is None else indices
    want = expected_statistics(exact, chosen, full_mask, full_segments, n_segments or 1, case["k"], case["score"])
    assert torch.equal(got.counts.double(), want.counts)
    assert torch.equal(got.n_rows.double(), want.n_rows)
    tolerance = TOLERANCE[case["dtype"]]
    # e^u and log are exact to a few units of rounding of u and lse
    size = exact.detach().masked_fill(exact.isneginf(), 0).abs().amax().item() if exact.numel() else 0.0
    relative = tolerance * (1 + size / 8)
    for name in ("probability_sum", "importance_sum", "lse_squared_sum", "entropy_sum"):
        value, expected = getattr(got, name), getattr(want, name)
        rows = want.n_rows.reshape(-1, *[1] * (expected.dim() - 1))
        floor = relative * (1e-6 if expected.dim() == 2 else 1) * rows
        wrong = (value.double() - expected).abs() > relative * expected.abs() + floor
        assert not wrong.any(), f"{name}: {value[wrong][:3]} for {expected[wrong][:3]}"

    weights = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in got]
    total = sum((value.double() * weight).sum() for value, weight in zip(got, weights, strict=True))
    parts = torch.autograd.grad(total, leaves)
    gradient = torch.cat([part.unsqueeze(0) if part.dim() == 2 else part for part in parts]).double()
    total = sum((value * weight).sum() for value, weight in zip(want, weights, strict=True))
    (expected,) = torch.autograd.grad(total, exact)
    assert gradient.shape == (*layers, *shape[1:])
    counted = full_mask & (full_segments >= 0)
    assert (gradient[~counted] == 0).all()
    expected = expected.masked_fill(exact.isneginf() | ~counted.unsqueeze(-1), 0)
    # p_j (v_j + ...): what is added up for the row is of this size
    p = scores_of(exact.detach(), case["score"]).softmax(-1) + exact.detach().softmax(-1)
    bound = 6 * relative * p * (10 + size**2 if case["scale"] > 1 else 20 + size) + 1e-34  # what underflows
    if case["dtype"] == torch.float16:
        bound += 2**-24  # its smallest number
    bound += (ROUNDING[case["dtype"]] + relative) * expected.abs()
    wrong = ((gradient - expected).abs() > bound) & counted.unsqueeze(-1)
    assert not wrong.any(), f"{gradient[wrong][:3]} for {expected[wrong][:3]}"


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gap", [5.0, 16.0, 40.0, 80.0])
def test_sure_rows_stay_exact(score, gap):
    """Entropy and every entry of the gradient by relative error, where 1 - p is below the resolution of float32."""
    logits = torch.tensor([[[0.25, -gap, 0.5 - gap, -1 - gap]]])
    weights = torch.tensor([3.0, 1.0, 2.0, 5.0])

    def losses(logits):
        s = router_statistics(logits, None, None, k=1, score=score)
        return (s.probability_sum * weights.to(s.probability_sum)).sum(), s.entropy_sum.sum()

    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    y = scores_of(exact, score)
    log_p = y - y.logsumexp(-1, keepdim=True)
    u = y - y[..., :1]
    rest = u[..., 1:].exp().sum()
    entropy = torch.log1p(rest) - (u * u.exp()).sum() / (1 + rest)
    centred = ((log_p.exp() * (weights.double() - weights[0].double())).sum(), entropy)  # the constant drops out
    for got, want in zip(losses(leaf), centred, strict=True):
        (gradient,) = torch.autograd.grad(got, leaf, retain_graph=True)
        (expected,) = torch.autograd.grad(want, exact, retain_graph=True)
        # of the maximum: float64 cancels there too, but a row's gradient by y adds up to 0
        slope = torch.ones_like(exact) if score == "softmax" else torch.sigmoid(-exact.detach())
        expected[..., 0] = -(expected / slope)[..., 1:].sum() * slope[..., 0]
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-6 * (3 + gap / 4), atol=1e-37)
    torch.testing.assert_close(losses(leaf)[1].double(), entropy, rtol=1e-6 * (3 + gap / 4), atol=0)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_of_equal_experts_the_lowest_are_chosen(score):
    logits = torch.tensor([[[1.0, 2, 2, 0, 2, 1], [-torch.inf, -torch.inf, -torch.inf, 3, -torch.inf, -torch.inf]]])
    expected = torch.tensor([[[1, 2, 4], [3, 0, 1]]])
    for dtype in DTYPES:
        for bias in (None, torch.zeros(1, 6)):
            got = router_statistics(logits.to(dtype), None, None, k=3, score=score, expert_bias=bias)
            want = torch.nn.functional.one_hot(expected, 6).sum((1, 2))
            assert torch.equal(got.counts.long(), want), (dtype, bias)


def test_sums_of_many_rows_keep_float32_exact():
    logits = torch.rand(1, 300_000, 3, generator=torch.Generator().manual_seed(0))
    got = router_statistics(logits, k=1)
    z = logits.double()
    torch.testing.assert_close(got.probability_sum.double(), z.softmax(-1).sum(1), rtol=2e-7, atol=0)
    torch.testing.assert_close(got.lse_squared_sum.double(), z.logsumexp(-1).square().sum(1), rtol=3e-7, atol=0)
    assert got.counts.sum() == 300_000


@pytest.mark.parametrize("n_experts", [8, 100])
def test_bitwise_the_same_whatever_the_threads_and_the_neighbours(n_experts):
    logits = torch.randn(3, 2000, n_experts)
    segments = torch.arange(2000) // 700
    upstream = [torch.randn(9, n_experts) for _ in range(2)] + [torch.randn(9) for _ in range(2)]

    def run(logits, **options):
        leaf = logits.clone().requires_grad_()
        got = router_statistics(leaf, k=2, **options)
        n = len(got.n_rows)
        torch.autograd.backward([got[i] for i in (1, 2, 3, 4)], [value[:n] for value in upstream])
        return *(value.detach() for value in got), leaf.grad

    threads = torch.get_num_threads()
    try:
        results = []
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            results.append(run(logits, segment_ids=segments, n_segments=3))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    alone = [run(logits[:1, segments == segment])[:-1] for segment in range(3)]
    for number, statistic in enumerate(results[0][:-1]):
        assert torch.equal(statistic[:3], torch.cat([one[number] for one in alone]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_experts", [8, 64])
def test_a_row_is_the_same_beside_rows_that_are_sure_or_masked(n_experts, dtype):
    """A GPU does ordinary rows, those that are sure of an expert and those with masked ones in different ways."""
    logits = torch.randn(1, 96, n_experts).to(dtype)
    upstream = [torch.randn(1, n_experts) for _ in range(2)] + [torch.randn(1) for _ in range(2)]

    def gradient_of(logits):
        leaf = logits.clone().requires_grad_()
        got = router_statistics(leaf, k=2)
        torch.autograd.backward([got[i] for i in (1, 2, 3, 4)], upstream)
        return leaf.grad

    other = torch.zeros(96, dtype=torch.bool)
    other[::5] = other[1::7] = True
    beside = logits.clone()
    beside[:, ::5, 0] += 60
    beside[:, 1::7, 1] = -math.inf
    assert torch.equal(gradient_of(beside)[:, ~other], gradient_of(logits)[:, ~other])
