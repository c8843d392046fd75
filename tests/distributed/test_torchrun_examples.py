"""The examples under torchrun: each ends, learns, and prints the losses of the others."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = ["data_parallel", "fully_sharded", "tensor_parallel", "pipeline"]

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


@functools.cache
def losses(name):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, ROOT / f"examples/distributed_{name}.py"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = re.findall(r"^step (\d+): loss ([\d.]+), perplexity ([\d.]+)$", result.stdout, re.MULTILINE)
    return torch.tensor([[float(number) for number in line] for line in found])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_example(name):
    found = losses(name)
    assert found.shape == (3, 3) and found[:, 0].tolist() == [10, 20, 30]
    assert found[2, 1] < 0.75 * found[0, 1]
    # one training, spread in different ways: apart by roundings alone
    torch.testing.assert_close(found, losses(NAMES[0]), rtol=1e-4, atol=0)
