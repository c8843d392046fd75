"""InfoNCE against F.cross_entropy of all similarities, SimCTG against the loop over pairs."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from torch.utils.flop_counter import FlopCounterMode

from ava_ext import UnifiedLoss
from ava_ext.losses.contrastive import ContrastiveLoss, info_nce, simctg


def random_vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_similarities(a, b, temperature=0.2):
    similarity = normalize(a, dim=-1) @ normalize(b, dim=-1).T / temperature
    labels = torch.arange(len(a))
    return (cross_entropy(similarity, labels) + cross_entropy(similarity.T, labels)) / 2


def loop_over_pairs(h, mask, segments, margin=0.5):
    total, n_pairs = 0.0, 0
    for b, i, j in torch.cartesian_prod(*(torch.arange(n) for n in (len(h), h.shape[1], h.shape[1]))).tolist():
        if i != j and mask[b, i] and mask[b, j] and segments[b, i] == segments[b, j]:
            s_ii, s_ij = cosine_similarity(h[b, i], h[b, i], dim=0), cosine_similarity(h[b, i], h[b, j], dim=0)
            total, n_pairs = total + (margin - s_ii + s_ij).clamp_min(0), n_pairs + 1
    return total / n_pairs


@pytest.mark.parametrize("block_elements", [1, 21, 10**6])
def test_info_nce(block_elements):
    a, b = random_vectors(7, 5).requires_grad_(), random_vectors(7, 5, seed=1).requires_grad_()
    got, expected = info_nce(a, b, temperature=0.2, block_elements=block_elements), all_similarities(a, b)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    for gradient, other in zip(torch.autograd.grad(got, (a, b)), torch.autograd.grad(expected, (a, b)), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-14)


def test_info_nce_mask_and_documents():
    a, b = random_vectors(7, 5), random_vectors(7, 5, seed=1)
    mask = torch.tensor([1, 1, 0, 1, 1, 0, 1]).bool()
    documents = torch.tensor([0, 1, 1, 0, 1, 2, 3])
    expected = all_similarities(a[mask], b[mask])
    similarity = (normalize(a[mask], dim=-1) @ normalize(b[mask], dim=-1).T / 0.2).exp()
    kept = documents[mask]
    apart = 0.0
    for matrix in (similarity, similarity.T):
        for i in range(len(kept)):
            rest = sum(matrix[i, j] for j in range(len(kept)) if i == j or kept[i] != kept[j])
            apart = apart - (matrix[i, i] / rest).log() / (2 * len(kept))
    a[~mask], b[~mask] = torch.nan, torch.nan
    a.requires_grad_()
    got = info_nce(a, b, temperature=0.2, row_mask=mask, block_elements=20)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    got.backward()
    assert (a.grad[~mask] == 0).all() and a.grad.isfinite().all()
    got = info_nce(a, b, temperature=0.2, row_mask=mask, document_ids=documents, block_elements=20)
    torch.testing.assert_close(got, apart, rtol=1e-12, atol=0)


@pytest.mark.parametrize("block_elements", [1, 50, 10**6])
def test_simctg(block_elements):
    h = random_vectors(2, 6, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]])
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]])
    for given in (None, segments):
        expected = loop_over_pairs(h, mask, torch.zeros(2, 6) if given is None else segments.expand(2, 6))
        poisoned = h.masked_fill(mask.unsqueeze(-1) == 0, torch.nan).requires_grad_()
        got = simctg(poisoned, mask, segment_ids=given, block_elements=block_elements)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        got.backward()
        assert (poisoned.grad[mask == 0] == 0).all() and poisoned.grad.isfinite().all()


def test_hand_worked_values():
    assert simctg(torch.ones(2, 5, 3)).item() == pytest.approx(0.5)
    assert simctg(torch.eye(4)[None]) == 0
    assert simctg(torch.eye(4)[None], margin=1.25).item() == pytest.approx(0.25)
    assert info_nce(torch.ones(4, 2), torch.ones(4, 2)).item() == pytest.approx(torch.tensor(4.0).log().item())


def test_gradcheck():
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])
    assert torch.autograd.gradcheck(
        lambda h: simctg(h, mask, block_elements=20), random_vectors(2, 4, 3).requires_grad_()
    )
    pair = random_vectors(5, 3).requires_grad_(), random_vectors(5, 3, seed=1).requires_grad_()
    documents = torch.tensor([0, 0, 1, 2, 3])
    assert torch.autograd.gradcheck(lambda a, b: info_nce(a, b, document_ids=documents, temperature=0.5), pair)


def test_torch_func_gives_the_gradient_of_autograd():
    states, partners = random_vectors(2, 6, 3), random_vectors(12, 3, seed=1)
    loss_fn = UnifiedLoss(5, primary_loss_type="standard", use_contrastive_loss=True)
    logits, targets = random_vectors(2, 6, 5, seed=2), torch.arange(12).view(2, 6) % 5
    for loss in (
        lambda h: simctg(h, block_elements=20),
        lambda h: info_nce(h.flatten(0, 1), partners, block_elements=20),
        lambda h: loss_fn(logits, targets, hidden_states=h),
    ):
        leaf = states.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        assert expected.any()
        torch.testing.assert_close(torch.func.grad(loss)(states), expected)


def test_backward_keeps_no_more_than_a_block():
    length, saved = 256, {}
    h = torch.randn(1, length, 8, requires_grad=True)

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = simctg(h, block_elements=8 * length) + info_nce(h[0], h[0] * 2, block_elements=8 * length)
    assert loss.isfinite() and len(saved) > 2
    assert sum(tensor.numel() for tensor in saved.values()) < length * length / 2


@pytest.mark.parametrize("n_pairs_of_block, n_products", [(12, 3), (4, 4)])
def test_products(n_pairs_of_block, n_products):
    """Of one block those of plain PyTorch; of several, backward computes the similarities again."""
    a, b = random_vectors(12, 5).requires_grad_(), random_vectors(12, 5, seed=1).requires_grad_()
    elements = 12 * n_pairs_of_block
    with FlopCounterMode(display=False) as counter:
        info_nce(a, b, block_elements=elements).backward()
    assert counter.get_total_flops() == n_products * 2 * 12 * 12 * 5
    with FlopCounterMode(display=False) as counter:
        simctg(a[None], block_elements=elements).backward()
    assert counter.get_total_flops() == n_products * 2 * 12 * 12 * 5


def test_module_forms():
    a, b = random_vectors(6, 5), random_vectors(6, 5, seed=1)
    loss_fn = ContrastiveLoss(temperature=0.2, weight=0.5)
    expected = 0.5 * all_similarities(a, b)
    for got in (loss_fn(a, b), loss_fn(torch.cat([a, b])), loss_fn(a, b, return_detailed=True)["total_loss"]):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    kept = mask.bool()
    expected = 0.5 * all_similarities(a[kept], b[kept])
    torch.testing.assert_close(loss_fn(a, b, attention_mask=mask), expected, rtol=1e-12, atol=0)
    h = random_vectors(2, 5, 3)
    got = loss_fn(h, attention_mask=torch.ones(2, 5))
    torch.testing.assert_close(got, 0.5 * simctg(h), rtol=1e-12, atol=0)


def test_nothing_to_compare():
    h = torch.full((2, 3, 4), torch.nan, requires_grad=True)
    nothing = torch.zeros(2, 3)
    loss = simctg(h, nothing) + info_nce(h[0], h[1], row_mask=nothing[0].bool()) + simctg(torch.ones(2, 1, 4))
    loss = loss + simctg(h[:, :0]) + info_nce(h[0, :0], h[1, :0])
    loss.backward()
    assert loss == 0 and (h.grad == 0).all()


def test_zero_vectors_have_finite_gradients():
    h = random_vectors(1, 3, 4)
    h[0, 1] = 0
    h.requires_grad_()
    (simctg(h, margin=1.5) + info_nce(h[0], h[0] * 2)).backward()
    assert h.grad.isfinite().all() and (h.grad[0, 1] == 0).all() and (h.grad[0, 0] != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_float32(dtype):
    h = random_vectors(2, 9, 16).to(dtype)
    for got, exact in (
        (simctg(h), simctg(h.double())),
        (info_nce(h[0], h[1]), info_nce(h[0].double(), h[1].double())),
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_without_a_graph_break(dynamic):
    torch._dynamo.reset()
    h = random_vectors(2, 6, 4).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])

    def both(h, mask):
        return simctg(h, mask, block_elements=40) + info_nce(h[0], h[1], block_elements=20)

    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic, backend="aot_eager")(h, mask)
    eager = both(h, mask)
    torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, h)[0] for loss in (compiled, eager)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"got \[4, 3\] and \[5, 3\]"):
        ContrastiveLoss()(torch.zeros(4, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"without targets, .* got \[5, 3\]"):
        ContrastiveLoss()(torch.zeros(5, 3))
    for shape in ((4, 3), (2, 5, 3)):
        with pytest.raises(ValueError, match="expected representations of real numbers, got complex64"):
            ContrastiveLoss()(torch.zeros(shape, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"attention_mask of shape \[2, 5\], got \[2, 4\]"):
        ContrastiveLoss()(torch.zeros(2, 5, 3), attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"document_ids of shape \[4\], got \[3\]"):
        ContrastiveLoss()(torch.zeros(4, 3), torch.zeros(4, 3), document_ids=torch.zeros(3))
    pair, states = torch.zeros(2, 4, 3), torch.zeros(2, 5, 3)
    for name, call in {
        "document_ids to be integers": lambda: info_nce(*pair, document_ids=torch.arange(4.0)),
        "segment_ids to be integers": lambda: simctg(states, segment_ids=torch.zeros(2, 5)),
        "row_mask of bool": lambda: info_nce(*pair, row_mask=torch.ones(4)),
    }.items():
        with pytest.raises(ValueError, match=f"contrastive_loss: expected {name}.*, got float32"):
            call()
    with pytest.raises(ValueError, match="expected no segment_ids with InfoNCE"):
        ContrastiveLoss()(torch.zeros(4, 3), torch.zeros(4, 3), segment_ids=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="expected no document_ids with SimCTG"):
        ContrastiveLoss()(torch.zeros(2, 5, 3), document_ids=torch.zeros(2))
    with pytest.raises(ValueError, match=r"expected temperature to be a number > 0 .*, got 0"):
        ContrastiveLoss(temperature=0)


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing_where_every_row_is_sure(dtype, backward_inside):
    first = random_vectors(64, 32).float().requires_grad_()
    second = first.detach().clone().requires_grad_()
    loss = ContrastiveLoss(temperature=0.06)(first, second)
    expected = torch.autograd.grad(loss, (first, second))
    exact = info_nce(first.double(), second.double(), temperature=0.06)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-3, atol=0)
    with torch.autocast("cpu", dtype):
        got = ContrastiveLoss(temperature=0.06)(first, second)
        gradients = torch.autograd.grad(got, (first, second)) if backward_inside else None
    torch.testing.assert_close(got, loss, rtol=0, atol=0)
    gradients = gradients or torch.autograd.grad(got, (first, second))
    # what runs backward within the region has its products in the lower precision, as everything in PyTorch
    bound = 0.02 if backward_inside else 0.0
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert (gradient - wanted).norm() <= bound * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing_at_the_margin(dtype):
    base = random_vectors(1, 1, 32).float()
    states = (base + 1e-3 * random_vectors(2, 9, 32, seed=1).float()).requires_grad_()
    margin = 1e-5  # less than the cosines differ from 1 in lower precision
    loss = simctg(states, margin=margin)
    with torch.autocast("cpu", dtype):
        got = simctg(states, margin=margin)
    torch.testing.assert_close(got, loss, rtol=0, atol=0)
    gradients = (torch.autograd.grad(value, states)[0] for value in (got, loss))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
