"""Planar geometry as sequence data: convex hulls, shortest tours and Delaunay triangulations (chapter 04).

Every problem is a set of points in the unit square, and its answer is a sequence of *positions* of the input:

=====================  ===========================================================================
``hull_batch``         hull vertices counter-clockwise, starting at the hull vertex of smallest index
``tsp_batch``          the shortest tour through all points, starting at point 1
``delaunay_batch``     three increasing indices per triangle, triangles in the order of their incentres
=====================  ===========================================================================

All three return ``(points, targets)``: points of shape ``(batch, n, 2)``, float32 in [0, 1), and targets of shape
``(batch, m)``, int64, in which ``1..n`` names a point, ``0`` (``STOP``) ends the answer and ``-1`` (``IGNORE``) is
padding. Points are drawn in float32 and every solver works in float64 on exactly those values: what the network
sees and what the solver saw are the same points. Draws whose answer hangs on a rounding error (a point on a hull
edge, four points on a circle) are drawn again.

The functions on single instances (``convex_hull``, ``held_karp``, ``delaunay_triangles``, ...) use numpy
conventions, 0-based indices; only targets are 1-based, because position 0 means stop.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch

__all__ = [
    "IGNORE",
    "STOP",
    "answers",
    "check_points",
    "convex_hull",
    "crosses_itself",
    "delaunay_batch",
    "delaunay_triangles",
    "held_karp",
    "hull_batch",
    "nearest_neighbour",
    "polygon_area",
    "pad_answers",
    "random_points",
    "tour_length",
    "tsp_batch",
    "two_opt",
]

STOP = 0
IGNORE = -1
MARGIN = 1e-6  # the least cross product (twice a triangle's area) between a hull edge and any other point
MARGIN_CIRCLE = 1e-9  # the least in-circle determinant of a Delaunay triangle and any other point
LARGEST_EXACT_TOUR = 20


# --------------------------------------------------------------------------------------------------------------
# Points
# --------------------------------------------------------------------------------------------------------------


def check_points(points, least: int = 1, batched: bool = True) -> np.ndarray:
    """Return the points as a float64 array, or raise a ValueError that says what was expected.

    Args:
        points: an array or tensor, ``(batch, n, 2)``, or ``(n, 2)`` when `batched` is false.
        least: the smallest n that makes sense to the caller (3 for a hull).
        batched: whether a batch axis is expected.
    """
    array = points.detach().cpu().numpy() if isinstance(points, torch.Tensor) else np.asarray(points)
    expected = "(batch, n, 2)" if batched else "(n, 2)"
    if array.ndim != (3 if batched else 2) or array.shape[-1] != 2:
        raise ValueError(f"expected points of shape {expected}, got {tuple(array.shape)}")
    if array.shape[-2] < least:
        raise ValueError(f"expected n >= {least} points, got {tuple(array.shape)}")
    return array.astype(np.float64)


def _generator(rng) -> np.random.Generator:
    if isinstance(rng, np.random.Generator):
        return rng
    if isinstance(rng, (int, np.integer)) and not isinstance(rng, bool):
        return np.random.default_rng(int(rng))
    raise ValueError(f"expected rng to be an integer seed or a numpy Generator, got {type(rng).__name__}")


def _check_sizes(n: int, batch: int, least: int) -> None:
    if n < least:
        raise ValueError(f"expected n >= {least} points, got n = {n}")
    if batch < 1:
        raise ValueError(f"expected batch >= 1, got batch = {batch}")


def random_points(n: int, batch: int, rng) -> np.ndarray:
    """Points uniform in the unit square, shape (batch, n, 2), float64 values that float32 represents exactly."""
    _check_sizes(n, batch, least=1)
    return _generator(rng).random((batch, n, 2), dtype=np.float32).astype(np.float64)


def _draw(n: int, batch: int, rng, solve):
    """Draw points and solve them; redraw the instances that ``solve`` reports as degenerate.

    ``solve(points) -> (answers, good)`` takes (b, n, 2) and returns a list of b answers and a boolean array (b,).
    """
    rng = _generator(rng)
    points, results = np.empty((batch, n, 2)), [None] * batch
    missing = np.arange(batch)
    while len(missing):
        drawn = random_points(n, len(missing), rng)
        found, good = solve(drawn)
        for row in np.flatnonzero(good):
            points[missing[row]], results[missing[row]] = drawn[row], found[row]
        missing = missing[~good]
    return points, results


def pad_answers(results: list[list[int]], width: int | None = None) -> torch.Tensor:
    """Answers as one (batch, width) int64 tensor: each is followed by ``STOP``, then by ``IGNORE``.

    >>> pad_answers([[1, 3], [2, 3, 1]])
    tensor([[ 1,  3,  0, -1],
            [ 2,  3,  1,  0]])
    """
    longest = max(len(result) for result in results) + 1
    if width is not None and width < longest:
        raise ValueError(f"expected width >= {longest}, the longest answer and its stop, got width = {width}")
    targets = torch.full((len(results), width or longest), IGNORE, dtype=torch.long)
    for row, result in enumerate(results):
        targets[row, : len(result)] = torch.as_tensor(result, dtype=torch.long)
        targets[row, len(result)] = STOP
    return targets


def answers(targets: torch.Tensor) -> list[list[int]]:
    """The inverse of ``pad_answers``: each row up to its first ``STOP`` (or ``IGNORE``) as a list of 1-based points."""
    results = []
    for row in targets.tolist():
        ends = [i for i, index in enumerate(row) if index <= 0]
        results.append(row[: ends[0]] if ends else row)
    return results


# --------------------------------------------------------------------------------------------------------------
# Convex hull
# --------------------------------------------------------------------------------------------------------------


def _cross(o, a, b):
    """Twice the signed area of the triangle o, a, b: positive when it turns left; broadcasts over the front axes."""
    return (a[..., 0] - o[..., 0]) * (b[..., 1] - o[..., 1]) - (a[..., 1] - o[..., 1]) * (b[..., 0] - o[..., 0])


def convex_hull(points) -> list[int]:
    """Hull vertices of (n, 2) points, counter-clockwise from the smallest index; 0-based.

    Andrew's monotone chain, O(n log n): walk the points from left to right, and drop every point at which the walk
    does not turn left; the same from right to left gives the upper side.
    """
    points = check_points(points, least=3, batched=False)
    order = sorted(range(len(points)), key=lambda i: (points[i, 0], points[i, 1]))
    hull: list[int] = []
    for sweep in (order, order[::-1]):
        chain: list[int] = []
        for i in sweep:
            while len(chain) >= 2 and _cross(points[chain[-2]], points[chain[-1]], points[i]) <= 0:
                chain.pop()
            chain.append(i)
        hull += chain[:-1]  # the last point starts the other side
    start = hull.index(min(hull))
    return hull[start:] + hull[:start]


def _gift_wrap(points: np.ndarray) -> tuple[list[list[int]], np.ndarray]:
    """Hulls of a batch (B, n, 2) at once, and which of them are safe from rounding.

    From the lowest point on, turn the last edge counter-clockwise until it meets the next point: h steps of O(B n).
    """
    batch, n, _ = points.shape
    rows = np.arange(batch)
    first = np.lexsort((points[..., 0], points[..., 1]), axis=-1)[:, 0]
    current, heading = first.copy(), np.zeros(batch)
    wrapped, good, open_ = [[int(i)] for i in first], np.ones(batch, dtype=bool), np.ones(batch, dtype=bool)
    while open_.any():
        step = points - points[rows, current][:, None]
        turn = np.mod(np.arctan2(step[..., 1], step[..., 0]) - heading[:, None], 2 * np.pi)
        turn[rows, current] = np.inf
        following = turn.argmin(axis=1)
        distance = np.abs(_cross(points[rows, current][:, None], points[rows, following][:, None], points))
        distance[rows, current] = distance[rows, following] = np.inf
        good &= ~open_ | (distance.min(axis=1) >= MARGIN)
        open_ &= (following != first) & good
        for row in np.flatnonzero(open_):
            wrapped[row].append(int(following[row]))
        heading = np.arctan2(
            points[rows, following, 1] - points[rows, current, 1],
            points[rows, following, 0] - points[rows, current, 0],
        )
        current = following
    for row, hull in enumerate(wrapped):
        start = hull.index(min(hull))
        wrapped[row] = hull[start:] + hull[:start]
    return wrapped, good


def hull_batch(n: int, batch: int, rng) -> tuple[torch.Tensor, torch.Tensor]:
    """Random points and their convex hulls.

    Args:
        n: number of points, at least 3.
        batch: number of instances.
        rng: an integer seed or a numpy Generator; the same seed gives the same batch.

    Returns:
        points ``(batch, n, 2)`` float32, and targets ``(batch, m)`` int64: 1-based hull vertices, counter-clockwise,
        starting from the hull vertex of smallest index; then ``STOP``, then ``IGNORE``. m is the longest hull of the
        batch plus one.

    Raises:
        ValueError: n or batch too small, or rng of another type.
    """
    _check_sizes(n, batch, least=3)
    points, hulls = _draw(n, batch, rng, _gift_wrap)
    return torch.tensor(points, dtype=torch.float32), pad_answers([[i + 1 for i in hull] for hull in hulls])


def polygon_area(points, cycle) -> float:
    """Area enclosed by the polygon through ``points[cycle]`` (0-based), by the shoelace formula; 0 below 3 vertices."""
    corners = check_points(points, batched=False)[list(cycle)].reshape(-1, 2)
    following = np.roll(corners, -1, axis=0)
    return abs(float((corners[:, 0] * following[:, 1] - corners[:, 1] * following[:, 0]).sum())) / 2


def crosses_itself(points, cycle) -> bool:
    """Whether the closed line through ``points[cycle]`` (0-based) is no simple polygon.

    True when two of its sides cross, when a vertex comes back, or when it has fewer than three vertices.
    """
    cycle = list(cycle)
    if len(cycle) < 3 or len(set(cycle)) < len(cycle):
        return True
    a = check_points(points, batched=False)[cycle]
    b = np.roll(a, -1, axis=0)  # side i runs from a[i] to b[i]
    separates = _cross(a[:, None], b[:, None], a) * _cross(a[:, None], b[:, None], b) < 0  # [i, j]: line i cuts side j
    return bool((separates & separates.T).any())  # neighbours share a vertex: their product is 0


# --------------------------------------------------------------------------------------------------------------
# Travelling salesman
# --------------------------------------------------------------------------------------------------------------


def _distances(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[..., :, None, :] - points[..., None, :, :], axis=-1)


def tour_length(points, tour) -> float:
    """Length of the closed tour through ``points[tour]`` (0-based), in units of the square's side."""
    stops = check_points(points, batched=False)[list(tour)]
    return float(np.linalg.norm(stops - np.roll(stops, -1, axis=0), axis=-1).sum())


def _canonical_tour(tour: list[int]) -> list[int]:
    """The same cycle from point 0, in the direction whose second point has the smaller index."""
    start = tour.index(0)
    tour = tour[start:] + tour[:start]
    return tour if len(tour) < 3 or tour[1] < tour[-1] else tour[:1] + tour[:0:-1]


def _held_karp(distance: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
    """Shortest tours for a batch of distance matrices (B, n, n): lengths (B,) and tours."""
    batch, n, _ = distance.shape
    others = n - 1  # point 0 is the start; bit j of a set stands for point j + 1
    between, from_start = distance[:, 1:, 1:], distance[:, 0, 1:]
    sets = np.arange(1 << others)
    sizes = np.array([int(s).bit_count() for s in sets])
    best = np.full((len(sets), others, batch), np.inf)
    previous = np.zeros((len(sets), others, batch), dtype=np.int8)
    for j in range(others):
        best[1 << j, j] = from_start[:, j]
    for size in range(2, others + 1):
        for j in range(others):
            with_j = sets[(sizes == size) & (sets >> j & 1 == 1)]
            candidates = best[with_j ^ (1 << j)] + between[:, :, j].T  # D(S - j, k) + d(k, j): (sets, k, B)
            previous[with_j, j] = candidates.argmin(axis=1)
            best[with_j, j] = candidates.min(axis=1)
    closed = best[-1] + from_start.T
    last, lengths, tours = closed.argmin(axis=0), closed.min(axis=0), []
    for row in range(batch):
        subset, j, tour = len(sets) - 1, int(last[row]), []
        while subset:
            tour.append(j + 1)
            subset, j = subset ^ (1 << j), int(previous[subset, j, row])
        tours.append(_canonical_tour([0] + tour[::-1]))
    return lengths, tours


def held_karp(distance) -> tuple[float, list[int]]:
    """The shortest closed tour of a distance matrix (n, n), n <= 20: its length and its order, 0-based, from point 0.

    Dynamic programming over sets (Held and Karp 1962), O(2^n n^2): D(S, j), the shortest way from point 0 through all
    of S that ends in j, is the minimum over k in S - {j} of D(S - {j}, k) + d(k, j).
    """
    distance = np.asarray(distance, dtype=np.float64)
    if distance.ndim != 2 or distance.shape[0] != distance.shape[1]:
        raise ValueError(f"expected distance of shape (n, n), got {distance.shape}")
    n = len(distance)
    if not 2 <= n <= LARGEST_EXACT_TOUR:
        raise ValueError(f"expected 2 <= n <= {LARGEST_EXACT_TOUR} points for an exact tour, got n = {n}")
    lengths, tours = _held_karp(distance[None])
    return float(lengths[0]), tours[0]


def nearest_neighbour(points) -> list[int]:
    """The greedy tour: from point 0 always to the nearest point not yet visited; 0-based, O(n^2)."""
    distance = _distances(check_points(points, batched=False))
    tour, left = [0], set(range(1, len(distance)))
    while left:
        tour.append(min(left, key=lambda j: (distance[tour[-1], j], j)))
        left.remove(tour[-1])
    return tour


def two_opt(points, tour) -> list[int]:
    """Improve a tour by reversing stretches of it until no reversal makes it shorter; canonical, 0-based."""
    distance, tour = _distances(check_points(points, batched=False)), list(tour)
    improved = True
    while improved:
        improved = False
        for i, j in combinations(range(len(tour)), 2):
            a, b, c, d = tour[i], tour[(i + 1) % len(tour)], tour[j], tour[(j + 1) % len(tour)]
            if distance[a, c] + distance[b, d] < distance[a, b] + distance[c, d] - 1e-12:
                tour[i + 1 : j + 1] = tour[i + 1 : j + 1][::-1]
                improved = True
    return _canonical_tour(tour)


def tsp_batch(n: int, batch: int, rng, solver: str = "exact") -> tuple[torch.Tensor, torch.Tensor]:
    """Random points and a tour through all of them.

    Args:
        n: number of points, at least 3.
        batch: number of instances.
        rng: an integer seed or a numpy Generator.
        solver: ``"exact"`` is Held-Karp, n <= 20; ``"approximate"`` is nearest neighbour improved by 2-opt, any n.

    Returns:
        points ``(batch, n, 2)`` float32, and targets ``(batch, n + 1)`` int64: the tour from point 1, in the direction
        whose second point has the smaller index; then ``STOP``.

    Raises:
        ValueError: n or batch too small, n too large for an exact tour, an unknown solver, or rng of another type.
    """
    _check_sizes(n, batch, least=3)
    if solver not in ("exact", "approximate"):
        raise ValueError(f'expected solver to be "exact" or "approximate", got {solver!r}')
    if solver == "exact" and n > LARGEST_EXACT_TOUR:
        raise ValueError(f'expected n <= {LARGEST_EXACT_TOUR} for solver="exact", got n = {n}')
    points = random_points(n, batch, rng)
    if solver == "exact":
        at_once = max(1, (1 << 24) // (n << (n - 1)))  # the table holds 2^(n-1) (n-1) numbers per instance
        chunks = [_held_karp(_distances(points[i : i + at_once]))[1] for i in range(0, batch, at_once)]
        tours = [tour for chunk in chunks for tour in chunk]
    else:
        tours = [two_opt(instance, nearest_neighbour(instance)) for instance in points]
    return torch.tensor(points, dtype=torch.float32), pad_answers([[i + 1 for i in tour] for tour in tours])


# --------------------------------------------------------------------------------------------------------------
# Delaunay triangulation
# --------------------------------------------------------------------------------------------------------------


def _incentres(corners: np.ndarray) -> np.ndarray:
    """Incentres of triangles (..., 3, 2): the corners weighted by the lengths of the opposite sides."""
    opposite = np.linalg.norm(np.roll(corners, -1, axis=-2) - np.roll(corners, -2, axis=-2), axis=-1)
    return (opposite[..., None] * corners).sum(axis=-2) / opposite.sum(axis=-1)[..., None]


def _sorted_triangles(points: np.ndarray, triangles) -> list[tuple[int, int, int]]:
    triangles = np.sort(np.asarray(triangles), axis=-1)
    centres = np.round(_incentres(points[triangles]), 9)
    return [tuple(int(i) for i in triangles[row]) for row in np.lexsort((centres[:, 1], centres[:, 0]))]


def delaunay_triangles(points) -> list[tuple[int, int, int]]:
    """Delaunay triangles of (n, 2) points by scipy: increasing 0-based triples, in the order of their incentres.

    Triangles are sorted by the coordinates of their incentres, rounded to nine decimals, first x, then y.
    """
    from scipy.spatial import Delaunay

    points = check_points(points, least=3, batched=False)
    return _sorted_triangles(points, Delaunay(points).simplices)


def _empty_circles(points: np.ndarray) -> tuple[list[list[tuple[int, int, int]]], np.ndarray]:
    """Delaunay triangles of a small batch (B, n, 2) from the definition: no other point inside the circumcircle.

    All C(n, 3) triples against all n points at once, O(B n^4): for n <= 12, where that beats a call per instance.
    """
    triples = np.array(list(combinations(range(points.shape[1]), 3)))
    corners = points[:, triples]  # (B, triples, 3, 2)
    turn = _cross(corners[..., 0, :], corners[..., 1, :], corners[..., 2, :])
    rays = corners[:, :, None] - points[:, None, :, None]  # (B, triples, n, 3, 2): from each point to each corner
    lifted = np.concatenate([rays, (rays**2).sum(axis=-1, keepdims=True)], axis=-1)
    inside = np.linalg.det(lifted) * np.sign(turn)[..., None]  # > 0: the point lies in the circle
    own = (triples[:, :, None] == np.arange(points.shape[1])).any(axis=1)
    inside[:, own] = -np.inf
    empty = (inside <= 0).all(axis=-1)
    clear = np.abs(turn).min(axis=-1) >= MARGIN
    clear &= np.abs(inside).min(axis=(-2, -1)) >= MARGIN_CIRCLE
    return [
        _sorted_triangles(instance, triples[chosen]) if good else []
        for instance, chosen, good in zip(points, empty, clear, strict=True)
    ], clear


def _delaunay(points: np.ndarray):
    if points.shape[1] <= 12:
        return _empty_circles(points)
    _, good = _gift_wrap(points)
    return [delaunay_triangles(instance) if ok else [] for instance, ok in zip(points, good, strict=True)], good


def delaunay_batch(n: int, batch: int, rng) -> tuple[torch.Tensor, torch.Tensor]:
    """Random points and their Delaunay triangulations.

    Args:
        n: number of points, at least 3. Above 12 the triangles come from scipy.
        batch: number of instances.
        rng: an integer seed or a numpy Generator.

    Returns:
        points ``(batch, n, 2)`` float32, and targets ``(batch, m)`` int64: three increasing 1-based indices per
        triangle, triangles sorted by their incentres; then ``STOP``, then ``IGNORE``. A set of n points of which h lie
        on the hull has 2n - 2 - h triangles.

    Raises:
        ValueError: n or batch too small, or rng of another type.
    """
    _check_sizes(n, batch, least=3)
    points, results = _draw(n, batch, rng, _delaunay)
    flat = [[i + 1 for triangle in triangles for i in triangle] for triangles in results]
    return torch.tensor(points, dtype=torch.float32), pad_answers(flat)
