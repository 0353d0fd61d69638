"""What is measured: one module per kernel, each with its shapes, its peers, and the launches of its Triton kernels."""

import importlib
import pkgutil
from types import ModuleType


def modules() -> dict[str, ModuleType]:
    """All modules of this folder, by the name of their kernel."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}
