"""The "huggingface" convention against transformers itself: a tiny random Mixtral and its real router_logits."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ava_ext import UnifiedLoss
from ava_ext.losses.auxiliary import AuxiliaryLoss

EXPERTS, K, LAYERS, VOCAB_SIZE = 6, 2, 3, 50
COEFFICIENT = 0.3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=EXPERTS,
        num_experts_per_tok=K,
        max_position_embeddings=32,
        output_router_logits=True,
        router_aux_loss_coef=COEFFICIENT,
        initializer_range=0.5,  # routers that have an opinion
    )
    return MixtralForCausalLM(config)


def batch(padded):
    tokens = torch.randint(1, VOCAB_SIZE, (3, 11), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(tokens)
    if padded:
        attention_mask[1, 7:] = 0
        attention_mask[2, :4] = 0
    return tokens, attention_mask


@pytest.mark.parametrize("padded", [False, True])
def test_auxiliary_loss_is_theirs(model, padded):
    tokens, attention_mask = batch(padded)
    router_logits = model(tokens, attention_mask=attention_mask).router_logits
    assert isinstance(router_logits, tuple) and len(router_logits) == LAYERS
    theirs = load_balancing_loss_func(router_logits, EXPERTS, K, attention_mask if padded else None)
    loss_fn = AuxiliaryLoss(K, load_balancing_weight=1.0, router_z_weight=0.0, load_balancing_convention="huggingface")
    ours = loss_fn(router_logits, row_mask=attention_mask.bool() if padded else None)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert abs(theirs - K) > 0.1  # not the value at perfect balance
    parameters = [parameter for name, parameter in model.named_parameters() if name.endswith(".gate.weight")]
    assert len(parameters) == LAYERS
    expected = torch.autograd.grad(theirs, parameters, retain_graph=True)
    for got, want in zip(torch.autograd.grad(ours, parameters), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * want.abs().max().item())


def test_unified_loss_is_the_loss_that_the_model_itself_computes(model):
    tokens, attention_mask = batch(padded=True)
    labels = tokens.masked_fill(attention_mask == 0, -100)
    output = model(tokens, attention_mask=attention_mask, labels=labels)
    loss_fn = UnifiedLoss(
        VOCAB_SIZE,
        primary_loss_type="standard",
        labels_are_shifted=False,
        num_experts=EXPERTS,
        num_experts_per_token=K,
        num_moe_layers=LAYERS,
        use_auxiliary_loss=True,
        load_balancing_weight=COEFFICIENT,
        load_balancing_convention="huggingface",
        router_z_weight=0.0,
    )
    ours = loss_fn(output.logits, labels, attention_mask, gate_logits=output.router_logits, return_detailed=True)
    torch.testing.assert_close(ours["aux_load_balancing"], COEFFICIENT * output.aux_loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours["total_loss"], output.loss, rtol=1e-6, atol=0)


def test_router_logits_of_the_model_in_every_term_of_the_router(model):
    tokens, attention_mask = batch(padded=True)
    output = model(tokens, attention_mask=attention_mask)
    chosen = tuple(logits.topk(K).indices for logits in output.router_logits)
    options = {
        "primary_loss_type": "standard",
        "labels_are_shifted": False,
        "num_experts": EXPERTS,
        "num_experts_per_token": K,
        "num_moe_layers": LAYERS,
        "use_moe_balancing": True,
        "expert_bias_rate": 0.0,  # the model has no bias
        "use_auxiliary_loss": True,
    }
    forms = {
        "tuple": (output.router_logits, None),
        "stack": (torch.stack(output.router_logits), None),
        "with the choices": (list(output.router_logits), chosen),
    }
    results = {}
    for form, (gate_logits, expert_indices) in forms.items():
        loss_fn = UnifiedLoss(VOCAB_SIZE, **options)
        arguments = {"gate_logits": gate_logits, "expert_indices": expert_indices}
        loss_fn(output.logits, tokens, attention_mask, **arguments)
        loss_fn.step()
        results[form] = loss_fn.get_loss_statistics()["moe_balancing"]
    counts = torch.stack(
        [torch.bincount(layer[attention_mask.bool().reshape(-1)].reshape(-1), minlength=EXPERTS) for layer in chosen]
    )
    for form, statistics in results.items():
        assert torch.equal(statistics["expert_counts"], counts.float()), form
        assert statistics["total_tokens"] == attention_mask.sum(), form
        violation = counts.amax(-1) / counts.float().mean(-1) - 1
        torch.testing.assert_close(statistics["max_violation"], violation, msg=form)
