"""`python -m seqarch.publishing execute|record|classroom [chapters]`: what the Makefile calls."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from . import notebooks


def main() -> int:
    """Run one command over the named chapters (numbers such as 04, or paths), or over all of them (execute: and openers)."""
    parser = argparse.ArgumentParser(prog="python -m seqarch.publishing", description=main.__doc__)
    parser.add_argument("command", choices=["execute", "record", "classroom"])
    parser.add_argument("chapters", nargs="*", help="numbers (04) or paths; none: every chapter")
    parser.add_argument("--output", type=Path, default=Path("_build/classroom"), help="where classroom copies go")
    arguments = parser.parse_args()
    root = Path.cwd()
    openers = sorted((root / "book").glob("part-*.ipynb")) if arguments.command == "execute" else []
    for path in _find(arguments.chapters, root) + ([] if arguments.chapters else openers):
        started = time.perf_counter()
        if arguments.command == "execute":
            notebooks.execute(path, root)
        elif arguments.command == "record":
            notebooks.record(path, root)
        else:
            notebooks.classroom(path, arguments.output / path.name)
        print(f"{arguments.command} {path.name}: {time.perf_counter() - started:.0f} s")
    return 0


def _find(wanted: list[str], root: Path) -> list[Path]:
    every = sorted((root / "chapters").glob("[0-9][0-9]-*.ipynb"))
    if not wanted:
        return every
    found = []
    for name in wanted:
        matches = [p for p in every if p.name.startswith(f"{name}-")] or [p for p in [Path(name)] if p.exists()]
        if not matches:
            sys.exit(f"expected a chapter among {', '.join(p.name for p in every)}, got {name}")
        found += matches
    return found


if __name__ == "__main__":
    sys.exit(main())
