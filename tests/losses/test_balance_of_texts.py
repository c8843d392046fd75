"""Load balancing of each text by itself in UnifiedLoss: batch rows, packed texts, masks, one text after the other."""

import pytest
import torch
from support.strategies import Numbers

from ava_ext import UnifiedLoss
from ava_ext.losses.auxiliary import load_balancing_loss
from ava_ext.ops import router_statistics
from ava_ext.sequences import text_numbers

V, E, K = 7, 4, 2
SHAPE = (2, 6)


def make_loss(**options):
    return UnifiedLoss(
        V,
        primary_loss_type="standard",
        num_experts=E,
        num_experts_per_token=K,
        use_auxiliary_loss=True,
        load_balancing_per_sequence=True,
        load_balancing_weight=0.3,
        **options,
    )


def make_inputs(n_layers=1):
    numbers = Numbers(0)
    targets = numbers.integers(0, V, *SHAPE)
    gates = [numbers.leaf(*SHAPE, E, scale=2.0) for _ in range(n_layers)]
    return numbers.normal(*SHAPE, V), targets, gates


def one_after_the_other(gates, texts):
    """texts: lists of (b, t)."""
    losses = []
    for gate in gates:
        for text in texts:
            rows = torch.stack([gate[b, t] for b, t in text])
            losses.append(load_balancing_loss(router_statistics(rows, k=K), k=K))
    return 0.3 * torch.stack(losses).mean()


def test_an_empty_batch():
    logits, gates = torch.randn(0, 5, V, requires_grad=True), torch.randn(0, 5, E, requires_grad=True)
    loss = make_loss()(logits, torch.zeros(0, 5, dtype=torch.long), gate_logits=gates)
    loss.backward()
    assert loss == 0 and gates.grad.shape == (0, 5, E)


PACKED = [[(0, 0), (0, 1)], [(0, 2), (0, 3), (0, 4), (0, 5)], [(1, t) for t in range(5)], [(1, 5)]]


@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("kind", ["rows", "segment_ids", "position_ids", "cu_seqlens", "mask"])
def test_against_one_text_after_the_other(kind, n_layers):
    logits, targets, gates = make_inputs(n_layers)
    texts, given = PACKED, {}
    if kind == "rows":
        texts = [[(b, t) for t in range(6)] for b in range(2)]
    elif kind == "segment_ids":
        given = {"segment_ids": torch.tensor([[3, 3, 5, 5, 5, 5], [5, 5, 5, 5, 5, 3]])}
    elif kind == "position_ids":
        given = {"position_ids": torch.tensor([[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0]])}
    elif kind == "cu_seqlens":
        given = {"cu_seqlens": torch.tensor([0, 2, 6, 11, 12])}
    else:
        mask = torch.ones(SHAPE)
        mask[0, 3:] = mask[1] = 0
        texts, given = [[(0, 0), (0, 1), (0, 2)]], {"attention_mask": mask}  # the second text has no row
    loss_fn = make_loss(num_moe_layers=n_layers)
    parts = loss_fn(logits, targets, gate_logits=gates, **given, return_detailed=True)
    expected = one_after_the_other(gates, texts)
    torch.testing.assert_close(parts["aux_load_balancing"], expected.detach(), rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(expected, gates)
    without_z = make_loss(num_moe_layers=n_layers, router_z_weight=0.0)(logits, targets, gate_logits=gates, **given)
    torch.testing.assert_close(torch.autograd.grad(without_z, gates), wanted, rtol=1e-9, atol=1e-13)


def test_other_terms_are_those_of_the_batch():
    logits, targets, gates = make_inputs(2)
    options = {"num_moe_layers": 2, "use_moe_balancing": True, "expert_bias_rate": 0.0}
    parts = make_loss(**options)(logits, targets, gate_logits=gates, return_detailed=True)
    whole = UnifiedLoss(
        V, primary_loss_type="standard", num_experts=E, num_experts_per_token=K, use_auxiliary_loss=True, **options
    )(logits, targets, gate_logits=gates, return_detailed=True)
    for name in ("aux_router_z", "moe_balancing_term", "moe_cv", "moe_max_violation"):
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=1e-15)
    assert parts["aux_load_balancing"] > whole["aux_load_balancing"]


ONE_TEXT = {"cu_seqlens": torch.tensor([0, 12])}


@pytest.mark.parametrize(
    "packing",
    [
        {},
        {"cu_seqlens": torch.tensor([0, 2, 6, 11, 12])},
        {"segment_ids": torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])},
        # more texts than cu_seqlens alone would allow
        {"segment_ids": torch.arange(12).view(SHAPE), **ONE_TEXT},
        {"position_ids": torch.zeros(SHAPE, dtype=torch.int64), **ONE_TEXT},
    ],
)
def test_compiled(packing):
    (logits, targets, gates), loss_fn = make_inputs(), make_loss()
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    got, want = (f(logits, targets, gate_logits=gates[0], **packing) for f in (compiled, loss_fn))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(loss, gates) for loss in (got, want))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-13)


def test_the_numbers_of_texts():
    segments = torch.tensor([[4, 4, 2], [2, 2, 2]])
    numbers, n_texts = text_numbers((2, 3), segments, None, torch.device("cpu"))
    assert numbers.tolist() == [0, 0, 1, 2, 2, 2] and n_texts == 3
    numbers, n_texts = text_numbers((2, 3), None, None, torch.device("cpu"))
    assert numbers.tolist() == [0, 0, 0, 1, 1, 1] and n_texts == 2


def test_bad_input_is_named():
    logits, targets, gates = make_inputs()
    with pytest.raises(ValueError, match="a row for each of the 12 targets, got 10"):
        make_loss()(logits, targets, gate_logits=gates[0][:, :5])
    with pytest.raises(ValueError, match="aux_load_balancing needs sequences"):
        make_loss()(logits[0], targets[0], gate_logits=gates[0][0])
    with pytest.raises(ValueError, match="needs load_balancing_convention='switch', got 'huggingface'"):
        make_loss(load_balancing_convention="huggingface")
