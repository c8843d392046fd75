"""`python -m ava_ext.bench`: what it says is what it measured, and its yardstick of errors is exact."""

import io
import json

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from ava_ext.bench import __main__ as bench
from ava_ext.bench.errors import errors, exact
from ava_ext.bench.report import print_table
from ava_ext.bench.variants import HIDDEN_STATES, LOGITS, Case, Size, Variant, peers

SIZE = Size(n_tokens=7, vocab_size=40, hidden_size=6, dtype="float64", device="cpu")


@pytest.mark.parametrize("problem", [LOGITS, HIDDEN_STATES])
def test_closed_form_is_autograd_in_float64(problem):
    case = Case(problem, SIZE)
    loss = bench.peers(problem, SIZE, with_compiled=False).variants["eager"]
    for actual, expected in zip(exact(case), loss.call(case), strict=True):
        torch.testing.assert_close(actual, expected.detach(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("problem", [LOGITS, HIDDEN_STATES])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_peer_computes_the_same_loss(problem, dtype):
    case = Case(problem, SIZE._replace(dtype=dtype))
    found, expected = peers(problem, case.size, with_compiled=False), exact(case)
    assert next(iter(found.variants)) == "ours" and "eager" in found.variants
    for name, variant in found.variants.items():
        assert max(errors(variant, case, expected).values()) < (1e-6 if dtype == "float32" else 0.02), name


def test_an_error_shows_where_it_is():
    """1 of 39 entries: a norm of the whole gradient would hide it behind that of the target."""

    def wrong(logits, targets):
        scale = torch.ones_like(logits).scatter(-1, targets.unsqueeze(-1), 2.0)
        return F.cross_entropy(logits * scale + (logits - logits * scale).detach(), targets)

    case = Case(LOGITS, SIZE)
    found = errors(Variant("wrong", wrong), case, exact(case))
    assert found["loss"] < 1e-12 and found["targets"] == pytest.approx(1.0) and found["others"] < 1e-12


def test_run_prints_a_table_and_writes_what_it_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(bench.memory, "is_available", lambda: False)  # each needs a process
    arguments = "--vocab-size 40 --hidden-size 6 --tokens 8 --dtype bfloat16 --device cpu --rounds 3 --no-compile"
    assert bench.main([*arguments.split(), "--output", str(tmp_path / "here")]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "here.json").read_text())
    assert [part["problem"] for part in result["results"]] == [LOGITS, HIDDEN_STATES]
    for part in result["results"]:
        assert {"ours", "eager"} <= set(part["variants"])
        for row in part["variants"].values():
            assert f"{row['median_ms']:.4g}" in printed and row["label"] in printed
            assert len(row["milliseconds"]) == 3
    assert (tmp_path / "here.png").read_bytes().startswith(b"\x89PNG")
    assert "liger" in printed  # absent or present, never silently left out


def test_no_number_is_cut_off_in_eighty_columns():
    row = {"median_ms": 1234.5, "quartiles_ms": (600.0, 1800.0), "time_over_ours": 16.42, "extra_bytes": 2345e6}
    errors = {name: 1.2e-05 for name in ("loss", "targets", "others", "weight")}
    ours = {**row, "label": "ava_ext.functional.linear_cross_entropy", "errors": errors}
    result = {"title": "", "variants": {"ours": ours}, "absent": {}, "error_names": list(errors), "error_note": ""}
    console = Console(width=80, file=io.StringIO())  # as a terminal, and a pipe
    print_table(result, console)
    printed = console.file.getvalue()
    assert all(number in printed for number in ("1234", "49%", "16.42", "2345")) and printed.count("1.2e-05") == 4


@pytest.mark.skipif(not bench.memory.is_available(), reason="the peak of a process's memory is Linux's to tell")
def test_memory_of_a_gradient_is_that_of_the_logits():
    size = Size(n_tokens=256, vocab_size=20000, hidden_size=None, dtype="float32", device="cpu")
    extra = bench._peak(LOGITS, "ours", size, None)
    assert extra == pytest.approx(256 * 20000 * 4, rel=0.1)


def test_a_variant_that_fails_is_absent_with_its_error():
    def fails(logits, targets):
        raise RuntimeError("no such kernel")

    found = peers(LOGITS, SIZE, with_compiled=False)
    found.variants["other"] = Variant("other", fails)
    measured = bench._errors(found, LOGITS, SIZE, lambda doing: None)
    assert "other" not in measured and found.absent["other"] == "other: RuntimeError: no such kernel"
