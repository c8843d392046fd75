"""benchmarks/accuracy.py: the table of the page is that of the results, and ours is as accurate as it says."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import accuracy

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "accuracy.md"
TABLE = re.compile(r"<!-- accuracy -->\n(.*?)<!-- /accuracy -->", re.DOTALL)
RESULTS = json.loads(accuracy.RESULTS.read_text())


def test_table_of_the_page_is_that_of_the_results():
    assert TABLE.search(PAGE.read_text())[1] == "\n" + accuracy.table(RESULTS) + "\n"


@pytest.mark.parametrize("way", ["ava_ext", "ava_ext, linear"])
@pytest.mark.parametrize("dtype", accuracy.DTYPES)
def test_ours_stays_at_the_rounding_of_the_dtype(way, dtype):
    """At most 2^-24 gap from rounding z, and half a unit in the last place from rounding the gradient."""
    half_unit = torch.finfo(accuracy.DTYPES[dtype]).eps / 2
    found = accuracy.ways()[way]
    for gap in (-16, 0, 12, 20, 80):
        if dtype == "float16" and gap > 16:
            continue  # its smallest number is larger than the gradient
        errors = accuracy.errors(found, *accuracy.rows(gap, accuracy.DTYPES[dtype]))
        assert max(errors.values()) < 2 * half_unit + 1e-6 + abs(gap) * 2**-23, (gap, errors)


def test_table_shows_an_error_at_the_target_that_a_whole_norm_hides():
    logits, targets = accuracy.rows(-16, torch.float32)
    wrong = accuracy.exact_gradient(logits, targets)
    at_target = targets.unsqueeze(-1)
    others = wrong.scatter(-1, at_target, 0.0) * 2
    fake = type("Fake", (), {"gradient": lambda self, *_: others.scatter(-1, at_target, wrong.gather(-1, at_target))})()
    errors = accuracy.errors(fake, logits, targets)
    assert errors["target"] == 0 and errors["others"] == pytest.approx(1.0)


def test_results_are_of_every_way_and_gap():
    rows = RESULTS["errors"]
    assert {row["dtype"] for row in rows} == set(accuracy.DTYPES)
    assert {"ava_ext", "PyTorch eager", "PyTorch compiled", "ava_ext, linear"} <= {row["way"] for row in rows}
    for row in rows:
        assert set(row["gaps"]) == {str(gap) for gap in accuracy.GAPS}


if __name__ == "__main__":
    page = TABLE.sub(lambda _: f"<!-- accuracy -->\n\n{accuracy.table(RESULTS)}\n<!-- /accuracy -->", PAGE.read_text())
    PAGE.write_text(page)
