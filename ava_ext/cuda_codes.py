"""Which GPUs a compiled library has code for: reads the fat binaries that nvcc leaves in it, without the toolkit.

A fat binary is a header (magic, version, size of the header, size of what follows) and entries; an entry is a header
(kind 1: PTX, 2: machine code; size of the header, size of the code, architecture) and its code.
`cuobjdump --list-elf --list-ptx` prints the same list.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_MAGIC = struct.pack("<I", 0xBA55ED50)
_HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of all entries
_ENTRY = struct.Struct("<HHIQ")  # kind, version, bytes of this header, bytes of the code
_ARCHITECTURE = struct.Struct("<I")
_ARCHITECTURE_OFFSET = 28  # in an entry's header
_KINDS = {1: "compute", 2: "sm"}


def cuda_codes(library: Path) -> list[str]:
    """Names such as "sm_90" (machine code) and "compute_120" (PTX, compiled for any later GPU by its driver).

    Args:
        library: a shared library.

    Returns:
        Every code once, in the order of architectures; empty without CUDA kernels.
    """
    found: set[tuple[int, str]] = set()
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        begin = data.find(_MAGIC)
        while begin >= 0:
            if begin + _HEADER.size <= len(data):
                found |= _codes_of(data, begin)
            begin = data.find(_MAGIC, begin + len(_MAGIC))
    return [f"{kind}_{architecture}" for architecture, kind in sorted(found)]


def _codes_of(data: mmap.mmap, begin: int) -> set[tuple[int, str]]:
    """(architecture, kind) of the entries of the fat binary that begins here."""
    _, version, header_bytes, entry_bytes = _HEADER.unpack_from(data, begin)
    place, end = begin + header_bytes, begin + header_bytes + entry_bytes
    if version != 1 or end > len(data):
        return set()  # the four bytes of the magic by chance
    codes = set()
    while place + _ARCHITECTURE_OFFSET + _ARCHITECTURE.size <= end:
        kind, _, entry_header_bytes, code_bytes = _ENTRY.unpack_from(data, place)
        if kind in _KINDS:
            codes.add((_ARCHITECTURE.unpack_from(data, place + _ARCHITECTURE_OFFSET)[0], _KINDS[kind]))
        if entry_header_bytes + code_bytes == 0:
            break
        place += entry_header_bytes + code_bytes
    return codes
