"""Executing, normalising, stamping and recording."""

import json
import shutil

import nbformat
import pytest

from seqarch.publishing import notebooks

from ..notebooks import ROOT

v4 = nbformat.v4


def make(tmp_path, *sources, tags=()):
    cells = [
        v4.new_markdown_cell("# 00. Small\n\n<!-- colab -->\n\ntext"),
        v4.new_code_cell("# setup", metadata={"tags": ["setup"]}),
        v4.new_code_cell('scale = "quick"', metadata={"tags": ["parameters"]}),
        *(v4.new_code_cell(s) for s in sources),
    ]
    (tmp_path / "chapters").mkdir(exist_ok=True)
    shutil.copy(ROOT / "_config.yml", tmp_path)
    path = tmp_path / "chapters" / "00-small.ipynb"
    nbformat.write(v4.new_notebook(cells=cells), path)
    return path


def test_two_executions_store_the_same_bytes(tmp_path):
    path = make(
        tmp_path,
        "from tqdm.auto import tqdm\nimport time\nfor _ in tqdm(range(3)): time.sleep(0.01)",
        "print('a')\nprint('\\x1b[31mb\\x1b[0m')",
        "import seqarch; from seqarch.figures import lines, show\n"
        "show(lines({'a': ([1], [2])}, x='x', y='y'), caption='One lonely point here.', alt='One point in the middle.')",
    )
    notebooks.execute(path, tmp_path)
    first = path.read_bytes()
    notebooks.execute(path, tmp_path)
    assert path.read_bytes() == first
    nb = nbformat.read(path, as_version=4)
    assert nb.cells[3].outputs == []  # the progress bar is gone
    assert nb.cells[4].outputs[0].text == "a\nb\n"
    assert "colab.research.google.com/github/" in nb.cells[0].source
    assert "pip" in nb.cells[1].source and "hide-cell" in nb.cells[1].metadata.tags


def test_a_failing_chapter_is_left_as_it_was(tmp_path):
    path = make(tmp_path, "1 / 0")
    before = path.read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        notebooks.execute(path, tmp_path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_live_widget_may_not_be_stored(tmp_path):
    path = make(tmp_path, "import ipywidgets\nipywidgets.IntSlider()")
    with pytest.raises(notebooks.ChapterError, match="live widgets"):
        notebooks.execute(path, tmp_path)


def test_a_chapter_without_a_place_for_the_badge_is_named(tmp_path):
    path = make(tmp_path)
    nb = nbformat.read(path, as_version=4)
    nb.cells[0].source = "# 00. Small"
    with pytest.raises(notebooks.ChapterError, match=r"got no place for \['badge'\]"):
        notebooks.stamp(nb, path.name, "https://github.com/a/b")


def test_recording_runs_at_full_scale_and_keeps_every_claim(tmp_path):
    path = make(
        tmp_path,
        "import seqarch\nseqarch.setup(seed=7)\nfrom seqarch.claims import claim\n"
        "claim('It scales.', paper='yes', measured=scale, holds=scale == 'full', value=1.5)",
    )
    before = path.read_bytes()
    target = notebooks.record(path, tmp_path)
    stored = json.loads(target.read_text())
    assert stored["claims"][0]["measured"] == "full" and stored["claims"][0]["holds"] is True
    assert stored["claims"][0]["value"] == {"value": 1.5} and stored["seed"] == 7
    assert {"device", "date", "version", "source_digest"} <= stored.keys()
    assert path.read_bytes() == before


def test_recorded_runs_are_read_back(tmp_path):
    path = make(
        tmp_path,
        "from seqarch.claims import claim\nclaim('It scales.', paper='yes', measured='so so', holds=None)",
    )
    notebooks.record(path, tmp_path)
    from seqarch.claims import recorded

    run = recorded("00-small", folder=path.parent / "recorded")
    assert run and "so so" in run._repr_markdown_()
