"""The version, in its one place: pyproject.toml and `ava_ext.__version__` read it here."""

__version__ = "0.1.0"
