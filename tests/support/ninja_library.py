"""Shared libraries that only tests use, compiled below build/ when a source or a header of theirs has changed."""

import fcntl
import os
import shlex
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def build_library(
    name: str,  # of the library, and of its folder below build/
    suffix: str,
    sources: dict[str, list[str]],  # path below the root of the project: flags of its own
    compile_flags: list[str],
    link_flags: list[str] = (),
) -> Path:
    """Compiles with $CXX and ninja; a compiler's error fails the test that asks."""
    folder = ROOT / "build" / name
    library = folder / f"{name}{suffix}"
    flags = ["-std=c++20", "-fno-trapping-math", "-fvisibility=hidden", "-Wall", "-Wextra", "-fPIC", *compile_flags]
    compiler = os.environ.get("CXX", "c++")
    lines = [
        f"rule compile\n  command = {compiler} {shlex.join(flags)} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {compiler} -shared $in {shlex.join(link_flags)} -o $out",
    ]
    objects = []
    for source, own_flags in sources.items():
        objects.append(source.replace("/", ".") + ".o")
        # relative paths: those of a clone may hold spaces
        lines.append(f"build {objects[-1]}: compile ../../{source}\n  flags = {shlex.join(own_flags)}")
    lines.append(f"build {library.name}: link {' '.join(objects)}")
    result = run_ninja(folder, lines)
    if result.returncode != 0:
        pytest.fail(result.stdout, pytrace=False)
    return library


def run_ninja(folder: Path, lines: list[str], targets: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Writes these lines as build.ninja into the folder and builds the targets, or all."""
    folder.mkdir(parents=True, exist_ok=True)
    # the ninja of this Python's environment, also where that is not activated
    environment = {**os.environ, "PATH": sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]}
    with (folder / "lock").open("w") as lock:  # the workers of pytest-xdist come at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        return subprocess.run(["ninja", *targets], cwd=folder, env=environment, capture_output=True, text=True)
