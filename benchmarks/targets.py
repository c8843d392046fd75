"""The speeds this project has set itself: 2 cores with AVX-512, logits [1024, 50257], as ratios within one run."""

from __future__ import annotations

from typing import Any, NamedTuple

from ava_ext.bench.timing import Times

N_ROWS, VOCAB_SIZE = 1024, 50257
# (ours, dtype) -> at least so many times faster than F.cross_entropy eager, compiled; time over copy_ at most
_SPEED = {
    ("ours_inplace", "float32"): (14, 7, 1.0),
    ("ours", "float32"): (10, 5, 1.3),
    ("ours_kernel", "float32"): (18, 9, 0.8),
    ("ours", "bfloat16"): (9, 5, 1.8),
}
_COMPOSED_EAGER, _COMPOSED_COMPILED = 60, 20
_TERMS_OVER_PLAIN = 1.25
# one gradient, rounded to huge pages of 2 MiB (2% of it in bfloat16), and vectors of n_rows
_EXTRA_MEMORY = {"ours": 1.03, "ours_inplace": 0.01, "terms_ours": 1.03, "terms_ours_inplace": 0.01}
_HALF_OVER_ALL = 0.6
_LINEAR_OVER_PRODUCTS, _LINEAR_EAGER, _LINEAR_COMPILED, _LINEAR_TORCH = 1.06, 1.1, 1.0, 1.0
_CHUNK_BYTES, _LINEAR_MEMORY, _LINEAR_EAGER_MEMORY = 64_000_000, 1.1, 8
_MTP_OVER_LINEAR = 1 + 3.2  # three heads beside the first
_CANDIDATES_MS = 5
# a router's losses, and the diversity of [n_experts, n_rows, hidden_size]
N_ROUTER_ROWS, N_EXPERTS, EXPERTS_PER_ROW = 65536, (64, 128, 256), 2
EXPERT_OUTPUTS = (8, 8192, 1024)
_ROUTER_EAGER, _ROUTER_COMPILED, _ROUTER_OVER_READ, _DIVERSITY_PAIRWISE = 10, 1.5, 1.5, 3
_PYTHON_US = 100


class Verdict(NamedTuple):
    """One target and what was measured."""

    name: str
    measured: float
    relation: str  # ">=" or "<="
    wanted: float

    @property
    def is_met(self) -> bool:
        return self.measured >= self.wanted if self.relation == ">=" else self.measured <= self.wanted


def of_row_loss(times: Times, dtype: str) -> list[Verdict]:
    """Targets of the times of one dtype at [N_ROWS, VOCAB_SIZE]."""
    verdicts = []
    for (name, of_dtype), (eager, compiled, copy) in _SPEED.items():
        if of_dtype == dtype:
            verdicts += [
                Verdict(f"{dtype} {name}: faster than F.cross_entropy", times.ratio("eager", name), ">=", eager),
                Verdict(f"{dtype} {name}: faster than compiled", times.ratio("compiled", name), ">=", compiled),
                Verdict(f"{dtype} {name}: time over copy_", times.ratio(name, "copy"), "<=", copy),
            ]
    for prefix in ("terms", "softcap"):
        ours = f"{prefix}_ours"
        eager, compiled = times.ratio(f"{prefix}_eager", ours), times.ratio(f"{prefix}_compiled", ours)
        verdicts += [
            Verdict(f"{dtype} {ours}: faster than composed", eager, ">=", _COMPOSED_EAGER),
            Verdict(f"{dtype} {ours}: faster than composed, compiled", compiled, ">=", _COMPOSED_COMPILED),
        ]
    for ours, plain in (("terms_ours", "ours"), ("terms_ours_inplace", "ours_inplace")):
        ratio = times.ratio(ours, plain)
        verdicts.append(Verdict(f"{dtype} {ours}: time over {plain}", ratio, "<=", _TERMS_OVER_PLAIN))
    return verdicts


def of_memory(extra: dict[str, float], dtype: str) -> list[Verdict]:
    """Targets of the peak extra memory over the logits, by variant."""
    return [
        Verdict(f"{dtype} {name}: extra memory over the logits", extra[name], "<=", wanted)
        for name, wanted in _EXTRA_MEMORY.items()
    ]


def of_linear(times: Times, extra: dict[str, int], size: dict[str, Any]) -> list[Verdict]:
    """Targets of the fused linear layer at one size, or of multi-token prediction beside it."""
    at = f"{size['dtype']} [{size['n_rows']}, {size['hidden_size']}] x {size['vocab_size']}"
    if "mtp_ours" in times.milliseconds:
        ratio = times.ratio("mtp_ours", "ours")
        return [Verdict(f"{at}: 3 heads more, time over one", ratio, "<=", _MTP_OVER_LINEAR)]
    torchs = [name for name in times.milliseconds if name.startswith("torch_")]
    best = min(torchs, key=times.median, default=None)
    verdicts = [
        Verdict(f"{at}: every term, time over the products", times.ratio("ours_terms", "products"), "<=",
                _LINEAR_OVER_PRODUCTS),
        Verdict(f"{at}: half of the rows ignored, over all", times.ratio("ours_half", "ours"), "<=", _HALF_OVER_ALL),
        Verdict(f"{at}: faster than eager", times.ratio("eager", "ours"), ">=", _LINEAR_EAGER),
        Verdict(f"{at}: faster than compiled", times.ratio("compiled", "ours"), ">=", _LINEAR_COMPILED),
    ]  # fmt: skip
    if best is not None:
        verdicts.append(Verdict(f"{at}: faster than {best}", times.ratio(best, "ours"), ">=", _LINEAR_TORCH))
    if extra:
        # bfloat16 weights have a float32 accumulator
        accumulator = size["vocab_size"] * size["hidden_size"] * 4 if size["dtype"] == "bfloat16" else 0
        over_budget = (extra["ours"] - accumulator) / _CHUNK_BYTES
        verdicts.append(Verdict(f"{at}: extra memory over the budget", over_budget, "<=", _LINEAR_MEMORY))
        if size["dtype"] == "float32":
            less = extra["eager"] / extra["ours"]
            verdicts.append(Verdict(f"{at}: less memory than eager", less, ">=", _LINEAR_EAGER_MEMORY))
    return verdicts


def of_overhead(python_side: Times, repetition: Times) -> list[Verdict]:
    """Targets of what does not grow with the logits."""
    microseconds = python_side.median("every_term") * 1e3
    verdicts = [Verdict("Python side of a call, every term on, us", microseconds, "<=", _PYTHON_US)]
    for text in repetition.milliseconds:
        milliseconds = repetition.median(text)
        verdicts.append(Verdict(f"candidates of {text} text [8, 4096], ms", milliseconds, "<=", _CANDIDATES_MS))
    return verdicts


def of_router(times: Times, n_experts: int) -> list[Verdict]:
    """Targets of one router."""
    eager, compiled = times.ratio("eager", "ours"), times.ratio("compiled", "ours")
    return [
        Verdict(f"router of {n_experts}: faster than composed", eager, ">=", _ROUTER_EAGER),
        Verdict(f"router of {n_experts}: faster than composed, compiled", compiled, ">=", _ROUTER_COMPILED),
        Verdict(
            f"router of {n_experts}: forward over reading once",
            times.ratio("ours_forward", "read"),
            "<=",
            _ROUTER_OVER_READ,
        ),
    ]


def of_diversity(times: Times) -> list[Verdict]:
    """Target of the diversity of experts."""
    return [Verdict("diversity: faster than pair by pair", times.ratio("pairwise", "ours"), ">=", _DIVERSITY_PAIRWISE)]
