"""Sums and means of detailed losses, over micro-batches, steps and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ava_ext.config import UnifiedLossConfig
from ava_ext.losses import METRICS, METRICS_THAT_ADD_UP
from ava_ext.ops.arguments import check_is_tensor
from ava_ext.process_group import GroupReference, resolve


class LossMeter:
    """Adds up the dicts that UnifiedLoss gives with return_detailed=True, over calls and ranks, and reads them once.

    - total_loss, the components, n_tokens and focal_loss are added. With num_items_in_batch they are shares of the
      whole batch, and their sum over micro-batches and ranks is that of the batch.
    - perplexity is exp of the mean cross_entropy, temperature that of the last call.
    - Every other metric is averaged with n_tokens as weights, over the calls that have it. Means over the rows of a
      call become means over all rows. Expert balance and per-depth metrics are not such means; for these you get the
      average over calls.

    Args:
        group: the process group that compute() adds up over; "world": the default group; None: this process alone.

    Example:
        >>> loss_fn, meter = UnifiedLoss(32000), LossMeter()
        >>> for micro_input_ids, micro_targets in zip(input_ids, targets):
        ...     options = {"num_items_in_batch": targets.numel(), "return_detailed": True}
        ...     parts = loss_fn(model(micro_input_ids), micro_targets, **options)
        ...     parts["total_loss"].backward()
        ...     meter.update(parts)
        >>> meter.compute()["n_tokens"]
        12.0
    """

    def __init__(self, group: Any = None) -> None:
        UnifiedLossConfig.checked("loss_meter", process_group=group)
        self.group = GroupReference(group)
        self.reset()

    def reset(self) -> None:
        """Discards all calls."""
        # of the calls with the same entries: their n_tokens weigh the means among these
        self._sums: dict[frozenset[str], dict[str, Tensor]] = {}
        self._temperature: Tensor | None = None

    @torch.no_grad()
    def update(
        self,
        parts: Mapping[str, Tensor],  # scalars
    ) -> None:
        """Adds the parts of one call, without waiting for the device.

        Raises:
            ValueError: parts have no n_tokens, or an entry is not a scalar, as with reduction="none".
            TypeError: parts are not a dict, as without return_detailed=True, or an entry is not a tensor.
        """
        is_dict = isinstance(parts, Mapping)
        if not is_dict or "n_tokens" not in parts:
            got = sorted(parts) if is_dict else type(parts).__name__
            raise (ValueError if is_dict else TypeError)(
                f"loss_meter: expected the dict of UnifiedLoss with return_detailed=True, with n_tokens, got {got}"
            )
        n_tokens, added = parts["n_tokens"], {}
        for name, value in parts.items():
            check_is_tensor("loss_meter", name, value)
            if value.dim() != 0:
                raise ValueError(f"loss_meter: expected a scalar for {name!r}, got shape {list(value.shape)}")
            # a copy: of float64, what is given may change later
            value = value.to(torch.float32 if value.device.type == "mps" else torch.float64, copy=True)
            added[name] = value * n_tokens if _is_mean(name) else value
        self._temperature = added.pop("temperature", self._temperature)
        entries = frozenset(added)
        before = self._sums.get(entries)
        self._sums[entries] = added if before is None else {name: before[name] + added[name] for name in before}

    def compute(self) -> dict[str, float]:
        """Every entry as a number, over all calls since the last reset and all ranks. Waits for the device, once.

        Ranks need not have the same entries, and one may have had no batch at all. If none had any, the result is {}.
        """
        kept = [value for sums in self._sums.values() for value in sums.values()]
        if self._temperature is not None:
            kept.append(self._temperature)
        numbers = iter(torch.stack(kept).tolist() if kept else ())
        own = [{name: next(numbers) for name in sums} for sums in self._sums.values()], next(numbers, None)
        ranks = [own]
        group = resolve(self.group.process_group)
        if group is not None:
            ranks = ranks * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(ranks, own, group=group)
        totals: dict[str, float] = {}
        n_tokens: dict[str, float] = {}  # of the calls that have the entry
        for sums in (sums for of_rank, _ in ranks for sums in of_rank):
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value
                n_tokens[name] = n_tokens.get(name, 0.0) + sums["n_tokens"]
        result = {name: value / max(n_tokens[name], 1) if _is_mean(name) else value for name, value in totals.items()}
        if "cross_entropy" in result:
            cross_entropy = result["cross_entropy"]
            result["perplexity"] = math.inf if cross_entropy > 700 else math.exp(cross_entropy)
        temperatures = [temperature for _, temperature in (own, *ranks) if temperature is not None]
        if temperatures:
            result["temperature"] = temperatures[0]
        return result


def _is_mean(name: str) -> bool:
    return name in METRICS and name not in METRICS_THAT_ADD_UP and name != "temperature"
