"""The text of a PTX module, cut into kernels and basic blocks."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

TYPES = {
    "pred": np.bool_,
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "f16": np.float16,
    "bf16": np.uint16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
}
NAMES = {kind: np.dtype(dtype).name for kind, dtype in TYPES.items()}  # of numpy
# threads wait for others in these, or for memory; each is a basic block of its own
WAITING = ("bar", "barrier", "shfl", "vote", "activemask", "match", "redux", "mma", "mbarrier")


@dataclass(eq=False)
class Instruction:
    text: str
    opcode: str  # st.global.u32
    operands: list[str] = field(default_factory=list)
    guard: str | None = None  # the predicate of @%p
    is_negated: bool = False  # @!%p

    def __post_init__(self) -> None:
        self.name, *self.suffixes = self.opcode.split(".")

    @property
    def is_block(self) -> bool:
        return self.name in WAITING or self.opcode.startswith("st.async")


class Function(NamedTuple):
    header: str
    body: str
    kind: str  # "entry" (a kernel) or "func"


def split_operands(text: str) -> list[str]:
    """Cuts at the commas outside brackets: {a, b} stays one operand."""
    parts, depth, part = [], 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += char
    return [*parts, part.strip()] if part.strip() else parts


class Module:
    def __init__(self, text: str) -> None:
        self.text = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.S))
        self.functions: dict[str, Function] = {}
        for match in re.finditer(r"\.(?:visible\s+|weak\s+)*(?:\.?(entry|func))\b", self.text):
            opening, ending = self.text.find("{", match.end()), self.text.find(";", match.end())
            if opening < 0 or (0 <= ending < opening):
                continue  # a declaration
            depth, end = 1, opening + 1
            while depth:
                end = re.compile(r"[{}]").search(self.text, end).end()
                depth += 1 if self.text[end - 1] == "{" else -1
            header = self.text[match.end() : opening]
            name = re.sub(r"^\s*\([^)]*\)", "", header).split("(")[0].strip()
            self.functions[name] = Function(header, self.text[opening + 1 : end - 1], match[1])
        constant = re.compile(r"\.global\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\d+\]\s*=\s*\{([^}]*)\}")
        # the texts of device asserts; only their addresses are used
        self.strings = {m[1]: bytes(int(x) for x in m[2].split(",")) for m in constant.finditer(self.text)}
        shared = r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]"
        self.dynamic_shared = re.findall(shared, self.text)

    @property
    def kernel_names(self) -> list[str]:
        return [name for name, function in self.functions.items() if function.kind == "entry"]

    @functools.cache  # noqa: B019  modules live as long as the tests
    def kernel(self, name: str) -> Kernel:
        return Kernel(self, name)

    def mutated(self, name: str, body: str) -> Kernel:
        """The kernel `name` with another text of its body."""
        copy = object.__new__(Module)
        copy.__dict__ |= self.__dict__
        copy.functions = self.functions | {name: self.functions[name]._replace(body=body)}
        return Kernel(copy, name)


class Kernel:
    """A kernel with the functions that it calls copied in, as basic blocks in the order of the text."""

    def __init__(self, module: Module, name: str) -> None:
        self.module, self.name = module, name
        self.registers: dict[str, str] = {}  # name: type
        self.shared: dict[str, int] = {}  # name: offset. Dynamic shared memory comes behind all.
        self.static_shared_bytes = 0
        self.parameters, self.parameter_bytes = _parameters(module.functions[name].header)
        self.call_variables: set[str] = set()  # registers in place of the .param variables of calls
        self.code: list[Instruction | str] = []  # a label is a string
        self._n_scopes = 0
        self._add(name, {}, "", None)
        self.blocks, self.labels = _basic_blocks(self.code)

    def _add(self, function: str, given: dict[str, str], prefix: str, end_label: str | None) -> None:
        """Adds the statements of a function. `given` names what its parameters and its result are in the caller."""
        body = self.module.functions[function].body
        scopes = [dict(given)]
        token = re.compile(r"\s*(?:(\{)|(\})|([\w$]+):(?!:)|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*;))")
        position = 0
        while match := token.match(body, position):
            position = match.end()
            if match[1]:
                self._n_scopes += 1
                scopes.append({})
            elif match[2]:
                scopes.pop()
            elif match[3]:
                self.code.append(prefix + match[3])
            elif statement := " ".join(match[4][:-1].split()):
                self._add_statement(statement, scopes, prefix, end_label)
        if body[position:].strip():
            raise NotImplementedError(body[position : position + 200])
        if end_label:
            self.code.append(end_label)

    def _add_statement(self, statement: str, scopes: list[dict], prefix: str, end_label: str | None) -> None:
        scope = f"{prefix}{self._n_scopes}:" if len(scopes) > 1 else prefix
        if statement.startswith(".reg"):
            return self._declare_registers(statement, scopes, scope)
        if statement.startswith(".param"):  # of a call
            kind, name = re.search(r"\.(b\d+)\s+([\w$]+)$", statement).groups()
            scopes[-1][name] = f"%{scope}{name}".replace(":", "_")
            self.registers[scopes[-1][name]] = kind
            self.call_variables.add(scopes[-1][name])
            return None
        if statement.startswith(".shared"):
            return self._declare_shared(statement)
        if statement.startswith((".pragma", ".loc")):
            return None
        guard = re.match(r"@(!?)(%?[\w$]+)\s+", statement)
        if guard:
            statement = statement[guard.end() :]
        opcode, _, rest = statement.partition(" ")
        if opcode.startswith("call"):
            return self._add_call(rest, scopes, prefix)
        if opcode == "ret" and end_label:
            opcode, rest = "bra", end_label
        elif opcode.startswith("bra"):
            rest = prefix + rest.strip()
        else:
            rest = _renamed(rest, scopes)
        opcode, operands = self._without_call_variables(opcode, split_operands(rest))
        predicate = _renamed(guard[2], scopes) if guard else None
        self.code.append(Instruction(statement, opcode, operands, predicate, bool(guard and guard[1])))
        return None

    def _declare_registers(self, statement: str, scopes: list[dict], scope: str) -> None:
        _, kind, names = statement.split(None, 2)
        for name in (name.strip() for name in names.split(",")):
            counted = re.fullmatch(r"(%\w+?)<(\d+)>", name)  # %r<40>
            for full in [f"{counted[1]}{i}" for i in range(int(counted[2]))] if counted else [name]:
                scopes[-1][full] = f"%{scope}{full.lstrip('%')}".replace(":", "_") if scope else full
                self.registers[scopes[-1][full]] = kind.lstrip(".")

    def _declare_shared(self, statement: str) -> None:
        match = re.search(r"\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?", statement)
        align, size = int(match[1]), np.dtype(TYPES[match[2]]).itemsize * int(match[4] or 1)
        self.shared[match[3]] = (self.static_shared_bytes + align - 1) // align * align
        self.static_shared_bytes = self.shared[match[3]] + size

    def _without_call_variables(self, opcode: str, operands: list[str]) -> tuple[str, list[str]]:
        """A store to, or a load from, a .param variable of a call is a move here."""
        if opcode.startswith(("st.param", "ld.param")):
            is_store = opcode.startswith("st")
            place = re.fullmatch(r"\[(%[\w$]+)(?:\+0)?\]", operands[0 if is_store else 1])
            if place and place[1] in self.call_variables:
                return f"mov.{opcode.split('.')[-1]}", [place[1], operands[1]] if is_store else [operands[0], place[1]]
        return opcode, operands

    def _add_call(self, rest: str, scopes: list[dict], prefix: str) -> None:
        call = re.fullmatch(r"(?:\(([^)]*)\)\s*,\s*)?([\w$]+)\s*,\s*\(([^)]*)\)", rest.strip())
        results, function, arguments = call[1] or "", call[2], call[3]
        arguments = [_renamed(name.strip(), scopes) for name in arguments.split(",") if name.strip()]
        if function not in self.module.functions:  # __assertfail
            self.code.append(Instruction(f"call {function}", "call", [function, *arguments]))
            return
        names = re.findall(r"\.param\s+\.b\d+\s+([\w$]+)", self.module.functions[function].header)
        results = [_renamed(name.strip(), scopes) for name in results.split(",") if name.strip()]
        self._n_scopes += 1
        inner = f"{prefix}{function}_{self._n_scopes}_"
        self._add(function, dict(zip(names, results + arguments, strict=True)), inner, inner + "end")


def _parameters(header: str) -> tuple[dict[str, int], int]:
    """Offset of each parameter, and the bytes of all."""
    offsets, end = {}, 0
    for match in re.finditer(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?", header):
        size = np.dtype(TYPES[match[2]]).itemsize
        align = int(match[1] or size)
        end = (end + align - 1) // align * align
        offsets[match[3]] = end
        end += size * int(match[4] or 1)
    return offsets, end


def _renamed(text: str, scopes: list[dict]) -> str:
    def new_name(match: re.Match) -> str:
        return next((scope[match[0]] for scope in reversed(scopes) if match[0] in scope), match[0])

    return re.sub(r"[%$]?[A-Za-z_][\w$]*(?:\.[xyz]\b)?", new_name, text)


def _basic_blocks(code: list[Instruction | str]) -> tuple[list[list[Instruction]], dict[str, int]]:
    """The blocks, and the number of the block that each label stands before."""
    labels: dict[str, int] = {}
    blocks: list[list[Instruction]] = [[]]
    for item in code:
        if isinstance(item, str):
            blocks += [[]] if blocks[-1] else []
            labels[item] = len(blocks) - 1
            continue
        if item.is_block and blocks[-1]:
            blocks.append([])
        blocks[-1].append(item)
        if item.is_block or item.name in ("bra", "ret", "exit", "trap"):
            blocks.append([])
    return (blocks if blocks[-1] else blocks[:-1]), labels
