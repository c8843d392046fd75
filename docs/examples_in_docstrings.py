"""For `make docs`: griffe knows the heading "Examples", docstrings here have one "Example"."""

from __future__ import annotations

import re
from typing import Any

import griffe


class ExamplesInDocstrings(griffe.Extension):
    """Renames the heading, so that its lines are shown as the code that they are."""

    def on_instance(self, *, obj: griffe.Object, **others: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
