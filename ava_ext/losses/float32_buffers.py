"""Running statistics that keep their precision whatever the model is cast to."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """A module whose floating buffers keep their dtype under .bfloat16(), .half(), .double() and .to(dtype).

    A running average in bfloat16 stops moving: 1 + 0.001 is 1 there. Moves between devices work as ever, and
    parameters are cast as ever.

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
