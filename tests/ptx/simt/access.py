"""Loads, stores and asynchronous copies of a launch, each checked."""

from __future__ import annotations

import numpy as np

from simt.memory import RED_ZONE, UNMAPPED, WRITTEN, Accesses
from simt.module import Instruction

# generic addresses of shared memory, far from those of a process: a window for each block of the cluster
SHARED_BASE = 1 << 56
SHARED_WINDOW = 1 << 24
# addresses of 32 bits in shared::cluster: those of the own block as they are, then a window for each block
CLUSTER_WINDOW = 1 << 24


class KernelFault(Exception):
    """What ends a kernel on a GPU too."""


class MemoryAccess:
    """Of a Launch."""

    accesses: dict[str, Accesses]

    def map_shared(self, address: np.ndarray, rank: np.ndarray) -> np.ndarray:
        window = (address - np.uint64(SHARED_BASE)) % np.uint64(SHARED_WINDOW)
        return np.uint64(SHARED_BASE) + rank.astype(np.uint64) * np.uint64(SHARED_WINDOW) + window

    def map_cluster(self, address: np.ndarray, rank: np.ndarray) -> np.ndarray:
        return (rank + np.uint32(1)) * np.uint32(CLUSTER_WINDOW) + address % np.uint32(CLUSTER_WINDOW)

    def _place(self, space: str, address: np.ndarray, threads: np.ndarray) -> tuple[str, np.ndarray]:
        """The memory, and places in it."""
        if space == "shared":
            return "shared", np.where(address < 0, -1, self.block_of[threads] * self.shared_stride + address)
        if space == "shared::cluster":
            window = address // CLUSTER_WINDOW
            rank = np.where(window == 0, self.block_of[threads], window - 1)
            is_there = (address >= 0) & (rank < self.cluster_size)
            return "shared", np.where(is_there, rank * self.shared_stride + address % CLUSTER_WINDOW, -1)
        if space == "generic":
            is_shared = (address >= SHARED_BASE) & (address < SHARED_BASE + SHARED_WINDOW * self.cluster_size)
            if is_shared.all():
                rank, offset = (address - SHARED_BASE) // SHARED_WINDOW, (address - SHARED_BASE) % SHARED_WINDOW
                for other in np.unique(rank):
                    if self.has_ended(int(other)):
                        raise KernelFault(f"{self.kernel.name}: shared memory of a block that has ended")
                return "shared", rank * self.shared_stride + offset
            if is_shared.any():
                raise NotImplementedError("generic access to two memories at once")
        return "global", address - self.memory.base

    def _checked(
        self, space: str, address: np.ndarray, n_bytes: int, threads: np.ndarray, instruction: Instruction
    ) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
        """The memory, its bytes, their states, and places in them."""
        memory, place = self._place(space, address, threads)
        if memory == "shared":
            data, state, end = self.shared_memory, self.shared_state, self.shared_state.size
        else:
            data, state, end = self.memory.bytes, self.memory.state, self.memory.end + RED_ZONE
        is_bad = (place < 0) | (place + n_bytes > end)
        safe = np.where(is_bad, 0, place)
        is_bad |= (state[safe] == UNMAPPED) | (state[safe + n_bytes - 1] == UNMAPPED)
        where = f"{self.kernel.name}: {instruction.text}:"
        if is_bad.any():
            k = int(np.argmax(is_bad))
            raise KernelFault(f"{where} unmapped address {int(address[k]):#x}, thread {threads[k]}")
        if np.any(address % n_bytes):
            raise KernelFault(f"{where} misaligned")
        return memory, data, state, place

    def _track(
        self, memory: str, place: np.ndarray, n_bytes: int, threads: np.ndarray, is_write: bool, by: Instruction
    ) -> None:
        accesses = self.accesses[memory]
        granules = accesses.granules(place, n_bytes)
        pending = accesses.pending[granules] >= 0
        if pending.any():
            self.find("pending copy", by, f"thread {threads[np.argmax(pending.any(1))]}")
        if memory == "global":
            owner, reader = self.global_owner, self.global_reader
            is_foreign = (owner[granules] >= 0) & (owner[granules] != self.cluster)
            if is_write:
                is_foreign |= (reader[granules] >= 0) & (reader[granules] != self.cluster)
                owner[granules] = self.cluster
            else:
                reader[granules] = self.cluster
            if is_foreign.any():
                self.find("race between blocks", by)
        if self.check_races:
            race = (accesses.write if is_write else accesses.read)(granules, threads, self.clocks)
            if race.any():
                k = int(np.argmax(race.any(1)))
                self.find("race", by, f"thread {threads[k]}, {memory} place {int(place[k])}")

    def load(
        self,
        space: str,
        address: np.ndarray,
        dtype: np.dtype,
        vector: int,
        threads: np.ndarray,
        guard: np.ndarray | None,
        number: int,
    ) -> np.ndarray:
        """[vector, n_threads]; 0 in threads whose guard is false"""
        n_bytes = dtype.itemsize * vector
        instruction = self.instructions[number]
        address = np.broadcast_to(address, threads.shape)
        if guard is not None:
            kept = np.flatnonzero(np.broadcast_to(guard, threads.shape))
            result = np.zeros((vector, threads.size), dtype)
            if kept.size:
                result[:, kept] = self.load(space, address[kept], dtype, vector, threads[kept], None, number)
            return result
        if space == "param":
            if np.any((address < 0) | (address + n_bytes > self.parameters.size) | (address % n_bytes != 0)):
                raise KernelFault(f"{self.kernel.name}: {instruction.text}: outside the parameters")
            return self.parameters[address[:, None] + np.arange(n_bytes)].view(dtype).T
        memory, data, state, place = self._checked(space, address, n_bytes, threads, instruction)
        spread = place[:, None] + np.arange(n_bytes)
        if np.any(state[spread] != WRITTEN):
            k = int(np.argmax((state[spread] != WRITTEN).any(1)))
            self.find("uninitialised", instruction, f"thread {threads[k]}, {memory} place {int(place[k])}")
        self._track(memory, place, n_bytes, threads, False, instruction)
        return data[spread].view(dtype).T

    def store(
        self,
        space: str,
        address: np.ndarray,
        dtype: np.dtype,
        values: list[np.ndarray],
        threads: np.ndarray,
        guard: np.ndarray | None,
        number: int,
    ) -> None:
        n_bytes = dtype.itemsize * len(values)
        instruction = self.instructions[number]
        address = np.broadcast_to(address, threads.shape)
        columns = np.stack([np.broadcast_to(value, threads.shape) for value in values], 1).astype(dtype, copy=False)
        if guard is not None:
            kept = np.broadcast_to(guard, threads.shape)
            address, threads, columns = address[kept], threads[kept], columns[kept]
            if not threads.size:
                return
        memory, data, state, place = self._checked(space, address, n_bytes, threads, instruction)
        self._track(memory, place, n_bytes, threads, True, instruction)
        spread = place[:, None] + np.arange(n_bytes)
        data[spread] = np.ascontiguousarray(columns).view(np.uint8).reshape(threads.size, n_bytes)
        state[spread] = WRITTEN

    # cp.async
    def start_copy_groups(self) -> None:
        self.committed = np.zeros(self.n_threads, np.int64)  # groups, of each thread
        self.copies: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]] = []

    def has_copies(self, threads: np.ndarray) -> bool:
        return any(np.isin(who, threads).any() for who, *_ in self.copies)

    def start_copies(
        self,
        to: np.ndarray,  # address in shared memory
        source: np.ndarray,  # address in global memory
        n_bytes: int,
        threads: np.ndarray,
        guard: np.ndarray | None,
        number: int,
    ) -> None:
        instruction = self.instructions[number]
        to, source = np.broadcast_to(to, threads.shape), np.broadcast_to(source, threads.shape)
        if guard is not None:
            kept = np.broadcast_to(guard, threads.shape)
            to, source, threads = to[kept], source[kept], threads[kept]
        if not threads.size:
            return
        _, _, _, to_place = self._checked("shared", to, n_bytes, threads, instruction)
        _, _, state, from_place = self._checked("global", source, n_bytes, threads, instruction)
        if np.any(state[from_place[:, None] + np.arange(n_bytes)] != WRITTEN):
            self.find("uninitialised", instruction)
        self._track("global", from_place, n_bytes, threads, False, instruction)
        self._track("shared", to_place, n_bytes, threads, True, instruction)
        accesses = self.accesses["shared"]
        accesses.pending[accesses.granules(to_place, n_bytes)] = threads[:, None]
        if not self.late_copies:
            self._copy(to_place, from_place, n_bytes)
        self.copies.append((threads, to_place, from_place, self.committed[threads], n_bytes))

    def _copy(self, to: np.ndarray, source: np.ndarray, n_bytes: int) -> None:
        spread = np.arange(n_bytes)
        self.shared_memory[to[:, None] + spread] = self.memory.bytes[source[:, None] + spread]
        self.shared_state[to[:, None] + spread] = WRITTEN

    def commit_copies(self, threads: np.ndarray) -> None:
        self.committed[threads] += 1

    def wait_for_copies(self, threads: np.ndarray, n_kept: int) -> None:
        """All but the last n_kept groups of each of the threads arrive."""
        waits = np.zeros(self.n_threads, bool)
        waits[threads] = True
        accesses, left = self.accesses["shared"], []
        for who, to, source, group, n_bytes in self.copies:
            lands = waits[who] & (group < self.committed[who] - n_kept)
            if lands.any():
                if self.late_copies:
                    self._copy(to[lands], source[lands], n_bytes)
                granules = accesses.granules(to[lands], n_bytes)
                warps = self.warp_of[who[lands]]
                accesses.pending[granules] = -1
                accesses.write_clock[granules] = self.clocks[warps, warps][:, None]
            if not lands.all():
                left.append((who[~lands], to[~lands], source[~lands], group[~lands], n_bytes))
        self.copies = left
