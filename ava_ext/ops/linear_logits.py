"""Logits as what they are computed from: hidden states and the weight of a linear layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# what a chunk of logits may take, by default
CPU_CHUNK_BYTES, CUDA_CHUNK_BYTES = 64_000_000, 1_000_000_000


class LinearLogits(NamedTuple):
    """The logits hidden_states @ weight.T + bias [..., n_columns], as what they are computed from.

    Example:
        >>> heads = [LinearLogits(h, head.weight) for head in further_heads]
        >>> loss = loss_fn(logits, targets, additional_logits=heads, confidence_scores=confidence)
    """

    hidden_states: Tensor  # [..., hidden_size]
    weight: Tensor  # [n_columns, hidden_size]
    bias: Tensor | None = None  # [n_columns]

    @property
    def shape(self) -> torch.Size:
        """[..., n_columns]: the shape of the logits."""
        return torch.Size((*self.hidden_states.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        """What the logits would be computed in: under autocast its type, as torch.nn.functional.linear."""
        dtype, device_type = self.hidden_states.dtype, self.hidden_states.device.type
        if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
            return torch.get_autocast_dtype(device_type)
        return dtype

    @property
    def device(self) -> torch.device:
        """Where they would be computed."""
        return self.hidden_states.device

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient is wanted of any of the three."""
        return torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in self)

    def unsqueeze(self, dim: int) -> LinearLogits:
        """The logits with one more leading dimension."""
        return self._replace(hidden_states=self.hidden_states.unsqueeze(dim))

    def check(self, owner: str, names: tuple[str, str, str] = ("hidden_states", "weight", "bias")) -> None:
        """Raises ValueError where shapes or types do not fit; owner begins the message, names are the three parts'."""
        hidden_states, weight, bias = self
        of_states, of_weight, of_bias = names
        if weight.dim() != 2 or hidden_states.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{owner}: expected {of_weight} of shape [vocab_size, {hidden_states.shape[-1]}] for "
                f"{of_states} of shape {list(hidden_states.shape)}, got {list(weight.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{owner}: expected {of_bias} of shape [{len(weight)}], got {list(bias.shape)}")
        for name, part in ((of_weight, weight), (of_bias, bias)):
            if part is None:
                continue
            if part.device != hidden_states.device:
                raise ValueError(f"{owner}: expected {name} on {hidden_states.device}, got {part.device}")
            if part.dtype != hidden_states.dtype and self.dtype == hidden_states.dtype:
                raise ValueError(
                    f"{owner}: expected {name} of {of_states}' type {hidden_states.dtype} outside autocast, "
                    f"got {part.dtype}"
                )

    def chunk_rows(self, chunk_bytes: int | None) -> int:
        """Rows of one chunk: as many as the budget allows (default 64 MB, 1 GB on CUDA), shared out evenly."""
        budget = chunk_bytes or (CUDA_CHUNK_BYTES if self.hidden_states.is_cuda else CPU_CHUNK_BYTES)
        most = max(1, budget // max(1, self.weight.shape[0] * self.dtype.itemsize))
        n_rows = self.shape[:-1].numel()
        n_chunks = max(1, -(-n_rows // most))
        return max(1, -(-n_rows // n_chunks))
