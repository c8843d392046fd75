"""The loss's expert_bias moves a model's own routers, which the loss hears from."""

import copy

import pytest
import torch
from tiny_models import batch, tiny

from ava_ext import UnifiedLoss

pytest.importorskip("transformers", reason="transformers is not installed")

from ava_ext.integrations.transformers import attach_loss, bind_expert_bias, fuse_lm_head

RATE = 0.5


def bound(name, put=fuse_lm_head, **options):
    model = tiny(name, num_hidden_layers=3)
    options = {"use_moe_balancing": True, "gradient_balance_weight": 0.0, "expert_bias_rate": RATE} | options
    fused = {"fused": put is fuse_lm_head}
    loss_fn = UnifiedLoss.from_model(model, **fused, primary_loss_type="standard", auto_step=False, **options)
    put(model, loss_fn)
    return model, loss_fn, bind_expert_bias(model, loss_fn)


def routers(model):
    return [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]


@pytest.mark.parametrize("name", ["DeepseekV3", "Glm4Moe"])
@pytest.mark.parametrize("put", [fuse_lm_head, attach_loss])
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_one_step_of_the_rule(name, put, use_reentrant):
    """b += rate * sign(mean(c) - c), with the choices of the rows that are no padding, counted once."""
    model, loss_fn, _ = bound(name, put)
    assert loss_fn.num_moe_layers == 2 and loss_fn.router_score == "sigmoid"
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()
    chosen = []
    hooks = [router.register_forward_hook(lambda _, __, output: chosen.append(output[2])) for router in routers(model)]
    model(**batch()).loss.backward()
    for hook in hooks:
        hook.remove()
    keep = batch()["attention_mask"].flatten().bool()
    counts = torch.stack([torch.bincount(indices[keep].flatten(), minlength=4) for indices in chosen[:2]]).double()
    expected = RATE * torch.sign(counts.mean(1, keepdim=True) - counts)
    assert expected.any()
    loss_fn.step()
    torch.testing.assert_close(loss_fn.moe_balancer.expert_bias.double(), expected)
    saved = model.state_dict()  # fresh before the next forward too
    for layer, router in enumerate(routers(model)):
        torch.testing.assert_close(router.e_score_correction_bias.double(), expected[layer])
    assert sum(name.endswith("e_score_correction_bias") for name in saved) == 2


def test_routers_choose_by_the_bias():
    model, loss_fn, _ = bound("DeepseekV3")
    loss_fn.moe_balancer.expert_bias[0, 2:] = 9.0
    model(**batch()).loss.backward()
    loss_fn.step()
    n_choices = 2 * batch()["attention_mask"].sum()
    assert loss_fn.get_loss_statistics()["moe_balancing"]["expert_counts"][0].tolist() == [0, 0, *[n_choices / 2] * 2]


@pytest.mark.parametrize("name", ["Ernie4_5_Moe", "MiniMaxM2", "HYV3"])
def test_routers_whose_bias_is_elsewhere(name):
    """In a module within the router, of shape [1, n_experts], or in the block around it."""
    model, loss_fn, _ = bound(name)
    loss_fn.moe_balancer.expert_bias[:, 2:] = 9.0
    model(**batch()).loss.backward()
    for layer, holder in enumerate(routers(model)):
        held = holder.e_score_correction_bias.flatten().float()
        assert torch.equal(held, loss_fn.moe_balancer.expert_bias[layer])
    loss_fn.step()
    counts = loss_fn.get_loss_statistics()["moe_balancing"]["expert_counts"]
    n_choices = 2 * batch()["attention_mask"].sum()
    assert not counts[:, :2].any() and (counts.sum(1) == n_choices).all()
    assert torch.equal(loss_fn.moe_balancer.expert_bias[:, :2], torch.full_like(counts[:, :2], RATE).float())


def test_routers_that_only_images_go_through_keep_their_bias():
    """They choose for no token of the text, and where there are no images not at all."""
    model = tiny("DeepseekV3")
    model.vision_tower = copy.deepcopy(model.model.layers[1].mlp)
    loss_fn = UnifiedLoss.from_model(model, use_moe_balancing=True, auto_step=False)
    bind_expert_bias(fuse_lm_head(model, loss_fn), loss_fn)
    model(**batch()).loss.backward()
    loss_fn.step()
    model.state_dict()
    assert routers(model)[0].e_score_correction_bias.any() and not routers(model)[1].e_score_correction_bias.any()


def test_the_bias_of_the_model_is_the_beginning():
    model = tiny("DeepseekV3")
    bias = torch.tensor([0.5, -0.25, 0.0, 0.125])
    routers(model)[0].e_score_correction_bias.copy_(bias)
    loss_fn = UnifiedLoss.from_model(model, use_moe_balancing=True, auto_step=False)
    binding = bind_expert_bias(model, loss_fn)
    assert torch.equal(loss_fn.moe_balancer.expert_bias[0], bias)
    inputs = batch()
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits  # a loop of one's own
    loss = loss_fn(logits, inputs["labels"], attention_mask=inputs["attention_mask"], **binding.take())
    loss.backward()
    assert routers(model)[0].weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="expected a forward through 1 routers before the loss, got 0"):
        binding.take()
    binding.remove()
    model(**inputs)
    assert not binding._chosen


@pytest.mark.parametrize("has_loss", [False, True])
def test_a_loaded_bias_is_the_beginning_too(has_loss):
    model, loss_fn, _ = bound("DeepseekV3")
    saved = model.state_dict()
    bias = torch.tensor([0.5, -0.25, 0.0, 0.125])
    for name, value in saved.items():
        if name.endswith("e_score_correction_bias"):
            saved[name] = bias
        elif name.endswith(".expert_bias"):
            saved[name] = value + 1.0
    if not has_loss:  # as save_pretrained leaves it out
        saved = {name: value for name, value in saved.items() if not name.startswith("unified_loss.")}
    model.load_state_dict(saved, strict=has_loss)
    expected = saved["unified_loss.moe_balancer.expert_bias"][0] if has_loss else bias
    assert torch.equal(loss_fn.moe_balancer.expert_bias[0], expected)
    loss_fn.moe_balancer.expert_bias.add_(0.5)
    model.load_state_dict({}, strict=False)  # adapters, for instance: nothing of routers
    model(**batch())
    assert torch.equal(routers(model)[0].e_score_correction_bias, expected + 0.5)


def test_a_copy_has_a_binding_of_its_own():
    model, loss_fn, _ = bound("DeepseekV3")
    other = copy.deepcopy(model)
    other(**batch()).loss.backward()
    other.unified_loss.step()
    other(**batch())
    assert routers(other)[0].e_score_correction_bias.any()
    model(**batch())
    assert not routers(model)[0].e_score_correction_bias.any() and not loss_fn.moe_balancer.expert_bias.any()


def test_without_its_binding_a_model_is_as_before():
    model, loss_fn, binding = bound("DeepseekV3")
    binding.remove()
    model(**batch())  # the model's own router logits, and the loss's own choice of them
    bind_expert_bias(model, loss_fn)
    model(**batch())
    assert model.expert_bias_binding is not binding


def test_what_fits_not_is_refused():
    model = tiny("DeepseekV3")
    with pytest.raises(ValueError, match="expected a loss with use_moe_balancing=True"):
        bind_expert_bias(model, UnifiedLoss.from_model(model))
    with pytest.raises(ValueError, match="expected num_moe_layers = 3 routers"):
        bind_expert_bias(model, UnifiedLoss.from_model(model, use_moe_balancing=True, num_moe_layers=3))
    dense = tiny("Llama")
    with pytest.raises(ValueError, match="got 0"):
        bind_expert_bias(dense, UnifiedLoss.from_model(dense, use_moe_balancing=True, num_experts=4))
