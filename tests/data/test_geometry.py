"""seqarch.data.geometry: exact solvers against scipy, brute force and the definitions."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.data import geometry
from seqarch.data.geometry import IGNORE, STOP, answers, delaunay_batch, hull_batch, pad_answers, tsp_batch

MAKERS = [hull_batch, tsp_batch, delaunay_batch]
boards = dict(n=st.integers(3, 12), seed=st.integers(0, 10**6))


def zero_based(targets):
    return [[i - 1 for i in answer] for answer in answers(targets)]


@pytest.mark.parametrize("make", MAKERS)
@settings(max_examples=30)
@given(n=st.integers(3, 9), batch=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_layout_of_a_batch(make, n, batch, seed):
    points, targets = make(n, batch, seed)
    assert points.shape == (batch, n, 2) and points.dtype == torch.float32
    assert targets.ndim == 2 and len(targets) == batch and targets.dtype == torch.long
    assert 0 <= points.min() and points.max() < 1
    for row in targets.tolist():
        end = row.index(STOP)
        assert all(1 <= i <= n for i in row[:end]) and all(i == IGNORE for i in row[end + 1 :])
    assert (targets[:, -1] == STOP).any()  # no wider than the longest answer
    again = make(n, batch, np.random.default_rng(seed))
    assert torch.equal(points, again[0]) and torch.equal(targets, again[1])
    assert not torch.equal(points, make(n, batch, seed + 1)[0])


def test_a_generator_goes_on():
    rng = np.random.default_rng(0)
    assert not torch.equal(hull_batch(5, 4, rng)[0], hull_batch(5, 4, rng)[0])


class TestHull:
    @settings(max_examples=200)
    @given(n=st.integers(3, 60), seed=st.integers(0, 10**6))
    def test_agrees_with_scipy(self, n, seed):
        scipy = pytest.importorskip("scipy.spatial")
        points, targets = hull_batch(n, 1, seed)
        theirs = scipy.ConvexHull(points[0].double().numpy()).vertices.tolist()
        start = theirs.index(min(theirs))
        ours = zero_based(targets)[0]
        assert ours == theirs[start:] + theirs[:start] == geometry.convex_hull(points[0])

    @settings(max_examples=50)
    @given(**boards)
    def test_counter_clockwise_from_the_smallest_index_with_a_margin(self, n, seed):
        points, targets = hull_batch(n, 1, seed)
        hull, points = zero_based(targets)[0], points[0].double().numpy()
        assert hull[0] == min(hull)
        for a, b in zip(hull, hull[1:] + hull[:1], strict=True):
            others = [c for c in range(n) if c not in (a, b)]
            assert (geometry._cross(points[a], points[b], points[others]) >= geometry.MARGIN).all()

    def test_one_hundred_thousand_points_are_no_problem_for_the_chain(self):
        angle = np.linspace(0, 2 * np.pi, 8, endpoint=False)
        ring = 10 * np.stack([np.cos(angle), np.sin(angle)], 1)
        inside = np.random.default_rng(0).normal(size=(20_000, 2)).clip(-5, 5)
        assert geometry.convex_hull(np.concatenate([ring, inside])) == list(range(8))

    def test_points_on_a_hull_edge_are_drawn_again(self, monkeypatch):
        flat = np.array([[0, 0], [0.5, 0], [1, 0], [0.5, 1]])
        draws = iter([flat[None], np.array([[[0, 0], [0.5, 0.25], [1, 0], [0.5, 1]]])])
        monkeypatch.setattr(geometry, "random_points", lambda n, batch, rng: next(draws))
        points, targets = hull_batch(4, 1, 0)
        assert points[0, 1].tolist() == [0.5, 0.25] and targets.tolist() == [[1, 3, 4, 0]]

    def test_area_and_crossing(self):
        square = np.array([[0, 0], [2, 0], [2, 1], [0, 1.0]])
        assert geometry.polygon_area(square, [0, 1, 2, 3]) == geometry.polygon_area(square, [3, 2, 1, 0]) == 2
        assert geometry.polygon_area(square, [0, 1]) == geometry.polygon_area(square, []) == 0
        assert not geometry.crosses_itself(square, [0, 1, 2, 3]) and not geometry.crosses_itself(square, [0, 1, 2])
        assert geometry.crosses_itself(square, [0, 2, 1, 3])  # a bow tie
        for cycle in ([], [0], [0, 1], [0, 1, 0, 2]):
            assert geometry.crosses_itself(square, cycle)

    @settings(max_examples=50)
    @given(**boards)
    def test_a_true_hull_never_crosses_itself(self, n, seed):
        points, targets = hull_batch(n, 1, seed)
        assert not geometry.crosses_itself(points[0], zero_based(targets)[0])


class TestTour:
    @settings(max_examples=60)
    @given(n=st.integers(3, 7), seed=st.integers(0, 10**6))
    def test_shortest_of_all_tours_in_the_agreed_direction(self, n, seed):
        points, targets = tsp_batch(n, 1, seed)
        tour, points = zero_based(targets)[0], points[0].double().numpy()
        best = min(geometry.tour_length(points, (0, *rest)) for rest in itertools.permutations(range(1, n)))
        assert geometry.tour_length(points, tour) == pytest.approx(best)
        assert sorted(tour) == list(range(n)) and tour[0] == 0 and tour[1] < tour[-1]
        length, again = geometry.held_karp(np.linalg.norm(points[:, None] - points[None], axis=-1))
        assert length == pytest.approx(best) and again == tour

    def test_approximate_tours_are_tours_and_rarely_much_longer(self):
        points, exact = tsp_batch(9, 50, 0)
        same, approximate = tsp_batch(9, 50, 0, solver="approximate")
        assert torch.equal(points, same)
        lengths = np.array(
            [
                [geometry.tour_length(x, t) for t in pair]
                for x, *pair in zip(points, zero_based(exact), zero_based(approximate), strict=True)
            ]
        )
        assert all(sorted(t) == list(range(9)) and t[0] == 0 and t[1] < t[-1] for t in zero_based(approximate))
        assert (lengths[:, 1] >= lengths[:, 0] - 1e-9).all() and lengths[:, 1].mean() < 1.05 * lengths[:, 0].mean()
        assert len(answers(tsp_batch(40, 1, 0, solver="approximate")[1])[0]) == 40

    def test_nearest_neighbour_by_hand(self):
        assert geometry.nearest_neighbour(np.array([[0, 0], [3, 0], [1, 0], [1, 1.5]])) == [0, 2, 3, 1]

    def test_mean_length_matches_the_paper(self):
        """Table 2: optimal tours of 5 and 10 points have mean lengths 2.12 and 2.87."""
        for n, batch, length in ((5, 4000, 2.12), (10, 400, 2.87)):
            points, targets = tsp_batch(n, batch, 0)
            measured = np.mean([geometry.tour_length(x, t) for x, t in zip(points, zero_based(targets), strict=True)])
            assert measured == pytest.approx(length, abs=0.03)


class TestDelaunay:
    @settings(max_examples=60)
    @given(n=st.integers(3, 20), seed=st.integers(0, 10**6))
    def test_agrees_with_scipy_and_tiles_the_hull(self, n, seed):
        scipy = pytest.importorskip("scipy.spatial")
        points, targets = delaunay_batch(n, 1, seed)
        answer, points = zero_based(targets)[0], points[0].double().numpy()
        triangles = [tuple(answer[k : k + 3]) for k in range(0, len(answer), 3)]
        assert set(triangles) == {tuple(sorted(t)) for t in scipy.Delaunay(points).simplices.tolist()}
        hull = geometry.convex_hull(points)
        assert len(triangles) == 2 * n - 2 - len(hull)
        assert sum(geometry.polygon_area(points, t) for t in triangles) == pytest.approx(
            geometry.polygon_area(points, hull)
        )

    @settings(max_examples=30)
    @given(**boards)
    def test_order_of_the_triangles(self, n, seed):
        points, targets = delaunay_batch(n, 1, seed)
        answer, points = zero_based(targets)[0], points[0].double().numpy()
        centres = []
        for k in range(0, len(answer), 3):
            i, j, l = answer[k : k + 3]
            assert i < j < l
            A, B, C = points[[i, j, l]]
            a, b, c = np.linalg.norm(B - C), np.linalg.norm(C - A), np.linalg.norm(A - B)
            centres.append(tuple(np.round((a * A + b * B + c * C) / (a + b + c), 9)))
        assert centres == sorted(centres)


def test_pad_answers_and_back():
    lists = [[1, 3], [], [2, 3, 1]]
    targets = pad_answers(lists)
    assert targets.tolist() == [[1, 3, 0, -1], [0, -1, -1, -1], [2, 3, 1, 0]]
    assert answers(targets) == lists and answers(pad_answers(lists, width=9)) == lists
    assert answers(torch.tensor([[4, 2]])) == [[4, 2]]  # an answer that never stopped


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: hull_batch(2, 4, 0), "expected n >= 3 points, got n = 2"),
        (lambda: tsp_batch(2, 4, 0), "expected n >= 3 points, got n = 2"),
        (lambda: delaunay_batch(2, 4, 0), "expected n >= 3 points, got n = 2"),
        (lambda: hull_batch(5, 0, 0), "expected batch >= 1, got batch = 0"),
        (lambda: hull_batch(5, 1, 0.5), "expected rng to be an integer seed or a numpy Generator, got float"),
        (lambda: tsp_batch(21, 1, 0), 'expected n <= 20 for solver="exact", got n = 21'),
        (lambda: tsp_batch(5, 1, 0, solver="A1"), 'expected solver to be "exact" or "approximate", got \'A1\''),
        (lambda: geometry.convex_hull(np.zeros((4, 3))), r"expected points of shape \(n, 2\), got \(4, 3\)"),
        (lambda: geometry.convex_hull(np.zeros((2, 2))), r"expected n >= 3 points, got \(2, 2\)"),
        (lambda: geometry.check_points(torch.zeros(5, 2)), r"expected points of shape \(batch, n, 2\), got \(5, 2\)"),
        (lambda: geometry.held_karp(np.zeros((3, 4))), r"expected distance of shape \(n, n\), got \(3, 4\)"),
        (lambda: geometry.held_karp(np.zeros((21, 21))), "expected 2 <= n <= 20 points for an exact tour, got n = 21"),
        (lambda: pad_answers([[1, 2, 3]], width=3), "expected width >= 4, .* got width = 3"),
    ],
)
def test_errors_name_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
