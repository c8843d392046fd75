"""Derivatives that the operators do not have raise: none passes for a constant, and its derivative for 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import coerce_cinterpreter  # the form in which the compiler follows what is asked
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

Returned = TypeVar("Returned")
# private in torch, but what its own donated buffers rely on; without it we keep the graph's memory intact, at the
# price of a copy
graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def counted_only(
    values: Tensor,  # [...]
    ignored: Tensor,  # [...] bool
) -> Tensor:  # [...]
    """values, and 0 where a row is ignored: what comes from above may be nan there, and 0 * nan is nan."""
    return values.masked_fill(ignored, 0)


def without_second_derivative(
    gradient: Tensor,  # [..., n_columns]
    *origins: Tensor | None,
) -> Tensor:  # [..., n_columns]
    """Inside backward(create_graph=True): a gradient that raises when it is differentiated.

    origins are tensors that autograd reaches by what the gradient is a function of: the logits, what comes from above.
    autograd.grad(penalty, parameters) goes only where a parameter can be, and would pass by a gradient that leads
    nowhere. None is a tensor that users get: they may write to it.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradient  # compiled: row_gradient's own autograd raises
    if is_batched(gradient, *origins):  # which DelayedError cannot take
        raise RuntimeError("ava_ext: double backward is not supported")
    leading = [origin for origin in origins if origin is not None and origin.requires_grad]
    if not leading:
        leading = [gradient.new_empty(0).requires_grad_()]
    raise_later = torch._C._functions.DelayedError(b"ava_ext: double backward is not supported", 1 + len(leading))
    return raise_later(gradient.detach(), *leading)[0]


def as_constant(value: float) -> float:
    """value; where a graph that is traced has it as a symbol, a constant of that graph."""
    if not torch.compiler.is_compiling():
        return value
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # with sympy: nothing that eager calls wait for

    return guard_scalar(value)


def is_exporting() -> bool:
    """torch.compiler.is_exporting(), which in torch 2.10 and 2.11 says yes to every graph that torch.compile traces."""
    return torch.compiler._is_exporting_flag


def without_activations(function: Callable[..., Returned], *arguments: Any) -> Returned:
    """function(*arguments), which backward computes again; within torch.func and in a program of torch.export, which
    cannot, what it needs is kept. The function reads no other tensors, so that backward finds what forward had.
    """
    if torch._C._are_functorch_transforms_active() or is_exporting():
        return function(*arguments)
    # a graph passes no symbol of a float into what is checkpointed
    arguments = tuple(as_constant(value) if isinstance(value, float) else value for value in arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class _EagerOperator(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *tensors, constants, (operator, save, ctx.gradient) = arguments
        inputs = (*tensors, *constants)
        with torch._C._AutoDispatchBelowAutograd():
            output = operator(*inputs)
        save(ctx, inputs, output)
        ctx.n_tensors = len(tensors)
        return output

    @staticmethod
    def backward(ctx, *grads):
        return *ctx.gradient(ctx, *grads)[: ctx.n_tensors], None, None


def call_operator(
    operator: Callable[..., tuple[Tensor, ...]],
    save: Callable[..., None],
    gradient: Callable[..., tuple[Tensor | None, ...]],
    tensors: tuple[Tensor | None, ...],
    constants: tuple[object, ...],
) -> tuple[Tensor, ...]:
    """operator(*tensors, *constants), whose autograd formula in torch.library is save and gradient.

    In eager mode by a Function of our own, which costs a third of the Python of torch.library's.
    """
    if torch.compiler.is_compiling():
        return operator(*tensors, *constants)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _EagerOperator.apply(*tensors, constants, (operator, save, gradient))
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*tensors, *constants)


def raise_double_backward(ctx, *grads):
    """The backward of an operator that computes a gradient; without it, torch would take that for a constant."""
    raise RuntimeError("ava_ext: double backward is not supported")


def is_forward_mode() -> bool:
    """Whether forward-mode derivatives may be asked for: within torch.func.jvp or forward_ad.dual_level."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether a forward-mode derivative by one of these is asked for."""
    return is_forward_mode() and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def refuse_tangents(owner: str, tensors: Iterable[Tensor | None]) -> None:
    """Raises NotImplementedError where a forward-mode derivative by one of them is asked for, which would be 0."""
    # compiled code cannot look for a tangent
    if is_forward_mode() and (torch.compiler.is_compiling() or has_tangent(*tensors)):
        raise NotImplementedError(f"{owner}: forward-mode derivatives are not supported here; expected reverse mode")


_functorch = torch._C._functorch
_is_transformed = torch._C._are_functorch_transforms_active  # looked up once, for wants_gradient asks of many tensors
_is_batched = getattr(_functorch, "is_legacy_batchedtensor", _functorch.is_batchedtensor)  # what autograd.grad makes


def _transforms() -> list[Any]:
    """Kinds of the torch.func transforms at work, the outermost first."""
    return [level.key() for level in _functorch.get_interpreter_stack() or ()]


def wants_gradient(tensor: Tensor) -> bool:
    """requires_grad; within torch.func also that of what the transforms have wrapped: a batch of vmap says False."""
    if _is_transformed() and not torch.compiler.is_compiling():  # compiled code cannot look into a batch
        while not tensor.requires_grad and _functorch.is_functorch_wrapped_tensor(tensor):
            tensor = _functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def is_batched(*tensors: Tensor | None) -> bool:
    """Whether one of these holds a batch: in a backward, that of autograd.grad(is_grads_batched=True)."""
    if torch.compiler.is_compiling():
        return False  # nor can compiled code ask
    return any(tensor is not None and _is_batched(tensor) for tensor in tensors)


def refuse_transforms(owner: str, tensors: Iterable[Tensor | None], vmap_works: bool = False) -> None:
    """Raises NotImplementedError where a derivative is asked for in a way that is not reverse mode of torch.autograd,
    and within torch.func.vmap; vmap_works: only where that is within, or around, another transform, or of what requires
    grad.
    """
    is_transformed = torch._C._are_functorch_transforms_active()
    if is_transformed and torch.compiler.is_compiling():
        refuse_transforms_in_graphs(owner)
    elif is_transformed:
        kinds, tensors = set(_transforms()), list(tensors)
        if _functorch.TransformType.Vmap in kinds and (len(kinds) > 1 or not vmap_works):
            raise NotImplementedError(
                f"{owner}: torch.func.vmap is not supported here; expected a call for each sample"
            )
        differentiable = any(tensor is not None and wants_gradient(tensor) for tensor in tensors)
        differentiable = differentiable and torch.is_grad_enabled()
        if _functorch.TransformType.Vmap in kinds and differentiable:
            raise NotImplementedError(
                f"{owner}: torch.func.vmap of what requires grad is not supported here; expected a call for each sample"
            )
        if _functorch.TransformType.Grad in kinds and differentiable:
            raise NotImplementedError(f"{owner}: torch.func.grad is not supported here; expected torch.autograd.grad")
        refuse_tangents(owner, tensors)
        if _functorch.TransformType.Jvp in kinds and differentiable:
            raise NotImplementedError(
                f"{owner}: torch.func.jvp beside what requires grad is not supported here; expected it within "
                "torch.no_grad"
            )
    refuse_tangents(owner, tensors)


def refuse_transforms_in_graphs(owner: str, vmap_works: bool = True) -> None:
    """Raises NotImplementedError while a graph is traced within torch.func.grad, or vmap where that does not work.

    Without fullgraph=True the compiler then leaves the function to eager mode. For where transforms are at work.
    """
    kind = coerce_cinterpreter(_functorch.peek_interpreter_stack()).key()
    if kind == _functorch.TransformType.Vmap and not vmap_works:
        raise NotImplementedError(f"{owner}: torch.func.vmap is not supported in a compiled graph; expected eager mode")
    if kind == _functorch.TransformType.Grad:
        raise NotImplementedError(f"{owner}: torch.func.grad is not supported in a compiled graph; expected eager mode")


def refuse_nested_transforms(owner: str) -> None:
    """Raises NotImplementedError within several transforms that do not work together: torch.func.vmap within a
    derivative, not around it, and jvp with another derivative.
    """
    kinds, transforms = _transforms(), _functorch.TransformType
    if kinds[-1] == transforms.Vmap and len(set(kinds)) > 1:
        raise NotImplementedError(
            f"{owner}: torch.func.vmap within torch.func.grad or jvp is not supported; expected it around them"
        )
    if transforms.Jvp in kinds and kinds.count(transforms.Jvp) + kinds.count(transforms.Grad) > 1:
        raise NotImplementedError(f"{owner}: second derivatives are not supported")
