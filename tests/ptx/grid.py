"""Which cases run: all with PTX_FULL, else some."""

import os
from collections.abc import Sequence

IS_FULL = bool(os.environ.get("PTX_FULL"))


def of_grid(cases: Sequence, every: int) -> list:
    """The whole grid, or in short every so-manieth case."""
    return list(cases) if IS_FULL else list(cases)[::every]
