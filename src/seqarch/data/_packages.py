"""Data come from installed packages, so nothing is downloaded at run time; a missing one is named with its cure."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingDataPackage(ImportError):
    """A package that carries a data set is not installed."""


def require(module: str, package: str) -> ModuleType:
    """Import `module`; raise MissingDataPackage with the pip line of `package` if it is not there."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as problem:
        raise MissingDataPackage(
            f"expected the package {package}, got none installed: pip install {package} (or pip install 'seqarch[data]')"
        ) from problem
