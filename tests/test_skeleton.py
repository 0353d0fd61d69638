"""The frame of the project agrees with itself."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from seqarch.publishing import notebooks

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from .notebooks import CHAPTERS, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_environment_yml_names_no_version_of_its_own():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert conda == [f"python{PROJECT['requires-python']}", "pip"]
    assert pip == ["-c constraints.txt", "-e .[all]"]


def test_all_is_the_union_of_the_other_extras():
    extras = PROJECT["optional-dependencies"]
    named = set(re.search(r"\[(.*)\]", extras["all"][0]).group(1).split(","))
    assert named == set(extras) - {"all"}


def test_every_need_has_a_tested_version():
    pinned = {
        re.split("==", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    needs = PROJECT["dependencies"] + [
        d for name, e in PROJECT["optional-dependencies"].items() if name != "all" for d in e
    ]
    missing = {re.match(r"[\w.-]+", n).group().lower().replace("_", "-") for n in needs} - pinned
    assert not missing


def test_core_asks_for_nothing_that_colab_must_replace():
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+", need) for need in PROJECT["dependencies"])


def test_table_of_contents_and_map_name_every_chapter():
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    files = [c["file"] for part in toc["parts"] for c in part["chapters"]]
    assert [f for f in files if f.startswith("chapters/")] == [f"chapters/{p.stem}" for p in CHAPTERS]
    parts = yaml.safe_load((ROOT / "book" / "chapters.yml").read_text(encoding="utf-8"))["parts"]
    slugs = [c["slug"] for part in parts for c in part["chapters"]]
    assert [s[:2] for s in slugs] == [f"{n:02d}" for n in range(1, 39)]
    assert {p.stem for p in CHAPTERS} <= set(slugs)


def test_the_repository_url_is_written_once():
    url = notebooks.repository_url(ROOT).removeprefix("https://github.com/")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    allowed = {"_config.yml", "CITATION.cff"}
    for name in tracked:
        if not name.endswith(".ipynb") and name not in allowed and Path(ROOT, name).suffix != ".png":
            assert url not in (ROOT / name).read_text(encoding="utf-8"), name
    assert url in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_import_is_light():
    """Beyond torch, the package adds little, and neither triton nor plotly nor a data package is loaded."""
    code = (
        "import time, torch; t = time.perf_counter(); import seqarch; d = time.perf_counter() - t;"
        "import sys; print(d, *[m for m in ('triton', 'plotly', 'pandas', 'sklearn') if m in sys.modules])"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    results = [r.stdout.split() for r in runs]
    base = subprocess.run(
        [sys.executable, "-c", "import sys, torch; print(*[m for m in ('triton', 'pandas') if m in sys.modules])"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert all(set(r[1:]) <= set(base) for r in results)
    assert min(float(r[0]) for r in results) < 0.3


@pytest.mark.parametrize(
    "target", ["book", "test", "serve", "execute", "record", "classroom", "benchmark", "clean", "help"]
)
def test_make_help_lists(target):
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"(?m)^{target}\s+\S", shown)
