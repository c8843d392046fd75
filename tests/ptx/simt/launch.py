"""One launch of a kernel: its threads, which of them run next, and what was found."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from simt.access import SHARED_BASE, SHARED_WINDOW, KernelFault, MemoryAccess
from simt.mbarriers import Mbarriers
from simt.memory import RED_ZONE, RESERVED, WARP, Accesses, Memory
from simt.module import Instruction, Kernel
from simt.synchronisation import EXITED, RUNNING, Synchronisation
from simt.translation import Program

MOST_STEPS = 10**7  # basic blocks, for a cluster


@functools.cache
def program_of(kernel: Kernel) -> Program:
    return Program(kernel)


class Launch(Synchronisation, Mbarriers, MemoryAccess):
    """A launch of `grid` blocks of `block` threads.

    Args:
        seed: of a random schedule; None: all warps together
        late_copies: a cp.async takes place when it is waited for, else at once
        check_races: without, a launch takes half the time
        ex2_error: largest relative error that is put on ex2.approx
    """

    def __init__(
        self,
        kernel: Kernel,
        memory: Memory,
        grid: tuple[int, int],
        block: int,
        shared_bytes: int = 0,
        cluster_size: int = 1,
        *,
        seed: int | None = None,
        late_copies: bool = True,
        check_races: bool = True,
        ex2_error: float = 0.0,
    ) -> None:
        self.kernel, self.memory, self.program = kernel, memory, program_of(kernel)
        self.grid, self.block, self.cluster_size = grid, block, cluster_size
        self.shared_bytes = self.program.dynamic_offset + shared_bytes
        self.seed, self.late_copies, self.check_races, self.ex2_error = seed, late_copies, check_races, ex2_error
        self.random = np.random.default_rng(seed or 0)
        self.n_threads = block * cluster_size
        self.n_warps = -(-self.n_threads // WARP)
        if cluster_size > 1 and block % WARP:
            raise NotImplementedError("clusters of blocks with part of a warp")
        self.instructions = self.program.instructions
        stores = [i.suffixes[-1] for i in self.instructions if i.name == "st" and "global" in i.suffixes]
        self.global_granule = 1 if {"u8", "b8", "s8"} & set(stores) else 2  # bytes: of the smallest store
        self.findings: dict[str, tuple[int, str]] = {}  # text: how often, and where first
        self.block_threads = np.zeros(len(kernel.blocks), np.int64)  # how many threads ran each basic block
        self.block_warps = np.zeros(len(kernel.blocks), np.int64)
        # instructions that each warp of a cluster has issued, but for mov and bra, most of which the assembler drops
        self.issued = np.zeros(self.n_warps, np.int64)
        self.issued_at_barriers: list[np.ndarray] = []  # behind each barrier of a block
        self._lengths = [sum(i.name not in ("mov", "bra") for i in block) for block in kernel.blocks]

    def find(self, what: str, instruction: Instruction | None, detail: str = "") -> None:
        text = f"{what}: {instruction.text if instruction else 'ret'}"
        times, first = self.findings.get(text, (0, detail))
        self.findings[text] = times + 1, first

    def run(self, parameters: bytes) -> Launch:
        self.parameters = np.frombuffer(parameters.ljust(self.kernel.parameter_bytes, b"\0"), np.uint8).copy()
        if self.parameters.size != self.kernel.parameter_bytes:
            raise ValueError(f"expected {self.kernel.parameter_bytes} bytes of parameters, got {len(parameters)}")
        self.memory.see_writes_of_host()
        n_granules = self.memory.end // self.global_granule + 1
        # the cluster that wrote, or read, each granule of global memory
        self.global_owner, self.global_reader = (np.full(n_granules, -1, np.int32) for _ in range(2))
        self.namespace: dict[str, Any] = {**self.program.constants, "launch": self}
        exec(self.program.code, self.namespace)
        self.functions = [self.namespace[f"block_{number}"] for number in range(len(self.kernel.blocks))]
        order = [(x, y) for y in range(self.grid[1]) for x in range(0, self.grid[0], self.cluster_size)]
        if self.seed is not None:
            self.random.shuffle(order)
        for self.cluster, (x, y) in enumerate(order):
            self._start_cluster(x, y)
            with np.errstate(all="ignore"):  # overflows are the kernel's business
                self._run_cluster()
        return self

    def _start_cluster(self, x: int, y: int) -> None:
        """The state of the blocks x, x + 1, ... of row y of the grid."""
        n, block = self.n_threads, self.block
        thread = np.arange(n)
        self.block_of = thread // block
        self.warp_of = thread // WARP
        special = {
            "tid_x": thread % block,
            "ntid_x": np.full(n, block),
            "ctaid_x": x + self.block_of,
            "ctaid_y": np.full(n, y),
            "nctaid_x": np.full(n, self.grid[0]),
            "nctaid_y": np.full(n, self.grid[1]),
            "cluster_ctarank": self.block_of,
            "laneid": thread % block % WARP,
        }
        self.namespace |= {f"S_{name}": value.astype(np.int64) for name, value in special.items()}
        self.files: dict[str, list[np.ndarray]] = {}
        for file, count in self.program.n_registers.items():  # registers begin with random bits
            bits = self.random.integers(0, 256, (count, n * np.dtype(file).itemsize), np.uint8)
            self.files[file] = list((bits & 1).view(np.bool_) if file == "bool" else bits.view(file))
            self.namespace[f"R_{file}"] = self.files[file]
        self.shared_stride = stride = (self.shared_bytes + RED_ZONE + 255) // 256 * 256
        self.shared_memory = np.full(stride * self.cluster_size + RED_ZONE, 0xCD, np.uint8)
        self.shared_state = np.zeros_like(self.shared_memory)
        for rank in range(self.cluster_size):
            self.shared_state[rank * stride : rank * stride + self.shared_bytes] = RESERVED
        self.shared_base = (SHARED_BASE + self.block_of * SHARED_WINDOW).astype(np.uint64)
        self.accesses = {
            "shared": Accesses(self.shared_memory.size, 4, self.n_warps),
            "global": Accesses(self.memory.end + RED_ZONE, self.global_granule, self.n_warps),
        }
        self.start_copy_groups()
        self.start_mbarriers()
        self.start_clocks()
        self.pc = np.zeros(n, np.int32)  # number of a basic block
        self.status = np.full(n, RUNNING, np.int8)

    def _run_cluster(self) -> None:
        scheduled, steps_left = np.ones(self.n_threads, bool), 0
        for _ in range(MOST_STEPS):
            threads = np.flatnonzero((self.status == RUNNING) & scheduled)
            if self.seed is not None and (steps_left <= 0 or threads.size == 0):
                if self.stores and self.random.random() < 0.5:
                    self.land_store()
                ready = np.unique(self.warp_of[self.status == RUNNING])
                if ready.size:
                    size = int(self.random.choice([1, 1, 1, (ready.size + 1) // 2, ready.size]))
                    scheduled = np.isin(self.warp_of, self.random.choice(ready, size, replace=False))
                    steps_left = int(self.random.integers(1, 200))
                    threads = np.flatnonzero((self.status == RUNNING) & scheduled)
            steps_left -= 1
            if threads.size == 0 and self.stores:
                self.land_store()  # as late as may be
                continue
            if threads.size == 0:
                if (self.status == EXITED).all():
                    return
                where = {self.kernel.blocks[p][0].text for p in np.unique(self.pc[self.status != EXITED])}
                raise KernelFault(f"{self.kernel.name}: deadlock at {sorted(where)}")
            counters = self.pc[threads]
            number = int(counters.min())
            self._step(number, threads[counters == number])
        raise KernelFault(f"{self.kernel.name}: no end in sight")

    def _step(self, number: int, threads: np.ndarray) -> None:
        """Runs a basic block in these threads."""
        self.block_threads[number] += threads.size
        warps = self.warp_of[threads]
        warps = warps[np.diff(warps, prepend=-1) != 0]  # each once
        self.block_warps[number] += warps.size
        self.issued[warps] += self._lengths[number]
        ending = self.program.endings[number]
        if ending.kind == "wait":
            return self.wait(number, ending.target, threads)
        condition = self.functions[number](threads)
        if ending.kind == "fall":
            self.pc[threads] = number + 1
        elif ending.kind == "bra":
            self.pc[threads] = ending.target if condition is None else np.where(condition, ending.target, number + 1)
        else:
            self.pc[threads] = number + 1
            leaving = threads if condition is None else threads[np.broadcast_to(condition, threads.shape)]
            if leaving.size:
                self._leave(leaving)
        return None

    def _leave(self, threads: np.ndarray) -> None:
        self.status[threads] = EXITED
        if self.has_copies(threads):
            self.find("copies under way at the end of their thread", None)
        for rank in np.unique(self.block_of[threads]) if self.cluster_size > 1 else ():
            if self.has_ended(rank):
                self._end_block(rank)
        self.release_block_barriers()
        self.release_cluster_barrier()

    def has_ended(self, rank: int) -> bool:
        return bool((self.status[self.block_of == rank] == EXITED).all())

    def _end_block(self, rank: int) -> None:
        """The shared memory of a block goes with it: the other blocks have to be done with it by then."""
        self.require_no_stores_to(rank)
        accesses, per_block = self.accesses["shared"], self.shared_stride // 4
        own = slice(rank * per_block, (rank + 1) * per_block)
        seen = self.clocks[np.unique(self.warp_of[self.block_of == rank])].max(0)
        writer = np.maximum(accesses.writer[own], 0)
        unseen = (accesses.writer[own] >= 0) & (accesses.write_clock[own] > seen[writer // WARP])
        unseen &= writer // self.block != rank  # mbarriers come behind all threads
        if unseen.any() or (accesses.read_clock[own] > seen[: self.n_warps]).any():
            self.find("shared memory is accessed from outside while its block may end", None)

    def trap(self, threads: np.ndarray) -> None:
        raise KernelFault(f"{self.kernel.name}: trap, thread {threads[0]}")

    def assert_failed(self, threads: np.ndarray, message: np.ndarray, *_: np.ndarray) -> None:
        texts = list(self.kernel.module.strings.values())
        text = texts[int(np.asarray(message).reshape(-1)[0]) - 1].rstrip(b"\0").decode(errors="replace")
        raise KernelFault(f"{self.kernel.name}: device assert: {text}, thread {threads[0]}")

    def ex2(self, x: np.ndarray, is_flushed: bool) -> np.ndarray:
        smallest = np.float32(2.0**-126)
        x = np.where(np.abs(x) < smallest, np.float32(0), x) if is_flushed else x
        exact = np.exp2(x.astype(np.float64))
        if self.ex2_error:
            exact = exact * (1 + self.ex2_error * self.random.uniform(-1, 1, np.shape(exact)))
        result = exact.astype(np.float32)
        return np.where(result < smallest, np.float32(0), result) if is_flushed else result

    # what was executed
    @property
    def warp_instructions(self) -> dict[str, int]:
        """opcode: how often a warp issued it"""
        return self._counted(self.block_warps)

    @property
    def thread_instructions(self) -> dict[str, int]:
        """opcode: how often a thread executed it"""
        return self._counted(self.block_threads)

    def _counted(self, times: np.ndarray) -> dict[str, int]:
        counted: dict[str, int] = {}
        for block, n in zip(self.kernel.blocks, times.tolist(), strict=True):
            for instruction in block:
                counted[instruction.opcode] = counted.get(instruction.opcode, 0) + n
        return {opcode: n for opcode, n in counted.items() if n}
