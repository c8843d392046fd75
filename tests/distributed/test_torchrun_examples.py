"""The examples for torchrun: each ends, learns, and prints the losses of the others."""

import contextlib
import importlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.processes import on_ranks

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"


def under_torchrun(name):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, EXAMPLES / f"{name}.py"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def in_a_group(rank, name):
    """What the example does between the beginning and the end of its process group."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        importlib.import_module(name).run()
    return printed.getvalue()


def losses(printed):
    found = re.findall(r"^step (\d+): loss ([\d.]+), perplexity ([\d.]+)$", printed, re.MULTILINE)
    return torch.tensor([[float(number) for number in line] for line in found])


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_one_training_spread_in_different_ways():
    """One of them as its page says, which takes long; the others begin and end their group as it does."""
    expected = losses(under_torchrun("distributed_data_parallel"))
    assert expected.shape == (3, 3) and expected[:, 0].tolist() == [10, 20, 30]
    assert expected[2, 1] < 0.75 * expected[0, 1]
    for name in ("distributed_fully_sharded", "distributed_tensor_parallel", "distributed_pipeline"):
        source = (EXAMPLES / f"{name}.py").read_text()
        assert source.endswith('\n\nif __name__ == "__main__":\n    in_process_group(run)\n')
        found = losses(on_ranks(2, in_a_group, name)[0])
        # apart by roundings alone
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0, msg=lambda text, name=name: f"{name}: {text}")
