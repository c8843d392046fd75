"""What is compared: one loss and its gradients, from logits or from hidden states, by this library and its peers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ava_ext.unified_loss import UnifiedLoss

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
LOGITS, HIDDEN_STATES = "logits", "hidden_states"


class Size(NamedTuple):
    """The shapes of a case."""

    n_tokens: int
    vocab_size: int
    hidden_size: int | None  # None: only from logits
    dtype: str
    device: str


class Rewritten(torch.autograd.Function):
    """case.source, written into case.buffer: the output of an operation, as of a GEMM, in the same memory each time."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, case: Any) -> Tensor:  # [] -> [n_rows, vocab_size]
        return case.buffer.copy_(case.source).detach()

    @staticmethod
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[None, None]:
        return None, None


class Case:
    """Inputs of one size. `refill` writes the logits anew, as a model does; losses may write over them."""

    def __init__(self, problem: str, size: Size) -> None:
        self.problem, self.size = problem, size
        generator = torch.Generator(size.device).manual_seed(0)
        dtype = DTYPES[size.dtype]

        def normal(*shape: int, scale: float) -> Tensor:
            values = torch.empty(shape, dtype=dtype, device=size.device)
            return values.normal_(0, scale, generator=generator)

        n, vocab_size = size.n_tokens, size.vocab_size
        self.targets = torch.randint(vocab_size, (n,), generator=generator, device=size.device)
        if problem == LOGITS:
            self.source = normal(n, vocab_size, scale=2.0)
            self.buffer = torch.empty_like(self.source)
        else:
            assert size.hidden_size is not None
            self.hidden_states = normal(n, size.hidden_size, scale=1.0).requires_grad_()
            self.weight = normal(vocab_size, size.hidden_size, scale=2 / size.hidden_size**0.5).requires_grad_()
        self.refill()

    def refill(self) -> None:
        """Logits [n_tokens, vocab_size] that require grad and are not a leaf."""
        if self.problem == LOGITS:
            parameter = torch.zeros((), device=self.size.device, requires_grad=True)
            self.logits: Tensor = Rewritten.apply(parameter, self)

    def leaves(self) -> tuple[Tensor, ...]:
        """What gets a gradient."""
        return (self.logits,) if self.problem == LOGITS else (self.hidden_states, self.weight)


Loss = Callable[..., Tensor]  # (logits, targets) or (hidden_states, weight, targets) -> []


class Variant(NamedTuple):
    """One way to compute the loss."""

    label: str
    loss: Loss
    is_compiled: bool = False

    def call(self, case: Case) -> tuple[Tensor, ...]:
        """The loss [] and the gradient of each of case.leaves()."""
        value = self.loss(*case.leaves(), case.targets)
        return value, *torch.autograd.grad(value, case.leaves())


class Peers(NamedTuple):
    """Variants by name, and the names of those that are absent, each with the reason."""

    variants: dict[str, Variant]
    absent: dict[str, str]


def peers(problem: str, size: Size, with_compiled: bool = True) -> Peers:
    """Everything that can be compared here. Ours come first."""
    found = Peers(_ours(problem, size), {})
    eager = _eager_from_logits if problem == LOGITS else _eager_from_hidden_states
    found.variants["eager"] = Variant("PyTorch eager", eager)
    if with_compiled:
        compiled = torch.compile(eager, dynamic=False, fullgraph=True)
        found.variants["compiled"] = Variant("PyTorch compiled", compiled, is_compiled=True)
    is_cuda = size.device != "cpu"
    if problem == LOGITS:
        _add(found, "liger", "liger-kernel", "liger_kernel.transformers.functional", "liger_cross_entropy", is_cuda)
        return found
    _add_torch_linear(found)
    function = "liger_fused_linear_cross_entropy"
    _add(found, "liger", "liger-kernel", "liger_kernel.transformers.functional", function, is_cuda)
    options = {"impl": "cce" if is_cuda else "torch_compile"}
    _add(found, "cut", "cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy", True, **options)
    return found


def _ours(problem: str, size: Size) -> dict[str, Variant]:
    make = partial(UnifiedLoss, size.vocab_size, primary_loss_type="standard")
    loss_fn = make().to(size.device)
    if problem == HIDDEN_STATES:

        def from_hidden_states(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return loss_fn(targets=targets, hidden_states=states, lm_head_weight=weight)

        return {"ours": Variant("ava_ext", from_hidden_states)}
    inplace = make(inplace_gradient=True).to(size.device)
    return {"ours": Variant("ava_ext", loss_fn), "ours_inplace": Variant("ava_ext, inplace_gradient", inplace)}


def _eager_from_logits(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


def _eager_from_hidden_states(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(states, weight), targets)


def _add_torch_linear(found: Peers) -> None:
    """F.linear_cross_entropy, with each way that it offers to accumulate."""
    function = getattr(F, "linear_cross_entropy", None)
    options_type = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options_type is None:
        found.absent["torch_linear"] = f"torch {torch.__version__} has no F.linear_cross_entropy"
        return
    for name, options in {"": options_type(), "_accurate": options_type(acc_policy="accurate")}.items():
        label = "F.linear_cross_entropy" + (", accurate" if name else "")
        found.variants["torch_linear" + name] = Variant(label, partial(function, options=options))


def _add(found: Peers, name: str, package: str, module: str, function: str, runs: bool, **options: Any) -> None:
    """A function of another package, or why it is absent."""
    try:
        label = f"{package} {metadata.version(package)}"
        if not runs:
            found.absent[name] = f"{package} runs on GPUs only"
            return
        taken = getattr(import_module(module), function)
    except metadata.PackageNotFoundError:
        found.absent[name] = f"{package} is not installed"
    except Exception as error:  # a package that does not fit this torch fails in many ways
        found.absent[name] = f"{package}: {type(error).__name__}: {error}"[:200]
    else:
        found.variants[name] = Variant(label, partial(taken, **options), is_compiled=bool(options))
