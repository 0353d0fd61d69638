"""The safety net has no holes: three ways to break a chapter, and each is caught."""

import shutil
import subprocess
import sys

import nbformat
import pytest

from seqarch.publishing import notebooks

from ..notebooks import ROOT


@pytest.fixture
def small(tmp_path):
    """A small executed notebook in the mould of a chapter."""
    v4 = nbformat.v4
    nb = v4.new_notebook(
        cells=[
            v4.new_markdown_cell("# 00. Small\n\n<!-- colab -->"),
            v4.new_code_cell("# setup", metadata={"tags": ["setup"]}),
            v4.new_code_cell("# NBVAL_CHECK_OUTPUT\nprint(1 + 1)"),
        ]
    )
    (tmp_path / "chapters").mkdir()
    shutil.copy(ROOT / "_config.yml", tmp_path)
    path = tmp_path / "chapters" / "00-small.ipynb"
    nbformat.write(nb, path)
    notebooks.execute(path, tmp_path)
    return path


def nbval(path):
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "-q", "-p", "no:cacheprovider", path]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=path.parent)


def change(path, edit):
    nb = nbformat.read(path, as_version=4)
    edit(nb.cells[2])
    nbformat.write(nb, path)


def test_the_unbroken_copy_passes(small):
    result = nbval(small)
    assert result.returncode == 0, result.stdout


def test_a_cell_that_raises_is_caught(small):
    change(small, lambda cell: cell.update(source="raise RuntimeError('broken')"))
    result = nbval(small)
    assert result.returncode != 0 and "broken" in result.stdout


def test_a_checked_output_that_changed_is_caught(small):
    change(small, lambda cell: cell.outputs[0].update(text="3\n"))
    result = nbval(small)
    assert result.returncode != 0 and "mismatch" in result.stdout


def test_code_changed_after_execution_is_caught(small):
    """nbval --lax would pass this one: the digest is what notices."""
    change(small, lambda cell: cell.update(source="# NBVAL_CHECK_OUTPUT\nprint(4 - 2)"))
    assert nbval(small).returncode == 0
    nb = nbformat.read(small, as_version=4)
    assert nb.metadata.seqarch.source_digest != notebooks.digest(nb)
