"""`python -m ava_ext`: versions, what the library was built with, what is in use here and why, a self-check."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ava_ext._library import CUDA_VERSION, LIBRARY, build_info
from ava_ext._version import __version__
from ava_ext.cuda_codes import cuda_codes
from ava_ext.self_check import self_check

# of the packages that the integrations and the benchmark use: what a report of a fault has to say
PACKAGES = (
    "transformers", "accelerate", "peft", "trl", "lightning", "triton", "liger-kernel", "cut-cross-entropy", "numpy",
)  # fmt: skip
INSTRUCTION_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16",
)  # fmt: skip
VARIABLES = ("AVA_CPU_CAPABILITY", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TORCH_LOGS")


def collect(check: bool = True) -> dict[str, Any]:
    """Everything that the report says, as JSON can hold it.

    Args:
        check: also run the self-check.

    Returns:
        versions, machine, library, in_use, threads, environment, and self_check if asked for.

    Example:
        >>> from ava_ext.info import collect
        >>> sorted(collect(check=False))
        ['environment', 'in_use', 'library', 'machine', 'threads', 'versions']
    """
    report: dict[str, Any] = {
        "versions": _versions(),
        "machine": _machine(),
        "library": _library(),
        "in_use": {"cpu": _cpu_in_use(), "cuda": _cuda_in_use()},
        "threads": {
            "torch": torch.get_num_threads(),
            "torch_interop": torch.get_num_interop_threads(),
            "cores_of_this_process": _cores(),
        },
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    if check:
        start = time.perf_counter()
        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        checks = [check for device in devices for check in self_check(device)]
        report["self_check"] = {
            "passes": all(check.passes for check in checks),
            "seconds": round(time.perf_counter() - start, 2),
            "checks": [{**check._asdict(), "passes": check.passes} for check in checks],
        }
    return report


def _versions() -> dict[str, str]:
    versions = {"ava_ext": __version__, "torch": torch.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)$", text, re.MULTILINE)
    available = set(flags[1].split()) if flags else set()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "architecture": platform.machine(),
        "cpu": model[1] if model else platform.processor(),
        "cpu_flags": [flag for flag in INSTRUCTION_FLAGS if flag in available],
        "gpus": [{"name": gpu.name, "code": f"sm_{gpu.major}{gpu.minor}", "bytes": gpu.total_memory} for gpu in gpus],
    }


def _library() -> dict[str, Any]:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return {
        "path": str(LIBRARY),
        "bytes": LIBRARY.stat().st_size,
        "interface": "LibTorch stable ABI (torch >= 2.10), no CPython ABI",
        "instruction_sets": ["portable", *(["avx2", "avx512", "avx512bf16"] if is_x86 else [])],
        "cuda_toolkit": CUDA_VERSION or None,
        "cuda_codes": cuda_codes(LIBRARY),
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_in_use() -> dict[str, str]:
    wish = os.environ.get("AVA_CPU_CAPABILITY")
    reason = f"AVA_CPU_CAPABILITY={wish} asks for it" if wish else "the best that this processor has"
    return {"kernels": build_info()["cpu"], "reason": reason}


def _cuda_in_use() -> dict[str, str]:
    """Kernels of a GPU, "none", or "PyTorch operators" where torch has a GPU and the library no kernels."""
    if not torch.cuda.is_available():
        built_for = "a CPU-only build of torch" if torch.version.cuda is None else "torch sees no GPU"
        return {"kernels": "none", "reason": built_for}
    if not CUDA_VERSION:
        return {"kernels": "PyTorch operators", "reason": "the library was built without nvcc: slower, the same values"}
    major, minor = torch.cuda.get_device_capability()
    codes = cuda_codes(LIBRARY)
    same = [code for code in codes if re.fullmatch(rf"sm_{major}\d+", code) and int(code[3:]) <= 10 * major + minor]
    if same:
        return {"kernels": same[-1], "reason": f"machine code for this GPU, {torch.cuda.get_device_name()}"}
    older = [code for code in codes if code.startswith("compute_") and int(code[8:]) <= 10 * major + minor]
    if older:
        return {"kernels": older[-1], "reason": "PTX, which the driver compiles at the first call"}
    return {"kernels": "none", "reason": f"the library has {codes}, this GPU is sm_{major}{minor}: calls will fail"}


def as_text(report: dict[str, Any]) -> str:
    """The report for a person."""
    library, machine, threads = report["library"], report["machine"], report["threads"]
    cuda = f"CUDA {library['cuda_toolkit']} for {', '.join(library['cuda_codes'])}"
    lines = [
        ("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
        ("machine", f"{machine['cpu']}, {machine['system']}"),
        *(("", f"{gpu['name']} ({gpu['code']}), {gpu['bytes'] / 2**30:.0f} GiB") for gpu in machine["gpus"]),
        ("library", f"{library['path']}, {library['bytes'] / 1e6:.1f} MB, {library['interface']}"),
        ("built with", f"instruction sets {', '.join(library['instruction_sets'])}"),
        ("", cuda if library["cuda_toolkit"] else "no CUDA kernels: built without nvcc"),
        *(
            ("in use" if device == "cpu" else "", f"{device}: {used['kernels']} ({used['reason']})")
            for device, used in report["in_use"].items()
        ),
        ("threads", f"{threads['torch']} of torch, on {threads['cores_of_this_process']} cores"),
        ("environment", ", ".join(f"{name}={value}" for name, value in report["environment"].items()) or "nothing set"),
    ]
    text = "".join(f"{title:12}{value}\n" for title, value in lines)
    if "self_check" not in report:
        return text
    result = report["self_check"]
    text += f"\n{'self-check':27}{'relative error of the loss':>28}{'of its gradients':>20}   against float64\n"
    for check in result["checks"]:
        name = f"{check['name']}, {check['dtype']}" + (f", {check['device']}" if check["device"] != "cpu" else "")
        verdict = "passes" if check["passes"] else "FAILS"
        bounds = f"{verdict} (allowed {check['value_bound']:.1e}, {check['gradient_bound']:.1e})"
        text += f"  {name:25}{check['value_error']:28.1e}{check['gradient_error']:20.1e}   {bounds}\n"
    outcome = "everything passes" if result["passes"] else "SOMETHING FAILS: please report it with --json"
    return text + f"  {outcome}, {result['seconds']:.1f} s\n"


def main(arguments: list[str] | None = None) -> int:
    """Prints the report. Returns 1 if the self-check fails, else 0."""
    parser = argparse.ArgumentParser("ava-ext info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="for programs, and for reports of faults")
    parser.add_argument("--no-check", action="store_true", help="without the self-check")
    options = parser.parse_args(arguments)
    report = collect(check=not options.no_check)
    sys.stdout.write(json.dumps(report, indent=2) + "\n" if options.json else as_text(report))
    return 0 if options.no_check or report["self_check"]["passes"] else 1
