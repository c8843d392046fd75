"""What repetition candidates should take on a GPU: instructions that the PTX interpreter of the tests executes.

    python benchmarks/gpu_model_tables.py repetition

The kernels run over a short text (tests/ptx: nvcc compiles them, no GPU), forced the linear way. For a longer one each
kernel's instructions grow with the number of tokens, but for the lists that a chunk may have to look back through:
those are counted as if every chunk did. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_model import ASSUMED, ROOT, SCHEDULERS, Gpu

N_TOKENS = 2048  # of the text that is executed


def _constant(file: str, name: str) -> int:
    return int(re.search(rf"{name} = (\d+)", (ROOT / "csrc/cuda" / file).read_text())[1])


TEXT_THREADS = _constant("repetition_text.cuh", "kTextThreads")
TEXT_TILE = TEXT_THREADS * _constant("repetition_text.cuh", "kTextItems")
CHUNK_ROWS, SPAN_CHUNKS = (_constant("repetition_order.cuh", name) for name in ("kChunkRows", "kSpanChunks"))
APPEND = 60  # instructions to append a stored list of one entry
LAUNCH = 4e-6  # seconds between the starts of two kernels that wait for each other
SORT_LAUNCHES, SORT_PASSES, SORT_BYTES = 12, 8, 2 * 16  # of a radix sort: 8 bits a pass, keys and places of 8 bytes


@dataclass(frozen=True)
class Executed:
    """Warp instructions for each token of a text, where rows may not read and where they do."""

    text: float  # text_facts_kernel
    rest: float  # all other kernels
    step: float  # ngram_slots_kernel, which is among them
    read: float  # repetition_kernel, for each token that a row reads


TEXTS: dict[str, Callable[[int], torch.Tensor]] = {
    "constant": lambda n: torch.ones(n, dtype=torch.int64),
    "random, 50 ids": lambda n: torch.randint(50, (n,), generator=torch.Generator().manual_seed(0)),
}


def _executed(text: torch.Tensor, reads: bool) -> dict[str, int]:  # [n_tokens]
    """Warp instructions of each kernel, for n-grams of 4 tokens in 8 slots, immediate repetition and one EOS id."""
    for folder in ("tests", "tests/ptx"):
        if str(ROOT / folder) not in sys.path:
            sys.path.insert(0, str(ROOT / folder))
    from cuda_operators import on_device  # needs nvcc
    from support.emulated_cuda import DeviceLimits

    from ava_ext import ops

    # what the rows may read grows with the multiprocessors
    with on_device(DeviceLimits(132 if reads else 0, 228 * 1024, 227 * 1024, 1024, 8)) as device:
        ops.repetition_candidates(
            text[None],
            text.roll(-1)[None],
            weights=torch.tensor([0.5, 1.0, 0.05, 0.1]),
            vocab_size=50,
            use_immediate_repetition_penalty=True,
            use_ngram_penalty=True,
            eos_token_id=(0,),
        )
    executed: dict[str, int] = {}
    for launch in device.launches:
        kernel = re.search(r"\d([a-z_]+)_kernel", launch.kernel.name)[1]
        executed[kernel] = executed.get(kernel, 0) + sum(launch.warp_instructions.values())
    return executed


def count(kind: str) -> Executed:
    text = TEXTS[kind](N_TOKENS)
    linear, reading = _executed(text, False), _executed(text, True)
    n_reads = N_TOKENS**2 / 2
    of_token = {kernel: n / N_TOKENS for kernel, n in linear.items()}
    return Executed(
        of_token["text_facts"],
        sum(of_token.values()) - of_token["text_facts"],
        of_token["ngram_slots"],
        reading["repetition"] / n_reads,
    )


def reading_milliseconds(executed: Executed, n_sequences: int, n_tokens: int, gpu: Gpu) -> float:
    """Where every row reads its context, which is half of its text."""
    n_instructions = executed.read * n_sequences * n_tokens**2 / 2
    return n_instructions / (gpu.n_multiprocessors * SCHEDULERS * ASSUMED["issue"] * gpu.hertz) * 1e3


def milliseconds(executed: Executed, n_sequences: int, n_tokens: int, gpu: Gpu) -> float:
    """The parts one after the other, each as long as its scarcest resource or its longest chain of instructions."""
    n_rows = n_sequences * n_tokens
    of_multiprocessor = SCHEDULERS * ASSUMED["issue"] * gpu.hertz  # instructions a second
    n_rounds = math.ceil(n_sequences / gpu.n_multiprocessors)
    # a block reads one tile after the other
    of_warp = executed.text * TEXT_TILE / (TEXT_THREADS / 32)
    cycles = max(executed.text * TEXT_TILE / (SCHEDULERS * ASSUMED["issue"]), of_warp * ASSUMED["alone"])
    tile = ASSUMED["latency"] + cycles / gpu.hertz
    text = n_rounds * math.ceil(n_tokens / TEXT_TILE) * tile
    # all other kernels spread over the device; one warp's chunk is a chain, with the lists before it
    n_lists = min(SPAN_CHUNKS, n_tokens / CHUNK_ROWS) + n_tokens / (CHUNK_ROWS * SPAN_CHUNKS)
    look_back = n_rows / CHUNK_ROWS * n_lists * APPEND
    issue = (n_rows * executed.rest + look_back) / (gpu.n_multiprocessors * of_multiprocessor)
    chain = (CHUNK_ROWS * executed.step + 2 * n_lists * APPEND) * ASSUMED["dependent"] / gpu.hertz
    chain += 2 * n_lists * ASSUMED["latency"]
    sort = SORT_LAUNCHES * LAUNCH + SORT_PASSES * SORT_BYTES * n_rows / gpu.copy
    return (text + issue + chain + sort + 7 * LAUNCH) * 1e3
