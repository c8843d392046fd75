"""Loads the compiled library and says what is in it."""

from pathlib import Path

import torch

_FOLDER = Path(__file__).resolve().parent
LIBRARY = _FOLDER / "_C.abi3.so"

if not LIBRARY.exists():
    message = f"ava_ext: no compiled library in {_FOLDER}."
    if (_FOLDER.parent / "setup.py").exists():
        message += (
            " This is the source tree: it hides an installed ava_ext whenever Python starts here."
            " Build in place with `pip install --no-build-isolation -e .`, or start Python in another folder."
        )
    raise ImportError(message)
torch.ops.load_library(LIBRARY)

CUDA_VERSION: str = torch.ops.ava_ext.cuda_version()  # "" in a library without CUDA kernels


def build_info() -> dict[str, str]:
    """What this build runs with here.

    Returns:
        cpu: "portable", "avx2" or "avx512" (set AVA_CPU_CAPABILITY before the first use to force one);
        cuda: the version of the CUDA toolkit that compiled the CUDA kernels, or "none: ..." if the library has none.

    Example:
        >>> build_info()  # for example {'cpu': 'avx512', 'cuda': '13.0'}
        {'cpu': '...', 'cuda': '...'}
    """
    return {"cpu": torch.ops.ava_ext.cpu_capability(), "cuda": CUDA_VERSION or "none: built without nvcc"}


def empty_cache() -> int:
    """Frees the memory that is kept for the next large gradient on the CPU, as torch.cuda.empty_cache() on a GPU.

    A gradient of 1 MiB or more leaves its memory to the next one of about that size. At most two blocks are idle, none
    of them longer than 32 further gradients. Call this where no such gradient follows, such as after training. On other
    devices, gradients take torch's own memory.

    Returns:
        How many bytes were freed.

    Example:
        >>> n_bytes = empty_cache()
        >>> empty_cache()
        0
    """
    return int(torch.ops.ava_ext.empty_cache())
