"""Loads the compiled library and says what is in it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._compile import _disable_dynamo  # what torch.library.custom_op takes; torch.compiler.disable imports at once

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

_LIBRARY = torch.library.Library("ava_ext", "FRAGMENT")
CUDA_VERSION: str = torch.ops.ava_ext.cuda_version()  # "" in a library without CUDA kernels


def python_operator(function: Callable[..., Any]) -> str:
    """Makes a function an operator that changes nothing, on every device, of its name without the underscore.

    As torch.library.custom_op, whose first call imports torch._dynamo, which takes two seconds.

    Returns:
        The operator's name, for torch.library.register_fake and register_autograd.
    """
    name = function.__name__.lstrip("_")
    # in a process that compiles, the compiler stays outside of it
    untraced = _disable_dynamo(function)

    def kernel(*arguments: Any) -> Any:
        return (untraced if "torch._dynamo" in sys.modules else function)(*arguments)

    schema = torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    return f"ava_ext::{name}"


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
