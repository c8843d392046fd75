"""Instructions that a warp executes in a loop, counted in what `cuobjdump --dump-sass` prints.

A loop's body also holds what hardly ever runs: elements at the ends of a row, the one vector with the maximum. So not
the body is counted but a path through it: of the paths that do most of the work (`keys`, such as exponentials and wide
loads), the one with the fewest instructions. A key is looked for in "@P0 LDS.128", or " LDS.128" without a guard.
"""

from __future__ import annotations

import math
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_FUNCTION = re.compile(r"Function : (\w+)")
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,6})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_NO_WAY_ON = ("EXIT", "RET", "BPT")


@dataclass(frozen=True)
class Instruction:
    """One line of the listing."""

    address: int
    guard: str  # "@!P0", or ""
    opcode: str  # "LDS.128"
    target: int  # of a branch, else -1
    operands: str = field(default="", compare=False)


@dataclass(frozen=True)
class Loop:
    """The instructions [first, last] of a function, of which the last jumps back to the first."""

    first: int
    last: int


@dataclass(frozen=True)
class PathCounts:
    """What a warp executes on a path."""

    n_instructions: float
    opcodes: Counter[str]  # of the instructions on the path, without their repetitions

    def count(self, pattern: str) -> int:
        return sum(n for opcode, n in self.opcodes.items() if re.match(pattern, opcode))


@dataclass
class Function:
    """A kernel's listing."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def loops(self) -> list[Loop]:
        """The longest one for each place to which something jumps back."""
        places = {instruction.address: i for i, instruction in enumerate(self.instructions)}
        found: dict[int, int] = {}
        for i, instruction in enumerate(self.instructions):
            if instruction.opcode.split(".")[0] == "BRA" and instruction.opcode != "BRA.DIV":
                first = places.get(instruction.target, i)
                if first < i:
                    found[first] = i
        return [Loop(first, last) for first, last in sorted(found.items())]

    def opcodes(self, loop: Loop) -> Counter[str]:
        return Counter(i.opcode for i in self.instructions[loop.first : loop.last + 1])

    def path(self, loop: Loop, keys: str, trips: Callable[[Loop], float] = lambda inner: 1) -> PathCounts | None:
        """The path of one turn that has most opcodes like `keys`, and among those the fewest instructions.

        trips: how often an inner loop turns; a path goes through its body once, or never where it turns inf times. None
        where the turn goes backwards on its way, as code for rare cases does that stands behind the kernel.
        """
        weights = [1.0] * (loop.last + 1)
        for inner in self.loops():
            if loop.first < inner.first and inner.last < loop.last:
                turns = trips(inner)
                for i in range(inner.first, inner.last + 1):
                    weights[i] *= turns
        places = {self.instructions[i].address: i for i in range(loop.first, loop.last + 1)}
        best: dict[int, tuple[float, float]] = {}  # from here to the end: work, minus instructions
        following: dict[int, int] = {}
        for i in range(loop.last, loop.first - 1, -1):
            ways = [way for way in self._ways(i, places) if way in best]
            if (not ways and i != loop.last) or math.isinf(weights[i]):
                continue
            work, minus_length = max((best[way] for way in ways), default=(0.0, 0.0))
            if ways:
                following[i] = max(ways, key=best.__getitem__)
            is_work = re.search(keys, f"{self.instructions[i].guard} {self.instructions[i].opcode}") is not None
            best[i] = (work + is_work, minus_length - weights[i])
        if loop.first not in best:
            return None
        opcodes: Counter[str] = Counter()
        i = loop.first
        while True:
            opcodes[self.instructions[i].opcode] += 1
            if i not in following:
                return PathCounts(-best[loop.first][1], opcodes)
            i = following[i]

    def _ways(self, i: int, places: dict[int, int]) -> Iterator[int]:
        """Where it goes from an instruction, forwards; none from the loop's last one."""
        instruction = self.instructions[i]
        name = instruction.opcode.split(".")[0]
        if (name == "BRA" or name in _NO_WAY_ON) and not instruction.guard and "DIV" not in instruction.opcode:
            # a branch of a uniform predicate, "BRA.U UP0, 0x10", has no guard and goes on too
            if name == "BRA" and instruction.opcode.endswith(".U"):
                yield i + 1
        else:
            yield i + 1
        if name == "BRA" and places.get(instruction.target, -1) > i and "DIV" not in instruction.opcode:
            yield places[instruction.target]


def functions(listing: Iterable[str], names: str = "") -> Iterator[Function]:
    """The kernels of a listing whose name the pattern finds."""
    current = None
    for line in listing:
        if found := _FUNCTION.search(line):
            if current:
                yield current
            current = Function(found[1]) if re.search(names, found[1]) else None
        elif current and (found := _INSTRUCTION.match(line)):
            address, guard, opcode, operands = found.groups()
            target = _TARGET.search(operands) if opcode.startswith("BRA") else None
            of_operands = re.match(r"\s*(!?U?P\d+)\s*,", operands)  # BRA P0, 0x10
            guard = guard or (of_operands[1] if of_operands and opcode.startswith("BRA") else "")
            place = int(target[1], 16) if target else -1
            current.instructions.append(Instruction(int(address, 16), guard, opcode, place, operands))
    if current:
        yield current


def functions_of_cubin(cubin: Path, cuobjdump: str, names: str = "") -> list[Function]:
    """Those of an object file, or of a library."""
    text = subprocess.check_output([cuobjdump, "--dump-sass", str(cubin)], text=True)
    return list(functions(text.splitlines(), names))
