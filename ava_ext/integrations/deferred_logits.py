"""Logits that a model is about to compute, with what it does to them on the way to its loss function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class DeferredLogits:
    """What a head gives in place of logits: its input, and a record of what the model does to its output.

        logits = outer * tanh(inner * (hidden_states @ weight.T + bias)), or without a tanh inner * (...)

    A model multiplies by numbers and caps softly (Gemma, Granite, Cohere); a loss of hidden states can do the same.
    Anything else that is done to it raises TypeError: nothing that a model does to its logits is left out silently.

    Args:
        hidden_states: [..., hidden_size], the head's input.
        owner: class name of the model, for messages.
    """

    def __init__(
        self,
        hidden_states: Tensor,  # [..., hidden_size]
        owner: str,
        inner: float = 1.0,
        outer: float | None = None,
    ) -> None:
        self.hidden_states = hidden_states
        self.owner = owner
        self.inner = inner
        self.outer = outer

    @property
    def softcap(self) -> float | None:
        """c of c tanh(logits / c); None: no soft cap."""
        return self.outer

    @property
    def scale(self) -> float:
        """What the logits are multiplied by, before the soft cap."""
        scale = self.inner if self.outer is None else self.inner * self.outer
        return 1.0 if abs(scale - 1) < 1e-12 else scale

    def compute(self, head: Callable[[Tensor], Tensor]) -> Tensor:  # [..., n_columns]
        """The logits, as the model would have computed them from what its head gives."""
        logits = head(self.hidden_states)
        if self.inner != 1.0:
            logits = logits * self.inner
        return logits if self.outer is None else logits.tanh() * self.outer

    def _multiplied(self, factor: Any) -> DeferredLogits:
        if not isinstance(factor, (int, float)):
            raise self._unknown(f"multiplies its logits by a {type(factor).__name__}")
        inner, outer = (self.inner * factor, None) if self.outer is None else (self.inner, self.outer * factor)
        return DeferredLogits(self.hidden_states, self.owner, inner, outer)

    def __mul__(self, factor: Any) -> DeferredLogits:
        return self._multiplied(factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> DeferredLogits:
        return self._multiplied(1 / divisor if isinstance(divisor, (int, float)) else divisor)

    def tanh(self) -> DeferredLogits:
        """The soft cap's tanh."""
        if self.outer is not None:
            raise self._unknown("takes tanh of its logits twice")
        return DeferredLogits(self.hidden_states, self.owner, self.inner, 1.0)

    def float(self) -> DeferredLogits:
        """Itself: the loss computes in float32 at least."""
        return self

    def to(self, *arguments: Any, **options: Any) -> DeferredLogits:
        """Itself: the loss is computed where the head is."""
        return self

    def contiguous(self) -> DeferredLogits:
        """Itself."""
        return self

    @property
    def device(self) -> torch.device:
        """Of the hidden states."""
        return self.hidden_states.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states."""
        return self.hidden_states.dtype

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        deferred = next(value for value in (*arguments, *(options or {}).values()) if isinstance(value, cls))
        if function in (torch.tanh, torch.nn.functional.tanh) and arguments == (deferred,):
            return deferred.tanh()
        raise deferred._unknown(f"calls {getattr(function, '__name__', function)} on its logits")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python looks for by itself
            raise AttributeError(name)
        raise self._unknown(f"uses .{name} of its logits")

    def __getitem__(self, index: Any) -> Any:
        raise self._unknown("slices its logits")

    def _added(self, other: Any) -> Any:
        raise self._unknown("adds to its logits")

    __add__ = __radd__ = __sub__ = __rsub__ = _added

    def _unknown(self, what: str) -> TypeError:
        return TypeError(
            f"fuse_lm_head: expected {self.owner} to scale or softly cap its logits on the way to self.loss_function, "
            f"and nothing else, but it {what}: use attach_loss, which takes the logits that the model computes"
        )
