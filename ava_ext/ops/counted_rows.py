"""Which rows a linear layer is computed for: those that count, where that costs no wait for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ava_ext.ops.dtensors import is_dtensor

# what torch.fx.experimental.proxy_tensor.get_proxy_mode asks, which takes half a second to import
_MAKE_FX = torch._C._TorchDispatchModeKey.PROXY
_MODES = (torch._C._get_dispatch_mode, torch._ops._get_dispatch_mode_pre_dispatch)


class ChosenRows(NamedTuple):
    """The rows to compute. See `choose_rows`."""

    rows: Tensor | None  # [n_chosen] int64, ascending where is_exact; None: all rows
    is_exact: bool  # no row among them is left out of the loss


def choose_rows(
    counted: Tensor | None,  # [n_rows] bool; None: every row counts
    max_counted_rows: int | None,
) -> ChosenRows:
    """The rows that count and, where the host does not know how many these are, further ones behind them.

    On the CPU exactly those that count. Elsewhere all rows, because asking for their number would wait for the device;
    with max_counted_rows so many rows, those that count first. The shapes then depend on this number alone, and a CUDA
    graph can hold them.

    Raises:
        ValueError: more rows count than max_counted_rows says. On a GPU the device asserts it: the host does not wait.
    """
    if max_counted_rows is not None and max_counted_rows < 0:
        raise ValueError(f"row_loss: expected max_counted_rows >= 0, got {max_counted_rows}")
    if counted is None:
        return ChosenRows(None, True)
    n_rows = len(counted)
    if host_reads(counted.device):
        index = counted.nonzero().squeeze(-1)
        if max_counted_rows is not None and len(index) > max_counted_rows:
            raise ValueError(
                f"row_loss: expected at most max_counted_rows = {max_counted_rows} rows that count, got {len(index)}"
            )
        return ChosenRows(None if len(index) == n_rows else index, True)
    if max_counted_rows is None or max_counted_rows >= n_rows:
        return ChosenRows(None, False)
    torch._assert_async(counted.sum() <= max_counted_rows, "row_loss: more rows count than max_counted_rows")
    return ChosenRows(counted.argsort(stable=True, descending=True)[:max_counted_rows], False)


def kept_by(
    owner: str,
    mask: Tensor,  # [...]
    name: str = "attention_mask",
) -> Tensor:  # [...] bool
    """Where the mask is not 0.

    Raises:
        ValueError: an additive mask, of numbers below 0 beside the 0 of what counts. On a GPU and in a graph the device
            asserts it.
    """
    if mask.is_floating_point():
        local = mask.to_local() if is_dtensor(mask) else mask
        if host_sees(local):
            if (local < 0).any():
                raise ValueError(
                    f"{owner}: expected {name} of bools, or 0 where a row does not count, got numbers below 0, as "
                    f"of an additive mask: pass {name} >= 0"
                )
        elif local.device.type in ("cpu", "cuda") and not torch._C._are_functorch_transforms_active():
            torch._assert_async(~(local < 0).any(), f"{owner}: expected {name} without numbers below 0")
    return mask != 0


def host_reads(device: torch.device) -> bool:
    """Whether the host can look at numbers there without waiting."""
    return device.type == "cpu"


def host_sees(tensor: Tensor) -> bool:
    """Whether the host may branch on its numbers: they are in its memory, and nothing traces or transforms the call."""
    is_traced = torch.compiler.is_compiling() or torch._C._is_tracing()
    is_traced = is_traced or any(mode_of(_MAKE_FX) is not None for mode_of in _MODES)
    has_numbers = host_reads(tensor.device) and type(tensor) is Tensor  # a FakeTensor has none
    return has_numbers and not (is_traced or torch._C._are_functorch_transforms_active())
