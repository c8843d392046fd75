"""What nvcc makes of csrc/cuda: PTX, which tests/ptx runs, and from that the machine code that cuda_gates.py reads."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from support.ninja_library import ROOT, run_ninja

SOURCES = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc/cuda").glob("*.cu"))
# the kinds of GPU that kernels are compiled for: without and with clusters. setup.py assembles the PTX of each for all
# generations of its kind
KINDS = ("sm_80", "sm_90")
_INCLUDE = Path(torch.__file__).parent / "include"


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)


def compile_ptx(architecture: str, stems: Sequence[str] = ()) -> Path:
    """The folder with the <stem>.ptx of these sources, or of all, for "sm_90"; compiles what has changed.

    A warning is an error.
    """
    folder = ROOT / "build" / "ptx" / architecture
    flags = f"-std=c++20 -O3 -ptx -arch={architecture} -Werror=all-warnings -isystem {_INCLUDE}"
    lines = [f"rule compile\n  command = {find_nvcc()} {flags} -MD -MF $out.d -o $out $in", "  depfile = $out.d"]
    lines += ["  deps = gcc", "  description = nvcc $out"]
    lines += [f"build {source.stem}.ptx: compile ../../../{source}" for source in SOURCES]
    _ninja(folder, lines, [f"{stem}.ptx" for stem in stems])
    return folder


def assemble(architectures: Sequence[str]) -> list[Path]:
    """<stem>.sm_90.cubin of every source, for "sm_90", and ptxas' report beside it as .cubin.log."""
    folder = ROOT / "build" / "cuda_gates"
    command = f"{find_nvcc()} -cubin -Xptxas -v -arch=$sm -o $out $in > $out.log 2>&1 || (cat $out.log && false)"
    lines = [f"rule assemble\n  command = {command}\n  description = ptxas $out"]
    cubins = []
    for architecture in architectures:
        ptx = compile_ptx(KINDS[int(architecture.removeprefix("sm_")) >= 90])
        for source in SOURCES:
            cubins.append(folder / f"{source.stem}.{architecture}.cubin")
            path = os.path.relpath(ptx / f"{source.stem}.ptx", folder)  # that of a clone may hold spaces
            lines.append(f"build {cubins[-1].name}: assemble {path}\n  sm = {architecture}")
    _ninja(folder, lines, [cubin.name for cubin in cubins])
    return cubins


def _ninja(folder: Path, lines: list[str], targets: list[str]) -> None:
    result = run_ninja(folder, lines, targets)
    if result.returncode != 0:
        raise RuntimeError(result.stdout)
