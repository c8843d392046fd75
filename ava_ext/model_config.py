"""What a model's configuration says about its loss: vocabulary, experts, what it does to its logits.

Reads attributes by name and imports no library: any object with these attributes will do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

# names under which configurations keep the same thing; the first that is there counts
_COLUMNS = ("output_vocab_size", "unpadded_vocab_size", "vocab_size")  # Apertus 1.5, Inkling: of fewer logits
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
_FIRST_MOE_LAYERS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_MOE_STEPS = ("decoder_sparse_step", "moe_layer_interval", "interleave_moe_layer_step")  # Qwen, Ernie, Llama 4
_SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
_SCALES: dict[str, Callable[[float], float]] = {
    "logit_scale": lambda value: value,  # Cohere
    "lm_head_multiplier": lambda value: value,  # Falcon-H1
    "output_multiplier": lambda value: value,  # Muse
    "logits_scaling": lambda value: 1 / value,  # Granite divides by it
}
# by model_type, families that do something else with an attribute of such a name
_OTHER_SCALES: dict[tuple[str | None, str], Callable[[float], float]] = {
    ("hyperclovax", "logits_scaling"): lambda value: value,
    ("minicpm3", "logits_scaling"): lambda value: 1.0,  # divides the hidden states, before the head
}
# models around a text model that do to the logits what its configuration says; others (Llava, Gemma 3 with images,
# Cohere 2 Vision) call the head and leave it out
_APPLY_OPTIONS_OF_TEXT = {
    "cohere_compass",
    "diffusion_gemma",
    "gemma3n",
    "gemma4",
    "gemma4_unified",
    "granite4_vision",
    "granite_docling",
    "hyperclovax_vision_v2",
    "inkling2",
    "inkling2_loop",
    "mistral_large4",
    "muse_glimmer",
    "muse_spark",
    "paligemma",
    "t5gemma",
    "t5gemma2",
}
_SCORES = ("scoring_func", "expert_selection_fn")
# routers with a sigmoid and no e_score_correction_bias that tells it, and with a softmax although they have one
_SIGMOID_WITHOUT_BIAS = {"afmoe", "flint", "lfm2_moe", "llama4_text"}
_SOFTMAX_WITH_BIAS = {"ernie4_5_moe", "ernie4_5_vl_moe_text", "longcat_flash"}
_PROBABILITIES = {"gemma4_text"}  # what their output calls router_logits is the softmax of them


def options_of(model_or_config: Any, fused: bool = True, **given: Any) -> dict[str, Any]:
    """The options of UnifiedLoss that a causal language model sets.

    Args:
        model_or_config: a model with .config, or that configuration. Of a model that reads more than text, the
            configuration of its text model is read.
        fused: the loss computes the logits itself, so that it also does what the model does to them: soft cap, scale.
        given: options that the caller sets, whatever the model says.

    Returns:
        vocab_size, hidden_size, labels_are_shifted=False; of a mixture of experts num_experts, num_experts_per_token,
        num_moe_layers, router_score; with fused, logit_softcap and logit_scale where the model has them. Most routers'
        score is told by the model only: a configuration alone gives softmax.

    Raises:
        ValueError: no vocab_size; a term of a router, and a router with another score than softmax or sigmoid, or a
            model whose router_logits are probabilities.
    """
    config = text_config(model_or_config)
    vocab_size = _first(config, _COLUMNS)
    if vocab_size is None:
        raise ValueError(f"unified_loss: expected a configuration with vocab_size, got {type(config).__name__}")
    options: dict[str, Any] = {"vocab_size": vocab_size, "labels_are_shifted": False}
    options["hidden_size"] = getattr(config, "hidden_size", None)
    family = getattr(config, "model_type", None)
    experts = getattr(config, "ffn_config", config)  # DBRX
    n_experts = _first(experts, _EXPERTS)
    model = model_or_config if isinstance(model_or_config, nn.Module) else None
    if isinstance(n_experts, int) and n_experts > 1 and (n_layers := _moe_layers(model, config)) > 0:
        # routers of LongCat-Flash and ZAYA choose also among experts that do nothing
        options["num_experts"] = n_experts + (getattr(config, "zero_expert_num", None) or family == "zaya")
        options["num_experts_per_token"] = _first(experts, _EXPERTS_PER_TOKEN)
        options["num_moe_layers"] = n_layers
        score = _router_score(model, config)
        wants_router = given.get("use_auxiliary_loss") or given.get("use_moe_balancing")
        if wants_router and "router_score" not in given:
            check_router_logits(config)
            if score not in ("softmax", "sigmoid"):
                raise ValueError(
                    f"unified_loss: expected a router with the score 'softmax' or 'sigmoid', got {score!r} in "
                    f"{type(config).__name__}: leave router terms out, or say router_score="
                )
        if score == "sigmoid":
            options["router_score"] = score
    if fused:
        options |= logit_options(model_or_config)
    return options | given


def check_router_logits(config: Any) -> None:
    """Raises ValueError where the router_logits of a text model are no logits: a loss would take their softmax again.

    Args:
        config: of a text model.
    """
    if getattr(config, "model_type", None) in _PROBABILITIES:
        raise ValueError(
            f"unified_loss: expected router_logits, got probabilities, which a model of {type(config).__name__} "
            "gives by that name: leave router terms out, or give gate_logits of your own to a loss with "
            "router_score='softmax'"
        )


def text_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a model without those that only images go through: their routers are not of the text model."""
    return [module for name, module in model.named_modules() if "vision" not in name]


def text_config(model_or_config: Any) -> Any:
    """The configuration of the text model: of a model, of what holds it, or itself."""
    config = getattr(model_or_config, "config", model_or_config)
    get_text_config = getattr(config, "get_text_config", None)
    return config if get_text_config is None else get_text_config()


def logit_options(model_or_config: Any) -> dict[str, float]:
    """logit_softcap and logit_scale, where the model applies them to the logits of its head."""
    config, whole = text_config(model_or_config), getattr(model_or_config, "config", model_or_config)
    if config is not whole and getattr(whole, "model_type", None) not in _APPLY_OPTIONS_OF_TEXT:
        return {}
    options: dict[str, float] = {}
    softcap = _first(config, _SOFTCAPS)
    if softcap:
        options["logit_softcap"] = float(softcap)
    for name, as_factor in _SCALES.items():
        value = getattr(config, name, None)
        as_factor = _OTHER_SCALES.get((getattr(config, "model_type", None), name), as_factor)
        if isinstance(value, (int, float)) and value and as_factor(value) != 1:
            options["logit_scale"] = as_factor(value)
    return options


def _first(config: Any, names: tuple[str, ...]) -> Any:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if value is not None), None)


def _moe_layers(model: nn.Module | None, config: Any) -> int:
    """Layers whose router chooses: those that the model has, or as the configuration lists them."""
    types = getattr(config, "mlp_layer_types", None) or []
    n_hashed = types.count("hash_moe")  # DeepSeek-V4: the token itself decides
    if model is not None:
        children = [{name for name, _ in module.named_children()} for module in text_modules(model)]
        n_layers = sum(bool(names & {"experts", "input_linear"} and names & {"gate", "router"}) for names in children)
        if n_layers:
            return n_layers - n_hashed
    if types:
        return len(types) - types.count("dense") - n_hashed
    blocks = getattr(config, "layers_block_type", None) or ()
    if "moe" in blocks:  # Nemotron-H: a layer is one thing
        return blocks.count("moe")
    n_experts = getattr(config, "layers_num_experts", None)  # Jamba
    if n_experts:
        return sum(n > 1 for n in n_experts)
    first = _first(config, _FIRST_MOE_LAYERS) or 0
    step = _first(config, _MOE_STEPS) or 1
    dense = getattr(config, "mlp_only_layers", None) or ()
    family = getattr(config, "model_type", None)
    # a layer of LongCat-Flash has two attentions, and num_hidden_layers counts these
    layers = range(first, config.num_layers if family == "longcat_flash" else config.num_hidden_layers)
    n_layers = sum((layer + 1) % step == 0 and layer not in dense for layer in layers)
    return 2 * n_layers if family == "jetmoe" else n_layers  # JetMoE: experts in the attention of each layer, too


def _router_score(model: nn.Module | None, config: Any) -> str:
    """What a router makes of its logits. A configuration alone tells it of few families; of others it is a softmax."""
    score, family = _first(config, _SCORES), getattr(config, "model_type", None)
    if score is None and family in _SIGMOID_WITHOUT_BIAS:
        return "sigmoid"
    if score is not None or model is None or family in _SOFTMAX_WITH_BIAS:
        return score or "softmax"
    has_bias = any(hasattr(module, "e_score_correction_bias") for module in model.modules())
    return "sigmoid" if has_bias else "softmax"
