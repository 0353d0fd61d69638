"""`explore`: a figure with controls, alive in a kernel and alive on a published page.

In a running notebook, ipywidgets call ``draw`` on every change. In the published book there is no kernel, so the
figure of every state is computed when the notebook runs, and what differs between states is stored with the first
one; the script `explore.js` of the book switches between them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import plotly.graph_objects as go

from .figures import PLOTLY_MIME, as_json, check_words, is_live

MAX_CONTROLS = 3
MAX_STATES = 60
_MISSING = object()

Draw = Callable[..., go.Figure]


def explore(
    draw: Draw, *, caption: str, alt: str, start: dict[str, Any] | None = None, **controls: Sequence[Any]
) -> Explorer:
    """Show ``draw(**state)`` with one control per keyword.

    Args:
        draw: a function of the controls that returns a plotly figure, always with the same traces in the same order.
            It must depend on its arguments alone.
        caption: printed under the figure.
        alt: what the figure shows and how it changes, in words.
        start: the state shown first; None is the first value of every control.
        controls: up to three lists of values: numbers make a slider, strings a choice, ``[False, True]`` a switch.
            Together they may have at most 60 combinations.

    Raises:
        ValueError: no or too many controls or states, a start that is not a state, or a draw that returns something
            other than a plotly figure.
    """
    check_words(caption, alt)
    if not 1 <= len(controls) <= MAX_CONTROLS:
        raise ValueError(f"expected 1 to {MAX_CONTROLS} controls, got {len(controls)}")
    plain = {}
    for name, values in controls.items():
        if isinstance(values, str) or len(values) < 2:
            raise ValueError(f"expected control {name} to be a list of at least two values, got {values!r}")
        plain[name] = [v.item() if hasattr(v, "item") else v for v in values]
    states = 1
    for values in plain.values():
        states *= len(values)
    if states > MAX_STATES:
        raise ValueError(f"expected at most {MAX_STATES} states (the page stores every one), got {states}")
    first = {name: values[0] for name, values in plain.items()} | (start or {})
    for name, value in first.items():
        if value not in plain.get(name, ()):
            raise ValueError(f"expected start to name values of the controls {plain}, got {name}={value!r}")
    return Explorer(draw, caption, alt, plain, first)


class Explorer:
    """What `explore` returns; a notebook displays it by its last expression."""

    def __init__(self, draw: Draw, caption: str, alt: str, controls: dict[str, list], start: dict[str, Any]):
        self.draw, self.caption, self.alt, self.controls, self.start = draw, caption, alt, controls, start

    def figure(self, **state: Any) -> dict[str, Any]:
        """Return the figure of one state as JSON."""
        fig = self.draw(**state)
        if not isinstance(fig, go.Figure):
            raise ValueError(f"expected draw to return a plotly Figure, got {type(fig).__name__} for {state}")
        return as_json(fig, {"caption": self.caption, "alt": self.alt})

    def stored(self) -> dict[str, Any]:
        """Return the first figure with all other states folded into ``layout.meta.explore``.

        ``states[k]`` lists pairs of indices into ``paths`` and ``values``: what to replace in the first figure to get
        state k (in the order of itertools.product over the controls). A value that several states share is stored once.
        """
        base = self.figure(**self.start)
        names, paths, values, states = list(self.controls), _Pool(), _Pool(), []
        for combination in itertools.product(*self.controls.values()):
            state = self.figure(**dict(zip(names, combination, strict=True)))
            if len(state["data"]) != len(base["data"]):
                raise ValueError(
                    f"expected draw to return {len(base['data'])} traces in every state, got {len(state['data'])} "
                    f"for {dict(zip(names, combination, strict=True))}"
                )
            states.append([[paths.add(path), values.add(value)] for path, value in _difference(base, state)])
        controls = [
            {"name": n, "kind": _kind(v), "values": v, "start": v.index(self.start[n])}
            for n, v in self.controls.items()
        ]
        base["layout"]["meta"]["explore"] = {
            "controls": controls,
            "paths": paths.items,
            "values": values.items,
            "states": states,
        }
        return base

    def widget(self):
        """Return the live form: ipywidgets above an output area that is redrawn on every change."""
        import ipywidgets as widgets
        from IPython.display import display

        output = widgets.Output()
        made = {}
        for name, values in self.controls.items():
            label, kind = name.replace("_", " "), _kind(values)
            if kind == "toggle":
                made[name] = widgets.Checkbox(value=self.start[name], description=label, indent=False)
            else:
                kinds = {"slider": widgets.SelectionSlider, "choice": widgets.Dropdown}
                made[name] = kinds[kind](options=values, value=self.start[name], description=label)

        def redraw(_=None) -> None:
            with output:
                output.clear_output(wait=True)
                display(go.Figure(self.draw(**{name: control.value for name, control in made.items()})))

        for control in made.values():
            control.observe(redraw, names="value")
        redraw()
        return widgets.VBox([widgets.HBox(list(made.values())), output, widgets.HTML(f"<small>{self.caption}</small>")])

    def _ipython_display_(self) -> None:
        from IPython.display import display

        if is_live():
            display(self.widget())
        else:
            bundle = {
                PLOTLY_MIME: self.stored(),
                "text/plain": f"[Interactive figure] {self.caption} ({self.alt})",
            }
            display(bundle, raw=True)


def _kind(values: list) -> str:
    if values == [False, True] and all(isinstance(v, bool) for v in values):
        return "toggle"
    return "slider" if all(isinstance(v, (int, float)) for v in values) else "choice"


class _Pool:
    """A list without repetitions, by JSON equality."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._index: dict[str, int] = {}

    def add(self, item: Any) -> int:
        key = json.dumps(item, sort_keys=True)
        if key not in self._index:
            self._index[key] = len(self.items)
            self.items.append(item)
        return self._index[key]


def _difference(old: Any, new: Any, path: tuple = ()):
    """Yield (path, value) pairs that turn `old` into `new`; a value of ``{"$delete": true}`` removes the key."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            a, b = old.get(key, _MISSING), new.get(key, _MISSING)
            if b is _MISSING:
                yield [*path, key], {"$delete": True}
            elif a is _MISSING:
                yield [*path, key], b
            else:
                yield from _difference(a, b, (*path, key))
    elif isinstance(old, list) and isinstance(new, list) and _alike(old, new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _difference(a, b, (*path, i))
    elif old != new:
        yield list(path), new


def _alike(old: list, new: list) -> bool:
    """Lists of as many dicts (traces, annotations, shapes) are compared one by one; lists of numbers as a whole."""
    return len(old) == len(new) and all(isinstance(x, dict) for x in old + new)


def restore(stored: dict[str, Any], state: int) -> dict[str, Any]:
    """Return the figure of one stored state: what `explore.js` does in the page."""
    figure = json.loads(json.dumps(stored))
    explore_data = figure["layout"]["meta"].pop("explore")
    for path_index, value_index in explore_data["states"][state]:
        *parents, last = explore_data["paths"][path_index]
        value, target = explore_data["values"][value_index], figure
        for key in parents:
            target = target[key]
        if value == {"$delete": True}:
            del target[last]
        else:
            target[last] = value
    return figure
