"""What holds for every chapter: its anatomy, and that its stored outputs come from its stored code."""

import ast
import json
import re

import nbformat
import pytest

from seqarch.claims import CLAIM_MIME
from seqarch.figures import PLOTLY_MIME
from seqarch.publishing import notebooks

from ..notebooks import CHAPTERS, OPENERS, ROOT

LIMIT_BYTES = 1_500_000
chapters = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
notebooks_of_the_book = pytest.mark.parametrize("path", CHAPTERS + OPENERS, ids=lambda p: p.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code(nb):
    return [c for c in nb.cells if c.cell_type == "code"]


def outputs(nb):
    for cell in code(nb):
        yield from cell.outputs


def test_there_are_chapters():
    assert CHAPTERS


@notebooks_of_the_book
def test_stored_outputs_come_from_the_stored_code(path):
    nb = read(path)
    assert nb.metadata.get("seqarch", {}).get("source_digest") == notebooks.digest(nb), (
        f"the code of {path.name} changed after it was executed: make execute CHAPTER={path.relative_to(ROOT)}"
    )
    assert [c.execution_count for c in code(nb)] == list(range(1, len(code(nb)) + 1))


@notebooks_of_the_book
def test_stamped_from_the_one_repository_url(path):
    nb = read(path)
    before = nbformat.writes(nb)
    notebooks.stamp(nb, path.relative_to(ROOT).as_posix(), notebooks.repository_url(ROOT))
    assert nbformat.writes(nb) == before


@notebooks_of_the_book
def test_outputs_are_clean(path):
    """No errors, warnings, widgets, addresses, colours, bars or paths of a machine; not too large."""
    assert path.stat().st_size < LIMIT_BYTES
    for output in outputs(read(path)):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.get("text")
        data = output.get("data", {})
        assert notebooks.WIDGETS not in data
        text = output.get("text", "") + "".join(str(v) for k, v in data.items() if k.startswith("text/"))
        for pattern in (
            r"\bat 0x[0-9a-f]{6,}",
            r"\x1b\[",
            r"\d+%\|",
            r"it/s",
            r"(?<![\w:/.<])/(?:[\w.-]+/){2,}[\w.-]+",
        ):
            assert not re.search(pattern, text), text[:200]


@chapters
def test_anatomy(path):
    nb = read(path)
    source = "\n".join(c.source for c in code(nb))
    prose = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    tags = [t for c in nb.cells for t in notebooks.tags(c)]
    assert tags.count("setup") == 1 and tags.count("parameters") == 1
    assert 'scale = "quick"' in source
    assert source.count("NBVAL_CHECK_OUTPUT") >= 5
    assert len(re.findall(r"(?m)^explore\(", source)) >= 2
    assert len(re.findall(r"(?m)^### Exercise", prose)) >= 4
    assert tags.count("exercise-check") >= 3 and tags.count("solution") >= tags.count("exercise-check")
    assert sum(CLAIM_MIME in o.get("data", {}) for o in outputs(nb)) >= 3
    for heading in ("## Exercises", "## What to remember", "## Where it leads", "## References"):
        assert heading in prose, heading
    assert "{cite:p}" in prose and "Open in Colab" in prose
    assert len(re.findall(r"\w+", prose)) > 1500


@notebooks_of_the_book
def test_every_figure_has_words_and_axis_titles(path):
    figures = [o.data[PLOTLY_MIME] for o in outputs(read(path)) if PLOTLY_MIME in o.get("data", {})]
    assert figures
    for figure in figures:
        meta, layout = figure["layout"]["meta"], figure["layout"]
        assert len(meta["caption"].split()) >= 4 and len(meta["alt"].split()) >= 4
        assert "plotly.js" not in json.dumps(figure)
        cartesian = any(t.get("type", "scatter") in ("scatter", "bar", "heatmap") for t in figure["data"])
        if cartesian and layout.get("xaxis", {}).get("visible", True):
            for axis in ("xaxis", "yaxis"):
                assert layout.get(axis, {}).get("title", {}).get("text") is not None, (axis, meta["caption"])


@notebooks_of_the_book
def test_imports_only_the_package_never_another_chapter(path):
    for cell in code(read(path)):
        for node in ast.walk(ast.parse(cell.source)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.startswith(("chapter", "tests", "seqarch.publishing")) for n in names)


@chapters
def test_citations_are_in_the_bibliography(path):
    prose = "\n".join(c.source for c in read(path).cells if c.cell_type == "markdown")
    keys = {k.strip() for group in re.findall(r"\{cite:\w+\}`([^`]+)`", prose) for k in group.split(",")}
    known = set(re.findall(r"@\w+\{([^,]+),", (ROOT / "book" / "references.bib").read_text(encoding="utf-8")))
    assert keys and keys <= known, keys - known


@chapters
def test_classroom_copy_has_checks_but_no_solutions(path, tmp_path):
    notebooks.classroom(path, tmp_path / path.name)
    nb = read(tmp_path / path.name)
    tags = [t for c in nb.cells for t in notebooks.tags(c)]
    assert "solution" not in tags and "exercise-check" in tags and "exercise" in tags
    assert not any(c.outputs for c in code(nb))
