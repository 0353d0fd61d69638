"""explore: one call, two worlds, the same figure in both."""

import itertools
import json

import plotly.graph_objects as go
import pytest

from seqarch.explore import Explorer, explore, is_live, restore
from seqarch.figures import PLOTLY_MIME, lines

WORDS = dict(caption="A line of chosen slope.", alt="A straight line that gets steeper with the slope.")


def draw(slope, colour="blue", marked=False):
    fig = lines({"line": ([0, 1, 2], [0, slope, 2 * slope])}, title=f"slope {slope}", x="time (s)", y="height (m)")
    fig.data[0].line.color = colour
    if marked:
        fig.data[0].marker.size = 12
        fig.add_annotation(x=1, y=slope, text="here")
    return fig


CONTROLS = dict(slope=[1, 2.5, 4], colour=["blue", "black"], marked=[False, True])


@pytest.fixture
def explorer() -> Explorer:
    return explore(draw, **WORDS, **CONTROLS, start={"slope": 2.5})


def states():
    for values in itertools.product(*CONTROLS.values()):
        yield dict(zip(CONTROLS, values, strict=True))


def test_every_stored_state_is_the_figure_that_draw_gives(explorer):
    stored = explorer.stored()
    for k, state in enumerate(states()):
        want = explorer.figure(**state)
        assert restore(stored, k) == json.loads(json.dumps(want))


def test_live_and_stored_forms_show_the_same_figure(explorer):
    """The widgets' output for a state, and the page's figure for it, have the same data and layout."""
    stored, widget = explorer.stored(), explorer.widget()
    controls, output = widget.children[0].children, widget.children[1]
    drawn = []
    explorer.draw = lambda **state: drawn.append(draw(**state)) or drawn[-1]
    for k, state in enumerate(states()):
        for control, value in zip(controls, state.values(), strict=True):
            control.value = value
        live = drawn[-1] if drawn else draw(**state)
        page = restore(stored, k)
        page["layout"].pop("meta")
        assert json.loads(live.to_json(engine="json"))["data"] == page["data"]
        live_layout = json.loads(live.to_json(engine="json"))["layout"]
        assert live_layout == page["layout"]
    assert len(drawn) >= len(list(states())) - 1
    assert output is not None


def test_only_differences_are_stored():
    """Sixty states of a heavy figure whose title alone moves cost little more than one state."""
    heavy = list(range(20_000))

    def moving_title(k):
        return go.Figure(go.Scatter(x=heavy, y=heavy), layout=dict(title=dict(text=f"k = {k}")))

    explorer = explore(moving_title, **WORDS, k=list(range(60)))
    one = len(json.dumps(explorer.figure(k=0)))
    assert len(json.dumps(explorer.stored())) < one + 60 * 120


def test_kinds_of_controls_and_start(explorer):
    controls = explorer.stored()["layout"]["meta"]["explore"]["controls"]
    assert [(c["kind"], c["start"]) for c in controls] == [("slider", 1), ("choice", 0), ("toggle", 0)]


def test_output_degrades_to_a_plain_plotly_figure(explorer, monkeypatch):
    monkeypatch.setenv("SEQARCH_EXPLORE", "stored")
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw=False: shown.append(bundle))
    explorer._ipython_display_()
    bundle = shown[0]
    assert WORDS["caption"] in bundle["text/plain"]
    figure = bundle[PLOTLY_MIME]
    go.Figure(data=figure["data"], layout=figure["layout"])  # plotly itself accepts it, states and all


def test_live_only_where_a_person_is(monkeypatch):
    monkeypatch.delenv("SEQARCH_EXPLORE", raising=False)
    assert not is_live()  # no kernel under pytest
    monkeypatch.setenv("SEQARCH_EXPLORE", "live")
    assert is_live()


@pytest.mark.parametrize(
    "controls, message",
    [
        (dict(), "expected 1 to 3 controls, got 0"),
        (dict(a=[1, 2], b=[1, 2], c=[1, 2], d=[1, 2]), "expected 1 to 3 controls, got 4"),
        (dict(slope=[1]), "expected control slope to be a list of at least two values"),
        (dict(colour="blue"), "expected control colour to be a list"),
        (dict(slope=list(range(61))), "expected at most 60 states .* got 61"),
        (dict(slope=[1, 2], start={"slope": 3}), "expected start to name values of the controls"),
    ],
)
def test_errors(controls, message):
    with pytest.raises(ValueError, match=message):
        explore(draw, **WORDS, **controls)


def test_errors_of_draw():
    with pytest.raises(ValueError, match="expected draw to return a plotly Figure, got str"):
        explore(lambda k: "figure", **WORDS, k=[1, 2]).stored()
    with pytest.raises(ValueError, match="expected draw to return 1 traces in every state, got 2"):
        explore(lambda k: go.Figure([go.Scatter(y=[1])] * k), **WORDS, k=[1, 2]).stored()
    with pytest.raises(ValueError, match="expected alt to be a sentence"):
        explore(draw, caption=WORDS["caption"], alt="line", slope=[1, 2])
