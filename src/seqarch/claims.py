"""`claim`: what a paper says beside what was measured here. The book's ledger collects every one of them."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLAIM_MIME = "application/vnd.seqarch.claim+json"
VERDICTS = {True: "holds here", False: "not reproduced at this scale", None: "not tested at this scale"}


@dataclass(frozen=True)
class Claim:
    """One row of the ledger; `claim` makes it."""

    statement: str
    paper: str
    measured: str
    holds: bool | None
    where: str = ""
    value: Mapping[str, float] | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        return VERDICTS[self.holds]

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        row = {
            "statement": self.statement,
            "paper": self.paper,
            "where": self.where,
            "measured": self.measured,
            "holds": self.holds,
            "verdict": self.verdict,
            "value": self.value,
            "note": self.note,
        }
        text = [
            f"Claim:    {self.statement}",
            f"Paper:    {self.paper}" + (f" ({self.where})" if self.where else ""),
        ]
        text += [f"Measured: {self.measured}", f"Verdict:  {self.verdict}"] + (
            [f"Note:     {self.note}"] if self.note else []
        )
        return {CLAIM_MIME: row, "text/html": self.html(), "text/plain": "\n".join(text)}

    def html(self) -> str:
        """Return the card that notebooks and the book show."""
        mark, name = {True: ("✓", "holds"), False: ("✗", "fails"), None: ("–", "open")}[self.holds]
        rows = [
            ("Paper", self.paper + (f" ({self.where})" if self.where else "")),
            ("Measured", self.measured),
        ]
        rows += [("Note", self.note)] if self.note else []
        body = "".join(f"<dt><b>{k}</b></dt><dd>{html.escape(v)}</dd>" for k, v in rows)
        return (
            f'<div class="seqarch-claim seqarch-{name}"><p><b>Claim.</b> {html.escape(self.statement)}</p><dl>{body}</dl>'
            f"<p><b>{mark} {self.verdict}</b></p></div>"
        )


def claim(
    statement: str,
    *,
    paper: str,
    measured: str,
    holds: bool | None,
    where: str = "",
    value: float | Mapping[str, float] | None = None,
    note: str = "",
) -> Claim:
    """State a paper's claim beside what this chapter measured.

    Args:
        statement: the claim, in one sentence.
        paper: the paper's own figure or verdict.
        measured: ours, as printed from the chapter's variables.
        holds: whether the measurement supports the claim; None when this scale cannot test it.
        where: the table, figure or section of the paper.
        value: the measured number or named numbers, for the ledger and for recorded runs.
        note: what a careful reader should know about the comparison.

    Raises:
        ValueError: an empty statement, a verdict that is not a truth value, or a number that is not finite.
    """
    for name, text in (("statement", statement), ("paper", paper), ("measured", measured)):
        if not text or not text.strip():
            raise ValueError(f"expected {name} to say something, got {text!r}")
    if holds is not None:
        if getattr(holds, "shape", ()) != () or not isinstance(getattr(holds, "item", lambda: holds)(), bool):
            raise ValueError(f"expected holds to be True, False or None, got {holds!r}")
        holds = bool(holds)
    if value is not None:
        value = {k: float(v) for k, v in (value.items() if isinstance(value, Mapping) else [("value", value)])}
        bad = [k for k, v in value.items() if not math.isfinite(v)]
        if bad:
            raise ValueError(f"expected finite numbers in value, got {bad[0]}={value[bad[0]]}")
    return Claim(statement, paper, measured, holds, where, value, note)


@dataclass(frozen=True)
class Recorded:
    """A full-scale run of a chapter, as ``make record`` stored it."""

    chapter: str
    device: str
    date: str
    version: str
    seed: int
    claims: list[dict[str, Any]]

    def _repr_markdown_(self) -> str:
        lines = [
            f"**Recorded full-scale run** ({self.device}, {self.date}, seqarch {self.version}, seed {self.seed})",
            "",
        ]
        lines += ["| Claim | Measured | Verdict |", "| --- | --- | --- |"]
        lines += [f"| {c['statement']} | {c['measured']} | {c['verdict']} |" for c in self.claims]
        return "\n".join(lines)


@dataclass(frozen=True)
class NotRecorded:
    """Shown where a chapter has no full-scale run yet."""

    chapter: str

    def __bool__(self) -> bool:
        """Nothing is recorded."""
        return False

    def _repr_markdown_(self) -> str:
        number = self.chapter.split("-")[0]
        return (
            f"*No full-scale run is recorded for this chapter yet: on a GPU, `make record CHAPTER={number}` makes one.*"
        )


def recorded(chapter: str, folder: str | Path = "recorded") -> Recorded | NotRecorded:
    """Return the recorded full-scale run of `chapter` (such as ``"10-attention-as-rnn"``), or a note that there is none."""
    path = Path(folder) / f"{chapter}.json"
    if not path.exists():
        return NotRecorded(chapter)
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        return Recorded(**{name: content[name] for name in Recorded.__dataclass_fields__})
    except KeyError as missing:
        raise ValueError(f"expected {path} to hold {missing}, got the keys {sorted(content)}") from None
