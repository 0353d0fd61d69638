"""The built book, opened in a real browser that can reach nothing but this machine."""

import functools
import http.server
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import sync_playwright

from ..browser import launch
from ..notebooks import CHAPTERS, OPENERS, ROOT

TOC = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
PAGES = [TOC["root"], *(c["file"] for part in TOC["parts"] for c in part["chapters"])]
EXTRA = ["search", "genindex"]
PHONE, DESKTOP = (390, 844), (1280, 900)

# What plotly draws for the kinds of traces that the book uses.
MARKS = (
    ".scatterlayer path, .scatterlayer .point, .scatterlayer text, .barlayer path, .heatmaplayer image, .hm image, "
    ".contourlayer path, .boxlayer path, .violinlayer path, .pielayer path, .shapelayer path, .gl-container canvas"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build the book from the stored outputs into a fresh folder; any warning is an error."""
    out = tmp_path_factory.mktemp("book")
    command = [
        Path(sys.executable).with_name("jupyter-book"),
        "build",
        ".",
        "--toc",
        "book/_toc.yml",
        "--path-output",
        out,
    ]
    result = subprocess.run([*command, "-W", "--keep-going"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return out / "_build" / "html"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(built):
    server = http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(Quiet, directory=str(built)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        instance = launch(playwright)
        yield instance
        instance.close()


class Visit:
    """One page in one window, with everything that went wrong on the way."""

    def __init__(self, browser, site, name, size, theme):
        self.problems = []
        self.context = browser.new_context(viewport=dict(width=size[0], height=size[1]))
        self.context.add_init_script(f"localStorage.setItem('mode','{theme}'); localStorage.setItem('theme','{theme}')")

        def only_here(route):
            url = route.request.url
            if url.startswith((site, "data:", "blob:")):
                route.continue_()
            else:
                self.problems.append(f"asked for {url}")
                route.abort()

        self.context.route("**/*", only_here)
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda e: self.problems.append(f"error {e}"))
        self.page.on("console", lambda m: m.type in ("error", "warning") and self.problems.append(f"console {m.text}"))
        self.page.on("requestfailed", lambda r: self.problems.append(f"failed {r.url}"))
        self.page.on("response", lambda r: r.status >= 400 and self.problems.append(f"{r.status} {r.url}"))
        self.page.goto(f"{site}/{name}.html")
        self.page.wait_for_load_state("load", timeout=60_000)
        self.page.wait_for_function(
            "!window.MathJax || window.MathJax.startup.promise.then(() => true)", timeout=60_000
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.context.close()

    def draw_all(self):
        """Unfold solutions, scroll through the page so that every figure is drawn, and return the figures."""
        self.page.evaluate("document.querySelectorAll('details').forEach(fold => (fold.open = true))")
        figures = self.page.locator(".seqarch-figure")
        for i in range(figures.count()):
            figures.nth(i).scroll_into_view_if_needed()
            figures.nth(i).locator(".main-svg").first.wait_for(state="attached", timeout=20_000)
        return figures


def shown(figure):
    """The data and titles that plotly shows now."""
    return figure.locator(".seqarch-plot").evaluate(
        "g => JSON.stringify([g.data, g.layout.title, g.layout.annotations, g.layout.shapes])"
    )


@pytest.mark.parametrize("size, theme", [(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop-light", "phone-dark"])
@pytest.mark.parametrize("name", PAGES + EXTRA)
def test_page(browser, site, name, size, theme):
    with Visit(browser, site, name, size, theme) as visit:
        figures = visit.draw_all()
        assert visit.page.evaluate("document.documentElement.dataset.theme") == theme
        for i in range(figures.count()):
            assert figures.nth(i).locator(MARKS).count() > 0, f"figure {i} has no marks"
            assert figures.nth(i).locator(".seqarch-plot").evaluate("g => g.clientHeight > 100 && g.clientWidth > 200")
        math = visit.page.locator("span.math, div.math")
        assert math.count() == visit.page.locator(".math mjx-container").count() or math.count() == 0
        assert visit.page.locator("mjx-merror, [data-mjx-error]").count() == 0
        width, window = visit.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert width <= window, f"scrolls sideways: {width} > {window}"
        assert visit.problems == []


@pytest.mark.parametrize("path", CHAPTERS + OPENERS, ids=lambda p: p.stem)
def test_every_control_moves_its_figure(browser, site, path):
    """Sliders by keyboard and by mouse, choices and switches: each changes what is drawn."""
    with Visit(browser, site, f"{path.parent.name}/{path.stem}", DESKTOP, "light") as visit:
        figures = visit.draw_all()
        interactive = [f for f in figures.all() if f.locator(".seqarch-controls label").count()]
        assert len(interactive) >= (2 if path in CHAPTERS else 1)
        for figure in interactive:
            for slider in figure.locator("input[type=range]").all():
                slider.focus()
                start, before, values = slider.input_value(), shown(figure), {slider.input_value()}
                changed = False
                keys = ["ArrowLeft"] * int(start) + ["ArrowRight"] * int(slider.get_attribute("max"))
                for key in keys:
                    visit.page.keyboard.press(key)
                    values.add(slider.input_value())
                    changed = changed or shown(figure) != before
                assert changed and len(values) > 1, "the arrow keys change nothing"
                assert slider.get_attribute("aria-valuetext")
                before, box = shown(figure), slider.bounding_box()
                visit.page.mouse.click(box["x"] + 3, box["y"] + box["height"] / 2)
                assert slider.input_value() == "0" and shown(figure) != before, "the mouse changes nothing"
                slider.fill(start)  # other controls are tried from where the reader finds them
            for choice in figure.locator("select").all():
                start, pictures = choice.input_value(), set()
                for i in range(choice.locator("option").count()):
                    choice.select_option(index=i)
                    pictures.add(shown(figure))
                choice.select_option(start)
                assert len(pictures) > 1, "no choice changes anything"
            for switch in figure.locator("input[type=checkbox]").all():
                before = shown(figure)
                switch.click()
                assert shown(figure) != before, "the switch changes nothing"
                switch.click()
        assert visit.problems == []


def test_the_theme_switch_recolours_the_figures(browser, site):
    with Visit(browser, site, f"chapters/{CHAPTERS[0].stem}", DESKTOP, "light") as visit:
        figures = visit.draw_all()
        colour = "g => g.layout.font.color"
        before = figures.first.locator(".seqarch-plot").evaluate(colour)
        visit.page.evaluate("document.documentElement.dataset.theme = 'dark'")
        visit.page.wait_for_timeout(300)
        assert figures.first.locator(".seqarch-plot").evaluate(colour) != before


def test_the_ledger_lists_every_claim(browser, site):
    from seqarch.publishing import notebooks

    with Visit(browser, site, "book/ledger", DESKTOP, "light") as visit:
        claims = [c for p in CHAPTERS for c in notebooks.claims_of(p)]
        assert visit.page.locator(".seqarch-claim").count() == len(claims) > 0
        text = visit.page.locator("main").inner_text()
        assert all(c["measured"] in text for c in claims)


def test_the_map_links_written_chapters_and_names_the_others(browser, site):
    with Visit(browser, site, "book/index", DESKTOP, "light") as visit:
        assert visit.page.locator(".seqarch-map li").count() == 38
        assert visit.page.locator(".seqarch-map a").count() == len(CHAPTERS)


def test_solutions_are_folded_until_asked_for(browser, site):
    with Visit(browser, site, f"chapters/{CHAPTERS[0].stem}", DESKTOP, "light") as visit:
        folded = visit.page.locator("details.hide.above-input, details.hide, .cell.tag_hide-cell details")
        assert folded.count() >= 3
        assert not any(d.evaluate("d => d.open") for d in folded.all())
