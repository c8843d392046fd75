"""`make wheel`: what a wheel has to be before it is given to anyone. Prints what it found; exits with 1 on a fault.

python tests/wheel_gates.py dist
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

MOST_BYTES = 40_000_000
# what a CPU-only Linux has; the rest of LibTorch comes with torch, whatever its version
SYSTEM_LIBRARIES = r"ld-linux.*|lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)\.so\.\d+"
TORCH_LIBRARIES = r"lib(torch|torch_cpu|c10|torch_cuda|c10_cuda)\.so"
SOURCES = ("csrc/sources.txt", "csrc/library.cpp", "setup.py", "build_backend/torch_from_env.py", "ava_ext/py.typed")


def faults_of_wheel(path: Path) -> list[str]:
    faults = []
    if not re.fullmatch(r"ava_ext-[\d.]+-cp310-abi3-manylinux_\w+\.whl", path.name):
        faults.append(
            f"expected a name as ava_ext-<version>-cp310-abi3-manylinux_<glibc>_<machine>.whl, got {path.name}"
        )
    if path.stat().st_size > MOST_BYTES:
        faults.append(f"expected at most {MOST_BYTES / 1e6:.0f} MB, got {path.stat().st_size / 1e6:.1f}")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        shared = [name for name in names if re.search(r"\.so(\.|$)", name)]
        if shared != ["ava_ext/_C.abi3.so"]:
            faults.append(f"expected one library, ava_ext/_C.abi3.so, got {shared}")
        if "ava_ext/py.typed" not in names:
            faults.append("expected ava_ext/py.typed, got none")
        library = wheel.extract("ava_ext/_C.abi3.so", path.parent / "unpacked")
    needed = re.findall(r"NEEDED\s+(\S+)", subprocess.check_output(["objdump", "-p", library], text=True))
    for name in needed:
        if not re.fullmatch(f"{SYSTEM_LIBRARIES}|{TORCH_LIBRARIES}", name):
            faults.append(f"expected only libraries of torch and of the system, got {name}")
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, needs {', '.join(sorted(needed))}")
    return faults


def faults_of_sdist(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {len(names)} files")
    built = [name for name in names if name.endswith((".so", ".pyc", ".o"))]
    return [f"expected {name} in the sdist, got none" for name in SOURCES if name not in names] + [
        f"expected no built file in the sdist, got {name}" for name in built
    ]


def main(folder: Path) -> int:
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    faults = (
        [f"expected one wheel and one sdist, got {wheels} and {sdists}"] if len(wheels) != 1 or len(sdists) != 1 else []
    )
    for wheel in wheels:
        faults += faults_of_wheel(wheel)
    for sdist in sdists:
        faults += faults_of_sdist(sdist)
    print("\n".join(f"FAULT: {fault}" for fault in faults) or "wheel and sdist are as they should be")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
