"""Router statistics against explicit one-hot sums in float64."""

import pytest
import torch
from torch.nn.functional import one_hot

from ava_ext.ops.router_layers import layered_gate_logits, stack_expert_indices
from ava_ext.ops.router_rows import router_statistics


def oracle(gate_logits, expert_indices, mask, k, score):
    """Row by row, with a one-hot of every choice."""
    z = gate_logits.double()
    n_layers, _, n_experts = z.shape
    p = z.softmax(-1) if score == "softmax" else z.sigmoid() / z.sigmoid().sum(-1, keepdim=True)
    best = torch.argsort(z, dim=-1, descending=True, stable=True)[..., :k]  # of equals the lowest index
    indices = best if expert_indices is None else expert_indices
    chosen = one_hot(indices, n_experts).sum(2).double()
    keep = mask.double()[None, :, None]
    return {
        "counts": (chosen * keep).sum(1),
        "probability_sum": (p * keep).sum(1),
        "importance_sum": (p * chosen * keep).sum(1),
        "lse_squared_sum": (z.logsumexp(-1).square() * keep[..., 0]).sum(1),
        "entropy_sum": (-(p * p.log()).sum(-1) * keep[..., 0]).sum(1),
        "n_rows": mask.double().sum().expand(n_layers),
    }


def name_of(statistic):
    return lambda message: f"{statistic}: {message}"


def random_router(seed=0, n_layers=3, n_rows=37, n_experts=8, k=2):
    generator = torch.Generator().manual_seed(seed)
    gate_logits = torch.randn(n_layers, n_rows, n_experts, generator=generator, dtype=torch.float64) * 3
    scores = torch.rand(n_layers, n_rows, n_experts, generator=generator)
    return gate_logits, scores.topk(k).indices, torch.rand(n_rows, generator=generator) < 0.7


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("own_choice", [False, True])
def test_against_one_hot(score, own_choice):
    gate_logits, expert_indices, mask = random_router()
    indices = None if own_choice else expert_indices
    got = router_statistics(gate_logits, indices, mask, k=2, score=score)
    for name, expected in oracle(gate_logits, indices, mask, 2, score).items():
        torch.testing.assert_close(getattr(got, name), expected, rtol=1e-12, atol=1e-12, msg=name_of(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_float32(dtype):
    gate_logits = random_router(n_rows=3000)[0].to(dtype)
    mask = torch.ones(3000, dtype=torch.bool)
    got = router_statistics(gate_logits, None, None, k=2)
    for name, expected in oracle(gate_logits, None, mask, 2, "softmax").items():
        value = getattr(got, name)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0, msg=name_of(name))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradient(score):
    gate_logits, expert_indices, mask = random_router(n_layers=2, n_rows=5, n_experts=4)
    gate_logits.requires_grad_()

    def differentiable(gate_logits):
        s = router_statistics(gate_logits, expert_indices, mask, k=2, score=score)
        return s.probability_sum, s.importance_sum, s.lse_squared_sum, s.entropy_sum

    assert torch.autograd.gradcheck(differentiable, (gate_logits,))


def test_rows_that_do_not_count_are_not_looked_at():
    gate_logits, expert_indices, mask = random_router()
    expected = router_statistics(gate_logits[:, mask], expert_indices[:, mask], None, k=2)
    gate_logits[:, ~mask] = float("nan")
    expert_indices[:, ~mask] = 99
    gate_logits.requires_grad_()
    got = router_statistics(gate_logits, expert_indices, mask, k=2)
    for name in got._fields:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-12, atol=1e-12)
    sum(value.sum() for value in got).backward()
    assert (gate_logits.grad[:, ~mask] == 0).all()
    assert gate_logits.grad.isfinite().all()


@pytest.mark.parametrize("n_rows", [0, 5])
def test_no_counted_row_gives_zeros(n_rows):
    gate_logits = torch.randn(2, n_rows, 4, requires_grad=True)
    got = router_statistics(gate_logits, None, torch.zeros(n_rows, dtype=torch.bool), k=2)
    assert all((value == 0).all() for value in got)
    sum(value.sum() for value in got).backward()
    assert (gate_logits.grad == 0).all()


def test_experts_at_minus_infinity_have_probability_and_gradient_zero():
    gate_logits = torch.randn(1, 6, 4, dtype=torch.float64)
    expected = router_statistics(gate_logits[..., :3], None, None, k=2)
    gate_logits[..., 3] = -torch.inf
    gate_logits.requires_grad_()
    for score in ("softmax", "sigmoid"):
        got = router_statistics(gate_logits, None, None, k=2, score=score)
        assert got.probability_sum[0, 3] == 0
        gradient = torch.autograd.grad(sum(value.sum() for value in got), gate_logits)[0]
        assert (gradient[..., 3] == 0).all() and gradient.isfinite().all()
    got = router_statistics(gate_logits, None, None, k=2)
    torch.testing.assert_close(got.entropy_sum, expected.entropy_sum, rtol=1e-12, atol=0)


def test_logits_of_any_strides():
    gate_logits = torch.randn(2, 6, 5, dtype=torch.float64)
    strided = gate_logits.mT.contiguous().mT.requires_grad_()
    got, expected = router_statistics(strided, k=2), router_statistics(gate_logits.requires_grad_(), k=2)
    for value, other in zip(got, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=0)
    pairs = ((got, strided), (expected, gate_logits))
    gradients = (torch.autograd.grad(found.importance_sum.square().sum(), leaf) for found, leaf in pairs)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_sigmoid_scores_survive_where_every_sigmoid_underflows():
    got = router_statistics(torch.tensor([[[-200.0, -200.0, -201.0]]]), None, None, k=1, score="sigmoid")
    torch.testing.assert_close(got.probability_sum, torch.tensor([[0.0, 0.0, -1.0]]).softmax(-1))


def test_expert_bias_changes_the_choice_alone():
    gate_logits = random_router()[0]
    bias = torch.zeros(3, 8)
    bias[1, 5] = 10.0
    plain = router_statistics(gate_logits, None, None, k=2)
    for score in ("softmax", "sigmoid"):
        biased = router_statistics(gate_logits, None, None, k=2, score=score, expert_bias=bias)
        assert biased.counts[1, 5] == 37
        assert (biased.counts[0] == plain.counts[0]).all()
        unbiased = router_statistics(gate_logits, None, None, k=2, score=score)
        assert torch.equal(biased.probability_sum, unbiased.probability_sum)


@pytest.mark.devices("cpu")
def test_compiles_without_a_graph_break():
    gate_logits, expert_indices, mask = random_router()
    gate_logits.requires_grad_()

    def total(gate_logits, expert_indices, mask):
        s = router_statistics(gate_logits, expert_indices, mask, k=2)
        return (s.probability_sum * s.counts).sum() + s.lse_squared_sum.sum() + s.entropy_sum.sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")(gate_logits, expert_indices, mask)
    eager = total(gate_logits, expert_indices, mask)
    torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=0)
    gradient = torch.autograd.grad(compiled, gate_logits)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(eager, gate_logits)[0], rtol=1e-12, atol=1e-14)


def test_index_out_of_range_is_named():
    gate_logits, expert_indices, mask = random_router()
    row = int(mask.nonzero()[3])
    for value in (8, -1):
        expert_indices[2, row, 1] = value
        with pytest.raises(IndexError, match=rf"\[0, 8\), got {value} in layer 2, row {row}$"):
            router_statistics(gate_logits, expert_indices, mask, k=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 5}, "expected k between 1 and n_experts = 4, got 5"),
        ({"gate_logits": torch.zeros(6)}, r"got \[\[6\]\]"),
        (
            {"expert_indices": torch.zeros(1, 6, 3, dtype=torch.long)},
            r"expert_indices of shape \[1, 6, 2\], got \[1, 6, 3\]",
        ),
        ({"row_mask": torch.ones(5, dtype=torch.bool)}, r"row_mask of shape \[6\], got \[5\]"),
        ({"expert_bias": torch.zeros(4)}, r"expert_bias of shape \[1, 4\], got \[4\]"),
        ({"expert_bias": torch.zeros(1, 4, dtype=torch.complex64)}, "expert_bias of real numbers, got complex64"),
        ({"segment_ids": torch.linspace(0, 1.9, 6)}, "segment_ids to be integers .*, got float32"),
        ({"row_mask": torch.full((6,), float("nan"))}, "row_mask of bool, got float32"),
        ({"score": "relu"}, "got 'relu'"),
        ({"k": None}, "expected expert_indices or k, got neither"),
        ({"gate_logits": []}, "at least one layer, got none"),
        ({"gate_logits": [torch.zeros(1, 6, 4), torch.zeros(1, 6, 5)]}, r"got \[\[1, 6, 4\], \[1, 6, 5\]\]"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"gate_logits": torch.zeros(1, 6, 4), "expert_indices": None, "row_mask": None, "k": 2} | change
    with pytest.raises(ValueError, match=message):
        router_statistics(**arguments)


def flat(layers):
    """[n_layers, n_rows, n_experts] of what layered_gate_logits returns."""
    return torch.cat([layer.flatten(1, -2) for layer in layers])


def test_every_form_of_gate_logits():
    x = torch.randn(2, 3, 4, 5)  # [n_layers, batch, length, n_experts]
    expected = x.reshape(2, 12, 5)
    for form in (x, expected, tuple(x), [layer.reshape(12, 5) for layer in x]):
        assert torch.equal(flat(layered_gate_logits(form, 2)), expected)
        assert torch.equal(flat(layered_gate_logits(form)), expected)
    for form in (x[0], x[:1], expected[0], [x[0]]):
        assert torch.equal(flat(layered_gate_logits(form, 1)), expected[:1])
    for layer, original in zip(layered_gate_logits(tuple(x)), x, strict=True):
        assert layer.data_ptr() == original.data_ptr()  # not copied


def test_every_form_of_expert_indices():
    x = torch.randint(0, 5, (2, 3, 4, 2))
    expected = x.reshape(2, 12, 2)
    for form in (x, expected, tuple(x), list(expected)):
        assert torch.equal(stack_expert_indices(form, 2, 12, 2), expected)
    for form in (x[0], x[:1]):
        assert torch.equal(stack_expert_indices(form, 1, 12, 2), expected[:1])
    for form in (x[..., 0], list(x[..., 0]), x[..., :1], expected[..., 0]):
        for k in (1, None):
            assert torch.equal(stack_expert_indices(form, 2, 12, k), expected[..., :1])
    for form in (x.reshape(12, 4), expected.transpose(0, 1), x[:, :2], list(x[:1])):
        with pytest.raises(ValueError, match="expert_indices: expected"):
            stack_expert_indices(form, 2, 12, 2)


@pytest.mark.parametrize(
    ("form", "num_layers", "message"),
    [
        ([torch.zeros(6, 4), torch.zeros(5, 4)], 2, r"expected \[6, 4\] in every layer, got \[5, 4\] in layer 1"),
        ([torch.zeros(6, 4)], 2, "num_moe_layers = 2 layers, got 1"),
        ([], None, "at least 1 layer, got 0"),
        (torch.zeros(3, 6, 4), 2, r"num_moe_layers = 2 layers, got shape \[3, 6, 4\]"),
        (torch.zeros(6, 4), 2, r"got shape \[6, 4\]"),
        (torch.zeros(4), 1, r"got \[4\]"),
    ],
)
def test_layers_that_do_not_fit_are_named(form, num_layers, message):
    with pytest.raises(ValueError, match=message):
        layered_gate_logits(form, num_layers)
