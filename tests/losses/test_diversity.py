"""Diversity by the O(n_experts) identity against the loop over pairs."""

import itertools

import pytest
import torch
from torch.nn.functional import cosine_similarity

from ava_ext.losses.diversity import DiversityLoss

PAIRWISE = {
    "cosine": lambda u, v: cosine_similarity(u, v, dim=-1),
    "dot": lambda u, v: (u * v).sum(-1),
    "l2": lambda u, v: -(u - v).square().sum(-1),
}


def random_outputs(n_experts=5, n_rows=7, hidden_size=6):
    return torch.randn(n_experts, n_rows, hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def loop_over_pairs(outputs, similarity):
    pairs = [PAIRWISE[similarity](u, v) for u, v in itertools.combinations(outputs, 2)]
    return torch.stack(pairs).mean()


@pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
@pytest.mark.parametrize("n_experts", [2, 5])
def test_against_the_loop_over_pairs(similarity, n_experts):
    outputs = random_outputs(n_experts)
    loss_fn = DiversityLoss(weight=0.3, similarity=similarity)
    expected = 0.3 * loop_over_pairs(outputs, similarity)
    for form in (outputs, list(outputs), outputs.reshape(n_experts, 7, 1, 6)):
        torch.testing.assert_close(loss_fn(form), expected, rtol=1e-12, atol=1e-14)


def test_hand_worked_values():
    same = torch.randn(3, 8)
    assert DiversityLoss()([same, 2 * same, 5 * same]).item() == pytest.approx(1)
    assert DiversityLoss()([same, -same]).item() == pytest.approx(-1)
    assert DiversityLoss()(torch.eye(4).unsqueeze(1)).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
def test_gradcheck(similarity):
    loss_fn = DiversityLoss(similarity=similarity)
    mask = torch.tensor([1, 0, 1]).bool()
    assert torch.autograd.gradcheck(lambda x: loss_fn(x, mask), random_outputs(3, 3, 4).requires_grad_())


def test_zero_vectors():
    outputs = random_outputs()
    outputs[2, 3] = 0
    outputs[:, 5] = 0
    outputs.requires_grad_()
    loss = DiversityLoss()(outputs)
    torch.testing.assert_close(loss, loop_over_pairs(outputs, "cosine"), rtol=1e-12, atol=0)
    loss.backward()
    assert outputs.grad.isfinite().all()
    assert (outputs.grad[2, 3] == 0).all() and (outputs.grad[:, 5] == 0).all()
    assert outputs.grad[0, 3].abs().max() > 0


def test_rows_that_do_not_count():
    outputs = random_outputs()
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1]).bool()
    expected = DiversityLoss()(outputs[:, mask])
    outputs[:, ~mask] = torch.nan
    outputs.requires_grad_()
    loss = DiversityLoss()(outputs, mask)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    assert (outputs.grad[:, ~mask] == 0).all() and outputs.grad.isfinite().all()


@pytest.mark.parametrize(("shape", "mask"), [((1, 4, 3), None), ((3, 0, 3), None), ((3, 4, 3), torch.zeros(4).bool())])
def test_nothing_to_compare(shape, mask):
    outputs = torch.full(shape, torch.nan, requires_grad=True)
    loss = DiversityLoss()(outputs, mask)
    loss.backward()
    assert loss == 0 and (outputs.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_float32(dtype):
    outputs = random_outputs(8, 50, 64).to(dtype)
    got = DiversityLoss()(outputs, return_detailed=True)
    assert got["total_loss"].dtype == torch.float32
    torch.testing.assert_close(
        got["diversity_loss"].double(), loop_over_pairs(outputs.double(), "cosine"), rtol=1e-4, atol=1e-7
    )


def test_compiles_without_a_graph_break():
    outputs = random_outputs().requires_grad_()
    compiled = torch.compile(DiversityLoss(), fullgraph=True, backend="aot_eager")(list(outputs))
    torch.testing.assert_close(compiled, DiversityLoss()(outputs), rtol=1e-12, atol=0)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"expected \[4, 3\] from every expert, got \[5, 3\] from expert 1"):
        DiversityLoss()([torch.zeros(4, 3), torch.zeros(5, 3)])
    with pytest.raises(ValueError, match=r"got \[4, 3\]"):
        DiversityLoss()(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="at least 1 expert, got 0"):
        DiversityLoss()([])
    with pytest.raises(ValueError, match=r"row_mask of 4 rows, got shape \[3\]"):
        DiversityLoss()(torch.zeros(2, 4, 3), torch.ones(3).bool())
    with pytest.raises(ValueError, match="diversity_loss: expected expert_outputs of real numbers, got complex64"):
        DiversityLoss()(torch.zeros(2, 4, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="row_mask of bool, got float32"):
        DiversityLoss()(torch.zeros(2, 4, 3), torch.ones(4))
    with pytest.raises(ValueError, match="got 'euclid'"):
        DiversityLoss(similarity="euclid")
