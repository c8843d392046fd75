"""Global memory, and who has touched which part of a memory."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

WARP = 32
RED_ZONE = 256  # bytes between allocations, which nothing may touch
ALIGNMENT = 256  # of allocations, as of cudaMalloc
UNMAPPED, RESERVED, WRITTEN = 0, 1, 2  # states of a byte; reserved: mapped, not written yet
# What uninitialised memory holds: as a number of any floating type a nan that no computation gives, as an integer an
# id out of range.
UNINITIALISED = np.array([0xFD, 0xFF], np.uint8)


class Memory:
    """Global memory at its real addresses, so that the host code of the operators may read and write it too."""

    def __init__(self, n_bytes: int = 1 << 24) -> None:
        self.bytes = np.empty(n_bytes, np.uint8)
        self.state = np.zeros(n_bytes, np.uint8)
        self.base = self.bytes.ctypes.data
        self.end = RED_ZONE
        self.tensors: list[tuple[slice, int]] = []  # place and bytes of an element

    def clear(self) -> None:
        self.state[: self.end] = UNMAPPED
        self.end = RED_ZONE
        self.tensors = []

    def _reserve(self, n_bytes: int, shift: int) -> int:
        """The first byte of uninitialised memory, whose address is `shift` bytes behind a multiple of ALIGNMENT."""
        first = -(-(self.base + self.end) // ALIGNMENT) * ALIGNMENT + shift - self.base
        if first + n_bytes + 2 * RED_ZONE > self.bytes.size:
            raise MemoryError(f"Memory: expected at most {self.bytes.size} bytes in all")
        padded = n_bytes + n_bytes % 2
        self.bytes[first : first + padded].reshape(-1, 2)[:] = UNINITIALISED
        self.end = first + n_bytes + RED_ZONE
        return first

    def _tensor(self, n_elements: int, dtype: torch.dtype, shift: int) -> tuple[Tensor, Tensor]:
        """A tensor over uninitialised memory, `shift` bytes behind the beginning of its storage, and the states of its
        bytes."""
        first = self._reserve(n_elements * dtype.itemsize, shift)
        place = slice(first, first + n_elements * dtype.itemsize)
        self.tensors.append((place, dtype.itemsize))
        storage = torch.from_numpy(self.bytes[first - shift : place.stop]).view(dtype)
        return storage[shift // dtype.itemsize :], torch.from_numpy(self.state[place])

    def empty(self, size: list[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor in this memory."""
        tensor, state = self._tensor(math.prod(size), dtype, 0)
        state.fill_(RESERVED)
        return tensor.view(size)

    def copy_of(self, tensor: Tensor) -> Tensor:
        """A copy with the same strides, whose address is the same modulo 64; what lies between its rows is unmapped.

        Elements with the bits of UNINITIALISED count as not written.
        """
        size, strides, itemsize = tensor.shape, tensor.stride(), tensor.dtype.itemsize
        extent = 1 + sum((n - 1) * stride for n, stride in zip(size, strides, strict=True)) if tensor.numel() else 0
        copy, state = self._tensor(extent, tensor.dtype, tensor.data_ptr() % 64)
        state.as_strided((*size, itemsize), (*(itemsize * stride for stride in strides), 1)).fill_(RESERVED)
        return copy.as_strided(size, strides, copy.storage_offset()).copy_(tensor)

    def put(self, array: np.ndarray, shift: int = 0) -> int:
        """The address of a copy of a contiguous array; `shift` bytes behind a multiple of ALIGNMENT."""
        first = self._reserve(array.nbytes, shift)
        self.bytes[first : first + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.state[first : first + array.nbytes] = WRITTEN
        return self.base + first

    def get(self, address: int, like: np.ndarray) -> np.ndarray:
        first = address - self.base
        return self.bytes[first : first + like.nbytes].view(like.dtype).reshape(like.shape).copy()

    def see_writes_of_host(self) -> None:
        """Elements that no longer hold UNINITIALISED were written by host code. Called before a launch."""
        for place, itemsize in self.tensors:
            state = self.state[place].reshape(-1, itemsize)
            pattern = np.resize(UNINITIALISED, self.bytes[place].size)
            is_changed = (self.bytes[place] != pattern).reshape(-1, itemsize).any(1)
            state[is_changed[:, None] & (state == RESERVED)] = WRITTEN


class Accesses:
    """Who read and wrote each granule of a memory: finds pairs of accesses that nothing orders.

    A granule is `granule` bytes. A clock of a warp counts its barriers; `clocks[a, b]` is what warp a knows of warp b.
    """

    def __init__(self, n_bytes: int, granule: int, n_warps: int) -> None:
        n_granules = n_bytes // granule + 1
        self.granule = granule
        self.writer = np.full(n_granules, -1, np.int32)  # thread
        self.write_clock = np.zeros(n_granules, np.int32)
        self.read_clock = np.zeros((n_granules, n_warps), np.int32)
        self.reader = np.full((n_granules, n_warps), -1, np.int16)  # lane; -2: several
        self.pending = np.full(n_granules, -1, np.int32)  # thread whose cp.async will write here

    def granules(self, places: np.ndarray, n_bytes: int) -> np.ndarray:
        """[n_places, granules of an access]"""
        return places[:, None] // self.granule + np.arange(max(1, n_bytes // self.granule))

    def unordered_writers(self, granules: np.ndarray, threads: np.ndarray, clocks: np.ndarray) -> np.ndarray:
        writer = self.writer[granules]
        other = (writer >= 0) & (writer != threads[:, None])
        if not other.any():
            return other
        warp, writer_warp = threads[:, None] // WARP, np.maximum(writer, 0) // WARP
        seen = clocks[warp, writer_warp]
        written = self.write_clock[granules]
        return other & np.where(warp == writer_warp, seen <= written, seen < written)

    def is_unordered(self, granules: np.ndarray, seen: np.ndarray) -> bool:
        """Whether a writer that has seen these clocks races: with a write, or with a read."""
        writer, n_warps = self.writer[granules], self.read_clock.shape[1]
        is_written = (writer >= 0) & (seen[np.maximum(writer, 0) // WARP] < self.write_clock[granules])
        return bool(is_written.any() or (self.read_clock[granules] > seen[:n_warps]).any())

    def read(self, granules: np.ndarray, threads: np.ndarray, clocks: np.ndarray) -> np.ndarray:
        """Where a read races, [n_threads, granules of an access]."""
        race = self.unordered_writers(granules, threads, clocks)
        warp = np.broadcast_to(threads[:, None] // WARP, granules.shape)
        lanes = np.broadcast_to((threads % WARP).astype(np.int16)[:, None], granules.shape)
        now = clocks[warp, warp]
        again = (self.read_clock[granules, warp] == now) & (self.reader[granules, warp] != lanes)
        self.read_clock[granules, warp] = now
        self.reader[granules, warp] = np.where(again, -2, lanes)
        several = self.reader[granules, warp] != lanes
        if several.any():
            self.reader[granules[several], warp[several]] = -2
        return race

    def write(self, granules: np.ndarray, threads: np.ndarray, clocks: np.ndarray) -> np.ndarray:
        """Where a write races, [n_threads, granules of an access]."""
        race = self.unordered_writers(granules, threads, clocks)
        warp = threads // WARP
        read = self.read_clock[granules]  # [n_threads, granules of an access, n_warps]
        if read.any():
            unseen = read > clocks[warp][:, None, : read.shape[-1]]
            own = np.take_along_axis(read, np.broadcast_to(warp[:, None, None], (*granules.shape, 1)), 2)[..., 0]
            reader = self.reader[granules, warp[:, None]]
            same_warp = (own == clocks[warp, warp][:, None]) & (own > 0) & (reader != (threads % WARP)[:, None])
            race = race | unseen.any(2) | same_warp
        wanted = np.broadcast_to(threads[:, None], granules.shape)
        self.writer[granules] = wanted
        self.write_clock[granules] = clocks[warp, warp][:, None]
        return race | (self.writer[granules] != wanted)  # two lanes of one store
