"""The pages of `make docs` that are not files of docs/: mkdocs calls on_files and on_page_markdown.

Every text has one source. USAGE_GUIDE.md is cut into a page for each section; README.md, CHANGELOG.md, CONTRIBUTING.md
and benchmarks/README.md become pages as they are; the options come from UnifiedLossConfig, and the API from the lists
of public names. Links between files of the repository become links between pages.
"""

from __future__ import annotations

import dataclasses
import importlib
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# files of the repository that are pages; those in docs/ keep their names
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
}
GUIDE = "USAGE_GUIDE.md"
FENCE = re.compile(r"^(```+).*?^\1$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]\\]|\\.)*)\]\(([^()\s]*)\)")
# left out of the guide's pages: a page of its own says more
NO_PAGE = ("All options",)

# the pages of the API, each with the names that it documents
FUNCTIONS = "functions"
LOSSES = "losses"
DISTRIBUTED = ("ava_ext.distributed",)
INTEGRATIONS = ("ava_ext.integrations.transformers", "ava_ext.integrations.lightning")


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def guide_sections() -> dict[str, str]:
    """{heading: Markdown} of the guide's sections."""
    text = (ROOT / GUIDE).read_text()
    blank = FENCE.sub(lambda fence: re.sub(r"[^\n]", " ", fence[0]), text)  # a comment in code is no heading
    starts = [(match.start(), match[1]) for match in re.finditer(r"^## (.+)$", blank, re.MULTILINE)]
    ends = [start for start, _ in starts[1:]] + [len(text)]
    return {heading: text[start:end] for (start, heading), end in zip(starts, ends, strict=True)}


def translated(text: str, source: str, page: str) -> str:
    """Markdown of a file of the repository as that of a page: its links, and fences that mkdocs knows."""
    anchors = {anchor(heading): heading for heading in guide_sections()}

    def link(match: re.Match[str]) -> str:
        picture, label, target = match.groups()
        if re.match(r"\w+:", target):
            return match[0]
        path, _, fragment = target.partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path)) if path else source
        if file == GUIDE and fragment in anchors:
            goal, fragment = (f"guide/{fragment}.md" if anchors[fragment] not in NO_PAGE else "options.md"), ""
        elif file == GUIDE:
            goal = "guide/which-function-do-i-want.md"
        elif file in PAGES:
            goal = PAGES[file]
        elif file.startswith("docs/"):
            goal = file.removeprefix("docs/")
        elif (ROOT / file).exists():
            return label if "`" in label or label == file else f"{label} (`{file}`)"  # a source: it has no page
        else:
            raise ValueError(f"{source}: expected a link to a file of the repository, got {target}")
        goal = posixpath.relpath(goal, posixpath.dirname(page) or ".")
        return f"{picture}[{label}]({goal}{'#' + fragment if fragment else ''})"

    pieces, place = [], 0
    for fence in FENCE.finditer(text):
        pieces += [
            LINK.sub(link, text[place : fence.start()]),
            re.sub(r"^(```+\w+) no-run$", r"\1", fence[0], flags=re.M),
        ]
        place = fence.end()
    return "".join(pieces) + LINK.sub(link, text[place:])


def options_page() -> str:
    """Every option with its default, its range and what it is."""
    from ava_ext import UnifiedLossConfig

    lines = [
        "# Options\n",
        "`vocab_size` and `hidden_size` are the first two positional arguments of `UnifiedLoss`, all others keywords.",
        "Every option can be read as an attribute of the loss, and stored with `loss_fn.config.to_json()`.\n",
        "| option | default | values | what it is |\n| --- | --- | --- | --- |",
    ]
    for option in dataclasses.fields(UnifiedLossConfig):
        default = "required" if option.default is dataclasses.MISSING else f"`{option.default!r}`"
        values = option.metadata["values"].expected + (" or None" if option.default is None else "")
        cells = (f"`{option.name}`", default, values, option.metadata["doc"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def api_names() -> dict[str, list[str]]:
    """{page of the API: full names}: every public name once."""
    import ava_ext
    from ava_ext import losses, ops

    classes = [f"ava_ext.{name}" for name in ava_ext.__all__ if name in losses.__all__ or name == "UnifiedLossConfig"]
    others = [
        f"ava_ext.{name}" for name in ava_ext.__all__ if f"ava_ext.{name}" not in classes and name != "functional"
    ]
    functions = [*others, "ava_ext.functional.cross_entropy", "ava_ext.functional.linear_cross_entropy"]
    functions += [f"ava_ext.ops.{name}" for name in ops.__all__ if name not in ava_ext.__all__]
    pages = {LOSSES: classes, FUNCTIONS: functions}
    pages["distributed"] = [f"{module}.{name}" for module in DISTRIBUTED for name in public_names(module)]
    pages["integrations"] = [f"{module}.{name}" for module in INTEGRATIONS for name in public_names(module)]
    return pages


def public_names(module: str) -> list[str]:
    """__all__, read from the source: the integrations need packages that may not be here."""
    file = ROOT / Path(*module.split("."))
    text = (file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text()
    listed = re.search(r"^__all__ = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    return re.findall(r'"(\w+)"', listed[1]) if listed else []


def defined_in(name: str) -> str:
    """The name where it is defined: griffe reads sources, and follows no import that it cannot see."""
    module, _, own = name.rpartition(".")
    if module.startswith("ava_ext.integrations"):
        return name
    value = getattr(importlib.import_module(module), own)
    home = getattr(value, "__module__", module)
    return f"{home}.{own}" if home.startswith("ava_ext") and hasattr(value, "__qualname__") else name


def api_page(title: str, names: list[str]) -> str:
    lines = [f"# {title}\n"]
    for name in names:
        members = "[forward, step]" if name == "ava_ext.UnifiedLoss" else "false"
        if name == "ava_ext.METRICS":
            lines += ["## METRICS", "", f"`{name}`: which entries of a detailed loss are metrics, not addends.", ""]
            continue
        lines += [f"::: {defined_in(name)}", "    options:", f"      members: {members}", ""]
    return "\n".join(lines)


def api_index() -> str:
    lines = ["# API\n", "Every public name. The names of `ava_ext` can be imported from the package itself.\n"]
    for page, names in api_names().items():
        lines += [f"## [{page.capitalize()}]({page}.md)\n"]
        lines += [f"* [`{name}`][{defined_in(name)}]" if name != "ava_ext.METRICS" else f"* `{name}`" for name in names]
        lines.append("")
    return "\n".join(lines)


def benchmarks_page() -> str:
    text = translated((ROOT / "benchmarks/README.md").read_text(), "benchmarks/README.md", "benchmarks.md")
    heading, _, rest = text.partition("\n")
    figures = (
        "\n![How many times faster than PyTorch, by dtype](figures/rows.svg)\n\n"
        "![Extra memory of one loss and its gradient](figures/memory.svg)\n\n"
        "![Balancing losses of a router](figures/router.svg)\n\n"
        "`make docs` draws these from `benchmarks/results/amd_epyc.json`, "
        "which `make bench` wrote on 2 cores with AVX-512.\n"
    )
    return f"{heading}\n{figures}{rest}"


def generated_pages() -> dict[str, str]:
    """{page: Markdown} of everything that is not in docs/."""
    pages = {page: translated((ROOT / source).read_text(), source, page) for source, page in PAGES.items()}
    pages["benchmarks.md"] = benchmarks_page()
    for heading, text in guide_sections().items():
        if heading not in NO_PAGE:
            page = f"guide/{anchor(heading)}.md"
            # a section becomes a page: one level up
            pages[page] = translated(re.sub(r"^##(#*) ", r"#\1 ", text, flags=re.MULTILINE), GUIDE, page)
    pages["options.md"] = options_page()
    pages["api/index.md"] = api_index()
    for name, names in api_names().items():
        pages[f"api/{name}.md"] = api_page(name.capitalize(), names)
    return pages


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for page, text in generated_pages().items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Pages of docs/ as they are on GitHub, with links to the other files of the repository."""
    uri = page.file.src_uri
    return markdown if page.file.generated_by else translated(markdown, f"docs/{uri}", uri)
