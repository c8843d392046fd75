"""A model whose forward computes the loss gives the loss and the gradients that it would compute itself, in float64."""

import contextlib
import copy
import pickle
import threading
import weakref

import pytest
import torch
from tiny_models import SIZES, V, batch, gradients, loss_of, own_loss, tiny, tiny_aligned, with_options_of_text
from torch.nn.utils import prune

from ava_ext import UnifiedLoss

pytest.importorskip("transformers", reason="transformers is not installed")

from ava_ext.integrations.transformers import (
    UnifiedLossCallback,
    attach_loss,
    bind_expert_bias,
    causal_lm_loss,
    fuse_lm_head,
    trainer_loss,
    unfuse,
)

# what differs between families: nothing; one weight for embedding and head; a soft cap; a load balancing of its own;
# another name of the backbone; a bias of the head; a scale of the logits
FAMILIES = {
    "Llama": {},
    "Llama tied": {"tie_word_embeddings": True},
    "Gemma2": {"final_logit_softcapping": 3.0},
    "Mixtral": {"output_router_logits": True, "router_aux_loss_coef": 0.3},
    "GPT2": {},
    "Phi": {},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
}


def family(name, **options):
    return tiny(name.split()[0], **FAMILIES[name], **options)


def plain_loss(model, fused=True, **options):
    return UnifiedLoss.from_model(model, fused=fused, primary_loss_type="standard", **options)


def assert_same(found, expected, rtol=1e-12):
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=0)
    assert found[1].keys() == expected[1].keys()
    torch.testing.assert_close(found[1], expected[1], rtol=1e3 * rtol, atol=rtol / 10)


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_head_is_the_models_own_loss(name):
    model = family(name)
    expected = own_loss(model, **batch())
    fuse_lm_head(model, plain_loss(model))
    assert_same(loss_of(model, **batch()), expected)
    assert "logits" not in model(**batch())


@pytest.mark.parametrize("name", FAMILIES)
def test_attached_loss_is_the_models_own_loss(name):
    model = family(name)
    expected, logits = own_loss(model, **batch()), model(**batch()).logits
    attach_loss(model, plain_loss(model, fused=False))
    assert_same(loss_of(model, **batch()), expected)
    assert torch.equal(model(**batch()).logits, logits)


def test_hooks_of_the_head_run():
    """In one of them prune makes the weight; what another does to the logits has to be what the loss does."""
    model = family("Llama")
    expected = own_loss(model, **batch())[0]
    prune.identity(model.lm_head, "weight").weight.detach().zero_()  # as stale as it can be
    fuse_lm_head(model, plain_loss(model))
    torch.testing.assert_close(model(**batch()).loss, expected, rtol=1e-12, atol=0, check_dtype=False)
    model.lm_head.register_forward_hook(lambda head, inputs, output: 3 * output)
    with pytest.raises(ValueError, match=r"applies logit_scale=3\.0"):
        model(**batch())


@pytest.mark.parametrize("name", ["Granite", "Cohere"])
def test_a_loss_without_the_models_scale_is_refused(name):
    """It would be silently wrong."""
    model = family(name)
    fuse_lm_head(model, plain_loss(model, fused=False))
    with pytest.raises(
        ValueError, match=r"applies logit_scale=0\.25 .*got logit_scale=1\.0: .*\(model, logit_scale=0\.25"
    ):
        model(**batch())


@pytest.mark.parametrize("name", ["Llava of Cohere", "Gemma3", "MiniCPM3", "PaliGemma of Gemma2"])
def test_what_a_model_does_to_its_logits_is_what_from_model_says(name):
    """Models around a text model may leave out its scale or cap; MiniCPM3 divides the hidden states, not the logits."""
    model, inputs = with_options_of_text(name), batch()
    expected = own_loss(model, **inputs)
    hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
    direct = plain_loss(model)
    if name != "MiniCPM3":
        head = model.get_output_embeddings().weight
        given = {"hidden_states": hidden, "lm_head_weight": head, "attention_mask": inputs["attention_mask"]}
        torch.testing.assert_close(direct(targets=inputs["labels"], **given).detach(), expected[0])
    fuse_lm_head(model, direct)
    assert_same(loss_of(model, **inputs), expected)


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_logits_are_as_before_without_labels_and_in_evaluation(name):
    model, inputs = family(name).eval(), batch()
    expected = model(**inputs)
    labels = inputs.pop("labels")
    fuse_lm_head(model, plain_loss(model))
    assert torch.equal(model(**inputs).logits, expected.logits)
    assert torch.equal(model(inputs["input_ids"], inputs["attention_mask"]).logits, expected.logits)  # by position
    found = model(**inputs, labels=labels)
    assert torch.equal(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss.double(), rtol=1e-6, atol=0)
    assert "logits" not in model(**inputs, labels=labels, skip_logits=True)
    as_tuple = model(**inputs, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], found.loss) and torch.equal(as_tuple[1], expected.logits)
    generated = model.generate(inputs["input_ids"][:, :3], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (3, 6)


@pytest.mark.parametrize("change", [lambda logits: logits.float(), lambda logits: logits.to(torch.float32)])
def test_logits_in_evaluation_have_the_precision_of_the_models(change):
    """Mamba gives them in float32, Beam caps them there."""
    model = family("Gemma2", dtype=torch.bfloat16).eval()
    model.lm_head.register_forward_hook(lambda head, inputs, logits: change(logits))
    expected = model(**batch()).logits
    assert expected.dtype == torch.float32
    fuse_lm_head(model, plain_loss(model))
    torch.testing.assert_close(model(**batch()).logits, expected, rtol=0, atol=0)


class AsksForTheShape(torch.nn.Module):
    """First in the bases of a model that asks for its logits' shape (Inkling 2, xLSTM)."""

    def forward(self, *arguments, **options):
        shapes = []
        hook = self.lm_head.register_forward_hook(lambda head, inputs, logits: shapes.append((logits / 2).shape))
        output = super().forward(*arguments, **options)
        hook.remove()
        assert shapes == [(3, 9, V)]
        return output


def test_shape_of_logits_that_are_not_there():
    model, inputs = family("Llama"), batch()
    expected = own_loss(model, **inputs)
    model.__class__ = type("Asks", (AsksForTheShape, type(model)), {})
    fuse_lm_head(model, plain_loss(model))
    assert_same(loss_of(model, **inputs), expected)


class HasModelWithin(torch.nn.Module):
    """First in the bases of a model whose output has that of a model within it, as InstructBLIP's."""

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.hidden_states = type(output)(logits=output.logits, cache=output.cache)
        return output


@pytest.mark.parametrize("is_training", [True, False])
def test_no_output_has_logits_that_are_not_there(is_training):
    model = family("Llama").train(is_training)
    model.__class__ = type("Around", (HasModelWithin, type(model)), {})
    fuse_lm_head(model, plain_loss(model))
    within = model(**batch()).hidden_states
    assert "logits" not in within and within.cache is not None


def test_unfuse_gives_the_model_back():
    model = family("Llama")
    before, keys = own_loss(model, **batch()), set(model.state_dict())
    attributes = set(vars(model))
    loss_fn = plain_loss(model)
    fuse_lm_head(model, loss_fn)
    assert unfuse(model) is loss_fn
    assert set(model.state_dict()) == keys and set(vars(model)) == attributes
    assert type(model).__mro__[0].__module__.startswith("transformers.") and type(model.lm_head) is torch.nn.Linear
    assert_same(own_loss(model, **batch()), before)
    with pytest.raises(ValueError, match="expected a model with a loss"):
        unfuse(model)


def test_unfuse_where_accelerate_has_wrapped_forward():
    """Its forward in bfloat16 stays in the instance, and is of the class with the loss."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = family("Llama", dtype=torch.float32).eval()
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs).logits.float()
    fuse_lm_head(model, plain_loss(model))
    accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    assert "forward" in vars(model)
    unfuse(model)
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("put", [fuse_lm_head, attach_loss])
@pytest.mark.parametrize("is_dispatched_first", [True, False])
def test_a_model_that_accelerate_has_dispatched(put, is_dispatched_first):
    """As from_pretrained(device_map="auto") makes it where there are several devices."""
    accelerate = pytest.importorskip("accelerate")
    model, inputs = family("Llama"), batch()
    expected = own_loss(model, **inputs)
    steps = [lambda: accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)]
    steps.insert(is_dispatched_first, lambda: put(model, plain_loss(model)))
    for step in steps:
        step()
    assert_same(loss_of(model, **inputs), expected)
    assert_same(loss_of(copy.deepcopy(model), **inputs), expected)
    logits = model.eval()(**inputs).logits
    unfuse(model)
    assert torch.equal(model(**inputs).logits, logits)


def test_the_loss_is_computed_where_the_logits_are():
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny("Mixtral")
    model.lm_head.to("meta")  # another device, where nothing has values
    hooks.add_hook_to_module(model.lm_head, hooks.AlignDevicesHook("meta"))
    attach_loss(model, UnifiedLoss.from_model(model, use_auxiliary_loss=True))
    assert model(**batch()).loss.is_meta


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_with_its_own_weights(make_copy):
    model = fuse_lm_head(family("Llama"), plain_loss(family("Llama")))
    other = make_copy(model)
    expected = loss_of(model, **batch())
    model.zero_grad()
    assert_same(loss_of(other, **batch()), expected)
    assert not gradients(model)
    assert other.unified_loss is not model.unified_loss and type(other) is type(model)


def test_the_loss_function_of_a_fused_model_can_be_asked_for():
    """By whoever looks at the attributes of a model; called, it would cap the logits twice."""
    model = family("Gemma2")
    fuse_lm_head(model, plain_loss(model))
    assert hasattr(model, "loss_function")
    with pytest.raises(ValueError, match=r"expected a loss without logit_softcap, got 3\.0"):
        model.loss_function(torch.zeros(1, 2, V), torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_loss_function_goes_with_its_model(make_copy):
    model = family("Llama")
    loss_fn = UnifiedLoss.from_model(model, fused=False)  # learns its temperature
    model.loss_function = causal_lm_loss(loss_fn)
    copied = make_copy(model)
    torch.testing.assert_close(copied(**batch()).loss, model(**batch()).loss, rtol=0, atol=0)
    copied(**batch())
    assert loss_fn.get_loss_statistics()["temperature"]["count"] == 1


def test_labels_follow_the_logits_of_a_model_that_is_spread_over_devices():
    logits, labels = torch.empty(3, 9, V, device="meta"), batch()["labels"]
    loss = causal_lm_loss(UnifiedLoss(V, primary_loss_type="standard").to("meta"))
    assert loss(logits, labels).device.type == loss(logits, shift_labels=labels).device.type == "meta"


@pytest.mark.parametrize("put", [fuse_lm_head, attach_loss])
def test_micro_batches_add_up_to_the_batch(put):
    """Also what the model adds to its loss, which is a mean of each call: by its share of the tokens."""
    model = family("Mixtral", num_local_experts=1, num_experts_per_tok=1)  # one expert: its load balancing is constant
    inputs = batch()
    expected = own_loss(model, **inputs)
    loss_fn = plain_loss(model, num_experts=None, num_experts_per_token=None)
    put(model, loss_fn)
    n_items = loss_fn.count_items(inputs["labels"], inputs["attention_mask"])
    total = 0.0
    for row in range(3):
        micro_batch = {name: value[row : row + 1] for name, value in inputs.items()}
        loss = model(**micro_batch, num_items_in_batch=n_items).loss
        loss.backward()
        total = total + loss.detach()
    assert_same((total, gradients(model)), expected)


class AddsDecay(torch.nn.Module):
    """First in the bases of a model that adds to its loss without a word in its output, as Bamba does."""

    def forward(self, *arguments, labels=None, **options):
        output = super().forward(*arguments, labels=labels, **options)
        if labels is not None:
            output.loss = output.loss + 0.3 * self.lm_head.weight.square().mean()
        return output


@pytest.mark.parametrize("put", [fuse_lm_head, attach_loss])
def test_what_a_model_adds_is_shared_and_reported(put):
    model, inputs = family("Llama"), batch()
    model.__class__ = type("Adds", (AddsDecay, type(model)), {})
    expected = own_loss(model, **inputs)
    loss_fn = plain_loss(model)
    put(model, loss_fn)
    model.report_parts = True
    n_items = loss_fn.count_items(inputs["labels"], inputs["attention_mask"])
    total = added = 0.0
    for row in range(3):
        micro_batch = {name: value[row : row + 1] for name, value in inputs.items()}
        loss = model(**micro_batch, num_items_in_batch=n_items).loss
        loss.backward()
        total, added = total + loss.detach(), added + model.loss_parts["model_aux_loss"]
    assert_same((total, gradients(model)), expected)
    torch.testing.assert_close(added, 0.3 * model.lm_head.weight.detach().square().mean())


@pytest.mark.parametrize("put", [fuse_lm_head, attach_loss])
@pytest.mark.parametrize("n_items", [0, torch.tensor(0)])
def test_what_a_model_adds_where_nothing_counts_in_the_whole_batch(put, n_items):
    model, inputs = family("Mixtral"), batch()
    put(model, plain_loss(model))
    inputs["labels"].fill_(-100)
    loss, found = loss_of(model, **inputs, num_items_in_batch=n_items)
    assert loss == 0
    assert found and all(gradient.count_nonzero() == 0 for gradient in found.values())


@pytest.mark.parametrize("put", [fuse_lm_head, attach_loss])
def test_a_forward_that_raises_keeps_no_activations(put):
    """The next batch may need the memory."""
    model = family("Llama")
    put(model, plain_loss(model))
    kept = []

    def run_out_of_memory(head, inputs, output):
        kept.append(weakref.ref(inputs[0]))
        raise torch.OutOfMemoryError("of the logits")

    hook = model.lm_head.register_forward_hook(run_out_of_memory)
    with contextlib.suppress(torch.OutOfMemoryError):
        model(**batch())
    hook.remove()
    assert kept[0]() is None
    model(**batch()).loss.backward()


@pytest.mark.parametrize("put", [fuse_lm_head, attach_loss])
def test_another_thread_may_use_the_model_meanwhile(put):
    model = family("Llama").train()
    inputs = batch()
    without_labels = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**without_labels).logits
    put(model, plain_loss(model))
    expected, found = loss_of(model, **inputs), []

    def in_another_thread(*_):
        hook.remove()
        thread = threading.Thread(
            target=lambda: found.append((model(**without_labels).logits, model(**inputs).loss.detach()))
        )
        thread.start()
        thread.join()

    hook = model.model.register_forward_hook(in_another_thread)
    assert_same(loss_of(model, **inputs), expected)
    torch.testing.assert_close(found, [(logits, expected[0])])


@pytest.mark.parametrize("put", [fuse_lm_head, attach_loss])
def test_parts_add_up(put):
    model = family("Mixtral")
    put(model, plain_loss(model, z_loss_weight=0.1))
    model.report_parts = True
    loss = model(**batch()).loss
    parts = model.loss_parts
    assert torch.equal(parts["total_loss"], loss.detach()) and not parts["total_loss"].requires_grad
    assert parts["model_aux_loss"] > 0
    torch.testing.assert_close(parts["main_loss"] + parts["z_loss"] + parts["model_aux_loss"], loss.detach())
    copy.deepcopy(model)  # nothing of the graph is kept


@pytest.mark.parametrize("put", [fuse_lm_head, attach_loss])
@pytest.mark.parametrize(
    ("name", "weight"), [("Mixtral", {"router_aux_loss_coef": 0.3}), ("JetMoe", {"aux_loss_coef": 0.3})]
)
def test_router_terms_of_the_loss_see_the_padding(put, name, weight):
    """In place of the model's own load balancing; equal to it, padding left out."""
    model = tiny(name, output_router_logits=True, **weight)
    inputs = batch()
    expected = own_loss(model, **inputs)
    model.config.output_router_logits = False
    options = {"use_auxiliary_loss": True, "load_balancing_weight": 0.3, "router_z_weight": 0.0}
    put(model, plain_loss(model, load_balancing_convention="huggingface", **options))
    assert_same(loss_of(model, **inputs), expected, rtol=1e-7)  # transformers counts in float32
    assert "router_logits" not in model(**inputs)
    with pytest.raises(ValueError, match="got both"):
        model(**inputs, output_router_logits=True)


@pytest.mark.parametrize("put", [fuse_lm_head, attach_loss])
def test_routers_that_give_probabilities_are_refused(put):
    """Gemma 4: what it calls router_logits has gone through a softmax, and would go through another."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8}
    sizes = SIZES | {"head_dim": 8, "hidden_size_per_layer_input": 0, "layer_types": ["full_attention"] * 2}
    model = Gemma4ForCausalLM(Gemma4TextConfig(**sizes, **experts, per_layer_config={}))
    rows = model(**batch(), output_router_logits=True).router_logits[0].sum(1)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    put(model, plain_loss(model, put is fuse_lm_head, use_auxiliary_loss=True, router_score="softmax"))
    with pytest.raises(ValueError, match="expected router_logits, got probabilities"):
        model(**batch())


@pytest.mark.parametrize("put", [fuse_lm_head, attach_loss])
@pytest.mark.parametrize("n_checkpointed", [1, 2])
def test_router_terms_in_layers_of_reentrant_checkpointing_are_refused(put, n_checkpointed):
    """There a layer runs without grad, and what its router gives would train nothing."""
    model = tiny("Mixtral").train()
    put(model, plain_loss(model, use_auxiliary_loss=True, router_z_weight=1.0))
    expected = loss_of(model, **batch())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(loss_of(model, **batch()), expected)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.model.layers[0].gradient_checkpointing = n_checkpointed == 2
    with pytest.raises(ValueError, match=r"expected router logits with a gradient.*use_reentrant=True"):
        model(**batch())
    with torch.no_grad():
        assert model(**batch()).loss == expected[0]
    assert model.eval()(**batch()).loss == expected[0]


def test_multi_token_prediction_trains_with_the_model():
    model = family("Llama")
    losses = [plain_loss(model, use_mtp=True, num_future_tokens=2) for _ in range(2)]
    losses[1].load_state_dict(losses[0].state_dict())
    by_hand = copy.deepcopy(model)
    hidden = by_hand.model(batch()["input_ids"], attention_mask=batch()["attention_mask"]).last_hidden_state
    loss_fn = losses[1].double()
    loss = loss_fn(
        by_hand.lm_head(hidden), batch()["labels"], attention_mask=batch()["attention_mask"], hidden_states=hidden
    )
    loss.backward()
    expected = {"unified_loss." + name: g for name, g in gradients(loss_fn).items()} | gradients(by_hand)
    for put in (fuse_lm_head, attach_loss):
        put(model, losses[0])
        model.double()
        assert_same(loss_of(model, **batch()), (loss.detach(), expected))
        unfuse(model)


@pytest.mark.parametrize("name", ["Llama", "Cohere", "Gemma2"])
def test_depths_that_share_the_head_have_logits_as_the_model_has(name):
    """With attach_loss they would be those of the head alone, without the model's scale or soft cap."""
    model = family(name)
    for options in ({"mtp_share_head": True}, {"mtp_type": "hidden_states"}):
        loss_fn = plain_loss(model, False, use_mtp=True, num_future_tokens=1, **options)
        if name == "Llama":
            unfuse(attach_loss(model, loss_fn))
        else:
            with pytest.raises(ValueError, match=f"attach_loss: {name}.* got mtp_share_head=.*use fuse_lm_head"):
                attach_loss(model, loss_fn)
    attach_loss(model, plain_loss(model, False, use_mtp=True))  # with heads of its own


def test_packed_texts_and_shifted_labels():
    """Where texts begin reaches the loss: no label is predicted across two. shift_labels are rows already."""
    model = family("Llama")
    inputs = batch()
    del inputs["attention_mask"]
    inputs["position_ids"] = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]).expand(3, 9)
    masked = inputs["labels"].clone()
    masked[:, 4] = -100
    expected = own_loss(model, **(inputs | {"labels": masked}))
    fuse_lm_head(model, plain_loss(model))
    assert_same(loss_of(model, **inputs), expected)
    shift_labels = torch.cat([masked[:, 1:], torch.full((3, 1), -100)], 1)
    without = {name: value for name, value in inputs.items() if name != "labels"}
    assert_same(loss_of(model, **without, shift_labels=shift_labels), expected)
    weights = torch.rand(3, 9)
    with_weights = model(**inputs, loss_inputs={"token_weights": weights}).loss
    assert not torch.isclose(with_weights, expected[0])


@pytest.mark.parametrize(
    "begins", [{"seq_idx": torch.tensor([[0] * 4 + [1] * 5])}, {"cu_seq_lens_q": torch.tensor([0, 4, 9])}]
)
def test_packed_texts_without_positions(begins):
    """As DataCollatorWithFlattening gives them for attention or a state space that tells texts apart by these."""
    model = family("Llama")
    inputs = {"input_ids": batch()["input_ids"][:1], "labels": batch()["labels"][:1]}
    masked = inputs["labels"].clone()
    masked[:, 4] = -100
    expected = own_loss(model, **(inputs | {"labels": masked}))
    fuse_lm_head(model, plain_loss(model))
    assert_same(loss_of(model, **inputs, **{name: value.int() for name, value in begins.items()}), expected)


@pytest.mark.parametrize("put", [fuse_lm_head, attach_loss])
def test_padding_is_left_out_where_labels_are_shifted_too(put):
    """Its labels are not -100, and attention_mask is that of the tokens, as beside labels."""
    model, inputs = family("Llama"), batch()
    labels = inputs.pop("labels")
    labels[1] = inputs["input_ids"][1]
    put(model, plain_loss(model))
    expected = loss_of(model, **inputs, labels=labels)
    shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    assert_same(loss_of(model, **inputs, shift_labels=shift_labels), expected)
    whole, row = torch.ones(1, 4), torch.tensor([[5, 6, 7, 8]])  # the last row's target is a token of another rank's
    assert model.rows_of_call(row, True, {"attention_mask": whole}, None)["attention_mask"].all()


@pytest.mark.parametrize("put", [fuse_lm_head, attach_loss])
@pytest.mark.parametrize("name", ["ModernBert", "Moonshine"])
def test_labels_of_the_rows_themselves_are_not_shifted(name, put):
    """A masked language model; one whose decoder is fed the labels, and that gives shift_labels to its loss itself."""
    model, inputs = tiny_aligned(name)
    if name == "ModernBert":
        inputs["labels"][1, 6:] = inputs["input_ids"][1, 6:]  # padding, which only attention_mask leaves out
        expected = model(**inputs | {"labels": batch()["labels"]}).loss
    else:
        expected = model(**inputs).loss
    put(model, plain_loss(model, fused=put is fuse_lm_head))
    with pytest.raises(TypeError, match="labels are those of the rows themselves: give them as shift_labels"):
        model(**inputs)
    found = model(**inputs, shift_labels=inputs["labels"]).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_generate_takes_a_whole_batch():
    """As Seq2SeqTrainer hands it over with predict_with_generate=True: with what is the loss's alone."""
    model, inputs = tiny_aligned("Moonshine")
    expected = model.generate(**inputs, max_new_tokens=3)
    fuse_lm_head(model, plain_loss(model))
    of_loss = {"shift_labels": inputs["labels"], "loss_inputs": {"token_weights": torch.ones(3, 9)}}
    assert torch.equal(model.generate(**inputs, **of_loss, max_new_tokens=3), expected)


def test_a_model_that_computes_its_loss_itself_is_named():
    """Its logits are viewed on the way to a cross-entropy of its own: fuse_lm_head asks for attach_loss."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
    for put, match in ((fuse_lm_head, "use attach_loss"), (attach_loss, r"did not call: .*trainer_loss\(loss_fn\)")):
        model = BertForMaskedLM(BertConfig(vocab_size=V, **sizes))
        put(model, plain_loss(model))
        with pytest.raises(TypeError, match=match):
            model(**batch())


@pytest.mark.parametrize("put", [fuse_lm_head, attach_loss])
def test_another_ignore_index_is_refused(put):
    model = put(family("Llama"), plain_loss(family("Llama")))
    assert torch.equal(model(**batch(), ignore_index=-100).loss, model(**batch()).loss)
    with pytest.raises(ValueError, match=f"{put.__name__}: expected ignore_index=-100 as the loss, got 7"):
        model(**batch(), ignore_index=7)


def test_one_call_of_the_loss_function():
    """Of two, the second would be all of the loss."""
    model = family("Llama")
    plain_forward = type(model).forward

    def forward(self, **options):
        output = plain_forward(self, **options)
        output.loss = output.loss + self.loss_function(output.logits, options["labels"], vocab_size=V)
        return output

    model.__class__ = type("Changed", (type(model),), {"forward": forward})
    attach_loss(model, plain_loss(model, fused=False))
    with pytest.raises(TypeError, match=r"expected Changed to call self\.loss_function once"):
        model(**batch())


def test_compiled():
    """Without a graph break, the soft cap included; the state of the loss moves as without torch.compile."""
    model = family("Gemma2", num_hidden_layers=1, dtype=torch.float32)
    fuse_lm_head(model, UnifiedLoss.from_model(model, auto_step=False))
    expected = loss_of(model, **batch())
    model.unified_loss.reset_statistics()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.report_parts = True
    loss = compiled(**batch()).loss
    model.zero_grad()
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected[0])
    torch.testing.assert_close(gradients(model), expected[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.loss_parts["total_loss"], expected[0])
    model.unified_loss.step()
    assert model.unified_loss.get_loss_statistics()["temperature"]["count"] == 1
    labels = batch()["labels"]
    shift_labels = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1)
    given = {name: value for name, value in batch().items() if name != "labels"}
    model.unified_loss.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given, shift_labels=shift_labels).loss, expected[0])


def test_gradient_checkpointing_and_autocast():
    model = family("Llama", dtype=torch.float32)
    plain = copy.deepcopy(model)
    fuse_lm_head(model, plain_loss(model))
    for settings in ({}, {"dtype": torch.bfloat16}):
        expected = {}
        for each in (plain, model):
            each.zero_grad()
            with torch.autocast("cpu", enabled=bool(settings), **settings):
                loss = each(**batch()).loss
            loss.backward()
            expected[each] = (loss.detach(), gradients(each))
        tolerance = {"rtol": 2e-2, "atol": 2e-3} if settings else {"rtol": 1e-4, "atol": 1e-7}
        torch.testing.assert_close(expected[model], expected[plain], **tolerance)
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(loss_of(model, **batch()), loss_of(plain, **batch()), rtol=1e-4, atol=1e-7)


def test_saved_models_are_plain_ones(tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = family("Llama")
    keys = set(model.state_dict())
    fuse_lm_head(model, plain_loss(model, use_mtp=True))
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == keys
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "LlamaForCausalLM" and not hasattr(loaded, "unified_loss")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    by_class = type(model).from_pretrained(tmp_path)
    assert type(by_class) is type(loaded)
    assert torch.equal(by_class(**batch()).loss, loaded(**batch()).loss)
    made_anew = type(model)(model.config)  # as averages of weights are made, such as by BEMACallback of trl
    made_anew.load_state_dict(model.state_dict())
    assert torch.equal(made_anew(**batch()).loss, loaded(**batch()).loss)
    fuse_lm_head(made_anew, plain_loss(model, use_mtp=True))  # which then has a place for it
    made_anew.load_state_dict(model.state_dict())
    assert torch.equal(made_anew.unified_loss.mtp.heads[0].weight, model.unified_loss.mtp.heads[0].weight)


def test_what_fits_not_is_refused():
    model = family("Gemma2")
    fuse_lm_head(model, plain_loss(model, fused=False))
    with pytest.raises(ValueError, match=r"logit_softcap=3.0 to its logits.* got logit_softcap=None"):
        model(**batch())
    unfuse(model)
    with pytest.raises(ValueError, match=r"expected a loss without logit_softcap, got 3\.0"):
        attach_loss(model, plain_loss(model))
    with pytest.raises(ValueError, match="labels_are_shifted=False, got True"):
        fuse_lm_head(model, plain_loss(model, labels_are_shifted=True))
    with pytest.raises(ValueError, match="reduction 'mean' or 'sum', got 'none'"):
        fuse_lm_head(model, plain_loss(model, reduction="none"))
    with pytest.raises(TypeError, match="expected a causal language model of transformers, got Linear"):
        fuse_lm_head(torch.nn.Linear(2, 2), plain_loss(model))
    fuse_lm_head(model, plain_loss(model))
    with pytest.raises(ValueError, match="call unfuse"):
        fuse_lm_head(model, plain_loss(model))
    model.resize_token_embeddings(V + 3)
    model.set_output_embeddings(torch.nn.Linear(16, V + 3))
    with pytest.raises(TypeError, match="the head of Gemma2ForCausalLM is now another Linear"):
        model(**batch())
    tied = family("Llama tied")
    fuse_lm_head(tied, plain_loss(tied))
    tied.resize_token_embeddings(V + 3)
    with pytest.raises(TypeError, match=r"LlamaForCausalLM is now another Linear .*resize_token_embeddings"):
        tied(**batch())
    other = family("Llama")
    other.forward = other.forward
    with pytest.raises(ValueError, match="with one of its own"):
        fuse_lm_head(other, plain_loss(other))


@pytest.mark.parametrize("loss_fn", [None, torch.nn.Linear(2, 2), family("Llama")], ids=["None", "layer", "model"])
def test_what_is_no_loss_is_named(loss_fn):
    model = family("Llama")
    for owner, call in {
        "fuse_lm_head": lambda: fuse_lm_head(model, loss_fn),
        "attach_loss": lambda: attach_loss(model, loss_fn),
        "causal_lm_loss": lambda: causal_lm_loss(loss_fn),
        "trainer_loss": lambda: trainer_loss(loss_fn),
        "bind_expert_bias": lambda: bind_expert_bias(model, loss_fn),
        "UnifiedLossCallback": lambda: UnifiedLossCallback(loss_fn),
    }.items():
        with pytest.raises(
            TypeError, match=f"^{owner}: expected a UnifiedLoss as loss_fn, got .*{type(loss_fn).__name__}"
        ):
            call()
    with pytest.raises(TypeError, match=r"^bind_expert_bias: expected model to be a torch.nn.Module, got "):
        bind_expert_bias(None, plain_loss(model))


def test_a_compiled_loss_is_a_loss():
    model = family("Llama", tie_word_embeddings=False)
    causal_lm_loss(torch.compile(plain_loss(model, fused=False)))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda logits: logits + 1, "adds to its logits"),
        (lambda logits: logits[..., :5], "slices its logits"),
        (lambda logits: logits.__setitem__((..., 5), 0.0), "assigns to its logits"),
        (lambda logits: logits.sigmoid(), r"uses \.sigmoid of its logits"),
        (lambda logits: torch.sigmoid(logits), "calls sigmoid on its logits"),
        (lambda logits: logits * torch.ones(()), "scales its logits by a Tensor"),
        (lambda logits: logits.tanh().tanh(), "tanh of its logits twice"),
        (lambda logits: logits * 2, r"logit_scale=2\.0 to its logits"),
        (lambda logits: torch.tanh(logits / 2) * 2, r"logit_softcap=2\.0 to its logits"),
    ],
)
def test_nothing_that_a_model_does_to_its_logits_is_left_out(change, what):
    """What its configuration does not say is seen when it happens."""
    from transformers import LlamaForCausalLM

    model = family("Llama")
    plain_forward = LlamaForCausalLM.forward

    def forward(self, **options):
        head = self.lm_head
        self._modules["lm_head"] = type("Around", (torch.nn.Module,), {"forward": lambda _, h: change(head(h))})()
        try:
            return plain_forward(self, **options)
        finally:
            self._modules["lm_head"] = head

    model.__class__ = type("Changed", (LlamaForCausalLM,), {"forward": forward})
    fuse_lm_head(model, plain_loss(model))
    with pytest.raises((TypeError, ValueError), match=what):
        model(**batch())
