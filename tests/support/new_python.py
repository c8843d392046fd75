"""Programs in a Python of their own, in which nothing has imported ava_ext yet.

It is forked from a process that has imported torch and nothing else: that takes longer than most programs do.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch"])


def run_python(program: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `python -c program arguments` does in this folder, with these variables beside those of this process."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / "stdout", Path(folder) / "stderr"]
        process = _context.Process(target=_run, args=(program, arguments, cwd, os.environ | environment, outputs))
        process.start()
        process.join()
        return subprocess.CompletedProcess(program, process.exitcode, *(path.read_text() for path in outputs))


def run_pytest(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    return run_python(program, "-q", "-n0", "-p", "no:cacheprovider", *arguments, **environment)


def _run(program, arguments, cwd, environment, outputs):
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path.insert(0, str(cwd))
    sys.argv = ["-c", *arguments]
    exec(program, {"__name__": "__main__"})
