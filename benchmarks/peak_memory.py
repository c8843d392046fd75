"""Peak extra memory of one loss and its gradient, as a fraction of the logits.

A process of its own makes the logits, warms up on two rows (code is loaded, but no pool holds a gradient yet), and
then calls once. Extra = the greatest resident memory during the call - the resident memory before it. The gradient
counts: an extra of 1 is a gradient and nothing else. A compiled variant warms up at full size, or its compilation would
be measured; PyTorch keeps none of that memory. Linux only.
"""

from __future__ import annotations

import subprocess
import sys

from ava_ext.bench.memory import extra_bytes, is_available

__all__ = ["VARIANTS", "extra_bytes", "is_available", "peak_extra_memory"]

VARIANTS = (
    "eager", "compiled", "ours", "ours_inplace",
    "terms_eager", "terms_compiled", "terms_ours", "terms_ours_inplace",
)  # fmt: skip


def peak_extra_memory(variant: str, n_rows: int, vocab_size: int, dtype: str) -> float:
    """Peak extra memory over that of the logits, measured in a process of its own.

    Raises:
        RuntimeError: with what the process wrote, if it failed.
    """
    arguments = [variant, str(n_rows), str(vocab_size), dtype]
    result = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"peak_extra_memory of {variant}: {result.stderr}")
    return float(result.stdout.split()[-1])


def _measure(name: str, n_rows: int, vocab_size: int, dtype: str) -> float:
    from row_loss import DTYPES, Case, make_variants

    case = Case(n_rows, vocab_size, DTYPES[dtype])
    variant = make_variants(case)[name]
    warm_up = variant if variant.is_compiled else make_variants(Case(2, vocab_size, DTYPES[dtype]))[name]
    for _ in range(2):
        warm_up.call()
        case.refill()
    return extra_bytes(variant.call) / (case.source.numel() * case.source.element_size())


if __name__ == "__main__":
    print(_measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
