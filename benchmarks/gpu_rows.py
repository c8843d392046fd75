"""The loss of one batch of logits and its gradient on a GPU: ours, PyTorch's, other libraries', and a device copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpu_peers
import row_loss
import torch
from gpu_timing import Outcome, measure
from row_loss import Variant
from targets import Verdict

N_ROWS = (8192, 2048)
VOCAB_SIZES = (128256, 32000, 262144, 50257)
DTYPES = ("bfloat16", "float32")
MAIN_SIZE = (8192, 128256)  # where every variant runs; elsewhere those that take long to compile are left out
_COPY_SHARE, _TERMS_OVER_PLAIN, _FASTER_THAN_PEERS = 0.85, 1.1, 1.3
_EXTRA_MEMORY = {"ours": 1.01, "ours_inplace": 0.01, "terms_ours": 1.01, "terms_ours_inplace": 0.01}
PEERS = ("liger", "quack", "quack_inplace")


def make_variants(
    case: row_loss.Case, is_whole: bool, with_compiled: bool
) -> tuple[dict[str, Variant], dict[str, str]]:
    """Variants by name, and the absent ones with the reason."""
    peers, absent = gpu_peers.row_losses(case.targets, lambda loss: row_loss.forward_and_backward(case, loss))
    if not case.source.is_cuda:
        absent |= {name: "needs a GPU" for name in peers}
        peers = {}
    variants = {**row_loss.make_variants(case), **peers}
    for name, variant in list(variants.items()):
        if variant.is_compiled and not with_compiled:
            absent[name] = "left out: --no-compile"
            del variants[name]
        elif not is_whole and (name.startswith("softcap") or (variant.is_compiled and variant.is_slow)):
            del variants[name]
    return variants, absent


def reference_of(name: str) -> str:
    """The variant whose loss and gradient this one should give."""
    return f"{name.split('_')[0]}_eager" if name.startswith(("terms_", "softcap_")) else "eager"


def run_case(
    n_rows: int,
    vocab_size: int,
    dtype: str,
    device: torch.device,
    *,
    rounds: int,
    n_sequences: int,
    is_whole: bool,
    with_compiled: bool,
    on_progress: Callable[[Outcome], None] = lambda outcome: None,
) -> tuple[Outcome, dict[str, Variant], int]:
    """What was measured, the variants, and the bytes of the logits."""
    if with_compiled:
        torch.compiler.reset()  # sizes of earlier cases would count against the limit of recompilations
    case = row_loss.Case(n_rows, vocab_size, row_loss.DTYPES[dtype], device, n_sequences)
    variants, absent = make_variants(case, is_whole, with_compiled)
    references = {name: reference_of(name) for name in variants if name != "copy" and name != reference_of(name)}
    outcome = measure(
        variants,
        device,
        rounds=rounds,
        before=case.refill,
        slow_every=max(1, rounds // 5),
        references=references,
        on_progress=on_progress,
    )
    outcome.absent.update(absent)
    return outcome, variants, case.source.numel() * case.source.element_size()


def table(outcome: Outcome, variants: dict[str, Variant], logits_bytes: int) -> list[str]:
    """Lines: time, bytes per second of one read and one write of the logits, and the ratios."""
    times = outcome.times
    titles = f"{'ms':>9}{'quartiles':>19}{'GB/s':>8}{'of copy_':>9}  vs eager  vs comp.  / ours  extra / logits"
    lines = [f"{'forward + backward':54}{titles}"]
    for name, variant in variants.items():
        if name in outcome.absent:
            continue
        lower, upper = times.quartiles(name)
        rate = 2 * logits_bytes / times.median(name) / 1e6
        ratios = relative(outcome, name)
        cells = [
            f"{times.median(name):9.3f}{f'{lower:.3f} .. {upper:.3f}':>19}{rate:8.0f}",
            _cell(ratios["share_of_copy"], 9, "%"),
            _cell(ratios["faster_than_eager"], 10, "x"),
            _cell(ratios["faster_than_compiled"], 10, "x"),
            _cell(ratios["time_over_ours"], 8, ""),
            _cell(outcome.extra_bytes[name] / logits_bytes if name in outcome.extra_bytes else None, 16, ""),
        ]
        lines.append(f"{variant.label:54}{''.join(cells)}")
    return lines


def _cell(value: float | None, width: int, unit: str) -> str:
    if value is None:
        return " " * (width - 1) + "-"
    return f"{value:{width - 1}.0%} " if unit == "%" else f"{f'{value:.2f}{unit}':>{width}}"


def relative(outcome: Outcome, name: str) -> dict[str, float | None]:
    """Speed against the copy, PyTorch (every term: the composition) and plain UnifiedLoss; None if that did not run."""
    prefix = name.split("_")[0] + "_" if name.startswith(("terms_", "softcap_")) else ""
    pairs = {
        "share_of_copy": ("copy", name),
        "faster_than_eager": (f"{prefix}eager", name),
        "faster_than_compiled": (f"{prefix}compiled", name),
        "time_over_ours": (name, "ours"),
    }
    ran = outcome.times.milliseconds
    return {
        ratio: outcome.times.ratio(above, below) if above in ran and below in ran else None
        for ratio, (above, below) in pairs.items()
    }


def verdicts(outcome: Outcome, size: dict[str, Any], logits_bytes: int) -> list[Verdict]:
    """Targets of one case, of the variants that ran."""
    times, ran = outcome.times, outcome.times.milliseconds
    at = f"{size['dtype']} [{size['n_rows']}, {size['vocab_size']}]"
    found = []

    def add(title: str, above: str, below: str, relation: str, wanted: float) -> None:
        if above in ran and below in ran:
            found.append(Verdict(f"{at} {title}", times.ratio(above, below), relation, wanted))

    if size["dtype"] != "float32":  # the types of training
        for name in ("ours", "ours_kernel"):
            add(f"{name}: share of copy_'s speed", "copy", name, ">=", _COPY_SHARE)
    add("every term: time over plain", "terms_ours", "ours", "<=", _TERMS_OVER_PLAIN)
    for peer in PEERS:
        add(f"faster than {peer}", peer, "ours", ">=", _FASTER_THAN_PEERS)
    for name, wanted in _EXTRA_MEMORY.items():
        if name in outcome.extra_bytes:
            extra = outcome.extra_bytes[name] / logits_bytes
            found.append(Verdict(f"{at} {name}: extra memory over the logits", extra, "<=", wanted))
    return found
