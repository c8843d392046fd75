"""State that a component learns during training: a temperature, the load of experts, running averages."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ava_ext.losses.float32_buffers import Float32Buffers
from ava_ext.process_group import resolve


class LearnedState(Float32Buffers):
    """A module whose state changes during training. Three rules make its losses repeatable:

    - A forward reads what was committed before it.
    - What a forward learns is pending until `step()` commits it, once per optimizer step. Pending tensors are not
      buffers, because DistributedDataParallel broadcasts buffers before every forward and would overwrite what the
      other ranks have learned since the last step.
    - A call counts once. If a backward recomputes it (activation checkpointing), the recomputation reads what the call
      read and records nothing. Under reentrant checkpointing, the first run has no grad and the second is a
      recomputation, so such calls are never recorded.

    A subclass registers its buffers, names its other tensors in PENDING and PREVIOUS, and initialises all of them in
    `reset_parameters`.
    """

    statistics_name: ClassVar[str]  # its entry in UnifiedLoss.get_loss_statistics()
    PENDING: ClassVar[tuple[str, ...]]  # what calls have learned since the last step()
    PREVIOUS: ClassVar[tuple[str, ...]] = ()  # what was committed before the last step()

    def _apply(self, fn: Any, recurse: bool = True) -> LearnedState:
        super()._apply(fn, recurse)
        for name in self.PENDING + self.PREVIOUS:
            before = getattr(self, name)
            after = fn(before)
            setattr(self, name, after if after.dtype == before.dtype else before.to(after.device))
        return self

    def record(
        self,
        recording: bool | Tensor,  # [] bool, where a traced graph finds out when it runs
        **learned: Tensor,
    ) -> None:
        """Adds what a call has learned, without grad, to the pending tensors of these names."""
        if recording is False:
            return
        for name, value in learned.items():
            pending = getattr(self, name)
            if pending.device != value.device:  # wrappers that move parameters and buffers one by one leave it behind
                pending = pending.to(value.device)
                setattr(self, name, pending)
            pending.add_(torch.where(recording, value, 0) if isinstance(recording, Tensor) else value)

    def reduce_pending(self, process_group: Any) -> None:
        """Sums the pending tensors over the ranks."""
        group = resolve(process_group)
        if group is not None:
            for name in self.PENDING:
                torch.distributed.all_reduce(getattr(self, name), group=group)

    @staticmethod
    def keep_previous(
        previous: Tensor,  # [...]
        committed: Tensor,  # [...]
        recording: bool | Tensor,  # [] bool
    ) -> None:
        """Keeps the committed value before step() changes it, for recomputations of calls that read it."""
        previous.copy_(torch.where(recording, committed, previous) if isinstance(recording, Tensor) else committed)

    def clear_pending(self) -> None:
        """Discards what is pending."""
        for name in self.PENDING:
            getattr(self, name).zero_()

    def reset_parameters(self) -> None:
        """Sets all state to that of a new module, for example after to_empty()."""
        raise NotImplementedError

    def step(self, process_group: Any = None, recording: bool | Tensor = True) -> None:
        """Commits what is pending, summed over process_group. Once per optimizer step.

        recording: a tensor that is False if a traced graph runs as a recomputation, which commits nothing.
        """
        raise NotImplementedError

    def statistics(self) -> dict[str, Tensor]:
        """What has been committed, on the device."""
        raise NotImplementedError

    def reset_statistics(self) -> None:
        """Clears what statistics() reports."""
        raise NotImplementedError
