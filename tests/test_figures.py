"""Figures: what is stored, what a live front end gets, and the words that each must bring."""

import json
import math

import numpy as np
import pytest
import torch

from seqarch.figures import PLOTLY_MIME, bars, compact, figure, heatmap, lines, show

WORDS = dict(caption="Two curves that cross.", alt="A falling and a rising line that meet in the middle.")


def stored(fig):
    return show(fig, **WORDS)._repr_mimebundle_()[PLOTLY_MIME]


def test_stored_figures_are_plain_json_with_their_words():
    fig = lines({"a": (torch.arange(3), np.array([1.0, 0.5, 0.25]))}, x="step", y="loss (nats)")
    content = stored(fig)
    assert json.loads(json.dumps(content)) == content
    assert content["data"][0]["x"] == [0, 1, 2] and content["data"][0]["y"] == [1.0, 0.5, 0.25]
    assert content["layout"]["meta"] == WORDS
    assert content["layout"]["xaxis"]["title"]["text"] == "step"


def test_a_live_front_end_gets_plotlys_own_display(monkeypatch):
    shown = []
    monkeypatch.setenv("SEQARCH_EXPLORE", "live")
    monkeypatch.setattr("plotly.graph_objects.Figure.show", lambda self: shown.append(self))
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: shown.append(a))
    fig = figure("t", x="x", y="y")
    show(fig, **WORDS)._ipython_display_()
    assert shown[0] is fig and len(shown) == 2


def test_compact_keeps_significant_digits_and_leaves_gaps():
    assert compact([123456.0, 0.000123456, 7, True]) == [123500.0, 0.0001235, 7, True]
    assert compact(torch.tensor([1.0, math.nan, math.inf])) == [1.0, None, None]
    assert compact(np.array([[1.23456, 2.0]]), 3) == [[1.23, 2.0]]


def test_bands_bars_and_heat_maps_carry_their_numbers():
    band = lines({"a": ([0, 1], [1, 2])}, bands={"a": ([0, 1], [2, 3])}, x="x", y="y")
    assert [t.fill for t in band.data] == ["toself", None] and list(band.data[0].y) == [2, 3, 1, 0]
    bar = bars({"a": (0.5, 0.1), "b": 0.25}, y="accuracy")
    assert list(bar.data[0].y) == [0.5, 0.25] and list(bar.data[0].error_y.array) == [0.1, 0.0]
    heat = heatmap(torch.tensor([[-1.0, 0.5]]), x="x", y="y", diverging=True)
    assert (heat.data[0].zmin, heat.data[0].zmax) == (-1.0, 1.0)


@pytest.mark.parametrize("change", [dict(caption=""), dict(alt="figure"), dict(alt=None)])
def test_every_figure_needs_words(change):
    with pytest.raises(ValueError, match="expected (caption|alt) to be a sentence"):
        show(figure(x="x", y="y"), **{**WORDS, **change})
