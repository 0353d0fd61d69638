"""The book's Sphinx extension: local assets, the ledger of claims, the map of chapters."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging

from . import notebooks
from .benchmarks import Benchmarks
from .renderers import claim_html

logger = logging.getLogger(__name__)
FROM_CDN = ("https://", "http://", "//")


class Ledger(Directive):
    """``{ledger}``: every claim of every chapter, from the notebooks' stored outputs."""

    def run(self) -> list[nodes.Node]:
        """Build one section a chapter, below a table of totals."""
        root = Path(self.state.document.settings.env.srcdir)
        chapters = [(p, notebooks.claims_of(p)) for p in sorted((root / "chapters").glob("*.ipynb"))]
        for path, _ in chapters:
            self.state.document.settings.env.note_dependency(str(path))
        every = [c for _, claims in chapters for c in claims]
        counts = {name: sum(c["verdict"] == name for c in every) for name in notebooks_verdicts()}
        cells = "".join(f"<div><b>{n}</b> {name}</div>" for name, n in counts.items())
        parts = [f'<div class="seqarch-totals"><div><b>{len(every)}</b> claims</div>{cells}</div>']
        for path, claims in chapters:
            if claims:
                title = notebooks.title_of(path)
                parts.append(f'<h2><a href="../chapters/{path.stem}.html">{title}</a></h2>')
                parts += [claim_html(c) for c in claims]
        return [nodes.raw(text="".join(parts), format="html")]


def notebooks_verdicts() -> list[str]:
    """Return the verdicts that a claim can have, in the ledger's order."""
    from ..claims import VERDICTS

    return list(VERDICTS.values())


class ChapterMap(Directive):
    """``{chapter-map}``: all chapters by part, from book/chapters.yml; those not yet written are named, not linked."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Build a list of cards; an argument limits it to one part."""
        env = self.state.document.settings.env
        root = Path(env.srcdir)
        env.note_dependency(str(root / "book" / "chapters.yml"))
        parts = yaml.safe_load((root / "book" / "chapters.yml").read_text(encoding="utf-8"))["parts"]
        out = []
        for part in parts:
            if self.arguments and part["id"] != self.arguments[0]:
                continue
            if not self.arguments:
                out.append(f"<h3>{part['title']}</h3>")
            out.append('<ol class="seqarch-map">')
            for chapter in part["chapters"]:
                slug = chapter["slug"]
                inner = f"<b>{slug[:2]}</b> {chapter['title']}<small>{chapter['paper']}</small>"
                if (root / "chapters" / f"{slug}.ipynb").exists():
                    out.append(f'<li><a href="../chapters/{slug}.html">{inner}</a></li>')
                else:
                    out.append(f'<li class="planned"><span>{inner}<em>in preparation</em></span></li>')
            out.append("</ol>")
        return [nodes.raw(text="".join(out), format="html")]


def copy_assets(app: Sphinx) -> None:
    """Put plotly.js and MathJax beside the pages: readers need no other server, and neither does a classroom."""
    import plotly

    static = Path(app.outdir) / "_static"
    static.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(plotly.__file__).parent / "package_data" / "plotly.min.js", static / "plotly.min.js")
    if not (static / "mathjax").exists():
        shutil.copytree(_mathjax(), static / "mathjax")


def _mathjax() -> Path:
    """Return the folder of MathJax's built files inside the installed package."""
    try:
        files = importlib.metadata.files("django-static-mathjax") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.parts[-2:] == ("es5", "tex-mml-chtml.js"):
            return Path(file.locate()).parent
    raise RuntimeError("expected the package django-static-mathjax with tex-mml-chtml.js: pip install 'seqarch[book]'")


def keep_local(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Drop what would be fetched from elsewhere, and thebe; load plotly only on the pages with figures."""
    scripts, seen = [], set()
    for script in context["script_files"]:
        identity = (str(script.filename), script.attributes.get("body"))
        foreign = identity[0].startswith(FROM_CDN) or "thebe" in f"{identity[0]} {identity[1]}".lower()
        if not foreign and identity not in seen:  # some extensions add the same script twice
            scripts.append(script)
            seen.add(identity)
    context["script_files"][:] = scripts
    context["css_files"][:] = [f for f in context["css_files"] if not str(f.filename).startswith(FROM_CDN)]
    if doctree is not None and any('class="seqarch-figure"' in n.astext() for n in doctree.findall(nodes.raw)):
        app.add_js_file("plotly.min.js", loading_method="defer", priority=400)
        app.add_js_file("explore.js", loading_method="defer", priority=500)


def name_planned_chapters(app: Sphinx, doctree: nodes.document) -> None:
    """Show a link to a chapter that is planned but not yet written as its text; any other dead link stays an error."""
    root = Path(app.srcdir)
    parts = yaml.safe_load((root / "book" / "chapters.yml").read_text(encoding="utf-8"))["parts"]
    slugs = {chapter["slug"] for part in parts for chapter in part["chapters"]}
    planned = {slug for slug in slugs if not (root / "chapters" / f"{slug}.ipynb").exists()}
    for link in list(doctree.findall(addnodes.pending_xref)):
        if str(link.get("reftarget", "")).rsplit("/", 1)[-1].removesuffix(".ipynb") in planned:
            link.replace_self(nodes.inline(link.astext(), link.astext(), classes=["seqarch-planned"]))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_directive("ledger", Ledger)
    app.add_directive("chapter-map", ChapterMap)
    app.add_directive("benchmarks", Benchmarks)
    app.connect("builder-inited", copy_assets)
    app.connect("html-page-context", keep_local, priority=900)
    app.connect("doctree-read", name_planned_chapters)
    app.add_css_file("book.css")
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
