"""`python -m ava_ext [info] [--json]` and `python -m ava_ext bench ...`; installed, they are called `ava-ext`."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> int:
    """Runs info, the default, or bench. Returns the exit status."""
    command, *rest = arguments = list(sys.argv[1:] if arguments is None else arguments) or ["info"]
    if command == "bench":
        from ava_ext.bench.__main__ import main as bench

        return bench(rest)
    if command in ("-h", "--help"):
        print("usage: ava-ext [info] [--json] [--no-check] | ava-ext bench --help")
        return 0
    from ava_ext.info import main as info

    return info(rest if command == "info" else arguments)


if __name__ == "__main__":
    sys.exit(main())
