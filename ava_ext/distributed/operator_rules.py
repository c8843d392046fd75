"""The operators torch.ops.ava_ext of DTensors: each rank runs them on its rows, and gets DTensors.

Rules of torch.library for the class DTensor, not sharding strategies: a strategy would gather logits in placements that
it does not know, and takes no torch.Tensor beside a DTensor. Here what an operator cannot make of its part raises.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from ava_ext import ops  # noqa: F401  the operators exist once it is imported
from ava_ext.ops.dtensor_logits import Place
from ava_ext.ops.dtensor_rows import RouterPlace, of_whole_texts
from ava_ext.ops.dtensors import is_dtensor, summed
from ava_ext.ops.sharded_logits import RowShard

# how a result is made: dimensions before those of the rows and behind them, or a sum over rows, or an empty tensor
ROWS, ROWS_BY_N, N_BY_ROWS, SUM, EMPTY = (0, 0), (0, 1), (1, 0), "sum", "empty"


class RowOperator(NamedTuple):
    """An operator of rows [..., n]: which arguments are aligned with them, and how its results are made."""

    first: str  # whose placements decide
    of_rows: tuple[str, ...]  # [...] or [..., any]
    results: tuple[Any, ...] = ()
    weights: tuple[str, ...] = ()  # of a linear layer, whole on every rank
    is_of_elements: bool = False  # and linear in each: columns of several ranks are fine, and sums not added up yet


_OF_LOSS = ("targets", "row_weights", "candidate_ids", "candidate_weights", "column_weights")
_OF_GRADIENT = ("statistics", "row_coefficients", "ids", "row_mask", "column_weights")
_HEAD = ("weight", "bias")
ROW_OPERATORS = {
    "row_loss": RowOperator("logits", _OF_LOSS, (ROWS, N_BY_ROWS, ROWS_BY_N, ROWS_BY_N, ROWS_BY_N)),
    "row_loss_": RowOperator("logits", _OF_LOSS, (ROWS, N_BY_ROWS)),
    "row_statistics": RowOperator("logits", ("ids", "row_mask"), (ROWS_BY_N, ROWS_BY_N, N_BY_ROWS)),
    "row_gradient": RowOperator("logits", _OF_GRADIENT, (ROWS_BY_N,)),
    "row_gradient_": RowOperator("logits", _OF_GRADIENT),
    "scale_rows_": RowOperator("rows", ("factors", "targets"), is_of_elements=True),
    "linear_row_loss": RowOperator(
        "hidden_states", _OF_LOSS, (SUM, ROWS, N_BY_ROWS, ROWS_BY_N, SUM, SUM, EMPTY), _HEAD
    ),
    "linear_row_statistics": RowOperator(
        "hidden_states", ("ids", "row_mask"), (ROWS_BY_N, ROWS_BY_N, ROWS, ROWS, ROWS, ROWS, EMPTY), _HEAD
    ),
    "linear_row_gradient": RowOperator("hidden_states", _OF_GRADIENT, (ROWS_BY_N, SUM, SUM), _HEAD),
}
# of state that no rank has a part of, of a number of all rows, and one that writes a sum over rows into memory
WITHOUT_RULE = ("temperature_step_", "committed", "is_recomputation", "count_rows", "add_weight_gradient_")


def register() -> None:
    """Registers a rule for every operator that has one."""
    rules: dict[str, Any] = {name: functools.partial(_row_operator, name) for name in ROW_OPERATORS}
    rules |= {
        "repetition_candidates": _repetition_candidates,
        "router_statistics": _router_statistics,
        "router_gradient": _router_gradient,
    }
    for name, rule in rules.items():
        torch.library.register_torch_dispatch(f"ava_ext::{name}", DTensor, functools.partial(_called, rule))


def _called(rule: Any, cls: type, operator: Any, types: Any, arguments: tuple[Any, ...], options: Any) -> Any:
    names = [argument.name for argument in operator._schema.arguments]
    with torch.no_grad():  # autograd has its part behind it
        return rule(operator, dict(zip(names, arguments, strict=False)) | (options or {}))


def _row_operator(name: str, operator: Any, given: dict[str, Any]) -> Any:
    kind = ROW_OPERATORS[name]
    first = given[kind.first]
    if not is_dtensor(first):
        raise _mixed(name, kind.first, given)
    if kind.is_of_elements:
        placements = tuple(p if p.is_shard() else Replicate() for p in first.placements)
        place = Place(first.device_mesh, placements, first.dim() - 1)
    else:
        place = Place.of(name, kind.first, first)
    if any(place.is_of_columns) and not kind.is_of_elements:
        raise ValueError(
            f"{name}: expected {kind.first} whose last dimension is whole on every rank, got placements "
            f"{first.placements}: ava_ext.ops.row_loss, softmax_statistics and token_log_probs take the columns of "
            "several ranks, and gather a few numbers of each row"
        )
    rows = place.row_shard(first.shape[:-1]) or _all_rows(first.shape[:-1], place.mesh)
    others = {key: _local(name, key, value, rows, kind) for key, value in given.items() if key != kind.first}
    found = _as_tuple(operator(**{kind.first: first.to_local()}, **others))
    results = tuple(_result(value, how, rows, place.is_of_rows) for value, how in zip(found, kind.results, strict=True))
    return results if len(results) > 1 else results[0] if results else None


def _local(owner: str, name: str, value: Any, rows: RowShard, kind: RowOperator) -> Any:
    """What this rank's call gets of an argument."""
    if not isinstance(value, Tensor):
        return value
    if name in kind.weights and not is_dtensor(value) and any(p.is_shard() for p in rows.placements):
        raise ValueError(
            f"{owner}: expected {name} as a DTensor beside {kind.first} in placements {rows.placements}, got a "
            f"torch.Tensor: pass DTensor.from_local({name}, mesh, [Replicate()])"
        )
    if name not in kind.of_rows:
        return _same_everywhere(owner, name, value)
    if name == "column_weights" and is_dtensor(value) and tuple(value.placements) != rows.placements:
        raise ValueError(
            f"{owner}: expected {name} in the placements of the rows {rows.placements}, got {value.placements}: call "
            f"{name}.redistribute(placements=...) first"
        )
    return rows.local(value)


def _same_everywhere(owner: str, name: str, value: Any) -> Any:
    if not is_dtensor(value):
        return value
    if not all(p.is_replicate() for p in value.placements):
        raise ValueError(
            f"{owner}: expected {name} in placements Replicate, got {value.placements}: ava_ext.ops.row_loss of "
            "LinearLogits takes a weight in Shard(0)"
        )
    return value.to_local()


def _mixed(owner: str, first: str, given: dict[str, Any]) -> ValueError:
    names = ", ".join(name for name, value in given.items() if is_dtensor(value))
    return ValueError(
        f"{owner}: expected {first} as a DTensor beside {names}, got a torch.Tensor: pass "
        f"DTensor.from_local({first}, mesh, placements), or to_local() of the others"
    )


def _all_rows(shape: torch.Size, mesh: Any) -> RowShard:
    return RowShard(shape, (0,) * len(shape), tuple(shape), mesh, (Replicate(),) * mesh.ndim)


def _as_tuple(found: Any) -> tuple[Tensor, ...]:
    return () if found is None else (found,) if isinstance(found, Tensor) else tuple(found)


def _result(value: Tensor, how: Any, rows: RowShard, is_of_rows: tuple[bool, ...]) -> Any:
    if how == SUM:
        return summed(value, rows.mesh, is_of_rows)
    if how == EMPTY or value.dim() != how[0] + len(rows.sizes) + how[1]:  # not wanted
        return _replicated(value, rows.mesh)
    return rows.spread(value, how[0])


def _replicated(value: Any, mesh: Any) -> Any:
    """A DTensor of what every rank has; of what is one, itself."""
    return value if is_dtensor(value) else summed(value, mesh, (False,) * mesh.ndim)


def _repetition_candidates(operator: Any, given: dict[str, Any]) -> Any:
    of_rows = {name: given.pop(name) for name in ("targets", "segments")}
    tokens = given.pop("tokens")
    if not is_dtensor(tokens):
        raise _mixed("repetition_candidates", "tokens", of_rows)
    options = {name: _same_everywhere("repetition_candidates", name, value) for name, value in given.items()}
    found = of_whole_texts("repetition_candidates", functools.partial(operator, **options), tokens, **of_rows)
    return tuple(_replicated(value, tokens.device_mesh) for value in found)


def _router_place(owner: str, given: dict[str, Any]) -> RouterPlace:
    """Of the operator's layers; its other arguments become those of this rank."""
    layers = given["gate_logits"]
    if not any(map(is_dtensor, layers)):
        raise _mixed(owner, "gate_logits", given)
    place = RouterPlace(owner, layers)
    for name, value in given.items():
        if name in ("expert_indices", "expert_choice", "row_mask", "segment_ids"):
            given[name] = place.local(name, value)
        elif is_dtensor(value):  # gradients of sums: the same on every rank, once they are added up
            given[name] = value.full_tensor()
    given["gate_logits"] = [layer.to_local() for layer in layers]
    return place


def _router_statistics(operator: Any, given: dict[str, Any]) -> Any:
    layers, is_chosen = given["gate_logits"], given["expert_indices"] is None
    place = _router_place("router_statistics", given)
    if is_chosen and layers[0].dim() > 3:
        raise ValueError(
            "router_statistics: expected gate_logits [n_layers, n_rows, n_experts] where the operator chooses, got "
            f"shape {list(layers[0].shape)}: ava_ext.ops.router_statistics takes it"
        )
    *sums, choice = operator(**given)
    sums = [summed(value, place.mesh, place.is_of_rows) for value in sums]
    if not is_chosen or place.rows is None:
        return *sums, _replicated(choice, place.mesh)
    n_layers = len(choice)
    rows = place.rows._replace(
        shape=torch.Size((n_layers, *place.rows.shape[1:])), sizes=(n_layers, *place.rows.sizes[1:])
    )
    return *sums, rows.spread(choice)


def _router_gradient(operator: Any, given: dict[str, Any]) -> Any:
    place = _router_place("router_gradient", given)
    gradient = operator(**given)
    if place.rows is None:
        return _replicated(gradient, place.mesh)
    shape, sizes = (len(gradient), *place.rows.shape[1:]), (len(gradient), *place.rows.sizes[1:])
    return place.rows._replace(shape=torch.Size(shape), sizes=sizes).spread(gradient)
