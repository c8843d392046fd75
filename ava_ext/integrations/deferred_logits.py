"""Logits that a model is about to compute, with what it does to them on the way to its loss function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class DeferredLogits:
    """What a head gives in place of logits: its input, and a record of what the model does to its output.

    A model multiplies by numbers and caps softly (Gemma, Granite, Cohere); a loss of hidden states can do the same.
    Anything else that is done to it raises TypeError: nothing that a model does to its logits is left out silently.

    Args:
        hidden_states: [..., hidden_size], the head's input.
        owner: class name of the model, for messages.
        n_columns: of the logits; None: not known.
    """

    def __init__(
        self,
        hidden_states: Tensor,  # [..., hidden_size]
        owner: str,
        n_columns: int | None = None,
        operations: tuple[tuple[str, float], ...] = (),
    ) -> None:
        self.hidden_states = hidden_states
        self.owner = owner
        self.n_columns = n_columns
        self.operations = operations  # in their order: "times", "over", "tanh" or "float", and by what

    @property
    def softcap(self) -> float | None:
        """c of c tanh(logits / c); None: no soft cap."""
        names = [name for name, _ in self.operations]
        return _factor(self.operations[names.index("tanh") :]) if "tanh" in names else None

    @property
    def scale(self) -> float:
        """What the logits are multiplied by, before the soft cap."""
        scale = _factor(self.operations)
        return 1.0 if abs(scale - 1) < 1e-12 else scale

    def compute(self, head: Callable[[Tensor], Tensor]) -> Tensor:  # [..., n_columns]
        """The logits, as the model would have computed them from what its head gives."""
        logits = head(self.hidden_states)
        for name, number in self.operations:
            if name in ("times", "over"):
                logits = logits * number if name == "times" else logits / number
            else:
                logits = getattr(logits, name)()  # "tanh", "float"
        return logits

    def _then(self, name: str, number: Any = 1.0) -> DeferredLogits:
        if not isinstance(number, (int, float)):
            raise self._unknown(f"scales its logits by a {type(number).__name__}")
        return DeferredLogits(self.hidden_states, self.owner, self.n_columns, (*self.operations, (name, number)))

    def __mul__(self, factor: Any) -> DeferredLogits:
        return self._then("times", factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> DeferredLogits:
        return self._then("over", divisor)

    def tanh(self) -> DeferredLogits:
        """The soft cap's tanh."""
        if self.softcap is not None:
            raise self._unknown("takes tanh of its logits twice")
        return self._then("tanh")

    def float(self) -> DeferredLogits:
        """For whoever gets the logits; the loss computes in float32 at least."""
        return self._then("float")

    def to(self, *arguments: Any, **options: Any) -> DeferredLogits:
        """Like float, to float32; otherwise itself: the loss is computed where the head is."""
        to_float = any(value is torch.float32 for value in (*arguments, *options.values()))
        return self.float() if to_float else self

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

    @property
    def shape(self) -> torch.Size:
        """Of the logits."""
        if self.n_columns is None:
            raise self._unknown("uses .shape of its logits")
        return torch.Size((*self.hidden_states.shape[:-1], self.n_columns))

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        deferred = next(value for value in (*arguments, *(options or {}).values()) if isinstance(value, cls))
        if function in (torch.tanh, torch.nn.functional.tanh) and arguments == (deferred,):
            return deferred.tanh()
        raise deferred._unknown(f"calls {getattr(function, '__name__', function)} on its logits")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself looks for
            raise AttributeError(name)
        raise self._unknown(f"uses .{name} of its logits")

    def __getitem__(self, index: Any) -> Any:
        raise self._unknown("slices its logits")

    def __setitem__(self, index: Any, value: Any) -> None:
        raise self._unknown("assigns to its logits")

    def _added(self, other: Any) -> Any:
        raise self._unknown("adds to its logits")

    __add__ = __radd__ = __sub__ = __rsub__ = _added

    def _unknown(self, what: str) -> TypeError:
        return TypeError(
            f"fuse_lm_head: expected {self.owner} to scale or softly cap its logits on the way to self.loss_function, "
            f"and nothing else, but it {what}: use attach_loss, which takes the logits that the model computes"
        )


def _factor(operations: tuple[tuple[str, float], ...]) -> float:
    """What they multiply by in all."""
    factor = 1.0
    for name, number in operations:
        factor = factor * number if name == "times" else factor / number if name == "over" else factor
    return factor
