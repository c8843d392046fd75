"""State that a component learns during training: a temperature, the load of experts, running averages."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ava_ext.losses.float32_buffers import Float32Buffers
from ava_ext.ops.committed import CallMemory, committed, is_checkpointed, is_first_run
from ava_ext.ops.derivatives import is_exporting, refuse_transforms_in_graphs
from ava_ext.process_group import resolve


def _previous(name: str) -> str:
    return f"previous_{name}"


class LearnedState(Float32Buffers):
    """A module whose state changes during training. Four rules make its losses repeatable:

    - A forward reads what was committed before it.
    - What a forward learns is pending until `step()` commits it, once per optimizer step. Pending tensors are not
      buffers, because DistributedDataParallel broadcasts buffers before every forward and would overwrite what the
      other ranks have learned since the last step.
    - A call counts once. If a backward recomputes it (activation checkpointing), the recomputation reads what the call
      read and records nothing. A call is recognised by the targets that it was given. If calls share one tensor of
      targets, if the checkpointed function makes the targets itself, and in a graph of torch.compile, only the last
      call is remembered. Under reentrant checkpointing, the first run has no grad and the second is a recomputation, so
      such calls are never recorded. Checkpointing within a compiled function needs auto_step=False; with True autograd
      raises, because the graph writes over what its own recomputation reads.
    - A program of torch.export reads what was committed and learns nothing, in training mode too.

    A subclass registers its buffers, names in READ those that its forward reads, sets previous_<name> beside each of
    these, names its pending tensors in PENDING, and calls `reset_parameters`, which initialises all of them.
    """

    statistics_name: ClassVar[str]  # its entry in UnifiedLoss.get_loss_statistics()
    PENDING: ClassVar[tuple[str, ...]]  # what calls have learned since the last step()
    READ: ClassVar[tuple[str, ...]] = ()  # what a forward reads
    auto_step = False  # whether a call itself is followed by step(), so that a traced graph writes over what it reads

    def __init__(self) -> None:
        super().__init__()
        self.memory = CallMemory()

    def _apply(self, fn: Any, recurse: bool = True) -> LearnedState:
        super()._apply(fn, recurse)
        for name in self.PENDING + tuple(map(_previous, self.READ)):
            before = getattr(self, name)
            after = fn(before)
            setattr(self, name, after if after.dtype == before.dtype else before.to(after.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._follow(next(self.buffers()).device)  # assign=True may have taken the buffers from the meta device
        self.settle()  # what calls have learned was beside the state that this one replaces

    def _check_device(self, device: torch.device, owner: str) -> None:
        """Raises ValueError where the state is not on the device of the logits, as for every module with buffers.

        A call does not move it: a checkpoint, an optimizer step and the other ranks would not know where it went. State
        that a wrapper has cast is float32 again.
        """
        first: Any = next(iter(self._buffers.values()))
        home = first.device
        if first.is_floating_point() and first.dtype != torch.float32:
            self.restore_precision()
        if home != device:
            raise ValueError(
                f"{owner}: expected the state of {self.statistics_name} on {device} as the logits, got {home}: move "
                f"the loss with .to({str(device)!r})"
            )
        if any(getattr(self, name).device != home for name in self.PENDING[:1]):  # they move together
            self._follow(home)

    def _follow(self, home: torch.device) -> None:
        """Moves what is not a buffer to the buffers: wrappers that move parameters and buffers one by one leave it."""
        with torch.inference_mode(False):  # the first call may be a validation, and training writes to them
            for name in self.PENDING + tuple(map(_previous, self.READ)):
                tensor = getattr(self, name)
                if tensor.device == home:
                    continue
                if tensor.is_meta:  # never filled
                    read = getattr(self, name.removeprefix("previous_"))
                    tensor = torch.zeros_like(tensor, device=home) if name in self.PENDING else read.clone()
                setattr(self, name, tensor.to(home))

    def record(
        self,
        recording: bool | Tensor,  # [] bool, where a traced graph finds out when it runs
        **learned: Tensor,
    ) -> None:
        """Adds what a call has learned, without grad, to the pending tensors of these names.

        Raises:
            NotImplementedError: within torch.func, to whose transforms what the call has learned belongs.
        """
        if recording is False:
            return
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                f"{self.statistics_name}: a training call cannot learn within torch.func; expected eval(), or a call "
                "outside"
            )
        for name, value in learned.items():
            getattr(self, name).add_(torch.where(recording, value, 0) if isinstance(recording, Tensor) else value)

    def reduce_pending(self, process_group: Any) -> None:
        """Sums the pending tensors over the ranks."""
        group = resolve(process_group)
        if group is not None:
            self._follow(next(self.buffers()).device)  # this rank may not have had a call
            for name in self.PENDING:
                if getattr(self, name).numel():
                    torch.distributed.all_reduce(getattr(self, name), group=group)

    def begin(
        self,
        like: Tensor,  # any, on the device of the logits
        given: Any,  # a tensor that a recomputation of the same call is given too
        owner: str = "unified_loss",
    ) -> bool | Tensor:  # [] bool, where a traced graph finds out when it runs
        """To be called before a forward reads: remembers what it will read, for recomputations.

        Returns:
            Whether the call counts: in training, with grad enabled, where it is no recomputation.
        """
        self._check_device(like.device, owner)
        if not torch.is_grad_enabled() or is_exporting():
            return False
        first_run = is_first_run(like)
        if isinstance(first_run, Tensor):
            if torch._C._are_functorch_transforms_active():
                refuse_transforms_in_graphs(self.statistics_name)
            for name in self.READ if self.auto_step else ():
                previous = getattr(self, _previous(name))
                previous.copy_(torch.where(first_run, getattr(self, name), previous))
        elif self.READ and is_checkpointed():
            read = self.memory.get(given)
            if first_run:
                read = [getattr(self, name).clone() for name in self.READ]
                self.memory[given] = read
            for name, value in zip(self.READ, read or (), strict=False):
                getattr(self, _previous(name)).copy_(value)
        return first_run if self.training else False

    def read(self, name: str) -> Tensor:
        """The committed tensor of this name, as this call sees it. Copy it where a backward needs it."""
        value = getattr(self, name)
        if is_exporting():
            return value
        if torch.compiler.is_compiling() and not self.auto_step:
            return committed(value, value)  # nothing moves it before the backward, in which a graph may read it again
        return committed(value, getattr(self, _previous(name)))

    def clear_pending(self) -> None:
        """Discards what is pending."""
        for name in self.PENDING:
            getattr(self, name).zero_()

    @torch.no_grad()
    def settle(self) -> None:
        """Discards what is pending; recomputations read what is committed now."""
        self.clear_pending()
        for name in self.READ:
            getattr(self, _previous(name)).copy_(getattr(self, name))

    def reset_parameters(self) -> None:
        """Sets all state to that of a new module, for example after to_empty()."""
        self.reset_statistics()

    def step(self, process_group: Any = None, recording: bool | Tensor = True) -> None:
        """Commits what is pending, summed over process_group. Once per optimizer step.

        recording: a tensor that is False if a traced graph runs as a recomputation, which commits nothing.
        """
        raise NotImplementedError

    def statistics(self) -> dict[str, Tensor]:
        """What has been committed, on the device."""
        raise NotImplementedError

    def reset_statistics(self) -> None:
        """Clears what statistics() reports, and calls `settle`."""
        raise NotImplementedError
