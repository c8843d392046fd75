"""Small models of transformers with random weights, batches for them, and the loss that they compute themselves."""

import copy

import torch
from torch.nn import functional as F

V = 61
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
WITHOUT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def tiny(name, dtype=torch.float64, **options):
    """A causal language model by its family's name; eager where kernels know no float64."""
    import transformers

    options = SIZES | options
    if name == "GPT2":
        config = transformers.GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, **WITHOUT_DROPOUT)
        return _made(transformers.GPT2LMHeadModel, config, dtype)
    if name == "JetMoe":
        options |= {"kv_channels": 8}
        del options["num_attention_heads"]
    if name in ("Mixtral", "JetMoe", "DeepseekV3", "Glm4Moe"):
        options = {"experts_implementation": "eager", "num_experts_per_tok": 2, "num_local_experts": 4} | options
    if name in ("DeepseekV3", "Glm4Moe"):
        del options["num_local_experts"]
        options |= {"n_routed_experts": 4, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "n_group": 1}
        options |= {"topk_group": 1, "n_shared_experts": 1, "num_key_value_heads": 2}
    if name in ("Ernie4_5_Moe", "MiniMaxM2", "HYV3"):
        options |= {"experts_implementation": "eager", "moe_intermediate_size": 8, "head_dim": 8}
        options |= {"moe_num_experts": 4, "moe_k": 2} if name[0] == "E" else {"num_experts_per_tok": 2}
        options |= {"MiniMaxM2": {"num_local_experts": 4}, "HYV3": {"num_experts": 4}}.get(name, {})
    if name == "DeepseekV3":
        options |= {"q_lora_rank": 8, "kv_lora_rank": 8, **LATENT}
    if name in ("Gemma2", "Glm4Moe"):
        options |= {"head_dim": 8}
    config = getattr(transformers, f"{name}Config")(attn_implementation="eager", **options)
    return _made(getattr(transformers, f"{name}ForCausalLM"), config, dtype)


def tiny_aligned(name):
    """A model whose labels are those of the rows, and inputs of it: it predicts no next token."""
    import transformers

    options = SIZES | {"pad_token_id": 0, "attn_implementation": "eager"}
    if name == "ModernBert":
        config = transformers.ModernBertConfig(cls_token_id=1, sep_token_id=2, **options)
        return _made(transformers.ModernBertForMaskedLM, config, torch.float32).eval(), batch()
    options |= {"num_key_value_heads": 2, "decoder_start_token_id": 1}
    text = {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = transformers.MoonshineConfig(encoder_num_hidden_layers=1, encoder_num_attention_heads=2, **options, **text)
    model = _made(transformers.MoonshineForConditionalGeneration, config, torch.float32).eval()
    mask = torch.ones(3, 4000)  # of the encoder's inputs
    mask[:, -1000:] = 0
    return model, {"input_values": torch.randn(3, 4000), "attention_mask": mask, "labels": batch()["labels"]}


def with_options_of_text(name, dtype=torch.float64):
    """Models whose text model's configuration has a scale or a soft cap, or something by the name of one."""
    import transformers

    heads = {"num_key_value_heads": 2}
    if name == "MiniCPM3":
        return tiny(name, **heads, dim_model_base=4, q_lora_rank=8, kv_lora_rank=8, **LATENT)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    options = {"attn_implementation": "eager"}
    if name == "Llava of Cohere":
        text, vision = transformers.CohereConfig(**SIZES, logit_scale=0.25), transformers.CLIPVisionConfig(**vision)
        config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=0, **options)
        return _made(transformers.LlavaForConditionalGeneration, config, dtype)
    capped = {**SIZES, "head_dim": 8, "final_logit_softcapping": 3.0}
    if name == "Gemma3":
        text, vision = transformers.Gemma3TextConfig(**capped), transformers.SiglipVisionConfig(**vision)
        config = transformers.Gemma3Config(vision_config=vision, text_config=text, mm_tokens_per_image=4, **options)
        return _made(transformers.Gemma3ForConditionalGeneration, config, dtype)
    text, vision = transformers.Gemma2Config(**capped), transformers.SiglipVisionConfig(**vision, projection_dim=16)
    config = transformers.PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=16, **options)
    return _made(transformers.PaliGemmaForConditionalGeneration, config, dtype).eval()


def _made(cls, config, dtype):
    torch.manual_seed(0)
    return cls(config).to(dtype)


def batch(seed=0, batch_size=3, n_tokens=9):
    """input_ids, attention_mask and labels: a prompt without labels, and padding on the right."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, V, (batch_size, n_tokens), generator=generator)
    labels, mask = input_ids.clone(), torch.ones_like(input_ids)
    labels[0, :4] = -100
    labels[1, 6:], mask[1, 6:] = -100, 0
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def loss_in_double(logits, labels, vocab_size, num_items_in_batch=None, **options):
    """What transformers computes, without its rounding to float32."""
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def gradients(model):
    """By name, those that there are."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def own_loss(model, **inputs):
    """(loss, gradients) as the model itself computes them, in float64; the model is left as it was."""
    model = copy.deepcopy(model)
    model.loss_function = loss_in_double
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


def loss_of(model, **inputs):
    """(loss, gradients) of the model as it is."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


def forget_accelerate():
    """What accelerate knows of a process: before a test that of other tests, on a rank that of the test."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
