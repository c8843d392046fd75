"""The examples run, and print what they promise."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from support.ninja_library import ROOT


def run(name, *arguments, n_processes=1):
    command = [sys.executable]
    if n_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_processes)]
    result = subprocess.run(
        [*command, ROOT / "examples" / name, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # small models: more threads wait for each other
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def needs(*names):
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@needs("transformers", "accelerate")
@pytest.mark.slow
def test_trainer():
    small = ["--vocab-size", "300", "--hidden-size", "32", "--tokens", "16", "--batch-size", "2", "--steps", "3"]
    printed = run("trainer_fused_head.py", *small)
    for loss in ("built_in", "fused"):
        line = rf"^{loss}: \d+ ms per step \(\d+ ms of the processor\), peak memory \d+ MB$"
        assert re.search(line, printed, re.MULTILINE)
    ratios = r"^built_in / fused: time [\d.]+, processor time [\d.]+, peak memory [\d.]+$"
    assert re.search(ratios, printed, re.MULTILINE)
    assert "'cross_entropy'" in printed
    printed = run("trainer_fused_head.py", *small, "--loss", "fused", n_processes=2)
    assert len(re.findall(r"^fused: ", printed, re.MULTILINE)) == 1


@needs("transformers", "lightning")
def test_lightning():
    values = dict(line.split() for line in run("lightning_fused_head.py").splitlines() if len(line.split()) == 2)
    assert float(values["cross_entropy"]) < float(values["cross_entropy_epoch"]) < 6.0  # log 512 = 6.2 at first
    assert float(values["n_tokens_epoch"]) == 20 * 8 * 31
