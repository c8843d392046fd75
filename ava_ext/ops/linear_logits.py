"""Logits as what they are computed from: hidden states and the weight of a linear layer."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from ava_ext.ops.arguments import check_has_columns, check_is_tensor

# what a chunk of logits may take, by default
CPU_CHUNK_BYTES, CUDA_CHUNK_BYTES = 64_000_000, 1_000_000_000
CUDA_TILE_ROWS = 256  # of a matrix product
# To ask for their autocast raises. Listed, since dynamo cannot trace torch.amp.is_autocast_available in torch 2.10 and
# 2.11; and not the devices that have it, of which a backend of somebody else's (PrivateUse1) gets its name later.
_WITHOUT_AUTOCAST = frozenset(("meta", "vulkan", "ve", "fpga", "lazy", "hip", "mkldnn", "opengl", "opencl", "ideep"))


def is_linear(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a head does what torch.nn.Linear does. Its class may be another, as fully_shard makes one; its forward
    (of an adapter, of a scale) would silently be lost.
    """
    cls = getattr(head, "class_before_loss", type(head))  # a head whose input is recorded is of a class made for it
    is_plain = isinstance(head, nn.Linear) and cls.forward is nn.Linear.forward
    return is_plain and ("forward" not in vars(head) or has_accelerate_hooks(head))


def has_accelerate_hooks(module: nn.Module) -> bool:
    """Whether the forward of an instance is that of its class between hooks of accelerate, which bring its inputs to
    its device, and its weights too where they are offloaded (device_map).
    """
    own = vars(module)
    is_of_class = getattr(own.get("_old_forward"), "__func__", None) is type(module).forward
    return is_of_class and isinstance(own.get("forward"), functools.partial)


def is_weight_itself(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether weight and bias may be read without calling the head: `is_linear`, and no hook makes them before each
    forward, as those of torch.nn.utils.prune, weight_norm and spectral_norm do.
    """
    hooks = head._forward_pre_hooks.values()
    return is_linear(head) and not any(type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks)


class LinearLogits(NamedTuple):
    """The logits hidden_states @ weight.T + bias [..., n_columns], as what they are computed from.

    Pass it where logits go. They are then computed a chunk of rows at a time, and never exist as a whole.

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
        return _dtype_in_products(self.hidden_states)

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
        """Raises TypeError where a part is not a tensor, and ValueError where shapes or types do not fit.

        owner begins the message, names are the three parts'.
        """
        hidden_states, weight, bias = self
        of_states, of_weight, of_bias = names
        check_has_columns(owner, of_states, hidden_states)
        check_is_tensor(owner, of_weight, weight)
        if bias is not None:
            check_is_tensor(owner, of_bias, bias)
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
            if _dtype_in_products(part) != self.dtype:
                raise ValueError(
                    f"{owner}: expected {name} of {of_states}' type {hidden_states.dtype}, got {part.dtype}; "
                    "torch.autocast would convert float32, bfloat16 and float16"
                )


def _dtype_in_products(part: Tensor) -> torch.dtype:
    """The type that torch.nn.functional.linear would take this tensor in."""
    device_type = part.device.type
    if part.dtype == torch.float64 or device_type in _WITHOUT_AUTOCAST:
        return part.dtype
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else part.dtype


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Where a product in the tensors' own type is meant, whatever region the caller is in."""
    if device.type in _WITHOUT_AUTOCAST or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def rows_of_a_chunk(
    n_rows: int,
    n_columns: int,
    dtype: torch.dtype,
    device: torch.device,
    chunk_bytes: int | None,
    accumulator_bytes: int = 0,
) -> int:
    """As many rows as the budget allows, shared out evenly; at least 1.

    On CUDA whole tiles of its matrix products, and all rows at once where they take no more memory than a chunk and
    the accumulator of the weight's gradient, which several chunks need and one does not.
    """
    is_cuda = device.type == "cuda"
    row_bytes = max(1, n_columns * dtype.itemsize)
    most = max(1, (chunk_bytes or (CUDA_CHUNK_BYTES if is_cuda else CPU_CHUNK_BYTES)) // row_bytes)
    n_chunks = max(1, -(-n_rows // most))
    chunk_rows = max(1, -(-n_rows // n_chunks))
    if is_cuda and n_chunks > 1 and most >= CUDA_TILE_ROWS:
        chunk_rows = min(-(-chunk_rows // CUDA_TILE_ROWS), most // CUDA_TILE_ROWS) * CUDA_TILE_ROWS
    takes_all = n_rows * row_bytes <= chunk_rows * row_bytes + accumulator_bytes
    return max(1, n_rows) if takes_all else chunk_rows
