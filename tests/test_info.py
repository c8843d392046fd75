"""`python -m ava_ext`: the report, its self-check, and the list of GPUs that a library has code for."""

import json
import re
import struct
from importlib import metadata
from pathlib import Path

import pytest
import torch
from support.new_python import run_python

import ava_ext
from ava_ext import info, self_check
from ava_ext.__main__ import main
from ava_ext._library import LIBRARY
from ava_ext.cuda_codes import cuda_codes

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def report():
    return info.collect()


def test_self_check_passes_and_is_close_to_its_bounds_only_where_rounding_is(report):
    checks = report["self_check"]["checks"]
    assert report["self_check"]["passes"] and len(checks) >= 6
    for check in checks:
        if check["dtype"] == "float32":
            assert check["gradient_error"] < check["gradient_bound"] / 10, check


@pytest.mark.parametrize("fault", ["value", "target", "others", "nan"])
def test_self_check_sees_a_fault(monkeypatch, fault):
    """Each of: a loss that is off by 1e-5, a gradient without its targets, without its other entries, or with nan."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, targets):
            ctx.save_for_backward(targets.clamp_min(0).unsqueeze(-1))
            return logits.clone()

        @staticmethod
        def backward(ctx, gradient):
            (targets,) = ctx.saved_tensors
            if fault == "target":
                gradient = gradient.scatter(-1, targets, 0.0)
            if fault == "others":
                gradient = torch.zeros_like(gradient).scatter(-1, targets, gradient.gather(-1, targets))
            if fault == "nan":
                gradient = gradient.scatter(-1, targets, float("nan"))
            return gradient, None

    class BrokenLoss(ava_ext.UnifiedLoss):
        def forward(self, logits, targets):
            loss = super().forward(Broken.apply(logits, targets), targets)
            return loss * (1 + 1e-5) if fault == "value" else loss

    assert self_check._check("cross-entropy", torch.float32, "cpu").passes
    monkeypatch.setattr(self_check, "UnifiedLoss", BrokenLoss)
    assert not self_check._check("cross-entropy", torch.float32, "cpu").passes


def test_a_fault_is_the_exit_status(monkeypatch, capsys):
    broken = self_check.Check("cross-entropy", "cpu", "float32", 1.0, float("nan"), 1e-6, 1e-5)
    monkeypatch.setattr(info, "self_check", lambda device: [broken])
    assert main(["info"]) == 1
    assert "SOMETHING FAILS" in capsys.readouterr().out
    assert main(["--no-check"]) == 0


def test_text_says_what_is_in_use_and_why(report):
    text = info.as_text(report)
    assert f"torch {torch.__version__}" in text and f"ava_ext {ava_ext.__version__}" in text
    assert re.search(r"in use +cpu: (portable|avx2|avx512) \(", text)
    assert f"threads     {torch.get_num_threads()} of torch" in text


def test_json_is_the_report_and_names_a_forced_instruction_set():
    program = "import runpy; runpy.run_module('ava_ext', run_name='__main__')"
    result = run_python(program, "--json", "--no-check", AVA_CPU_CAPABILITY="portable", PATH="")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["in_use"]["cpu"] == {"kernels": "portable", "reason": "AVA_CPU_CAPABILITY=portable asks for it"}
    assert report["environment"]["AVA_CPU_CAPABILITY"] == "portable"
    assert report["library"]["bytes"] == LIBRARY.stat().st_size


def test_cuda_codes_are_there_where_kernels_are(report):
    assert bool(report["library"]["cuda_codes"]) == (ava_ext.build_info()["cuda"][0] != "n")


def fat_binary(*codes):
    """As nvcc writes it: a header, then entries of (kind, architecture, code)."""
    entries = b""
    for kind, architecture, code in codes:
        header = struct.pack("<HHIQ", kind, 0x101, 64, len(code)) + bytes(12) + struct.pack("<I", architecture)
        entries += header.ljust(64, b"\0") + code
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


def test_cuda_codes_reads_every_fat_binary(tmp_path):
    library = tmp_path / "library.so"
    by_chance = struct.pack("<I", 0xBA55ED50) + b"\1\0\20\0" + b"\xff" * 8
    second = fat_binary((2, 80, b"y"), (2, 100, b"y"))
    first = fat_binary((2, 80, b"x" * 8), (2, 90, b"x" * 24), (1, 120, b"ptx"))
    library.write_bytes(b"ELF" + by_chance + first + b"padding" + second + by_chance[:6])
    assert cuda_codes(library) == ["sm_80", "sm_90", "sm_100", "compute_120"]
    library.write_bytes(b"no code")
    assert cuda_codes(library) == []


def test_version_is_in_one_place():
    assert 'version = {attr = "ava_ext._version.__version__"}' in (ROOT / "pyproject.toml").read_text()
    installed = metadata.distribution("ava_ext")
    if Path(str(installed.locate_file("ava_ext"))).resolve() == ROOT / "ava_ext":
        assert installed.version == ava_ext.__version__
    assert f"version: {ava_ext.__version__}\n" in (ROOT / "CITATION.cff").read_text()
