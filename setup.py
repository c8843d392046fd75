"""Builds ava_ext/_C.abi3.so: one library for every CPython >= 3.10 and torch >= 2.10, with or without a GPU.

AVA_CUDA=auto   CUDA kernels are compiled where nvcc is found, also when torch itself is CPU-only
AVA_CUDA=1      nvcc is required       AVA_CUDA=0  no CUDA kernels
AVA_LINEINFO=1  lines of the source in the CUDA kernels, for a profiler: three times the size
TORCH_CUDA_ARCH_LIST, CUDA_HOME, MAX_JOBS, CXX: as for every torch extension. Without TORCH_CUDA_ARCH_LIST kernels are
                compiled for the GPUs at hand, or, where there are none, for every generation from sm_80 on
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    message = f"ava_ext: building needs torch >= 2.10 ({error}). Install it, or build with isolation."
    raise SystemExit(message) from error
if torch.__version__ < (2, 10):
    raise SystemExit(f"ava_ext: building needs torch >= 2.10, got {torch.__version__} in {torch.__path__[0]}")

ROOT = Path(__file__).resolve().parent
# the environment's own ninja, also where it is not activated: another ninja version discards the log of the
# last build and recompiles everything
os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")


def find_cuda() -> tuple[str, str] | None:
    """Folder and version of the CUDA toolkit, or None for a library without CUDA."""
    mode = os.environ.get("AVA_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"ava_ext: expected AVA_CUDA to be auto, 0 or 1, got {mode!r}")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if mode == "0" or (mode == "auto" and nvcc is None):
        return None
    if nvcc is None:
        where = f"{home}/bin" if home else "PATH"
        raise SystemExit(f"ava_ext: AVA_CUDA=1 but nvcc was not found in {where}. Set CUDA_HOME, or AVA_CUDA=0.")
    # nvcc on PATH can be a wrapper script far from the toolkit: ask it where its toolkit is
    dry_run = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(.+)", dry_run)
    version = re.search(r"release (\d+\.\d+)", subprocess.check_output([nvcc, "--version"], text=True))
    if not top or not version:
        raise SystemExit(f"ava_ext: {nvcc} does not work: {dry_run.strip()[:300]}. Set CUDA_HOME, or AVA_CUDA=0.")
    return os.path.realpath(top[1].strip()), version[1]


def architectures() -> str:
    """TORCH_CUDA_ARCH_LIST where the environment has none. Asks the driver, not torch, which may be CPU-only."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    here = {line.strip() for line in answer.splitlines() if re.fullmatch(r"\d+\.\d+", line.strip())}
    return ";".join(sorted(here, key=float)) or "8.0;9.0;10.0;12.0+PTX"


def generations(architectures: str) -> list[str]:
    """What nvcc is told of TORCH_CUDA_ARCH_LIST; nothing where torch should read it, such as "9.0a" or names.

    The kernels know two kinds of GPU, below sm_90 and from there on. So the compiler's front end runs once for each of
    them, and its PTX is assembled for each generation.
    """
    found = [re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", one) for one in re.split("[; ,]+", architectures.strip("; ,"))]
    if None in found:
        return []
    codes: dict[int, list[str]] = {}  # of each kind, by its lowest generation
    for number, with_ptx in sorted({(int(one[1] + one[2]), bool(one[3])) for one in found}):
        kind = next((lowest for lowest in codes if (lowest < 90) == (number < 90)), number)
        codes.setdefault(kind, []).extend([f"sm_{number}"] + [f"compute_{kind}"] * with_ptx)
    return [f"-gencode=arch=compute_{kind},code=[{','.join(made)}]" for kind, made in codes.items()]


def nvcc_options(version: str) -> list[str]:
    options = ["-O3", "--compiler-options=-fvisibility=hidden", *GENERATIONS]
    # an eighth of the size. Drivers of CUDA 12's time may not know the denser form
    options.append("--compress-mode=size" if int(version.split(".")[0]) >= 13 else "-Xfatbin=-compress-all")
    return options + ["-lineinfo"] * (os.environ.get("AVA_LINEINFO", "0") == "1")


CUDA = find_cuda()
CUDA_VERSION = CUDA[1] if CUDA else ""
sources = [line for line in (ROOT / "csrc/sources.txt").read_text().split() if CUDA or not line.endswith(".cu")]
cuda_options = {}
if CUDA:
    home, version = CUDA
    cpp_extension.CUDA_HOME = home  # cpp_extension leaves it None where torch is CPU-only
    # same reason: without it, .cu files get no header dependencies and are not rebuilt after a header edit
    torch.version.cuda = torch.version.cuda or version
    # without a visible GPU cpp_extension's own default fails with IndexError
    os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or architectures()
    GENERATIONS = generations(os.environ["TORCH_CUDA_ARCH_LIST"])
    cuda_options = {
        "include_dirs": [f"{home}/include"],
        "library_dirs": [f"{home}/lib64"],
        "libraries": ["cudart_static", "rt", "dl", "pthread"],  # static: nothing to find where there is no CUDA
    }
for stale in ROOT.glob("build/lib.*"):  # setuptools would pack modules that were deleted since
    shutil.rmtree(stale)
with_cuda = "no CUDA kernels"
if CUDA:
    with_cuda = " ".join([f"CUDA {CUDA[1]} from {CUDA[0]} for {os.environ['TORCH_CUDA_ARCH_LIST']}", *GENERATIONS])
print(f"ava_ext: building against torch {torch.__version__}, {with_cuda}", flush=True)


class Build(cpp_extension.BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        # `pip install -e .` gives a new temporary folder each time, so that ninja would find nothing to reuse
        kind = f"cuda{CUDA_VERSION}" if CUDA else "cpu"
        self.build_temp = str(ROOT / "build" / f"torch{torch.__version__}-{kind}")


# CppExtension on a CUDA torch too: CUDAExtension links libtorch_cuda, and such a library needs a CUDA torch to load
#
# -fno-trapping-math: without it GCC does not vectorise comparisons. NaN and inf keep their meaning, which -ffast-math
# would take away
extension = cpp_extension.CppExtension(
    "ava_ext._C",
    sources,
    py_limited_api=True,
    define_macros=[("AVA_CUDA_VERSION", f'"{CUDA_VERSION}"')],
    extra_compile_args={
        "cxx": ["-O3", "-g0", "-fno-trapping-math", "-fvisibility=hidden", "-Wall", "-Wextra"],
        "nvcc": nvcc_options(CUDA_VERSION) if CUDA else [],
    },
    # libtorch is what pulls in libtorch_cuda: it has to stay although no symbol comes from it directly. The linker of
    # macOS keeps every library, and does not know the option
    extra_link_args=["-Wl,--no-as-needed"] * (sys.platform != "darwin") + ["-ltorch"],
    **cuda_options,
)
setup(
    ext_modules=[extension],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
