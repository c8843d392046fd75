"""Barriers, shuffles and votes of a launch, and what they order.

A warp has a vector clock. A barrier joins the clocks of its warps, then each counts on: what a warp did before the
barrier is seen by the others behind it.
"""

from __future__ import annotations

import numpy as np

from simt import arithmetic
from simt.memory import WARP
from simt.module import Instruction, Kernel, split_operands
from simt.translation import Program

MOST_MBARRIERS = 16  # of a cluster here
RUNNING, AT_BARRIER, AT_CLUSTER, AT_WARP, AT_MBARRIER, EXITED = range(6)


class Synchronisation:
    """Of a Launch."""

    kernel: Kernel
    program: Program
    issued: np.ndarray
    issued_at_barriers: list[np.ndarray]

    def start_clocks(self) -> None:
        # behind the warps come the mbarriers, which have clocks too
        self.clocks = np.zeros((self.n_warps, self.n_warps + MOST_MBARRIERS), np.int32)
        np.fill_diagonal(self.clocks, 1)
        self.arrivals = np.zeros(self.n_threads, np.int64)  # at the cluster's barrier, of each thread
        self.release = np.zeros(self.clocks.shape[1], np.int32)  # what those know who have arrived

    def wait(self, number: int, instruction: Instruction, threads: np.ndarray) -> None:
        """Threads come to an instruction, the basic block `number`, in which they wait for others."""
        if instruction.name in ("mbarrier", "st"):
            return self.operate(number, instruction, threads)
        if instruction.guard:
            raise NotImplementedError(instruction.text)
        operation = (instruction.name, *instruction.suffixes[:1])
        if operation == ("bar", "sync"):
            self.status[threads] = AT_BARRIER
            self.release_block_barriers()
        elif operation == ("barrier", "cluster"):
            self._wait_in_cluster(number, instruction, threads)
        elif instruction.name in ("shfl", "vote", "redux", "mma") or operation == ("bar", "warp"):
            self._wait_in_warp(number, instruction, threads)
        else:
            raise NotImplementedError(instruction.text)

    def release_block_barriers(self) -> None:
        for rank in range(self.cluster_size):
            lanes = np.arange(rank * self.block, (rank + 1) * self.block)
            waiting = lanes[self.status[lanes] == AT_BARRIER]
            if waiting.size == 0 or waiting.size + np.count_nonzero(self.status[lanes] == EXITED) < lanes.size:
                continue
            warps = np.unique(self.warp_of[waiting])
            for warp in warps:
                places = np.unique(self.pc[waiting[self.warp_of[waiting] == warp]])
                if places.size > 1:
                    self.find("lanes of a warp meet at different barriers", self.kernel.blocks[places[0]][0])
            self.clocks[warps] = self.clocks[warps].max(0)
            self.clocks[warps, warps] += 1
            self.status[waiting] = RUNNING
            self.pc[waiting] += 1
            self.issued_at_barriers.append(self.issued.copy())

    # clusters
    def _wait_in_cluster(self, number: int, instruction: Instruction, threads: np.ndarray) -> None:
        if "aligned" in instruction.suffixes:  # the lanes of a warp meet first
            self.status[threads] = AT_WARP
            is_here = (self.status == AT_WARP) & (self.pc == number)
            missing = np.unique(self.warp_of[(self.status != EXITED) & ~is_here])
            threads = np.flatnonzero(
                is_here & np.isin(self.warp_of, self.warp_of[threads]) & ~np.isin(self.warp_of, missing)
            )
            if not threads.size:
                return
            self.status[threads] = RUNNING
        if instruction.suffixes[1] == "arrive":
            self.arrivals[threads] += 1
            warps = np.unique(self.warp_of[threads])
            self.release = np.maximum(self.release, self.clocks[warps].max(0))
            self.clocks[warps, warps] += 1  # what follows the arrival is not released by it
            self.pc[threads] = number + 1
        else:
            self.status[threads] = AT_CLUSTER
        self.release_cluster_barrier()

    def release_cluster_barrier(self) -> None:
        live = self.status != EXITED
        if not live.any():
            return
        complete = self.arrivals[live].min()
        waiting = np.flatnonzero((self.status == AT_CLUSTER) & (self.arrivals <= complete))
        if waiting.size:
            warps = np.unique(self.warp_of[waiting])
            self.clocks[warps] = np.maximum(self.clocks[warps], self.release)
            self.clocks[warps, warps] += 1
            self.status[waiting] = RUNNING
            self.pc[waiting] += 1

    # warps
    def _wait_in_warp(self, number: int, instruction: Instruction, threads: np.ndarray) -> None:
        self.status[threads] = AT_WARP
        for warp in np.unique(self.warp_of[threads]):
            lanes = np.flatnonzero(self.warp_of == warp)
            waiting = lanes[(self.status[lanes] == AT_WARP) & (self.pc[lanes] == number)]
            masks = self._masks(instruction, waiting)
            for mask in np.unique(masks):  # the parts of a warp that are there; one without all its lanes waits
                asked = lanes[(int(mask) >> (lanes - warp * WARP)) & 1 == 1]
                if (self.status[asked] == EXITED).any():
                    self.find("a lane in the mask has exited", instruction)
                    asked = asked[self.status[asked] != EXITED]
                if np.isin(asked, waiting[masks == mask]).all():
                    self._meet(instruction, asked)
                    self.status[asked] = RUNNING
                    self.pc[asked] = number + 1

    def _masks(self, instruction: Instruction, threads: np.ndarray) -> np.ndarray:
        if instruction.name == "mma":
            return np.full(threads.size, (1 << WARP) - 1)
        return self._values(instruction.operands[-1], threads)

    def _values(self, operand: str, threads: np.ndarray, dtype: type = np.uint32) -> np.ndarray:
        if operand in self.program.place_of:
            file, row = self.program.place_of[operand]
            return self.files[file][row][threads].view(dtype)
        return np.full(threads.size, self.program.literal(operand, np.dtype(dtype)))

    def _set_values(self, register: str, threads: np.ndarray, values: np.ndarray) -> None:
        file, row = self.program.place_of[register]
        self.files[file][row][threads] = values if file == "bool" else np.asarray(values).view(file)

    def _meet(self, instruction: Instruction, threads: np.ndarray) -> None:
        """All lanes of the mask are there."""
        warp, operands = self.warp_of[threads[0]], instruction.operands
        lane = threads - warp * WARP
        if instruction.name == "bar":  # bar.warp.sync
            self.clocks[warp, warp] += 1
        elif instruction.name == "vote":
            votes = self._values(operands[1].lstrip("!"), threads, np.bool_) ^ operands[1].startswith("!")
            mode = instruction.suffixes[1]
            if mode not in ("any", "all", "ballot"):
                raise NotImplementedError(instruction.text)
            ballot = np.uint32(int(np.sum(votes.astype(np.int64) << lane)))
            self._set_values(operands[0], threads, {"any": votes.any(), "all": votes.all(), "ballot": ballot}[mode])
        elif instruction.name == "redux":
            mode, kind = instruction.suffixes[1:3]
            if kind not in ("s32", "u32") or mode not in ("min", "max", "add"):
                raise NotImplementedError(instruction.text)
            values = self._values(operands[1], threads, np.int32 if kind == "s32" else np.uint32)
            reduced = {"min": np.min, "max": np.max, "add": np.sum}[mode](values)  # add: without a carry beyond 32 bits
            result = np.full(threads.size, reduced.astype(values.dtype))
            self._set_values(operands[0], threads, result)
        elif instruction.name == "mma":
            self._multiply(instruction, threads)
        else:
            self._shuffle(instruction, threads, lane)

    def _multiply(self, instruction: Instruction, threads: np.ndarray) -> None:
        *how, result, a, b, c = instruction.suffixes
        if how != ["sync", "aligned", "m16n8k16", "row", "col"] or a != b or (result, c) != ("f32", "f32"):
            raise NotImplementedError(instruction.text)
        registers = [split_operands(operand[1:-1]) for operand in instruction.operands]
        kinds = np.uint32, np.uint32, np.float32
        given = [
            np.stack([self._values(register, threads, kind) for register in operand], -1)
            for operand, kind in zip(registers[1:], kinds, strict=True)
        ]
        tile = arithmetic.multiply_tiles(*given, {"f16": arithmetic.f16_to_f32, "bf16": arithmetic.bf16_to_f32}[a])
        for k, register in enumerate(registers[0]):
            self._set_values(register, threads, tile[:, k])

    def _shuffle(self, instruction: Instruction, threads: np.ndarray, lane: np.ndarray) -> None:
        operands, mode = instruction.operands, instruction.suffixes[1]
        b, c = (self._values(operand, threads).astype(np.int64) for operand in operands[2:4])
        segment, clamp = (c >> 8) & 31, c & 31
        highest, lowest = (lane & segment) | (clamp & ~segment), lane & segment
        source = {"bfly": lane ^ b, "idx": lowest | (b & ~segment & 31), "up": lane - b, "down": lane + b}[mode]
        is_inside = source >= highest if mode == "up" else source <= highest
        source = threads - lane + np.where(is_inside, source, lane)
        if not np.isin(source, threads).all():
            self.find("shuffle from a lane that is not there", instruction)
        register, _, flag = operands[0].partition("|")
        self._set_values(register, threads, self._values(operands[1], source))
        if flag and flag != "_":
            self._set_values(flag, threads, is_inside)
