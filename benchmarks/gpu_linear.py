"""The last linear layer and the loss together on a GPU: ours, the bare products, PyTorch's ways, other libraries'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpu_peers
import linear
import torch
from gpu_timing import Outcome, measure
from row_loss import DTYPES, Variant
from targets import Verdict
from torch import Tensor

from ava_ext.ops.linear_rows import by_chunks

SIZES = ((8192, 4096, 128256),)  # n_rows, hidden_size, vocab_size
_OVER_PRODUCTS = 1.05
# variants that give the same gradients but for rounding; the products alone are another computation
_YARDSTICKS = ("products", "products_chunked", "products_whole", "ours_terms", "ours_half")


def _own_products(case: linear.Case) -> Callable[[], object]:
    """The products of ours and nothing else: the layer's own plan of chunks and sums, with no kernel between them."""
    states, weight = case.hidden_states.detach(), case.weight.detach()
    with_states_and_weight = [True, True, False]

    def no_kernel(logits: Tensor, rows: slice | Tensor) -> None:
        pass

    def call() -> tuple[Tensor, Tensor]:
        grad_states, grad_weight, _ = by_chunks(
            states, weight, None, None, weight.dtype, with_states_and_weight, no_kernel, None, None
        )
        return grad_states, grad_weight

    return call


def _whole_products(case: linear.Case) -> Callable[[], object]:
    """Logits, gradient of hidden states, gradient of weight: three products over all rows, in the type of the weight.

    No chunks, no float32: what a linear layer and its backward take by themselves.
    """
    states, weight = case.hidden_states.detach(), case.weight.detach()

    def call() -> tuple[Tensor, Tensor]:
        logits = states @ weight.t()
        return logits @ weight, logits.t() @ states

    return call


def make_variants(case: linear.Case, with_compiled: bool) -> tuple[dict[str, Variant], dict[str, str]]:
    """Variants by name, and the absent ones with the reason."""
    peers, absent = gpu_peers.linear_losses(case.targets, lambda loss: linear.with_gradients(case, loss))
    if not case.weight.is_cuda:
        absent |= {name: "needs a GPU" for name in peers}
        peers = {}
    shared = {
        name: Variant(variant.label, variant.call, is_slow=False, is_compiled=variant.is_compiled)
        for name, variant in linear.make_variants(case).items()
    }
    if not any(name.startswith("torch_") for name in shared):
        absent["torch"] = f"torch {torch.__version__} has no F.linear_cross_entropy with options"
    variants = {
        "products": Variant("its matrix products alone", _own_products(case)),
        "products_chunked": shared.pop("products")._replace(label="chunked products, all in the weight's type"),
        "products_whole": Variant("three products over all rows", _whole_products(case)),
        **shared,
        **peers,
    }
    for name, variant in list(variants.items()):
        if variant.is_compiled and not with_compiled:
            absent[name] = "left out: --no-compile"
            del variants[name]
    return variants, absent


def run_case(
    n_rows: int,
    hidden_size: int,
    vocab_size: int,
    dtype: str,
    device: torch.device,
    *,
    rounds: int,
    with_compiled: bool,
    on_progress: Callable[[Outcome], None] = lambda outcome: None,
) -> tuple[Outcome, dict[str, Variant], int]:
    """What was measured, the variants, and the bytes of both gradients."""
    if with_compiled:
        torch.compiler.reset()
    case = linear.Case(n_rows, hidden_size, vocab_size, DTYPES[dtype], device)
    variants, absent = make_variants(case, with_compiled)
    references = {name: "eager" for name in variants if name not in _YARDSTICKS and name != "eager"}
    outcome = measure(variants, device, rounds=rounds, references=references, on_progress=on_progress)
    outcome.absent.update(absent)
    parameters = (case.hidden_states, case.weight)
    return outcome, variants, sum(tensor.numel() * tensor.element_size() for tensor in parameters)


def table(outcome: Outcome, variants: dict[str, Variant], gradient_bytes: int) -> list[str]:
    """Lines: time, over the products and over ours, and the extra memory without the gradients that are returned."""
    times, ran = outcome.times, outcome.times.milliseconds
    lines = [f"{'forward + backward':54}{'ms':>9}{'quartiles':>19}  / products  / ours  extra MB"]
    for name, variant in variants.items():
        if name in outcome.absent:
            continue
        lower, upper = times.quartiles(name)
        over_products, over_ours = (
            f"{times.ratio(name, other):.2f}" if other in ran else "-" for other in ("products", "ours")
        )
        extra = f"{(outcome.extra_bytes[name] - gradient_bytes) / 1e6:.0f}" if name in outcome.extra_bytes else "-"
        quartiles = f"{lower:.2f} .. {upper:.2f}"
        lines.append(
            f"{variant.label:54}{times.median(name):9.2f}{quartiles:>19}{over_products:>12}{over_ours:>8}{extra:>10}"
        )
    return lines


def verdicts(outcome: Outcome, size: dict[str, Any]) -> list[Verdict]:
    """Targets of one case, of the variants that ran."""
    if not {"ours", "products"} <= outcome.times.milliseconds.keys():
        return []
    at = f"{size['dtype']} [{size['n_rows']}, {size['hidden_size']}] x {size['vocab_size']}"
    ratio = outcome.times.ratio("ours", "products")
    return [Verdict(f"{at}: time over its matrix products", ratio, "<=", _OVER_PRODUCTS)]
