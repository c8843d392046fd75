"""mbarriers of a launch, and the stores of st.async that they count: after "mbarrier" and "st.async" of the PTX ISA.

A phase is complete when no arrival is pending and the tx-count is zero; then as many arrivals are pending again as are
expected. Bytes may be counted before they are expected: the tx-count goes below zero meanwhile.

When a store lands is open. Without a seed it lands when no thread can go on, one after the other; with one, at any
time. Its place is pending until then. What has landed counts as written by the mbarrier, which has a clock of its own:
only who has seen the phase complete is behind it. What the thread did before it stored is released with that (the
complete-tx has .release semantics), as what it did before it arrived.

Released is what the warp did before its last bar.warp.sync: among its lanes nothing else orders accesses. By the ISA,
what the very lane did since is released as well, which no kernel here needs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from simt.access import KernelFault
from simt.memory import WARP, WRITTEN
from simt.module import Instruction, split_operands
from simt.synchronisation import AT_MBARRIER, MOST_MBARRIERS, RUNNING

MOST_COUNTED = (1 << 20) - 1  # arrivals, and bytes on both sides of zero
NEVER = 1 << 30  # a clock that nobody sees


@dataclass(eq=False)
class Mbarrier:
    number: int
    n_expected: int  # arrivals of a phase
    n_pending: int
    released: np.ndarray  # clocks: what arrivals and stores of this phase bring
    seen: np.ndarray  # clocks: what those learn who see the last phase complete
    n_bytes: int = 0  # the tx-count
    phase: int = 0
    n_landed: int = 0  # its clock
    is_observed: bool = True  # somebody has seen the last phase complete
    timed_out: set[int] = field(default_factory=set)  # threads whose try_wait has ended early in this phase


@dataclass(eq=False)
class AsyncStore:
    place: int
    data: np.ndarray  # bytes
    mbarrier: Mbarrier
    released: np.ndarray  # clocks
    by: Instruction


class Mbarriers:
    """Of a Launch."""

    def start_mbarriers(self) -> None:
        self.mbarriers: dict[int, Mbarrier] = {}  # by place in shared memory
        self.stores: list[AsyncStore] = []  # on their way
        self.waits: dict[int, tuple[Mbarrier, int]] = {}  # thread: mbarrier and parity

    def operate(self, number: int, instruction: Instruction, threads: np.ndarray) -> None:
        """Threads come to a basic block that is an instruction on mbarriers."""
        chosen = threads
        if instruction.guard:
            chosen = threads[self._values(instruction.guard, threads, np.bool_) ^ instruction.is_negated]
        self.pc[threads] = number + 1
        operation = ".".join([instruction.name, *instruction.suffixes[:2]])
        if instruction.name == "st":
            self._store_async(instruction, chosen)
        elif instruction.suffixes[0] == "init":
            self._init_mbarriers(instruction, chosen)
        elif operation == "mbarrier.arrive.expect_tx" and instruction.operands[0] == "_":
            self._arrive_expecting(instruction, chosen)
        elif operation == "mbarrier.try_wait.parity":
            self._try_wait(number, instruction, chosen)
        else:
            raise NotImplementedError(instruction.text)

    def _addresses(self, operand: str, threads: np.ndarray) -> np.ndarray:
        base, offset = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand).groups()
        return self._values(base, threads).astype(np.int64) + int(offset or 0)

    def _fail(self, instruction: Instruction, what: str, thread: int) -> None:
        raise KernelFault(f"{self.kernel.name}: {instruction.text}: {what}, thread {thread}")

    def _mbarriers_at(
        self, operand: str, threads: np.ndarray, instruction: Instruction
    ) -> list[tuple[int, int, Mbarrier]]:
        """Thread, place, mbarrier."""
        space = "shared::cluster" if "shared::cluster" in instruction.suffixes else "shared"
        _, _, _, places = self._checked(space, self._addresses(operand, threads), 8, threads, instruction)
        accesses = self.accesses["shared"]
        if self.check_races and accesses.unordered_writers(accesses.granules(places, 8), threads, self.clocks).any():
            self.find("race with mbarrier.init", instruction)
        found = []
        for thread, place in zip(threads.tolist(), places.tolist(), strict=True):
            if place not in self.mbarriers:
                self._fail(instruction, "no mbarrier there", thread)
            found.append((thread, place, self.mbarriers[place]))
        return found

    def _init_mbarriers(self, instruction: Instruction, threads: np.ndarray) -> None:
        address, counts = instruction.operands
        _, _, state, places = self._checked("shared", self._addresses(address, threads), 8, threads, instruction)
        self._track("shared", places, 8, threads, True, instruction)
        counts = self._values(counts, threads)
        for thread, place, count in zip(threads.tolist(), places.tolist(), counts.tolist(), strict=True):
            if place in self.mbarriers:
                self._fail(instruction, "there is an mbarrier already", thread)
            if not 1 <= count <= MOST_COUNTED:
                self._fail(instruction, f"a count of {count}", thread)
            if len(self.mbarriers) == MOST_MBARRIERS:
                raise NotImplementedError(f"more than {MOST_MBARRIERS} mbarriers in a cluster")
            nothing = np.zeros(self.clocks.shape[1], np.int32)
            self.mbarriers[place] = Mbarrier(len(self.mbarriers), count, count, nothing, nothing)
            state[place : place + 8] = WRITTEN

    def _released_by(self, thread: int) -> np.ndarray:
        warp = self.warp_of[thread]
        clocks = self.clocks[warp].copy()
        clocks[warp] -= 1
        return clocks

    def _arrive_expecting(self, instruction: Instruction, threads: np.ndarray) -> None:
        n_bytes = self._values(instruction.operands[2], threads).tolist()
        at = self._mbarriers_at(instruction.operands[1], threads, instruction)
        for (thread, _, mbarrier), n in zip(at, n_bytes, strict=True):
            if mbarrier.n_pending == 0:
                self._fail(instruction, "more arrivals than expected", thread)
            if not mbarrier.is_observed:
                self._fail(instruction, "nobody has waited for the phase before", thread)
            mbarrier.n_bytes += n
            if mbarrier.n_bytes > MOST_COUNTED:
                self._fail(instruction, f"a tx-count of {mbarrier.n_bytes}", thread)
            mbarrier.n_pending -= 1
            mbarrier.released = np.maximum(mbarrier.released, self._released_by(thread))
            self._complete_phase(mbarrier)

    def _complete_phase(self, mbarrier: Mbarrier) -> None:
        if mbarrier.n_pending or mbarrier.n_bytes:
            return
        mbarrier.phase += 1
        mbarrier.n_pending = mbarrier.n_expected
        mbarrier.seen, mbarrier.released = mbarrier.released, np.zeros_like(mbarrier.released)
        mbarrier.is_observed = False
        mbarrier.timed_out.clear()
        for thread in [thread for thread, (other, _) in self.waits.items() if other is mbarrier]:
            del self.waits[thread]
            self.status[thread] = RUNNING
            self._end_wait(mbarrier, thread, True)

    def _end_wait(self, mbarrier: Mbarrier, thread: int, is_complete: bool) -> None:
        instruction = self.kernel.blocks[self.pc[thread]][0]
        self._set_values(instruction.operands[0], np.array([thread]), np.array([is_complete]))
        self.pc[thread] += 1
        if is_complete:
            warp = self.warp_of[thread]
            self.clocks[warp] = np.maximum(self.clocks[warp], mbarrier.seen)
            mbarrier.is_observed = True

    def _try_wait(self, number: int, instruction: Instruction, threads: np.ndarray) -> None:
        parities = self._values(instruction.operands[2], threads).tolist()
        at = self._mbarriers_at(instruction.operands[1], threads, instruction)
        self.pc[threads] = number
        for (thread, place, mbarrier), parity in zip(at, parities, strict=True):
            if place // self.shared_stride != self.block_of[thread]:
                self._fail(instruction, "an mbarrier of another block", thread)
            if parity > 1:
                self._fail(instruction, f"a parity of {parity}", thread)
            if mbarrier.phase % 2 != parity:
                self._end_wait(mbarrier, thread, True)
            elif thread not in mbarrier.timed_out:  # after any time the ISA lets it end without success
                mbarrier.timed_out.add(thread)
                self._end_wait(mbarrier, thread, False)
            else:
                self.waits[thread] = mbarrier, parity
                self.status[thread] = AT_MBARRIER

    def _store_async(self, instruction: Instruction, threads: np.ndarray) -> None:
        if instruction.opcode != "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32":
            raise NotImplementedError(instruction.text)
        if self.cluster_size == 1:
            raise KernelFault(f"{self.kernel.name}: {instruction.text}: a cluster of one block")
        address, vector, counter = instruction.operands
        addresses = self._addresses(address, threads)
        _, _, _, places = self._checked("shared::cluster", addresses, 16, threads, instruction)
        words = [self._values(register, threads) for register in split_operands(vector[1:-1])]
        data = np.stack(words, 1).view(np.uint8)  # [n_threads, 16]
        accesses, at = self.accesses["shared"], self._mbarriers_at(counter, threads, instruction)
        for k, (thread, counter_place, mbarrier) in enumerate(at):
            place = int(places[k])
            if place // self.shared_stride != counter_place // self.shared_stride:
                self._fail(instruction, "the place and its mbarrier in two blocks", thread)
            if self.has_ended(place // self.shared_stride):
                self._fail(instruction, "shared memory of a block that has ended", thread)
            store = AsyncStore(place, data[k], mbarrier, self._released_by(thread), instruction)
            granules = accesses.granules(places[k : k + 1], 16)[0]
            if (accesses.pending[granules] >= 0).any():
                self.find("pending copy", instruction, f"thread {thread}")
            if self.check_races and accesses.is_unordered(granules, store.released):
                self.find("race", instruction, f"thread {thread}, shared place {place}")
            accesses.pending[granules] = thread
            accesses.writer[granules] = (self.n_warps + mbarrier.number) * WARP
            accesses.write_clock[granules] = NEVER
            self.stores.append(store)

    def land_store(self) -> None:
        """One of the stores on their way: the first, or any."""
        store = self.stores.pop(0 if self.seed is None else int(self.random.integers(len(self.stores))))
        accesses, mbarrier = self.accesses["shared"], store.mbarrier
        granules = accesses.granules(np.array([store.place]), 16)[0]
        self.shared_memory[store.place : store.place + 16] = store.data
        self.shared_state[store.place : store.place + 16] = WRITTEN
        mbarrier.n_landed += 1
        accesses.pending[granules] = -1
        accesses.write_clock[granules] = mbarrier.n_landed
        mbarrier.n_bytes -= 16
        if mbarrier.n_bytes < -MOST_COUNTED:
            self._fail(store.by, f"a tx-count of {mbarrier.n_bytes}", -1)
        mbarrier.released = np.maximum(mbarrier.released, store.released)
        mbarrier.released[self.n_warps + mbarrier.number] = mbarrier.n_landed
        self._complete_phase(mbarrier)

    def require_no_stores_to(self, rank: int) -> None:
        """A block ends."""
        for store in self.stores:
            if store.place // self.shared_stride == rank:
                raise KernelFault(f"{self.kernel.name}: {store.by.text}: lands in a block that has ended")
