"""Executing, normalising, stamping and recording chapters: what is stored is what anyone gets who runs them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from ..claims import CLAIM_MIME

KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
BAR = re.compile(r"\d+%\|.*\|\s*\d+/\d+|\d+it \[|\d+/\d+ \[")
WIDGETS = "application/vnd.jupyter.widget-view+json"

SETUP = """\
# Setup: on Colab or Kaggle this installs the book's package; where it is installed already, it does nothing.
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("seqarch") is None:
    home = "git+{repository}"
    source = os.environ.get("SEQARCH_SOURCE", home)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"seqarch[data] @ {{source}}"], check=True)
    importlib.invalidate_caches()"""


class ChapterError(RuntimeError):
    """A chapter that cannot be executed or stored as it is."""


def repository_url(root: Path) -> str:
    """Return the one repository URL of the project, from _config.yml."""
    import yaml

    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
    return config["repository"]["url"].rstrip("/")


def digest(nb: NotebookNode) -> str:
    """Return a digest of all code cells but the stamped one: stored beside outputs, it shows which code made them."""
    sources = [c.source.rstrip() for c in nb.cells if c.cell_type == "code" and "setup" not in tags(c)]
    return hashlib.sha256("\x00".join(sources).encode()).hexdigest()


def tags(cell: NotebookNode) -> set[str]:
    """Return a cell's tags."""
    return set(cell.metadata.get("tags", []))


def stamp(nb: NotebookNode, name: str, repository: str) -> None:
    """Write the setup cell and the Colab badge, which depend on the repository URL, into `name`, a path in the repository."""
    branch_path = f"{repository.removeprefix('https://github.com/')}/blob/main/{name}"
    badge = f"[![Open in Colab](../book/_static/colab.svg)](https://colab.research.google.com/github/{branch_path})"
    stamped = {"setup": False, "badge": False}
    for cell in nb.cells:
        if "setup" in tags(cell):
            cell.source = SETUP.format(repository=repository)
            cell.metadata["tags"] = sorted(tags(cell) | {"hide-cell"})
            stamped["setup"] = True
        elif cell.cell_type == "markdown" and not stamped["badge"]:
            cell.source, n = re.subn(r"(?m)^(<!-- colab -->|\[!\[Open in Colab\]\(.*)$", badge, cell.source, count=1)
            stamped["badge"] = n > 0
    missing = [k for k, done in stamped.items() if not done]
    if missing:
        raise ChapterError(
            f"{name}: expected a cell tagged setup and a line <!-- colab -->, got no place for {missing}"
        )


def normalise(nb: NotebookNode) -> None:
    """Remove from an executed notebook what differs between runs and machines."""
    nb.metadata = NotebookNode(
        kernelspec=KERNELSPEC, language_info={"name": "python"}, seqarch={"source_digest": digest(nb)}
    )
    nb.nbformat, nb.nbformat_minor = 4, 5
    count = 0
    for cell in nb.cells:
        kept = sorted(tags(cell))
        cell.metadata = NotebookNode({"tags": kept} if kept else {})
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = _merge_streams([o for o in cell.outputs if not _is_bar(o)])
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if "metadata" in output:
                output.metadata = NotebookNode({})
            if output.output_type == "stream":
                output.text = ANSI.sub("", output.text)
            if WIDGETS in output.get("data", {}):
                raise ChapterError(f"cell {count}: stored outputs may not hold live widgets, which are dead on a page")


def _is_bar(output: NotebookNode) -> bool:
    """Whether an output is a tqdm progress bar, as a widget or as text on stderr."""
    text = output.get("data", {}).get("text/plain", "") if WIDGETS in output.get("data", {}) else ""
    text = output.text if output.get("name") == "stderr" else text
    return bool(BAR.search(text)) and all(BAR.search(line) or not line.strip() for line in re.split(r"[\r\n]", text))


def _merge_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    merged: list[NotebookNode] = []
    for output in outputs:
        last = merged[-1] if merged else None
        if output.output_type == "stream" and last is not None and last.get("name") == output.name:
            last.text += output.text
        else:
            merged.append(output)
    return merged


def run(nb: NotebookNode, folder: Path, timeout: int) -> None:
    """Execute all cells in a fresh kernel that starts in `folder`, as the book stores them: no bars, no live widgets."""
    environment = {"SEQARCH_EXPLORE": "stored", "TQDM_DISABLE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    before = {k: os.environ.get(k) for k in environment}
    os.environ.update(environment)
    try:
        NotebookClient(
            nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        ).execute()
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key)
            else:
                os.environ[key] = value


def execute(path: Path, root: Path, timeout: int = 900) -> None:
    """Stamp, run and normalise one chapter in place. The file is replaced whole, and only after every cell ran."""
    nb = nbformat.read(path, as_version=4)
    stamp(nb, path.resolve().relative_to(root.resolve()).as_posix(), repository_url(root))
    run(nb, path.parent, timeout)
    normalise(nb)
    write(path, nbformat.writes(nb) + "\n")


def record(path: Path, root: Path, timeout: int = 3600) -> Path:
    """Run a chapter at full scale and store its claims in chapters/recorded; the notebook itself is left alone."""
    import torch

    import seqarch

    nb = nbformat.read(path, as_version=4)
    parameters = [c for c in nb.cells if "parameters" in tags(c)]
    if not parameters:
        raise ChapterError(f"{path.name}: expected a cell tagged parameters, got none")
    parameters[0].source = re.sub(r'scale\s*=\s*"quick"', 'scale = "full"', parameters[0].source)
    run(nb, path.parent, timeout)
    claims = [o.data[CLAIM_MIME] for c in nb.cells for o in c.get("outputs", []) if CLAIM_MIME in o.get("data", {})]
    seeds = re.findall(r"seqarch\.setup\(seed=(\d+)\)", "\n".join(c.source for c in nb.cells))
    content = {
        "chapter": path.stem,
        "scale": "full",
        "seed": int(seeds[0]) if seeds else 0,
        "version": seqarch.__version__,
        "source_digest": digest(nb),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "date": date.today().isoformat(),
        "claims": claims,
    }
    target = path.parent / "recorded" / f"{path.stem}.json"
    write(target, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return target


def classroom(path: Path, target: Path) -> None:
    """Write a copy for a class: the solutions are gone, and so are all outputs; the checks stay."""
    nb = nbformat.read(path, as_version=4)
    nb.cells = [c for c in nb.cells if "solution" not in tags(c)]
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nb.metadata.pop("seqarch", None)
    write(target, nbformat.writes(nb) + "\n")


def claims_of(path: Path) -> list[dict[str, Any]]:
    """Return every claim in a chapter's stored outputs, in order."""
    nb = nbformat.read(path, as_version=4)
    return [o.data[CLAIM_MIME] for c in nb.cells for o in c.get("outputs", []) if CLAIM_MIME in o.get("data", {})]


def title_of(path: Path) -> str:
    """Return the text of a chapter's first heading."""
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        found = re.search(r"(?m)^# (.+)$", cell.source) if cell.cell_type == "markdown" else None
        if found:
            return found.group(1).strip()
    raise ChapterError(f"{path.name}: expected a heading, got none")


def write(path: Path, text: str) -> None:
    """Write a file beside its place and move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
