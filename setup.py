"""Builds ava_ext/_C.abi3.so: one library for every CPython >= 3.10 and torch >= 2.10.

MAX_JOBS, CXX: as for every torch extension.
"""

import os
import shutil
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

for stale in ROOT.glob("build/lib.*"):  # setuptools would pack modules that were deleted since
    shutil.rmtree(stale)
print(f"ava_ext: building against torch {torch.__version__}", flush=True)


class Build(cpp_extension.BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        # `pip install -e .` gives a new temporary folder each time, so that ninja would find nothing to reuse
        self.build_temp = str(ROOT / "build" / f"torch{torch.__version__}")


# CppExtension on a CUDA torch too: CUDAExtension links libtorch_cuda, and such a library needs a CUDA torch to load
#
# -fno-trapping-math: without it GCC does not vectorise comparisons. NaN and inf keep their meaning, which -ffast-math
# would take away
extension = cpp_extension.CppExtension(
    "ava_ext._C",
    (ROOT / "csrc/sources.txt").read_text().split(),
    py_limited_api=True,
    extra_compile_args={"cxx": ["-O3", "-g0", "-fno-trapping-math", "-fvisibility=hidden", "-Wall", "-Wextra"]},
)
setup(
    ext_modules=[extension],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
