"""The calls of the system that this library comes from, as typed there; values against plain PyTorch."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from ava_ext import AdaptiveMTPLoss, UnifiedLoss, create_unified_loss

generator = torch.Generator().manual_seed(0)
x, y = torch.randn(20, 100, generator=generator), torch.randint(0, 100, (20,), generator=generator)
x2, y2 = x.view(2, 10, 100), y.view(2, 10)


def test_options_read_as_attributes():
    loss_fn = create_unified_loss(
        {
            "vocab_size": 100, "hidden_size": 64, "primary_loss_type": "deepseek", "use_mtp": True,
            "num_future_tokens": 3, "use_ngram_penalty": True,
        }
    )  # fmt: skip
    assert loss_fn.vocab_size == 100 and loss_fn.use_mtp and loss_fn.use_ngram_penalty
    assert loss_fn.num_future_tokens == 3 and loss_fn.label_smoothing == 0.0
    with pytest.raises(AttributeError, match="options are fixed"):
        loss_fn.vocab_size = 5


def test_experts_come_with_their_choices():
    gates, chosen = torch.randn(20, 4, generator=generator), torch.randint(0, 4, (20, 2), generator=generator)
    loss_fn = UnifiedLoss(vocab_size=100, primary_loss_type="standard", num_experts=4, use_moe_balancing=True)
    loss = loss_fn(logits=x, targets=y, gate_logits=gates, expert_indices=chosen)
    torch.testing.assert_close(loss, cross_entropy(x, y))  # balanced, until something is committed
    load = 0.9 / 4 + 0.1 * torch.bincount(chosen.flatten(), minlength=4) / 40
    term = 0.01 * 4 * ((load - 1 / 4) * gates.softmax(-1).mean(0)).sum()
    second = loss_fn(logits=x, targets=y, gate_logits=gates, expert_indices=chosen)
    torch.testing.assert_close(second, cross_entropy(x, y) + term)


@pytest.mark.parametrize("options", [{"primary_loss_type": "adaptive_mtp"}, {"use_mtp": True, "mtp_type": "adaptive"}])
def test_adaptive_heads(options):
    loss_fn = UnifiedLoss(
        100, 64, adaptive_temperature=False, num_future_tokens=1, confidence_reg_strength=0.0, **options
    )
    confidence, other = torch.full((2, 1), 0.5), torch.zeros_like(x2)
    is_primary = "primary_loss_type" in options
    given = {"logits": other, "primary_logits": x2} if is_primary else {"logits": x2, "primary_logits": other}
    loss = loss_fn(targets=y2, additional_logits=[x2], confidence_scores=confidence, mtp_active=True, **given)
    head = cross_entropy(x2[:, :-1].flatten(0, 1), y2[:, 1:].flatten(), reduction="sum") / 20
    torch.testing.assert_close(loss, cross_entropy(x, y) + 0.1 * 0.5 * head)


@pytest.mark.parametrize(
    "make", [lambda: UnifiedLoss(100, 64, primary_loss_type="adaptive_mtp"), lambda: AdaptiveMTPLoss(100)]
)
def test_no_heads_are_fine_unless_they_are_asked_for(make):
    parts = make()(x2, y2, return_detailed=True)
    torch.testing.assert_close(parts["total_loss"], cross_entropy(x, y))
    assert parts["mtp_loss"] == 0 and parts["confidence_regularization"] == 0
    with pytest.raises(ValueError, match="mtp_active needs additional_logits"):
        make()(x2, y2, mtp_active=True)
