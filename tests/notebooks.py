"""Loading what chapters define, for tests and benchmarks."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace

import nbformat

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9][0-9]-*.ipynb"))
OPENERS = sorted((ROOT / "book").glob("part-*.ipynb"))  # the openers of parts that compute something


@functools.cache
def load_definitions(chapter: str, *, exercises: bool = True) -> SimpleNamespace:
    """Run a chapter's cells tagged ``definition``, and its exercises' checks and solutions, without its experiments.

    Returns a namespace with everything that they define.
    """
    wanted = {"definition"} | ({"exercise-check", "solution"} if exercises else set())
    nb = nbformat.read(ROOT / "chapters" / f"{chapter}.ipynb", as_version=4)
    names: dict = {"__name__": f"chapter_{chapter[:2]}"}
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "code" and wanted & set(cell.metadata.get("tags", [])):
            exec(compile(cell.source, f"{chapter}[{i}]", "exec"), names)
    return SimpleNamespace(**names)
