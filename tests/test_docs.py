"""The pages of `make docs`: every public name, every section, every link; and the tests that the pages name exist."""

import functools
import importlib
import re
from pathlib import Path

import pages
import pytest

import ava_ext
from ava_ext import UnifiedLossConfig, functional, ops
from ava_ext.losses import __all__ as losses

ROOT = Path(__file__).resolve().parent.parent
GENERATED = pages.generated_pages()
NAV = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)


@functools.cache
def written():
    """{page: Markdown} of the files of docs/."""
    folder = ROOT / "docs"
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*.md")}
    return {page: pages.translated(path.read_text(), f"docs/{page}", page) for page, path in files.items()}


def test_every_page_is_in_the_navigation_once():
    assert sorted(NAV) == sorted({**GENERATED, **written()}), "a new or renamed section wants its line in mkdocs.yml"


def test_every_public_name_is_documented_once():
    documented = [name for names in pages.api_names().values() for name in names]
    assert len(documented) == len(set(documented))
    public = {f"ava_ext.{name}" for name in ava_ext.__all__ if name != "functional"}
    public |= {f"ava_ext.ops.{name}" for name in ops.__all__ if name not in ava_ext.__all__}
    public |= {f"ava_ext.functional.{name}" for name in ("cross_entropy", "linear_cross_entropy")}
    assert public <= set(documented)
    assert {f"ava_ext.{name}" for name in losses} <= set(documented) | {"ava_ext.METRICS"}
    for name in ("fuse_lm_head", "attach_loss", "UnifiedLossCallback"):
        assert f"ava_ext.integrations.transformers.{name}" in documented
    assert "ava_ext.distributed.FusedHead" in documented
    assert functional.__doc__


def test_every_documented_name_has_a_docstring():
    for page in ("losses", "functions"):
        for name in pages.api_names()[page]:
            module, _, own = name.rpartition(".")
            value = getattr(importlib.import_module(module), own)
            assert own == "METRICS" or value.__doc__, name


def test_every_option_is_on_its_page():
    for option in UnifiedLossConfig.__dataclass_fields__:
        assert f"| `{option}` |" in GENERATED["options.md"]


def test_sections_of_the_guide_are_whole():
    guide = (ROOT / "USAGE_GUIDE.md").read_text()
    assert guide.endswith("".join(pages.guide_sections().values()))
    for heading, text in pages.guide_sections().items():
        assert text.startswith(f"## {heading}\n")


def test_fences_say_python_alone_and_code_is_untouched():
    text = "[a](docs/recipes.md)\n```python no-run\nx = y[0](z)\n```\n[b](README.md#install)\n"
    assert pages.translated(text, "README.md", "guide/x.md") == (
        "[a](../recipes.md)\n```python\nx = y[0](z)\n```\n[b](../index.md#install)\n"
    )
    with pytest.raises(ValueError, match=r"expected a link to a file of the repository, got nowhere\.md"):
        pages.translated("[a](nowhere.md)", "README.md", "index.md")


@pytest.mark.parametrize("page", sorted({**GENERATED, **written()}))
def test_links_lead_to_pages_and_pictures_are_there(page):
    text = pages.FENCE.sub("", {**GENERATED, **written()}[page])
    for _, _, target in pages.LINK.findall(text):
        path = target.partition("#")[0]
        if path and not re.match(r"\w+:", path):
            goal = str((ROOT / "docs" / page).parent.joinpath(path).resolve().relative_to(ROOT / "docs"))
            assert goal in GENERATED or (ROOT / "docs" / goal).is_file(), f"{page}: {target}"


def test_tests_that_pages_name_exist():
    named = set()
    for text in written().values():
        named |= set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text))
    assert len(named) > 30
    for file, function in named:
        source = ROOT / file
        assert source.is_file(), file
        assert not function or re.search(rf"^def {function}\(", source.read_text(), re.MULTILINE), f"{file}::{function}"


def test_every_row_of_the_compatibility_table_names_a_test():
    for line in (ROOT / "docs" / "compatibility.md").read_text().splitlines():
        if line.startswith("| ") and not re.match(r"\| (---|\|)", line) and not line.startswith("| |"):
            assert "`tests/" in line, line
