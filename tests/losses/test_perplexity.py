"""Perplexity against exp of F.cross_entropy."""

import pytest
import torch
from support.allocations import Allocations
from torch.nn.functional import cross_entropy

from ava_ext.losses.perplexity import PerplexityLoss


def make_inputs():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    return logits, torch.tensor([[1, -100, 3], [6, 0, 2]]), torch.tensor([[1, 1, 1], [1, 0, 1]])


def test_value_and_gradient():
    logits, targets, mask = make_inputs()
    masked = targets.masked_fill(mask == 0, -100)
    for attention_mask, kept in ((None, targets), (mask, masked)):
        got = PerplexityLoss()(logits, targets, attention_mask, return_detailed=True)
        expected = cross_entropy(logits.reshape(-1, 7), kept.reshape(-1))
        torch.testing.assert_close(got["cross_entropy"], expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(got["total_loss"], expected.exp(), rtol=1e-12, atol=0)
    assert not PerplexityLoss()(logits.requires_grad_(), targets, return_detailed=True)["cross_entropy"].requires_grad
    assert torch.autograd.gradcheck(lambda x: PerplexityLoss()(x, targets, mask), logits)


def test_uniform_low_precision_and_no_row():
    uniform = PerplexityLoss()(torch.zeros(6, 10, dtype=torch.bfloat16), torch.arange(6))
    assert uniform.dtype == torch.float32 and uniform.item() == pytest.approx(10)
    logits = torch.full((3, 4), torch.nan, requires_grad=True)
    loss = PerplexityLoss()(logits, torch.full((3,), -100))
    loss.backward()
    assert loss == 1 and (logits.grad == 0).all()


def test_logits_are_read_where_they_are():
    """By the row kernels, in one pass: no copy in float32, no log_softmax beside them."""
    logits = torch.randn(2, 3, 501, dtype=torch.bfloat16, requires_grad=True)
    targets, mask = torch.tensor([[1, -100, 3], [6, 0, 2]]), torch.tensor([[1, 1, 1], [1, 0, 1]])
    with Allocations(501) as seen:
        loss = PerplexityLoss()(logits, targets, mask)
    assert len(seen.blocks - {logits.data_ptr()}) == 1  # the gradient, which the same pass writes
    rows = cross_entropy(logits.double().flatten(0, 1), targets.masked_fill(mask == 0, -100).flatten())
    torch.testing.assert_close(loss, rows.exp().float())


def test_compiles_without_a_graph_break():
    logits, targets, mask = make_inputs()
    compiled = torch.compile(PerplexityLoss(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(logits, targets, mask), PerplexityLoss()(logits, targets, mask), rtol=1e-12, atol=0
    )


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"targets of shape \[3\], got \[4\]"):
        PerplexityLoss()(torch.zeros(3, 5), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="perplexity_loss: expected logits of real numbers, got complex64"):
        PerplexityLoss()(torch.zeros(3, 5, dtype=torch.complex64), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_targets_of_other_integer_types(dtype):
    logits, targets, mask = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5)), torch.tensor([[1, 1, 0, 1, 1]] * 2)
    loss_fn = PerplexityLoss()
    torch.testing.assert_close(loss_fn(logits, targets.to(dtype), mask), loss_fn(logits, targets, mask), rtol=0, atol=0)


def test_targets_that_are_no_ids_are_named():
    with pytest.raises(
        ValueError, match=r"perplexity_loss: expected targets to be integers of shape \[\.\.\.\], got float32"
    ):
        PerplexityLoss()(torch.zeros(2, 3), torch.tensor([0.0, 1.7]))
