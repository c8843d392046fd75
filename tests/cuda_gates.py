"""What can be said about the CUDA kernels without a GPU, from what nvcc makes of them for sm_80, sm_90 and sm_100:

* every file of csrc/cuda compiles without a warning;
* all kernels keep everything in registers: no spills, no local memory;
* those over rows read and write them 16 bytes at a time;
* those of rows with a loss have no fence of all memory but the one of a cluster before its first row.

    python tests/cuda_gates.py [--architectures 80 90 100] [--table]

Compiled again only after an edit (build/ptx, build/cuda_gates). Ends with 0 where all is well, or where no nvcc is.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from support.cuda_compiler import assemble, find_nvcc

ARCHITECTURES = ["80", "90", "100"]
# rows of each type of logits (float64 is simple, not fast, but must not spill either), and what takes no logits
KERNELS = re.compile(r"(softmax_rows_(float32|bfloat16|float16|float64)|router_rows|repetition|temperature)$")
# those that must move 16 bytes at a time
WIDE = re.compile(r"(row_loss|row_gradient|scale_rows|\d+router_gradient)_kernel")
# what a cluster's barrier becomes: a wait for every store, and a first cache thrown away
FENCE = re.compile(r"MEMBAR\.\w+\.GPU|CCTL\.IVALL")
# Residence::clusters, by its mangled value: below sm_90, where no plan asks for it, nothing but a trap
CLUSTERS = re.compile(r"row_loss_kernel.*ResidenceE2E")


@dataclass
class Kernel:
    """One kernel in one object file."""

    name: str
    registers: int = 0
    local_bytes: int = 0  # stack frame
    spill_bytes: int = 0
    loads: set[str] = field(default_factory=set)  # SASS instructions that move 128 bits
    stores: set[str] = field(default_factory=set)
    local_instructions: int = 0
    fences: int = 0

    def faults(self, has_clusters: bool = True) -> list[str]:
        found: list[str] = []
        if self.local_bytes or self.spill_bytes or self.local_instructions:
            found.append(
                f"{self.local_bytes} bytes of local memory, {self.spill_bytes} bytes spilled, "
                f"{self.local_instructions} instructions on them"
            )
        if "row_loss_kernel" in self.name and self.fences > (2 if CLUSTERS.search(self.name) else 0):
            found.append(f"{self.fences} fences of all memory")
        if WIDE.search(self.name) and (has_clusters or not CLUSTERS.search(self.name)):
            found += ["no 128-bit load"] * (not self.loads) + ["no 128-bit store"] * (not self.stores)
        return found


def find_cuobjdump(nvcc: str) -> str:
    """The toolkit's own, or PyPI's nvidia-cuda-cuobjdump, which the extra `test` brings."""
    folders = [str(Path(os.path.realpath(nvcc)).parent)]
    folders += [str(path) for path in Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")]
    found = shutil.which("cuobjdump", path=os.pathsep.join(folders)) or shutil.which("cuobjdump")
    if found is None:
        raise SystemExit("cuda_gates: expected cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return found


def kernels_of_report(text: str) -> dict[str, Kernel]:
    """From ptxas -v."""
    kernels: dict[str, Kernel] = {}
    current = None
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            current = kernels[match[1]] = Kernel(match[1])
        elif current is None:
            continue
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current.local_bytes = int(match[1])
            current.spill_bytes = int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            current.registers = int(match[1])
    return kernels


def add_instructions(kernels: dict[str, Kernel], sass: str) -> None:
    """From cuobjdump -sass."""
    current = None
    for line in sass.splitlines():
        if match := re.search(r"Function : (\w+)", line):
            current = kernels.get(match[1])
        elif current is not None and (match := re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", line)):
            instruction = match[1]
            if re.match(r"(LDL|STL)\b", instruction):
                current.local_instructions += 1
            elif FENCE.match(instruction):
                current.fences += 1
            elif re.match(r"(LDG|LDGSTS)\..*128", instruction):
                current.loads.add(instruction)
            elif re.match(r"STG\..*128", instruction):
                current.stores.add(instruction)


def check(objects: list[Path], cuobjdump: str, show_table: bool) -> int:
    """Prints what is wrong; returns how much that is."""
    environment = {**os.environ, "PATH": str(Path(cuobjdump).parent) + os.pathsep + os.environ["PATH"]}

    def disassemble(cubin: Path) -> str:
        return subprocess.check_output([cuobjdump, "-sass", cubin], text=True, env=environment)

    n_faults = n_kernels = 0
    with_kernels = [cubin for cubin in objects if KERNELS.search(cubin.name.split(".")[0])]
    pool = ThreadPoolExecutor()
    for cubin, sass in zip(with_kernels, pool.map(disassemble, with_kernels), strict=True):
        has_clusters = int(cubin.name.split("sm_")[1].split(".")[0]) >= 90
        kernels = kernels_of_report(Path(f"{cubin}.log").read_text())
        add_instructions(kernels, sass)
        n_kernels += len(kernels)
        if not kernels or "Function :" not in sass:
            print(f"cuda_gates: no kernel found in {cubin.name}")
            n_faults += 1
        for kernel in kernels.values():
            if show_table:
                moves = " ".join(sorted(kernel.loads | kernel.stores))
                print(f"{cubin.name:36} {kernel.registers:4} registers  {kernel.name:70} {moves}")
            for fault in kernel.faults(has_clusters):
                print(f"cuda_gates: {cubin.name}: {kernel.name}: {fault}")
                n_faults += 1
    print(f"cuda_gates: {len(objects)} objects, {n_kernels} kernels, {n_faults} faults")
    return n_faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, metavar="SM")
    parser.add_argument("--table", action="store_true", help="registers and wide instructions of every kernel")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda_gates: no nvcc on PATH or in CUDA_HOME: nothing to look at")
        return 0
    objects = assemble([f"sm_{number}" for number in options.architectures])
    return int(check(objects, find_cuobjdump(nvcc), options.table) > 0)


if __name__ == "__main__":
    sys.exit(main())
