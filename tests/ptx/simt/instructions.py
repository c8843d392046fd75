"""What the instructions of PTX compute, as Python expressions over arrays of the active threads."""

from __future__ import annotations

import numpy as np

from simt.module import NAMES, TYPES, Instruction, split_operands


def _bits(kind: str) -> int:
    return 8 * np.dtype(TYPES[kind]).itemsize


class Computations:
    """Of a Translator, which brings read, write and guard."""

    def compute(self, i: Instruction) -> None:
        """An instruction whose operands all have the type of its last suffix."""
        kind = i.suffixes[-1] if i.suffixes else ""
        simple = SIMPLE.get(i.name)
        if simple is None or (kind.endswith(("x2", "f16")) and i.name not in ("min", "max")):
            raise NotImplementedError(i.text)
        self.write(i.operands[0], kind, simple(kind, i.suffixes, *[self.read(x, kind) for x in i.operands[1:]]))

    # moves
    def do_mov(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        kind = suffixes[-1]
        if operands[0].startswith("{"):  # cuts a register
            parts = split_operands(operands[0][1:-1])
            part, whole = f"b{_bits(kind) // len(parts)}", self.read(operands[1], kind)
            for k, register in enumerate(parts):
                shifted = f"{whole} >> np.{NAMES[kind]}({k * _bits(part)})"
                self.write(register, part, f"({shifted}).astype(np.{NAMES[part]})")
        elif operands[1].startswith("{"):  # puts registers together
            parts = split_operands(operands[1][1:-1])
            part, whole = f"b{_bits(kind) // len(parts)}", NAMES[kind]
            terms = [
                f"({self.read(x, part)}.astype(np.{whole}) << np.{whole}({k * _bits(part)}))"
                for k, x in enumerate(parts)
            ]
            self.write(operands[0], kind, " | ".join(terms))
        else:
            self.write(operands[0], kind, f"{self.read(operands[1], kind)}.copy()")

    def do_cvta(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        source = self.read(operands[1], "u64")
        if "shared" in suffixes:
            source = f"{source} {'-' if 'to' in suffixes else '+'} launch.shared_base[threads]"
        self.write(operands[0], "u64", f"({source}).copy()")

    def do_mapa(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        kind, method = ("u32", "map_cluster") if "shared::cluster" in suffixes else ("u64", "map_shared")
        address, rank = self.read(operands[1], kind), self.read(operands[2], "u32")
        self.write(operands[0], kind, f"launch.{method}({address}, {rank})")

    def do_cvt(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        target, source = suffixes[-2:]
        if target in ("bf16x2", "f16x2"):
            high, low = self.read(operands[1], "f32"), self.read(operands[2], "f32")
            return self.write(operands[0], target, f"pair(f32_to_{target[:-2]}, {high}, {low})")
        x, to = self.read(operands[1], source), NAMES[target]
        rounding = next((suffix for suffix in suffixes[:-2] if suffix.startswith("r")), "")
        rounding = {"rni": "np.rint", "rmi": "np.floor", "rpi": "np.ceil", "rzi": "np.trunc"}.get(rounding)
        if source == "bf16":
            expression = f"bf16_to_f32({x})"
        elif target == "bf16":
            expression = f"f32_to_bf16({x})"
        elif source[0] == "f" and target[0] != "f":
            expression = f"to_integer({x}, {rounding}, np.{to})"
        elif rounding:
            expression = f"{rounding}({x}).astype(np.{to})"
        else:
            expression = f"{x}.astype(np.{to})"
        if "sat" in suffixes:
            expression = f"np.where(np.isnan({x}), np.float32(0), np.clip({expression}, np.float32(0), np.float32(1)))"
        if "ftz" in suffixes:
            expression = f"flush({expression})"
        return self.write(operands[0], target, expression)

    # comparison and choice
    def do_setp(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        if "|" in operands[0]:
            raise NotImplementedError(i.text)
        kind = suffixes[-1]
        a, b = self.read(operands[1], kind), self.read(operands[2], kind)
        expression = COMPARISONS[suffixes[0]].format(a=a, b=b)
        if suffixes[0] == "ne" and kind.startswith("f"):  # false where one is nan
            expression = f"(({a} < {b}) | ({a} > {b}))"
        if len(suffixes) == 3:
            combine = {"and": "&", "or": "|", "xor": "^"}[suffixes[1]]
            expression = f"({expression} {combine} {self.read(operands[3], 'pred')})"
        self.write(operands[0], "pred", expression)

    def do_set(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        """Of pairs of 16 bits: 16 bits of ones for each half that compares so"""
        comparison, to, kind = suffixes
        if to != "u32" or not kind.endswith("x2"):
            raise NotImplementedError(i.text)
        a, b = self.read(operands[1], kind), self.read(operands[2], kind)
        expression = COMPARISONS[comparison].format(a="a", b="b")
        self.write(operands[0], "u32", f"masks_of_pairs(lambda a, b: {expression}, {kind[:-2]}_to_f32, {a}, {b})")

    def do_selp(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        kind = suffixes[-1]
        a, b, p = self.read(operands[1], kind), self.read(operands[2], kind), self.read(operands[3], "pred")
        self.write(operands[0], kind, f"np.where({p}, {a}, {b})")

    # integers, with operands of different types
    def do_mul(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        """mul, and mad with a third operand"""
        kind = suffixes[-1]
        a, b = self.read(operands[1], kind), self.read(operands[2], kind)
        if "wide" in suffixes:
            kind = kind[0] + str(2 * int(kind[1:]))
            expression = f"{a}.astype(np.{NAMES[kind]}) * {b}.astype(np.{NAMES[kind]})"
        elif "hi" in suffixes:
            expression = f"multiply_high({a}, {b})"
        else:
            expression = f"{a} * {b}"
        if len(operands) > 3:
            expression = f"({expression}) + {self.read(operands[3], kind)}"
        self.write(operands[0], kind, expression)

    do_mad = do_mul

    def do_shl(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        kind, name = suffixes[-1], {"shl": "shift_left", "shr": "shift_right"}[i.name]
        a, count = self.read(operands[1], kind), self.read(operands[2], "u32")
        self.write(operands[0], kind, f"{name}({a}, {count}, {_bits(kind)})")

    do_shr = do_shl

    def do_shf(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        low, high, count = (self.read(operand, "b32") for operand in operands[1:])
        shifted = f"funnel_shift({low}, {high}, {count}, {suffixes[0] == 'l'}, {suffixes[1] == 'wrap'})"
        self.write(operands[0], "b32", shifted)

    def do_bfi(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        kind = suffixes[-1]
        a, b = self.read(operands[1], kind), self.read(operands[2], kind)
        self.write(operands[0], kind, f"bit_field_insert({a}, {b}, {int(operands[3])}, {int(operands[4])})")

    def do_popc(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        self.write(operands[0], "u32", f"count_bits({self.read(operands[1], suffixes[-1])})")

    def do_bfind(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        a = self.read(operands[1], "u32")
        place = f"highest_bit({a})"
        if "shiftamt" in suffixes:
            place = f"np.where({a} == 0, -1, 31 - {place}).astype(np.int32)"
        self.write(operands[0], "s32", place)

    def do_clz(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        self.write(operands[0], "s32", f"(31 - highest_bit({self.read(operands[1], 'u32')})).astype(np.int32)")

    def do_ex2(self, i: Instruction, suffixes: list[str], operands: list[str]) -> None:
        if suffixes[-1] != "f32":
            raise NotImplementedError(i.text)
        self.write(operands[0], "f32", f"launch.ex2({self.read(operands[1], 'f32')}, {'ftz' in suffixes})")


def _fma(kind: str, suffixes: list[str], a: str, b: str, c: str) -> str:
    return {"f64": "fma_f64", "f32": "fma_rm_f32" if "rm" in suffixes else "fma_f32"}[kind] + f"({a}, {b}, {c})"


def _add(kind: str, suffixes: list[str], a: str, b: str) -> str:
    return f"add_rz_f32({a}, {b})" if "rz" in suffixes else f"{a} + {b}"


def _extreme(kind: str, suffixes: list[str], a: str, b: str, which: str) -> str:
    if kind.endswith("x2"):
        half = kind[:-2]
        return f"of_pairs(np.f{which}, {half}_to_f32, f32_to_{half}, {a}, {b})"
    if kind[0] == "f" and "NaN" not in suffixes:  # a nan loses
        return f"np.f{which}({a}, {b})"
    return f"np.{which}imum({a}, {b})"


def _div(kind: str, suffixes: list[str], a: str, b: str) -> str:
    return f"{a} / {b}" if kind[0] == "f" else f"divide({a}, {b})"


def _rcp(kind: str, suffixes: list[str], a: str) -> str:
    if "approx" not in suffixes:
        return f"np.{NAMES[kind]}(1) / {a}"
    return f"rcp_approx_f64({a})" if kind == "f64" else f"flush((1 / flush({a}).astype(np.float64)).astype(np.float32))"


SIMPLE = {
    "add": _add,
    "sub": lambda kind, suffixes, a, b: f"{a} - {b}",
    "div": _div,
    "rem": lambda kind, suffixes, a, b: f"remainder({a}, {b})",
    "fma": _fma,
    "max": lambda kind, suffixes, a, b: _extreme(kind, suffixes, a, b, "max"),
    "min": lambda kind, suffixes, a, b: _extreme(kind, suffixes, a, b, "min"),
    "neg": lambda kind, suffixes, a: f"-{a}",
    "abs": lambda kind, suffixes, a: f"np.abs({a})",
    "not": lambda kind, suffixes, a: f"~{a}",
    "and": lambda kind, suffixes, a, b: f"{a} & {b}",
    "or": lambda kind, suffixes, a, b: f"{a} | {b}",
    "xor": lambda kind, suffixes, a, b: f"{a} ^ {b}",
    "brev": lambda kind, suffixes, a: f"reverse_bits({a})",
    "sqrt": lambda kind, suffixes, a: f"np.sqrt({a})",
    "rcp": _rcp,
    "lg2": lambda kind, suffixes, a: f"np.log2({a}.astype(np.float64)).astype(np.float32)",
    # the sign of a on the magnitude of b
    "copysign": lambda kind, suffixes, a, b: f"np.copysign({b}, {a})",
}
COMPARISONS = {
    "eq": "({a} == {b})",
    "ne": "({a} != {b})",
    "lt": "({a} < {b})",
    "le": "({a} <= {b})",
    "gt": "({a} > {b})",
    "ge": "({a} >= {b})",
    "lo": "({a} < {b})",  # unsigned
    "ls": "({a} <= {b})",
    "hi": "({a} > {b})",
    "hs": "({a} >= {b})",
    "equ": "~(({a} < {b}) | ({a} > {b}))",  # or one is nan
    "neu": "({a} != {b})",
    "ltu": "~({a} >= {b})",
    "leu": "~({a} > {b})",
    "gtu": "~({a} <= {b})",
    "geu": "~({a} < {b})",
    "num": "~(np.isnan({a}) | np.isnan({b}))",
    "nan": "(np.isnan({a}) | np.isnan({b}))",
}
