"""Basic blocks of PTX to Python functions: registers, literals, addresses, branches, memory.

The function of a block takes the active threads. It reads a register once, keeps it in a Python variable, and writes it
back at its end if another block may read it. What an instruction computes is in instructions.py.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from simt import arithmetic
from simt.instructions import Computations
from simt.module import NAMES, TYPES, Instruction, Kernel, split_operands

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SPECIAL = ("%tid.x", "%ntid.x", "%ctaid.x", "%ctaid.y", "%nctaid.x", "%nctaid.y", "%cluster_ctarank", "%laneid")


class Ending(NamedTuple):
    """How a block goes on: "fall" through, "bra" to a block, "ret", or "wait" for other threads."""

    kind: str
    target: int | Instruction | None = None
    condition: str | None = None  # a Python expression; None: always


class Program:
    """A kernel as Python code, for any number of launches."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.place_of: dict[str, tuple[str, int]] = {}  # register: numpy type, number among those of the type
        self.n_registers: dict[str, int] = {}  # numpy type: how many
        for register, kind in kernel.registers.items():
            file = NAMES[kind]
            self.place_of[register] = file, self.n_registers.get(file, 0)
            self.n_registers[file] = self.n_registers.get(file, 0) + 1
        self.dynamic_offset = (kernel.static_shared_bytes + 15) // 16 * 16
        self.instructions: list[Instruction] = []  # those that access memory, by the number that the code gives them
        self.constants: dict[str, Any] = {name: value for name, value in vars(arithmetic).items() if callable(value)}
        self.constants["np"] = np
        self._find_uses()
        self.endings: list[Ending] = []
        text = []
        for number, block in enumerate(kernel.blocks):
            translator = Translator(self, block, number)
            self.endings.append(translator.ending)
            lines = translator.lines + [f"return {translator.ending.condition}"] * bool(translator.ending.condition)
            text.append(f"def block_{number}(threads):\n" + "\n".join(f"    {line}" for line in lines or ["pass"]))
        self.code = compile("\n\n".join(text), kernel.name, "exec")

    def _find_uses(self) -> None:
        used: dict[str, set[int]] = {}
        carried = set()  # registers that a block reads before it writes them
        for number, block in enumerate(self.kernel.blocks):
            seen: set[str] = set()
            for instruction in block:
                mentions = [set(re.findall(r"%[\w$]+", text)) for text in instruction.operands]
                is_write = bool(mentions) and not instruction.operands[0].startswith("[") and instruction.name != "call"
                first_read = 1 if is_write and not instruction.guard else 0
                reads = set().union(*mentions[first_read:], [instruction.guard] if instruction.guard else [])
                carried |= reads - seen
                seen.update(*mentions, reads)
                for register in set().union(*mentions, reads):
                    used.setdefault(register, set()).add(number)
        self.live = carried | {register for register, blocks in used.items() if len(blocks) > 1}

    def literal(self, text: str, dtype: np.dtype) -> Any:
        if (place := self.place_of_symbol(text)) is not None:
            return np.array([place], np.int64).astype(dtype)[0]
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return np.array([int(text[2:], 16)], np.uint32).view(np.float32)[0].astype(dtype)
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return np.array([int(text[2:], 16)], np.uint64).view(np.float64)[0].astype(dtype)
        if dtype == np.bool_:
            return np.bool_(int(text, 0))
        if text == "WARP_SZ":
            return dtype.type(32)
        value = int(text.rstrip("U"), 0) & ((1 << 8 * dtype.itemsize) - 1)
        return np.array([value], UNSIGNED[dtype.itemsize]).view(dtype)[0]

    def place_of_symbol(self, name: str) -> int | None:
        """Offset of a parameter or a shared array; the number of a text."""
        kernel = self.kernel
        if name in kernel.parameters:
            return kernel.parameters[name]
        if name in kernel.shared:
            return kernel.shared[name]
        if name in kernel.module.dynamic_shared:
            return self.dynamic_offset
        if name in kernel.module.strings:
            return list(kernel.module.strings).index(name) + 1
        return None


class Translator(Computations):
    """The Python text of one block."""

    def __init__(self, program: Program, block: list[Instruction], number: int) -> None:
        self.program, self.kernel = program, program.kernel
        self.lines: list[str] = []
        self.known: dict[str, str] = {}  # register: the Python variable that holds it
        self.ending = Ending("fall")
        written = []
        for instruction in block:
            self.instruction = instruction
            written += self._translate(instruction)
        for register in dict.fromkeys(written):
            if register in program.live:
                file, row = program.place_of[register]
                self.lines.append(f"R_{file}[{row}][threads] = {self.known[register]}")

    def _translate(self, instruction: Instruction) -> list[str]:
        """Returns the registers that were written."""
        self._written: list[str] = []
        method = getattr(self, f"do_{instruction.name}", None)
        if method:
            method(instruction, instruction.suffixes, instruction.operands)
        else:
            self.compute(instruction)
        return self._written

    def emit(self, expression: str) -> str:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        return name

    def read(self, operand: str, kind: str) -> str:
        """An expression for an operand, of the numpy type of `kind`."""
        wanted = np.dtype(TYPES[kind])
        if operand.startswith("!"):
            return f"(~{self.read(operand[1:], kind)})"
        if operand in SPECIAL:
            unsigned = UNSIGNED[wanted.itemsize].__name__
            return f"S_{operand[1:].replace('.', '_')}[threads].astype(np.{unsigned}).view(np.{wanted.name})"
        if operand not in self.program.place_of:
            if operand.startswith("%"):
                raise NotImplementedError(f"{self.instruction.text}: {operand}")
            value = self.program.literal(operand, wanted)
            name = f"c_{value.dtype.name}_{value.tobytes().hex()}"
            self.program.constants[name] = value
            return name
        if operand not in self.known:
            file, row = self.program.place_of[operand]
            self.known[operand] = self.emit(f"R_{file}[{row}][threads]")
        stored, name = np.dtype(TYPES[self.kernel.registers[operand]]), self.known[operand]
        if stored == wanted:
            return name
        if stored.itemsize == wanted.itemsize:
            return f"{name}.view(np.{wanted.name})"
        if stored.itemsize < wanted.itemsize:
            raise NotImplementedError(f"{self.instruction.text}: {operand} is narrower than {kind}")
        wide, narrow = UNSIGNED[stored.itemsize].__name__, UNSIGNED[wanted.itemsize].__name__
        return f"{name}.view(np.{wide}).astype(np.{narrow}).view(np.{wanted.name})"

    def write(self, operand: str, kind: str, expression: str) -> None:
        if operand == "_":
            return
        stored, given = np.dtype(TYPES[self.kernel.registers[operand]]), np.dtype(TYPES[kind])
        if stored.itemsize > given.itemsize:
            sign = "" if np.issubdtype(given, np.signedinteger) else "u"
            expression = f"({expression}).astype(np.{sign}int{8 * stored.itemsize}).view(np.{stored.name})"
        elif stored != given:
            expression = f"({expression}).view(np.{stored.name})"
        if self.instruction.guard:
            old = self.read(operand, self.kernel.registers[operand])
            expression = f"np.where({self.guard()}, {expression}, {old})"
        self.known[operand] = self.emit(expression)
        self._written.append(operand)

    def guard(self) -> str:
        predicate = self.read(self.instruction.guard, "pred")
        return f"~{predicate}" if self.instruction.is_negated else predicate

    def address(self, operand: str) -> str:
        """An address in its memory, as an int64 expression."""
        base, offset = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand).groups()
        if base in self.program.place_of:
            expression = f"{self.read(base, self.kernel.registers[base])}.astype(np.int64)"
        else:
            expression = f"np.full(threads.size, {self.program.place_of_symbol(base)}, np.int64)"
        return f"{expression} + {int(offset)}" if offset else expression

    # control
    def do_bra(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        self.ending = Ending("bra", self.kernel.labels[operands[0]], self.guard() if i.guard else None)

    def do_ret(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        self.ending = Ending("ret", None, self.guard() if i.guard else None)

    do_exit = do_ret

    def do_trap(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        self.lines.append("launch.trap(threads)")
        self.ending = Ending("ret")

    def do_call(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        arguments = ", ".join(self.read(x, self.kernel.registers[x]) for x in operands[1:])
        self.lines.append(f"launch.assert_failed(threads, {arguments})")

    def do_bar(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        self.ending = Ending("wait", i)

    do_barrier = do_shfl = do_vote = do_redux = do_mma = do_mbarrier = do_bar

    def do_membar(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        """Nothing: barriers order all memory here."""

    do_fence = do_membar

    # memory
    def _access(self, suffixes: list[str]) -> tuple[str, int, str]:
        """Memory, elements, type of an element."""
        names = [suffix.split("::")[0] for suffix in suffixes]
        space = next((name for name in names if name in ("global", "shared", "param", "const", "local")), "generic")
        vector = next((int(suffix[1:]) for suffix in suffixes if re.fullmatch(r"v\d", suffix)), 1)
        return space, vector, suffixes[-1]

    def _number(self, instruction: Instruction) -> int:
        self.program.instructions.append(instruction)
        return len(self.program.instructions) - 1

    def do_ld(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        space, vector, kind = self._access(suffixes)
        names = split_operands(operands[0][1:-1]) if operands[0].startswith("{") else [operands[0]]
        loaded = self.emit(
            f"launch.load({space!r}, {self.address(operands[1])}, np.dtype(np.{NAMES[kind]}), {vector}, threads, "
            f"{self.guard() if i.guard else None}, {self._number(i)})"
        )
        for k, register in enumerate(names):
            self.write(register, kind, f"{loaded}[{k}]")

    do_ldu = do_ld

    def do_st(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        if i.is_block:
            return self.do_bar(i, suffixes, operands)
        space, _, kind = self._access(suffixes)
        names = split_operands(operands[1][1:-1]) if operands[1].startswith("{") else [operands[1]]
        values = ", ".join(self.read(x, kind) for x in names)
        self.lines.append(
            f"launch.store({space!r}, {self.address(operands[0])}, np.dtype(np.{NAMES[kind]}), [{values}], threads, "
            f"{self.guard() if i.guard else None}, {self._number(i)})"
        )
        return None

    def do_cp(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        if suffixes[0] != "async" or "bulk" in suffixes:
            raise NotImplementedError(i.text)
        if "commit_group" in suffixes:
            self.lines.append("launch.commit_copies(threads)")
        elif "wait_group" in suffixes or "wait_all" in suffixes:
            self.lines.append(f"launch.wait_for_copies(threads, {int(operands[0]) if operands else 0})")
        else:
            self.lines.append(
                f"launch.start_copies({self.address(operands[0])}, {self.address(operands[1])}, {int(operands[2])}, "
                f"threads, {self.guard() if i.guard else None}, {self._number(i)})"
            )
