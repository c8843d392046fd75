"""A head under an adapter of peft: the merged weight, with the gradients of what it is made of."""

import pytest
import torch
from tiny_models import batch, loss_in_double, loss_of, tiny
from torch import nn

from ava_ext import UnifiedLoss

pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from ava_ext.integrations.transformers import attach_loss, fuse_lm_head, unfuse


def adapted(tied=False, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **({"lora_dropout": 0.0} | options))
    return peft.get_peft_model(tiny("Llama", tie_word_embeddings=tied), config).double()


def plain_loss(model):
    return UnifiedLoss.from_model(model.get_base_model(), primary_loss_type="standard")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["lm_head"], "use_dora": True},
        {"target_modules": ["lm_head"], "use_rslora": True, "lora_bias": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "tied": True, "ensure_weight_tying": True},
    ],
    ids=["lora", "dora", "rslora with bias", "modules to save", "tied modules to save"],
)
def test_adapted_head(options):
    model = adapted(**options)
    inner = model.get_base_model()
    inner.loss_function = loss_in_double
    expected = loss_of(model, **batch())
    assert any("lm_head" in name or "modules_to_save" in name for name in expected[1])
    del inner._loss_function
    fuse_lm_head(model, plain_loss(model))
    found = loss_of(model, **batch())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    with model.disable_adapter():
        without = model(**batch()).loss
    unfuse(model)
    inner.loss_function = loss_in_double
    with model.disable_adapter():
        torch.testing.assert_close(without, model(**batch()).loss, rtol=1e-12, atol=0)
    assert not torch.isclose(without, expected[0])


@pytest.mark.parametrize("autocast", [False, True])
def test_an_adapter_smaller_than_the_last_digit_of_its_head_counts(autocast):
    """As after the first steps of training a bfloat16 model, whose weight would swallow it."""
    torch.manual_seed(0)
    base = tiny("Llama", torch.bfloat16, hidden_size=64)
    base.lm_head.weight.data.normal_(0, 0.3)
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["lm_head"]))
    head = base.lm_head
    nn.init.normal_(head.lora_A["default"].weight, std=0.1)
    nn.init.normal_(head.lora_B["default"].weight, std=1e-3)
    assert head.lora_B["default"].weight.dtype == torch.float32
    inputs, hidden = batch(batch_size=8, n_tokens=32), []
    hook = head.register_forward_pre_hook(lambda head, inputs: hidden.append(inputs[0].detach().double()))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    weight, lora_A, lora_B = (
        part.weight.detach().double() for part in (head.base_layer, head.lora_A["default"], head.lora_B["default"])
    )
    without, expected = (
        loss_in_double(hidden[0] @ merged.T, inputs["labels"], 61) for merged in (weight, weight + 2 * lora_B @ lora_A)
    )
    fuse_lm_head(model, plain_loss(model))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = model(**inputs).loss.double()
    assert (found - expected).abs() < 0.2 * (without - expected).abs()


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"]}])
def test_an_adapter_for_each_text(options):
    """The fused head knows one weight; attach_loss computes with the logits of all of them."""
    options |= {"modules_to_save": ["lm_head"]} if options["target_modules"] == ["q_proj"] else {}
    model = adapted(**options)
    model.add_adapter("other", peft.LoraConfig(r=2, init_lora_weights=False, **options))
    model = model.double().eval()
    model.get_base_model().loss_function = loss_in_double
    of_texts = {"adapter_names": ["default", "other", "__base__"]}
    expected = model(**batch(), **of_texts).loss
    del model.get_base_model()._loss_function
    attach_loss(model, plain_loss(model))
    torch.testing.assert_close(model(**batch(), **of_texts).loss, expected, rtol=1e-12, atol=0)
    unfuse(model)
    fuse_lm_head(model, plain_loss(model))
    with pytest.raises(TypeError, match=r"hidden states alone, got \['adapter_names'\] too: use attach_loss"):
        model(**batch(), **of_texts)


def test_a_loss_that_adapters_have_frozen_is_noticed(tmp_path):
    transformers = pytest.importorskip("transformers")
    from ava_ext.integrations.transformers import UnifiedLossCallback, UnifiedLossTrainer

    model = tiny("Llama", torch.float32)
    loss_fn = UnifiedLoss.from_model(model, use_mtp=True, auto_step=False)
    later = peft.get_peft_model(fuse_lm_head(model, loss_fn), peft.LoraConfig(target_modules=["q_proj"]))
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=r"got \['mtp.* frozen: put the loss in after get_peft_model"):
        UnifiedLossTrainer(later, args, train_dataset=[], loss_fn=loss_fn)
    rows = [{name: value[0] for name, value in batch().items()}]
    plain = transformers.Trainer(later, args, train_dataset=rows, callbacks=[UnifiedLossCallback(loss_fn)])
    with pytest.raises(ValueError, match=r"UnifiedLossCallback: .* got \['mtp.* frozen"):
        plain.train()


def test_what_is_no_linear_layer_is_refused():
    model = adapted(target_modules=["lm_head"], lora_dropout=0.5)
    with pytest.raises(TypeError, match=r"lora_dropout=0.5: use lora_dropout=0.0"):
        fuse_lm_head(model.train(), plain_loss(model))
    other = peft.get_peft_model(tiny("Llama"), peft.LoHaConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(
        TypeError, match="expected a head that is one linear layer, got Linear with a forward of its own"
    ):
        fuse_lm_head(other, plain_loss(other))


def test_adapters_that_come_after_the_loss_are_noticed():
    """Base weight only would be a wrong loss without a gradient of the adapter."""
    model = tiny("Llama")
    fuse_lm_head(model, UnifiedLoss.from_model(model))
    later = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(TypeError, match=r"call unfuse\(model\) first"):
        later(**batch())


class Sharded(nn.Linear):
    def forward(self, hidden_states):
        return super().forward(hidden_states)


def test_weights_that_are_not_here_are_refused():
    model = tiny("Llama")
    loss_fn = UnifiedLoss.from_model(model)
    model.lm_head.to("meta")
    with pytest.raises(TypeError, match="meta device"):
        fuse_lm_head(model, loss_fn)
    model.lm_head = Sharded(16, 61)
    with pytest.raises(TypeError, match="a forward of its own"):
        fuse_lm_head(model, loss_fn)
    model.lm_head = nn.Linear(16, 61)
    model.lm_head._hf_hook = object()
    with pytest.raises(TypeError, match="moves to the device for each call"):
        fuse_lm_head(model, loss_fn)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["PromptTuning", "PrefixTuning"])
def test_prompts_that_are_learned(name, tmp_path):
    """A prompt makes labels and mask longer, a prefix the mask alone; the trainer's N is that of the loss."""
    transformers = pytest.importorskip("transformers")
    from ava_ext.integrations.transformers import UnifiedLossTrainer

    inputs = batch(batch_size=4)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["attention_mask"][:, -4:] = 0
    rows = [{name: value[row] for name, value in inputs.items()} for row in range(4)]
    torch.manual_seed(0)
    options = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(tiny("Llama", torch.float32), getattr(peft, f"{name}Config")(**options))
    masked = inputs | {"labels": inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)}
    expected = model(**masked).loss.item()
    args = {"report_to": [], "use_cpu": True, "max_steps": 1, "logging_steps": 1, "save_strategy": "no"}
    args |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "disable_tqdm": True}
    args = transformers.TrainingArguments(str(tmp_path), **args)
    trainer = UnifiedLossTrainer(model, args, train_dataset=rows, loss_fn=plain_loss(model))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
