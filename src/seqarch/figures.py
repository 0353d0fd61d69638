"""How the book draws: one plotly template, a few builders, and `show` for figures that do not move.

Colours are Okabe and Ito's, told apart by colour-blind readers, in shades that keep their contrast on white and on
dark pages. The template leaves backgrounds transparent and text colour to the page, which restyles it for its theme.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

COLOURS = ["#0c7bb8", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#8c6bb1", "#7f7f7f"]
DIVERGING = [[0, "#0c7bb8"], [0.5, "#f7f7f7"], [1, "#d55e00"]]
SEQUENTIAL = "Viridis"
INK, GRID = "#7a7a7a", "rgba(128,128,128,0.25)"
PLOTLY_MIME = "application/vnd.plotly.v1+json"


def register_template() -> None:
    """Make the book's plotly template the default one. Called by `seqarch.setup`."""
    axis = dict(gridcolor=GRID, zerolinecolor=GRID, linecolor=GRID, automargin=True, title=dict(standoff=8))
    pio.templates["seqarch"] = go.layout.Template(
        layout=dict(
            colorway=COLOURS,
            font=dict(family="system-ui, -apple-system, 'Segoe UI', sans-serif", size=13, color=INK),
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            margin=dict(l=56, r=16, t=44, b=48),
            title=dict(x=0, xanchor="left", font=dict(size=15)),
            xaxis=axis,
            yaxis=axis,
            legend=dict(orientation="h", y=-0.22, x=0, yanchor="top"),
            colorscale=dict(sequential=SEQUENTIAL, diverging=DIVERGING),
            hoverlabel=dict(font=dict(size=12)),
            height=380,
        )
    )
    pio.templates.default = "seqarch"


register_template()


def figure(title: str | None = None, *, x: str | None = None, y: str | None = None, **layout: Any) -> go.Figure:
    """Return an empty figure with axis titles (name them with their units); `layout` goes to plotly's layout."""
    fig = go.Figure()
    fig.update_layout(template="seqarch", title_text=title, xaxis_title_text=x, yaxis_title_text=y)
    if title is None:
        fig.update_layout(margin_t=16)
    fig.update_layout(**layout)
    return fig


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str | None = None,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    **layout: Any,
) -> go.Figure:
    """Draw named curves ``{"name": (xs, ys)}``; `bands` adds a shaded ``(low, high)`` around a curve of that name."""
    fig = figure(title, x=x, y=y, **layout)
    for i, (name, (xs, ys)) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        if bands and name in bands:
            low, high = bands[name]
            fig.add_scatter(
                x=[*compact(xs), *reversed(compact(xs))], y=[*compact(high), *reversed(compact(low))], fill="toself",
                fillcolor=colour, opacity=0.18, line=dict(width=0), hoverinfo="skip", showlegend=False,
            )  # fmt: skip
        dash = ["solid", "dash", "dot", "dashdot"][i % 4]
        fig.add_scatter(
            x=compact(xs), y=compact(ys), name=name, mode="lines", line=dict(color=colour, width=2, dash=dash)
        )
    fig.update_xaxes(type="log" if log_x else "linear")
    fig.update_yaxes(type="log" if log_y else "linear")
    return fig


def bars(
    values: Mapping[str, float | tuple[float, float]],
    *,
    title: str | None = None,
    x: str = "",
    y: str,
    **layout: Any,
) -> go.Figure:
    """Draw one bar per name; a value may be ``(value, spread)``, drawn with an error bar."""
    fig = figure(title, x=x, y=y, **layout)
    heights = [v[0] if isinstance(v, tuple) else v for v in values.values()]
    spread = [v[1] if isinstance(v, tuple) else 0.0 for v in values.values()]
    fig.add_bar(
        x=list(values), y=compact(heights), marker_color=[COLOURS[i % len(COLOURS)] for i in range(len(values))],
        error_y=dict(type="data", array=compact(spread), visible=any(spread), color=INK), showlegend=False,
    )  # fmt: skip
    return fig


def heatmap(
    z: Any,
    *,
    title: str | None = None,
    x: str,
    y: str,
    diverging: bool = False,
    xs: Sequence | None = None,
    ys: Sequence | None = None,
    zmin: float | None = None,
    zmax: float | None = None,
    unit: str = "",
    **layout: Any,
) -> go.Figure:
    """Draw a matrix, first row on top; `diverging` centres the colours on zero; `unit` titles the colour bar."""
    rows = [compact(row, 3) for row in z]
    if diverging:
        bound = max((abs(v) for row in rows for v in row if v is not None), default=1.0) or 1.0
        zmin, zmax = (-bound if zmin is None else zmin), (bound if zmax is None else zmax)
    fig = figure(title, x=x, y=y, **layout)
    fig.add_heatmap(
        z=rows, x=xs, y=ys, zmin=zmin, zmax=zmax, colorscale=DIVERGING if diverging else SEQUENTIAL,
        colorbar=dict(title=dict(text=unit, side="right"), thickness=12),
    )  # fmt: skip
    fig.update_yaxes(autorange="reversed")
    return fig


def compact(values: Any, digits: int = 4) -> list:
    """Return numbers as a plain list of `digits` significant digits: what a stored figure should hold."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    if hasattr(values, "tolist"):
        values = values.tolist()
    return [_round(v, digits) for v in values]


def _round(value: Any, digits: int) -> Any:
    if isinstance(value, (list, tuple)):
        return [_round(v, digits) for v in value]
    if isinstance(value, (bool, str)) or value is None:
        return value
    if isinstance(value, int) or hasattr(value, "__index__"):
        return int(value)
    value = float(value)
    if not math.isfinite(value):
        return None  # plotly leaves a gap
    return float(f"{value:.{digits}g}")


def check_words(caption: str, alt: str) -> None:
    """Every figure of the book says what it shows, also to those who cannot see it."""
    for name, text in (("caption", caption), ("alt", alt)):
        if not isinstance(text, str) or len(text.split()) < 3:
            raise ValueError(f"expected {name} to be a sentence that describes the figure, got {text!r}")


def as_json(fig: go.Figure, meta: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a figure as plain JSON values, with `meta` (caption, alt, states) in plotly's own place for such notes."""
    stored = json.loads(pio.to_json(fig, validate=False, engine="json"))
    stored["layout"]["meta"] = dict(meta or {})
    stored["config"] = {"responsive": True, "displaylogo": False}
    return stored


def is_live() -> bool:
    """Whether a person sits at this kernel. ``SEQARCH_EXPLORE=live|stored`` decides; else any Jupyter kernel is live."""
    chosen = os.environ.get("SEQARCH_EXPLORE")
    if chosen in ("live", "stored"):
        return chosen == "live"
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return hasattr(get_ipython(), "kernel")


class Figure:
    """A figure with a caption and alt text, as a notebook output."""

    def __init__(self, fig: go.Figure, caption: str, alt: str):
        check_words(caption, alt)
        self.figure, self.caption, self.alt = fig, caption, alt

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        return {
            PLOTLY_MIME: as_json(self.figure, {"caption": self.caption, "alt": self.alt}),
            "text/plain": f"[Figure] {self.caption} ({self.alt})",
        }

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, display

        if is_live():  # plotly knows best how its figures reach this front end: Colab's differs from Jupyter's
            self.figure.show()
            display(HTML(f"<small>{html.escape(self.caption)}</small>"))
        else:
            display(self._repr_mimebundle_(), raw=True)


def show(fig: go.Figure, *, caption: str, alt: str) -> Figure:
    """Display a figure that does not move. `caption` is printed below it; `alt` describes it in words."""
    return Figure(fig, caption, alt)
