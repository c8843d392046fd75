"""The examples run, and print what they promise."""

import contextlib
import importlib
import importlib.util
import io
import re
import subprocess
import sys

import pytest
import torch
from support.ninja_library import ROOT
from support.processes import on_new_ranks
from tiny_models import forget_accelerate

SMALL = ["--vocab-size", "300", "--hidden-size", "32", "--tokens", "16", "--batch-size", "2", "--steps", "3"]


def printed(name, *arguments):
    """By the example's main(), given these arguments. Here: a process of its own takes seconds to import so much."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        example = importlib.import_module(name)
        patch.setattr(sys, "argv", [example.__file__, *arguments])
        example.main()
    return output.getvalue()


def needs(*names):
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def run_here(command, **options):
    """In the place of subprocess.run."""
    python, file, *arguments = command
    assert python == sys.executable and file == str(ROOT / "examples/trainer_fused_head.py")
    return subprocess.CompletedProcess(command, 0, printed("trainer_fused_head", *arguments))


@needs("transformers", "accelerate")
def test_trainer(monkeypatch):
    monkeypatch.setattr(subprocess, "run", run_here)
    found = printed("trainer_fused_head", *SMALL)
    for loss in ("built_in", "fused"):
        line = rf"^{loss}: \d+ ms per step \(\d+ ms of the processor\), peak memory \d+ MB$"
        assert re.search(line, found, re.MULTILINE)
    ratios = r"^built_in / fused: time [\d.]+, processor time [\d.]+, peak memory [\d.]+$"
    assert re.search(ratios, found, re.MULTILINE)
    assert "'cross_entropy'" in found


def trainer_on_rank(rank):
    forget_accelerate()
    return printed("trainer_fused_head", *SMALL, "--loss", "fused")


@needs("transformers", "accelerate")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_trainer_on_two_ranks():
    found = on_new_ranks(2, trainer_on_rank)
    assert [len(re.findall(r"^fused: ", of_rank, re.MULTILINE)) for of_rank in found] == [1, 0]


@needs("transformers", "lightning")
def test_lightning():
    values = dict(line.split() for line in printed("lightning_fused_head").splitlines() if len(line.split()) == 2)
    assert float(values["cross_entropy"]) < float(values["cross_entropy_epoch"]) < 6.0  # log 512 = 6.2 at first
    assert float(values["n_tokens_epoch"]) == 20 * 8 * 31
