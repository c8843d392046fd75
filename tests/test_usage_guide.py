"""The documentation runs: every python block, what it prints, the contents, the table of options, that of errors.

`python tests/test_usage_guide.py` rewrites the contents of USAGE_GUIDE.md from its headings and the table of options
from UnifiedLossConfig.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import io
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.new_python import run_python

from ava_ext import ConsistencyLoss, FocalLoss, UnifiedLoss, UnifiedLossConfig, build_info
from ava_ext.ops import row_loss, row_options
from ava_ext.ops.repetition import repetition_candidates

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "USAGE_GUIDE.md"
PAGES = [ROOT / "README.md", GUIDE, *sorted((ROOT / "docs").rglob("*.md"))]
SHARED = "What the snippets share"  # the section of the guide that runs before each of its others
CONTENTS = re.compile(r"<!-- contents -->\n(.*?)<!-- /contents -->", re.DOTALL)
TABLE = re.compile(r"<!-- options -->\n(.*?)<!-- /options -->", re.DOTALL)
FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A python block of a page, and the text block right behind it: what it prints."""

    source: str
    line: int
    output: str | None
    may_lack_packages: bool


def sections(page):
    """{heading: blocks} of a page, in its order."""
    text = page.read_text()
    headings = [(match.start(), match[1]) for match in re.finditer(r"^##? (.+)$", FENCE.sub(_blank, text), re.M)]
    fences = list(FENCE.finditer(text))
    found = {heading: [] for _, heading in headings}
    for fence, following in zip(fences, [*fences, None][1:], strict=True):
        language, *marks = fence[1].split() or [""]
        if language != "python":
            continue
        is_output = following and following[1] == "text" and not text[fence.end() : following.start()].strip()
        heading = [name for start, name in headings if start < fence.start()][-1]
        line = text.count("\n", 0, fence.start()) + 1
        block = Block(fence[2], line, following[2] if is_output else None, marks == ["no-run"])
        found[heading].append(block)
    return {heading: blocks for heading, blocks in found.items() if blocks}


def _blank(fence):
    return re.sub(r"[^\n]", " ", fence[0])  # a comment in a block is no heading, and positions stay


def missing_packages(source):
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
    tops = {module.partition(".")[0] for module in modules}
    return sorted(top for top in tops if importlib.util.find_spec(top) is None)


def run(page, block, namespace):
    # lines of a traceback are those of the page
    code = compile("\n" * block.line + block.source, str(page), "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)
    return printed.getvalue()


CASES = [(page, heading) for page in PAGES for heading in sections(page)]


@pytest.mark.parametrize(("page", "heading"), CASES, ids=[f"{page.name}: {heading}" for page, heading in CASES])
def test_every_block_runs_and_prints_what_the_page_says(page, heading, monkeypatch, tmp_path):
    # the default backend compiles C++ for half a minute; what a graph can hold is the same
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.chdir(tmp_path)
    blocks = sections(page)
    namespace = {"__name__": "documentation"}
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for block in [*(blocks[SHARED] if page == GUIDE and heading != SHARED else ()), *blocks[heading]]:
            missing = missing_packages(block.source)
            if block.may_lack_packages and missing:
                continue
            assert not missing, f"{page.name}:{block.line} needs {missing}: mark it no-run"
            output = run(page, block, namespace)
            assert output == (block.output or ""), f"{page.name}:{block.line} prints\n{output}"
    finally:
        torch.set_num_threads(n_threads)


def anchor(heading):  # as GitHub makes it
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def headings(page):
    return re.findall(r"^## (.+)$", FENCE.sub(_blank, page.read_text()), re.M)


def contents():
    return "".join(f"- [{heading}](#{anchor(heading)})\n" for heading in headings(GUIDE))


def test_contents_are_the_headings():
    assert CONTENTS.search(GUIDE.read_text())[1] == contents(), "python tests/test_usage_guide.py writes them anew"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for file_name, section in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", FENCE.sub(_blank, page.read_text())):
        target = (page.parent / file_name).resolve() if file_name else page
        assert target.exists(), file_name
        assert not section or section in map(anchor, headings(target)), section


def option_table():
    lines = ["| option | default | what it is |", "| --- | --- | --- |"]
    for option in dataclasses.fields(UnifiedLossConfig):
        default = "required" if option.default is dataclasses.MISSING else f"`{option.default!r}`"
        lines.append(f"| `{option.name}` | {default} | {option.metadata['doc']} |")
    return "\n".join(lines) + "\n"


def test_table_of_options_is_that_of_the_configuration():
    assert TABLE.search(GUIDE.read_text())[1] == option_table(), "python tests/test_usage_guide.py writes it anew"


def _loss(**options):
    return UnifiedLoss(10, primary_loss_type="standard", **options)


LOGITS, TARGETS = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(0)), torch.ones(2, 5, dtype=torch.int64)


def _leaf():
    return LOGITS.clone().requires_grad_()


def _second_backward_in_place():
    loss = _loss(inplace_gradient=True)(_leaf() * 1, TARGETS)
    loss.backward(retain_graph=True)
    loss.backward()


def _double_backward():
    leaf = _leaf()
    (gradient,) = torch.autograd.grad(_loss()(leaf, TARGETS), leaf, create_graph=True)
    gradient.square().sum().backward()


def _router(**options):
    loss_fn = _loss(num_experts=4, **options)
    loss_fn(LOGITS, TARGETS, gate_logits=torch.zeros(10, 4))


# one for each line of the table of errors
MISTAKES = [
    lambda: UnifiedLoss(10, label_smooting=0.1),
    lambda: _loss(label_smoothing=1.5),
    lambda: setattr(_loss(), "label_smoothing", 0.1),
    lambda: FocalLoss(10, focal_gamma=3),
    lambda: _loss(reduction="none", use_auxiliary_loss=True),
    lambda: UnifiedLoss(10, initial_temperature=3.0),
    lambda: _loss()(LOGITS, TARGETS[:, 1:]),
    lambda: _loss()(LOGITS[..., :9], TARGETS),
    lambda: _loss()(LOGITS, TARGETS.float()),
    lambda: _loss()(LOGITS, LOGITS.softmax(-1)),
    lambda: _loss()(LOGITS, TARGETS * 10),
    lambda: _loss()(LOGITS, TARGETS, negative_ids=TARGETS[..., None] * 10),
    lambda: _loss()(None, TARGETS),
    lambda: _loss()(LOGITS, TARGETS, lm_head_weight=torch.zeros(10, 4)),
    lambda: _loss()(LOGITS, TARGETS, num_items_in_batch=torch.tensor(10.0, dtype=torch.bfloat16)),
    lambda: _loss(reduction="sum")(LOGITS, TARGETS, num_items_in_batch=10),
    lambda: _loss()(targets=TARGETS, hidden_states=LOGITS, lm_head_weight=torch.nn.Identity()),
    lambda: _loss(use_ngram_penalty=True)(LOGITS.flatten(0, 1), TARGETS.flatten()),
    lambda: _loss(use_mtp=True),
    lambda: _loss(num_experts=4, use_moe_balancing=True)(LOGITS, TARGETS),
    lambda: _router(use_moe_balancing=True),
    lambda: _loss(expert_bias_update="quantile"),
    lambda: _router(use_auxiliary_loss=True),
    lambda: _loss()(LOGITS, TARGETS, token_weights=torch.ones(2, 5, requires_grad=True)),
    lambda: _loss(inplace_gradient=True)(_leaf(), TARGETS),
    lambda: _loss(inplace_gradient=True)((_leaf() * 1)[:, :1].expand(2, 5, 10), TARGETS),
    _second_backward_in_place,
    _double_backward,
    lambda: row_loss(LOGITS, TARGETS, row_options(LOGITS).requires_grad_()),
    lambda: row_loss(LOGITS.long(), TARGETS, row_options(LOGITS)),
    lambda: ConsistencyLoss()(LOGITS, LOGITS[:1]),
    lambda: repetition_candidates(TARGETS[0], TARGETS[0], weights=torch.ones(4), vocab_size=10),
]


def test_table_of_errors_has_the_messages_that_mistakes_give():
    section = GUIDE.read_text().split("## Troubleshooting")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+): (.+?)` \|", section, re.M)
    assert len(rows) == len(MISTAKES)
    for (kind, pattern), mistake in zip(rows, MISTAKES, strict=True):
        with pytest.raises((ValueError, TypeError, IndexError, AttributeError, RuntimeError)) as raised:
            mistake()
        assert type(raised.value).__name__ == kind, pattern
        expression = ".*".join(map(re.escape, pattern.split("…")))
        assert re.search(expression, str(raised.value)), f"{pattern}\n{raised.value}"


def test_capability_of_the_page_on_environment_variables():
    assert build_info()["cpu"] in ("portable", "avx2", "avx512")
    in_sources = set()
    for path in [*ROOT.glob("ava_ext/**/*.py"), *ROOT.glob("csrc/**/*.cpp"), ROOT / "setup.py"]:
        in_sources |= set(re.findall(r"(?:getenv|environ\.get)\(\"(AVA_[A-Z_]*[A-Z])\"", path.read_text()))
    section = GUIDE.read_text().split("## Environment variables")[1].split("\n## ")[0]
    assert in_sources == set(re.findall(r"\bAVA_[A-Z_]*[A-Z]\b", section)) and in_sources


USES_THE_OPTION = """
import torch
from ava_ext import UnifiedLoss

def penalty(logits, temperature=None, **options):
    loss_fn = UnifiedLoss(10, entropy_floor_nats=3.0, entropy_floor_weight=0.5, **options)
    if temperature is not None:
        loss_fn.temperature.value.fill_(temperature)
    return loss_fn(logits, torch.ones(2, 6).long(), return_detailed=True)["entropy_floor_penalty"]

logits = torch.randn(2, 6, 10)
assert penalty(logits) > 0
torch.testing.assert_close(penalty(2 * logits, temperature=2.0), penalty(logits))
torch.testing.assert_close(penalty(2 * logits, initial_temperature=2.0, adaptive_temperature=False), penalty(logits))
torch.testing.assert_close(penalty(logits, logit_softcap=2.0), penalty(2 * torch.tanh(logits / 2)))
"""


def test_the_worked_example_becomes_an_option(tmp_path):
    page = ROOT / "docs" / "adding_a_loss.md"
    shutil.copytree(ROOT / "ava_ext", tmp_path / "ava_ext", ignore=shutil.ignore_patterns("__pycache__"))
    module = sections(page)["Worked example: an entropy floor"][0]
    (tmp_path / "ava_ext" / "losses" / "entropy_floor.py").write_text(module.source)
    (diff,) = (body for language, body in FENCE.findall(page.read_text()) if language == "diff")
    for hunk in re.split(r"^ # ", diff, flags=re.M)[1:]:
        file_name, *lines = hunk.splitlines()
        before, after = ([line[1:] for line in lines if line[0] in marks] for marks in (" ", " +"))
        source = (tmp_path / file_name).read_text()
        assert source.count("\n".join(before)) == 1, hunk
        (tmp_path / file_name).write_text(source.replace("\n".join(before), "\n".join(after)))
    result = run_python(USES_THE_OPTION, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_blocks_are_found_and_compared():
    assert len(CASES) > 25
    page = sections(GUIDE)[SHARED]
    assert page and not any(block.may_lack_packages for block in page)
    assert sum(block.output is not None for page, heading in CASES for block in sections(page)[heading]) > 5


if __name__ == "__main__":
    os.chdir(ROOT)
    text = CONTENTS.sub(lambda _: f"<!-- contents -->\n{contents()}<!-- /contents -->", GUIDE.read_text())
    GUIDE.write_text(TABLE.sub(lambda _: f"<!-- options -->\n{option_table()}<!-- /options -->", text))
    n_options = len(dataclasses.fields(UnifiedLossConfig))
    print(f"{GUIDE.name}: {len(headings(GUIDE))} headings and {n_options} options written", file=sys.stderr)
