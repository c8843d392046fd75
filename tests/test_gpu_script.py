"""benchmarks/gpu.sh in its dry form on the CPU: all that it starts runs, and what it compares is the same loss."""

import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import gpu
import gpu_check
import gpu_linear
import gpu_peers
import gpu_router
import gpu_rows
import gpu_timing
import linear
import pytest
import row_loss
import torch
import torch.nn.functional as F
from row_loss import Variant

from ava_ext.ops import linear_rows

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
YARDSTICKS = {"copy", *gpu_linear._YARDSTICKS, "ours_operator"}


def assert_same_values(variants, references, **tolerances):
    """Loss and gradients of every variant equal those of the one it is compared with."""
    for name, reference in references.items():
        values = []
        for variant in (name, reference):
            # the gradient may lie in memory that the next call writes
            values.append([value.detach().clone() for value in variants[variant].call()])
        torch.testing.assert_close(*values, **tolerances, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("n_sequences", [1, 2])
def test_variants_of_rows_agree(n_sequences):
    case = row_loss.Case(64, 131, torch.float64, CPU, n_sequences)
    variants, _ = gpu_rows.make_variants(case, is_whole=True, with_compiled=False)
    for variant in variants:
        variants[variant] = variants[variant]._replace(call=refilled(case, variants[variant].call))
    references = {name: gpu_rows.reference_of(name) for name in variants if name not in YARDSTICKS}
    assert {"ours", "ours_inplace", "ours_kernel", "terms_ours", "softcap_ours_inplace"} <= references.keys()
    assert_same_values(variants, references, rtol=1e-9, atol=1e-14)


def refilled(case, call):
    def refill_and_call():
        case.refill()
        return call()

    return refill_and_call


def test_variants_of_the_linear_layer_agree():
    case = linear.Case(40, 8, 70, torch.float64, CPU)
    variants, _ = gpu_linear.make_variants(case, with_compiled=False)
    references = {name: "eager" for name in variants if name not in YARDSTICKS}
    assert "ours" in references
    assert_same_values(variants, references, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("chunk_rows", [7, 40])
def test_products_follow_the_plan_of_the_layer(monkeypatch, chunk_rows):
    case = linear.Case(40, 8, 70, torch.float64, CPU)
    planned = []
    monkeypatch.setattr(linear_rows, "rows_of_a_chunk", lambda *plan: planned.append(plan) or chunk_rows)
    whole, own = gpu_linear._whole_products(case)(), gpu_linear._own_products(case)()
    torch.testing.assert_close(own, whole, rtol=1e-12, atol=0)
    assert len(planned) == 1


def test_variants_of_the_router_agree():
    case = gpu_router.Case(3, 50, 7, 2, torch.float64, CPU)
    variants, _ = gpu_router.make_variants(case, with_compiled=False)
    assert_same_values(variants, {"ours": "eager"}, rtol=1e-10, atol=1e-15)


def test_bytes_of_the_router():
    case = gpu_router.Case(3, 50, 8, 2, torch.bfloat16, CPU)
    assert case.bytes == 3 * 50 * (3 * 8 * 2 + 2 * 8)  # read, read, write in 2 bytes; choices in 8


def test_what_fails_or_differs_is_left_out_and_named():
    def fail():
        raise RuntimeError("first line\nsecond line")

    value = torch.tensor(2.0)
    outcome = gpu_timing.measure(
        {
            "eager": Variant("", lambda: (value, torch.ones(3))),
            "ours": Variant("", lambda: (value, torch.ones(3))),
            "broken": Variant("", fail),
            "other loss": Variant("", lambda: (value * 1.1, torch.ones(3))),
            "other gradient": Variant("", lambda: (value, torch.ones(3) * 0.9)),
            "nan": Variant("", lambda: (value * torch.nan, torch.ones(3))),
        },
        CPU,
        rounds=2,
        references={name: "eager" for name in ("ours", "other loss", "other gradient", "nan")},
    )
    assert set(outcome.times.milliseconds) == {"eager", "ours"}
    assert outcome.absent.pop("broken") == "RuntimeError: first line"
    assert set(outcome.absent) == {"other loss", "other gradient", "nan"}
    assert all(reason.startswith("wrong: ") for reason in outcome.absent.values())


def test_targets_compare_with_the_yardstick():
    times = gpu_timing.Times({"copy": [1.0], "ours": [1.25], "ours_kernel": [1.1], "terms_ours": [1.5], "liger": [2.5]})
    outcome = gpu_timing.Outcome(times, {}, {"ours": 2000, "ours_inplace": 500})
    size = {"n_rows": 8, "vocab_size": 9, "dtype": "bfloat16"}
    got = {verdict.name: (verdict.measured, verdict.is_met) for verdict in gpu_rows.verdicts(outcome, size, 1000)}
    at = "bfloat16 [8, 9]"
    assert got == {
        f"{at} ours: share of copy_'s speed": (0.8, False),
        f"{at} ours_kernel: share of copy_'s speed": (1 / 1.1, True),
        f"{at} every term: time over plain": (1.2, False),
        f"{at} faster than liger": (2.0, True),
        f"{at} ours: extra memory over the logits": (2.0, False),
        f"{at} ours_inplace: extra memory over the logits": (0.5, False),
    }


def test_peers_that_are_absent_are_named():
    variants, absent = gpu_rows.make_variants(row_loss.Case(8, 11, torch.float32), is_whole=True, with_compiled=False)
    assert set(gpu_rows.PEERS) <= absent.keys()  # none of them runs on the CPU
    assert not set(gpu_rows.PEERS) & variants.keys()
    assert gpu_peers.versions().keys() == set(gpu_peers.PACKAGES)


def test_a_failure_of_ours_is_a_failure_of_the_run(tmp_path, monkeypatch, capsys):
    def broken(*arguments, **options):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(gpu_router, "router_statistics", broken)
    assert gpu.main(["router", "--device", "cpu", "--quick", "--no-compile", "--out", str(tmp_path)]) == 1
    assert "ours_operator: RuntimeError: no kernel" in capsys.readouterr().out


def test_a_check_that_fails_is_named(monkeypatch, capsys):
    checks = [
        ("right", lambda: None),
        ("wrong", lambda: gpu_check.assert_close("loss", torch.ones(2), torch.zeros(2), 1)),
    ]
    monkeypatch.setattr(gpu_check, "checks", lambda device, is_small: checks)
    assert gpu_check.main(["--device", "cpu"]) == 1
    assert "FAILED wrong: AssertionError: loss: relative error 1.41" in capsys.readouterr().out


def test_small_entries_of_a_gradient_are_compared_by_themselves():
    gradient = torch.full((2, 5000), 1e-4, dtype=torch.float64)
    gradient[:, 7] = -1.0
    gpu_check.assert_gradient("gradient", gradient, gradient, 1e-9)
    without = gradient.where(gradient < 0, 0.0)  # 0.7% of the norm
    with pytest.raises(AssertionError, match="other entries"):
        gpu_check.assert_gradient("gradient", without, gradient, 0.01)


@pytest.fixture
def script(tmp_path):
    """Runs the script. Its Python, which finds every module, and compute-sanitizer are stand-ins: they say what they
    are called with."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def run(*options, cwd=ROOT, python='echo "python $*"', **changes):
        for name, line in {"python": python, "compute-sanitizer": 'echo "sanitizing $*, --kernel-name"'}.items():
            (folder / name).write_text(f"#!/bin/sh\n{line}\n")
            (folder / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHON": "python"}
        environment |= {"GPU_DEVICE": "cpu", "OUT": str(tmp_path), **changes}
        command = ["bash", "benchmarks/gpu.sh", *options]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)

    return run


def test_the_whole_script_runs_dry(script, tmp_path, capsys):
    """Every step but the build, which the tests run in the result of. What the script starts is called here."""
    script = script("--rounds", "6", "--vocab-size", "131", GPU_SECONDS="3000")  # the machine may be busy
    assert script.returncode == 0, script.stdout[-3000:] + script.stderr[-3000:]
    started = re.findall(r"^python benchmarks/(\w+)\.py (.*)$", script.stdout, re.MULTILINE)
    assert len(started) == 6
    for name, arguments in dict.fromkeys(started):  # on the CPU the full check is the small one
        assert {"gpu": gpu, "gpu_check": gpu_check}[name].main(arguments.split()) == 0
    assert capsys.readouterr().out.count(" 0 failed") == 1
    steps = ["build", "check", "rows", "check-full", "linear", "router", "sweep", "tests", "memcheck", "racecheck"]
    summary = script.stdout.split("results in")[1]
    assert [line.split(":")[0].strip() for line in summary.splitlines()[1:]] == [*steps, "synccheck"]
    for step in set(steps) - {"build", "tests"}:
        assert f"  {step}: passed" in summary
    assert "build: left out, there is a library" in summary
    assert "tests: left out, they need a GPU, pytest and hypothesis" in summary
    options = "--error-exitcode 9 --print-limit 20 --kernel-name kernel_substring=_ZN3ava"
    assert f"sanitizing --tool racecheck {options} python benchmarks/gpu_check.py" in script.stdout
    assert (tmp_path / "gpu.log").read_text() == script.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "gpu.log", "dry_run.json"}
    stored = json.loads((tmp_path / "dry_run.json").read_text())
    assert stored["dry_run"] is True
    for part in gpu.PARTS:  # each a run of its own; they add up
        assert part not in ("rows", "sweep") or {case["vocab_size"] for case in stored[part]} == {131}
        for case in stored[part]:
            assert case["is_complete"]
            assert {"ours"} < case["times"].keys() and case["targets"]
            assert not {name for name in case["not_measured"] if "ours" in name}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"GPU_STEPS": "rows bogus"},
            "GPU_STEPS: expected steps of build check rows check-full linear router sweep tests memcheck",
        ),
        ({"PYTHON": "no-such-python"}, "missing: no-such-python"),
        ({"GPU_SECONDS": "0", "GPU_STEPS": "rows"}, "rows: left out, the time is up"),
    ],
)
def test_the_script_says_what_is_wrong(script, changes, expected):
    assert expected in script(**changes).stdout


def test_a_run_that_is_cut_short_keeps_its_figures(tmp_path, monkeypatch):
    """The first rounds of a case are stored before the others run."""
    calls = []

    def cut_short(*arguments, **options):
        calls.append(options["rounds"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return interleave(*arguments, **options)

    interleave = gpu_timing.interleave
    monkeypatch.setattr(gpu_timing, "interleave", cut_short)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["router", "--device", "cpu", "--quick", "--no-compile", "--rounds", "9", "--out", str(tmp_path)])
    (case,) = json.loads((tmp_path / "dry_run.json").read_text())["router"]
    assert calls == [4, 5] and case["is_complete"] is False and case["times"]["ours"]


def lose(*arguments, **options):
    raise gpu_timing.DeviceLostError("the device is lost after ours: an illegal memory access")


def test_a_lost_device_ends_the_benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_timing, "require_device", lose)
    monkeypatch.setattr(gpu_router, "router_statistics", lose)
    options = ["--device", "cpu", "--quick", "--no-compile", "--out", str(tmp_path)]
    assert gpu.main(["router", "linear", *options]) == 1
    output = capsys.readouterr().out
    assert "FAILED router: the device is lost after ours" in output and "linear:" not in output


def test_a_lost_device_ends_the_check(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "checks", lambda device, is_small: [("one", lose), ("two", lose)])
    monkeypatch.setattr(gpu_check, "require_device", lose)
    assert gpu_check.main(["--device", "cpu"]) == 1
    output = capsys.readouterr().out
    assert "FAILED one" in output and "FAILED two" not in output and "1 checks, 1 failed" in output


def test_a_working_device_is_not_lost():
    gpu_timing.require_device(CPU, "nothing")


def test_the_bundle_is_found(script, tmp_path):
    """In a copy of the repository without a library: that of the bundle, and its packages. Programs run in Python."""
    copy = tmp_path / "copy"
    for name in ("ava_ext", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    bundle = copy / "build/gpu_bundle"
    (bundle / "packages").mkdir(parents=True)
    (copy / "ava_ext/_C.abi3.so").rename(bundle / "_C.abi3.so")
    # Python imports it when it starts, if the script has put the packages on its path
    report = "lambda: print(getattr(sys.modules.get('ava_ext'), '__file__', '-'))"
    (bundle / "packages/sitecustomize.py").write_text(f"import atexit, sys\natexit.register({report})\n")
    has_module = '[ "$2" = "import torch" ] || [ -f ava_ext/_C.abi3.so ]'
    python = f'if [ "$1" = -c ]; then {has_module}; else exec "{sys.executable}" "$@"; fi'
    script = script(cwd=copy, python=python, PYTHONPATH="", GPU_STEPS="build router")
    assert script.returncode == 0, script.stdout[-3000:]
    assert "the library of build/gpu_bundle" in script.stdout
    assert "build: left out, there is a library" in script.stdout
    assert f"{copy}/ava_ext/__init__.py" in script.stdout


def test_peers_are_called_as_they_want_to_be(monkeypatch):
    """Stand-ins with the signatures of the libraries, which need a GPU."""

    def liger(input, target, weight=None):
        return F.cross_entropy(input, target)

    def quack(x, target, lse_partial=None, weight=None, ignore_index=-100, reduction="mean", inplace_backward=False):
        return F.cross_entropy(x, target, ignore_index=ignore_index, reduction=reduction)

    def liger_linear(input, weight, target, bias=None, accum_dtype=None):
        return F.cross_entropy(F.linear(input, weight, bias), target)

    def cut(e, c, targets, filter_eps="high", impl="cce"):
        assert impl == "cce"
        return F.cross_entropy(F.linear(e, c), targets)

    of_liger = types.SimpleNamespace(liger_cross_entropy=liger, liger_fused_linear_cross_entropy=liger_linear)
    modules = {
        "liger_kernel.transformers.functional": of_liger,
        "quack.cross_entropy": types.SimpleNamespace(cross_entropy=quack),
        "cut_cross_entropy": types.SimpleNamespace(linear_cross_entropy=cut),
    }
    monkeypatch.setattr(gpu_peers, "import_module", modules.__getitem__)

    case = row_loss.Case(16, 31, torch.float64)
    peers, absent = gpu_peers.row_losses(case.targets, lambda loss: row_loss.forward_and_backward(case, loss))
    assert set(peers) == set(gpu_rows.PEERS) and not absent
    variants = peers | {"eager": row_loss.make_variants(case)["eager"]}
    assert_same_values(variants, dict.fromkeys(peers, "eager"), rtol=0, atol=0)

    case = linear.Case(16, 5, 31, torch.float64)
    peers, absent = gpu_peers.linear_losses(case.targets, lambda loss: linear.with_gradients(case, loss))
    assert set(peers) == {"liger", "liger_float32", "cut_cce", "cut_exact"} and not absent
    variants = peers | {"eager": linear.make_variants(case)["eager"]}
    assert_same_values(variants, dict.fromkeys(peers, "eager"), rtol=0, atol=0)
