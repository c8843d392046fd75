"""Running statistics that keep their precision, whatever the model is cast to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """A module whose floating-point buffers keep their dtype when the model around it is cast.

    A running average in bfloat16 stops moving, because 1 + 0.001 is 1 there. So .bfloat16(), .half(), .double() and
    .to(dtype) leave the buffers alone, and load_state_dict casts a checkpoint's buffers to theirs, also with
    assign=True. Parameters are cast and everything moves between devices as usual.

    Example:
        >>> class Counter(Float32Buffers):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("count", torch.zeros(()))
        >>> Counter().bfloat16().count.dtype
        torch.float32
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Buffers:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)  # from the original: the cast has already lost digits
        return self

    def restore_precision(self) -> None:
        """Makes buffers float32 again that a wrapper has cast one by one, as FullyShardedDataParallel does with a
        buffer_dtype. The digits that they have lost are gone.
        """
        for buffer in self._buffers.values():
            if buffer is not None and buffer.is_floating_point() and buffer.dtype != torch.float32:
                buffer.data = buffer.data.float()  # wrappers hold the buffers themselves

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for name, buffer in self._buffers.items():
            given = state_dict.get(prefix + name)
            if buffer is not None and isinstance(given, Tensor) and given.dtype != buffer.dtype:
                state_dict[prefix + name] = given.to(buffer.dtype)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
