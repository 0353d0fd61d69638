"""How myst-nb shows the book's outputs: figures as raw HTML that `explore.js` brings to life, claims as cards."""

from __future__ import annotations

import html
import json
from typing import Any, ClassVar

from docutils import nodes

from ..claims import CLAIM_MIME
from ..figures import PLOTLY_MIME


class FigureRenderer:
    """A myst-nb MIME render plugin (entry point ``myst_nb.mime_renderers``)."""

    mime_priority_overrides: ClassVar = [("*", PLOTLY_MIME, 1), ("*", CLAIM_MIME, 2)]

    @staticmethod
    def handle_mime(renderer: Any, data: Any, inline: bool) -> list[nodes.Element] | None:
        """Return the nodes of one output, or None to leave it to myst-nb."""
        if data.mime_type == PLOTLY_MIME:
            return [nodes.raw(text=figure_html(_decoded(data.content)), format="html")]
        if data.mime_type == CLAIM_MIME:
            return [nodes.raw(text=claim_html(_decoded(data.content)), format="html")]
        return None


def _decoded(content: Any) -> dict[str, Any]:
    return json.loads(content) if isinstance(content, str) else content


def figure_html(figure: dict[str, Any]) -> str:
    """Return a ``<figure>`` that holds its own data; without JavaScript it shows the description."""
    meta = figure["layout"].get("meta") or {}
    alt, caption = meta.get("alt", "Figure"), meta.get("caption", "")
    payload = json.dumps(figure, separators=(",", ":")).replace("<", "\\u003c")
    height = figure["layout"].get("height") or 380
    return (
        f'<figure class="seqarch-figure">'
        f'<div class="seqarch-controls" hidden></div>'
        f'<div class="seqarch-plot" role="img" aria-label="{html.escape(alt)}" style="min-height:{height}px">'
        f"<noscript>{html.escape(alt)}</noscript></div>"
        f'<script type="application/json">{payload}</script>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def claim_html(row: dict[str, Any]) -> str:
    """Return the card of a stored claim."""
    from ..claims import Claim

    return Claim(**{k: v for k, v in row.items() if k != "verdict"}).html()
