"""A small GPT in plain PyTorch: pre-norm blocks, learned positions, output head tied to the embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """One transformer layer: causal self-attention, then a feed-forward network, each added to its input."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(
        self,
        hidden: Tensor,  # [batch, length, width]
        past: tuple[Tensor, Tensor] | None = None,  # keys and values [batch, n_heads, past_length, width / n_heads]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Returns the new hidden states and the keys and values of past and present positions."""
        heads = self.query_key_value(self.attention_norm(hidden)).unflatten(-1, (3, self.n_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [batch, n_heads, length, width / n_heads]
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        # one new token may look at everything before it: only a longer input needs the mask
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=past is None)
        hidden = hidden + self.attention_out(attended.transpose(1, 2).flatten(2))
        return hidden + self.feed_forward(hidden), (key, value)


class SmallGPT(nn.Module):
    """Token ids [batch, length] -> logits [batch, length, vocab_size]; length is at most `context`.

    Example:
        >>> model = SmallGPT(vocab_size=4096, context=256)
        >>> model(torch.zeros(2, 16, dtype=torch.long)).shape
        torch.Size([2, 16, 4096])
    """

    def __init__(self, vocab_size: int, context: int, width: int = 128, n_layers: int = 2, n_heads: int = 4) -> None:
        super().__init__()
        self.context = context
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, n_heads) for _ in range(n_layers))
        self.final_norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # what is added to the residual stream shrinks with depth (GPT-2)
                residual = name.endswith(("attention_out.weight", "feed_forward.3.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * n_layers) ** 0.5 if residual else 0.02)

    def forward(self, ids: Tensor) -> Tensor:  # [batch, length] -> [batch, length, vocab_size]
        return self._step(ids, [None] * len(self.blocks))[0]

    def _step(self, ids: Tensor, pasts: list) -> tuple[Tensor, list]:
        start = 0 if pasts[0] is None else pasts[0][0].shape[2]
        hidden = self.token_embedding(ids) + self.position_embedding.weight[start : start + ids.shape[1]]
        presents = []
        for block, past in zip(self.blocks, pasts, strict=True):
            hidden, present = block(hidden, past)
            presents.append(present)
        return F.linear(self.final_norm(hidden), self.token_embedding.weight), presents

    @torch.no_grad()
    def greedy(
        self,
        prompts: Tensor,  # [batch, prompt_length]
        n_new_tokens: int,
        banned_token: int | None = None,
    ) -> Tensor:  # [batch, n_new_tokens]
        """The most probable continuation, token by token, never choosing `banned_token`."""
        logits, pasts = self._step(prompts, [None] * len(self.blocks))
        new_tokens = []
        while True:
            last = logits[:, -1]
            if banned_token is not None:
                last[:, banned_token] = float("-inf")
            new_tokens.append(last.argmax(dim=-1, keepdim=True))
            if len(new_tokens) == n_new_tokens:
                return torch.cat(new_tokens, dim=1)
            logits, pasts = self._step(new_tokens[-1], pasts)
