"""The operators of the router under opcheck, gradcheck, torch.compile and repeated backwards."""

import pytest
import torch

from ava_ext.ops.router_rows import router_statistics

ops = torch.ops.ava_ext


def router(n_layers=2, n_rows=5, n_experts=4, k=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gate_logits = torch.randn(n_layers, n_rows, n_experts, generator=generator, dtype=dtype)
    indices = torch.rand(n_layers, n_rows, n_experts, generator=generator).topk(k).indices
    return gate_logits, indices, torch.rand(n_rows, generator=generator) < 0.8


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("dtype", "is_sigmoid"),
    [(torch.float32, False), (torch.bfloat16, True), (torch.float16, False), (torch.float64, True)],
)
def test_opcheck(dtype, is_sigmoid):
    gate_logits, indices, mask = router(n_rows=7, n_experts=17, dtype=dtype)
    leaf = gate_logits.requires_grad_()
    real = torch.float64 if dtype == torch.float64 else torch.float32
    segments = torch.tensor([0, 1, 1, 2, -1, 0, 0])
    bias = torch.rand(2, 17, dtype=real)
    for arguments in [
        ([leaf], indices, mask, None, None, 1, 2, is_sigmoid),
        ([leaf[0:1], leaf[1:]], indices.int(), None, segments, None, 3, 2, is_sigmoid),
        ([leaf[:, ::2, 3:11]], None, None, None, bias[:, :8], 1, 2, is_sigmoid),
    ]:
        torch.library.opcheck(ops.router_statistics.default, arguments)
    detached = gate_logits.detach()
    choice = ops.router_statistics([detached], None, mask, None, None, 1, 2, is_sigmoid)[-1]
    vectors, scalars = torch.rand(2, 6, 17, dtype=real), torch.rand(2, 6, dtype=real)
    for arguments in [
        ([detached], None, None, mask, None, vectors[0, :2], None, None, None, 1, is_sigmoid),
        ([detached], indices, None, None, segments, *vectors, *scalars, 3, is_sigmoid),
        ([detached], None, choice, None, segments, *vectors, *scalars, 3, is_sigmoid),
    ]:
        torch.library.opcheck(ops.router_gradient.default, arguments)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("own_choice", [False, True])
def test_gradcheck_of_every_statistic(score, own_choice):
    gate_logits, indices, mask = router()
    segments = torch.tensor([0, 1, 1, -1, 0])
    leaves = [layer.clone().requires_grad_() for layer in gate_logits]

    def statistics(*layers):
        given = None if own_choice else indices
        s = router_statistics(layers, given, mask, k=2, score=score, segment_ids=segments, n_segments=2)
        return s.probability_sum, s.importance_sum, s.lse_squared_sum, s.entropy_sum

    # layers in a list have no dimension of their own
    assert torch.autograd.gradcheck(statistics, leaves)


def test_each_statistic_alone_gives_its_part_of_the_gradient():
    gate_logits, indices, mask = router(n_rows=70, n_experts=9)
    leaf = gate_logits.requires_grad_()
    s = router_statistics(leaf, indices, mask)
    parts = [torch.autograd.grad(s[i].sum(), leaf, retain_graph=True)[0] for i in (2, 3, 4)]
    (whole,) = torch.autograd.grad(s.importance_sum.sum() + s.lse_squared_sum.sum() + s.entropy_sum.sum(), leaf)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-14)
    assert all(part.abs().max() > 1e-3 for part in parts)


def test_statistics_without_a_gradient():
    gate_logits, indices, _ = router()
    s = router_statistics(gate_logits.requires_grad_(), indices)
    assert not s.counts.requires_grad and not s.n_rows.requires_grad
    s.probability_sum.sum().backward()  # the others were not used
    torch.testing.assert_close(gate_logits.grad, torch.zeros_like(gate_logits), rtol=0, atol=1e-15)


def test_second_backward_and_second_user():
    gate_logits, indices, _ = router()
    leaf = gate_logits.requires_grad_()
    hidden = leaf * 2
    loss = (router_statistics(hidden, indices).entropy_sum.sum() + hidden.square().sum()) / 3
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], first)
    parts = router_statistics(leaf * 2, indices).entropy_sum.sum() / 3, (leaf * 2).square().sum() / 3
    expected = sum(torch.autograd.grad(part, leaf)[0] for part in parts)
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("as_list", [False, True])
def test_double_backward_raises(as_list):
    gate_logits, indices, _ = router()
    leaf = gate_logits.requires_grad_()
    given = list(leaf) if as_list else leaf
    (gradient,) = torch.autograd.grad(router_statistics(given, indices).entropy_sum.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.square().sum().backward()


def test_logits_changed_before_backward_raise():
    gate_logits, indices, _ = router()
    hidden = gate_logits.requires_grad_() * 2
    loss = router_statistics(hidden, indices).entropy_sum.sum()
    with torch.no_grad():
        hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.devices("cpu")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("own_choice", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_a_list_of_layers(backend, own_choice):
    gate_logits, indices, mask = router(n_rows=70, n_experts=8)

    def loss(layers, indices, mask):
        s = router_statistics(layers, indices, mask, k=2)
        return (s.probability_sum * s.counts).sum() + s.importance_sum.square().sum() + s.lse_squared_sum.sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    given = None if own_choice else indices
    results = []
    for function in (loss, compiled):
        leaves = [layer.clone().requires_grad_() for layer in gate_logits]
        value = function([leaf * 1.5 for leaf in leaves], given, mask)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_a_compiled_index_out_of_range_is_named():
    gate_logits, indices, mask = router()
    compiled = torch.compile(router_statistics, fullgraph=True, backend="aot_eager")
    indices[1, int(mask.nonzero()[0]), 0] = 99
    with pytest.raises(IndexError, match="got 99 in layer 1"):
        compiled(gate_logits, indices, mask)


def test_bad_arguments_of_the_operators_are_named():
    gate_logits, indices, mask = router()
    vectors, scalars = torch.rand(2, 4, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    for arguments, message in [
        (([gate_logits], indices.float(), None, None, None, 1, 2, False), "expert_indices of type int32 or int64"),
        (([gate_logits], indices, None, None, None, 1, 3, False), r"expert_indices of shape \[2, 5, 3\], got"),
        (([gate_logits], None, None, None, None, 1, 5, False), r"k in \[1, n_experts = 4\], got 5"),
        (([gate_logits], None, mask.int(), None, None, 1, 2, False), "row_mask of type bool, got int32"),
        (([gate_logits], None, None, None, None, 3, 2, False), "segment_ids beside n_segments = 3, got none"),
        (
            ([gate_logits.int()], None, None, None, None, 1, 2, False),
            "float32, bfloat16, float16 or float64, got int32",
        ),
        (
            ([gate_logits, gate_logits.float()], None, None, None, None, 1, 2, False),
            "one type, got float64 and float32",
        ),
        (([gate_logits, gate_logits[:, 1:]], None, None, None, None, 1, 2, False), "layers of one shape"),
        (([gate_logits.mT], None, None, None, None, 1, 2, False), "last stride 1, got 4"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.router_statistics(*arguments)
    with pytest.raises(RuntimeError, match=r"grad_probability_sum of shape \[2, 4\], got \[2, 3\]"):
        ops.router_gradient([gate_logits], None, None, None, None, vectors[:, 1:], None, None, None, 1, False)
    choice = torch.zeros(2, 5, 1, dtype=torch.uint8)
    for chosen, message in (((None, None), "got neither"), ((indices, choice), "got both")):
        with pytest.raises(RuntimeError, match="either expert_indices or expert_choice beside .*" + message):
            ops.router_gradient([gate_logits], *chosen, None, None, None, vectors, None, None, 1, False)
    with pytest.raises(RuntimeError, match=r"expert_choice of shape \[2, 5, 1\], got \[2, 5, 4\]"):
        ops.router_gradient([gate_logits], None, choice.expand(2, 5, 4), *[None] * 6, 1, False)
    with pytest.raises(RuntimeError, match=r"grad_entropy_sum of type float64, got float32"):
        ops.router_gradient([gate_logits], *[None] * 7, scalars.float(), 1, False)


def test_segments_out_of_range_are_named():
    gate_logits = router()[0]
    for segments in (torch.full((5,), 2), torch.tensor([0, 1, 0, 5, 0])):
        with pytest.raises(IndexError, match=rf"segment_ids below n_segments = 2, got {segments.max()} in row"):
            router_statistics(gate_logits, k=2, segment_ids=segments, n_segments=2)
