"""Process groups that modules refer to: none, a group, or "world"."""

from __future__ import annotations

import warnings
from typing import Any

import torch


def resolve(process_group: Any) -> Any:
    """The group to communicate over, or None for this process alone.

    "world" is the default group of the moment: a module that names it can be made before the group is, and pickled.
    """
    if not isinstance(process_group, str):
        return process_group
    distributed = torch.distributed
    return distributed.group.WORLD if distributed.is_available() and distributed.is_initialized() else None


def picklable(process_group: Any) -> str | None:
    """What a pickle can hold of a group: its name."""
    kept = process_group if isinstance(process_group, str) else None
    if process_group is not kept:
        warnings.warn(
            "ava_ext: a process group cannot be pickled and is left out; process_group='world' can", stacklevel=3
        )
    return kept


class GroupReference:
    """Holds a process group for a module: a copy of the module refers to the same group, a pickled one to none."""

    def __init__(self, process_group: Any = None) -> None:
        self.process_group = process_group

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupReference:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return GroupReference, (picklable(self.process_group),)
