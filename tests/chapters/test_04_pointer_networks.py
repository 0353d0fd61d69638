"""Chapter 04: the network's laws, its decoding, and exercises whose checks can tell right from wrong."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.data import geometry
from seqarch.kernels.additive_attention import additive_scores
from tests.notebooks import load_definitions

chapter = load_definitions("04-pointer-networks")


def network(seed=0, hidden=16, kind="pointer"):
    torch.manual_seed(seed)
    made = (
        chapter.PointerNetwork(hidden) if kind == "pointer" else chapter.DictionaryNetwork(8, hidden, kind == "blend")
    )
    for p in made.parameters():
        p.data.mul_(2)  # opinions, though no knowledge
    return made.eval()


KINDS = ["pointer", "blend", "plain"]


class TestScores:
    @settings(max_examples=20)
    @given(m=st.integers(1, 5), n=st.integers(1, 6), H=st.integers(1, 8), seed=st.integers(0, 1000))
    def test_loops_broadcasting_and_kernel_agree(self, m, n, H, seed):
        g = torch.Generator().manual_seed(seed)
        d, e = torch.randn(2, m, H, generator=g), torch.randn(2, n, H, generator=g)
        W_1, W_2, v = (torch.randn(*s, generator=g) for s in ((H, H), (H, H), (H,)))
        a, blend = chapter.attend(d, e, W_1, W_2, v)
        u = chapter.point(d, e, W_1, W_2, v)
        torch.testing.assert_close(u.softmax(-1), a)
        torch.testing.assert_close(additive_scores(d @ W_2.T, e @ W_1.T, v), u, rtol=0, atol=1e-5)
        for b in range(2):
            a_loops, blend_loops = chapter.attend_loops(d[b], e[b], W_1, W_2, v)
            torch.testing.assert_close(a[b], a_loops, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(blend[b], blend_loops, rtol=1e-4, atol=1e-5)

    def test_permuting_keys_and_mask_permutes_the_scores(self):
        model, order = network(), torch.tensor([3, 0, 5, 1, 4, 2])
        d, E = torch.randn(2, 4, 16), torch.randn(2, 6, 16)
        mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
        torch.testing.assert_close(model.output(d, E[:, order], mask[:, order]), model.output(d, E, mask)[..., order])


class TestForward:
    @pytest.mark.parametrize("n", [3, 5, 8, 30])
    def test_one_set_of_parameters_serves_any_n(self, n):
        points, targets = geometry.hull_batch(n, 3, n)
        p = network()(points, targets).softmax(-1)
        assert p.shape == (*targets.shape, n + 1)
        torch.testing.assert_close(p.sum(-1), torch.ones(targets.shape))

    @pytest.mark.parametrize("kind", KINDS)
    def test_teacher_forced_equals_step_by_step(self, kind):
        model, (points, targets) = network(kind=kind), geometry.hull_batch(8, 10, 0)
        with torch.no_grad():
            at_once, memory, last = model(points, targets), chapter.start_decoding(model, points), torch.full((10,), -1)
            for i in range(targets.shape[1]):
                logits, memory = chapter.make_step(model)(last, memory)
                real = targets[:, i] >= 0
                torch.testing.assert_close(logits[real], at_once[real, i], rtol=1e-4, atol=1e-5)
                last = targets[:, i]

    def test_padding_changes_neither_scores_nor_answers_nor_gradients(self):
        model, lengths = network(), torch.tensor([3, 7, 5])
        boards = [geometry.hull_batch(int(n), 1, int(n)) for n in lengths]
        targets = geometry.pad_answers([geometry.answers(t)[0] for _, t in boards])
        padded = torch.full((3, 7, 2), 1e6)
        for b, (board, _) in enumerate(boards):
            padded[b, : lengths[b]] = board[0]
        together = model(padded, targets, lengths)
        answers = chapter.decode(model, padded, "no_repeat", lengths=lengths)
        for b, (board, _) in enumerate(boards):
            n = int(lengths[b])
            torch.testing.assert_close(
                together[b, :, : n + 1], model(board, targets[b : b + 1])[0], rtol=1e-4, atol=1e-5
            )
            assert (together[b].softmax(-1)[:, n + 1 :] == 0).all()
            assert answers[b] == chapter.decode(model, board, "no_repeat")[0]
        loss = F.cross_entropy(together.flatten(0, 1), targets.flatten(), ignore_index=-1)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, list(model.parameters())))

    def test_later_targets_cannot_change_earlier_scores(self):
        model, (points, targets) = network(), geometry.tsp_batch(6, 4, 0)
        changed = targets.clone()
        changed[:, 3] = 1
        a, b = model(points, targets), model(points, changed)
        assert torch.equal(a[:, :4], b[:, :4]) and not torch.equal(a[:, 4], b[:, 4])

    def test_the_loss_counts_the_stop_and_skips_the_padding(self):
        model, (points, targets) = network(), geometry.hull_batch(6, 20, 1)
        log_p = model(points, targets).log_softmax(-1)
        counted = [-log_p[b, i, c] for b, row in enumerate(targets.tolist()) for i, c in enumerate(row) if c != -1]
        assert (targets == -1).any()
        torch.testing.assert_close(chapter.pointer_loss(model, (points, targets)), torch.stack(counted).mean())

    @pytest.mark.parametrize(
        "points, targets, message",
        [
            (torch.rand(4, 2), torch.ones(4, 1).long(), r"expected points of shape \(B, n, 2\), got \(4, 2\)"),
            (torch.rand(2, 4, 3), torch.ones(2, 1).long(), r"expected points of shape \(B, n, 2\), got \(2, 4, 3\)"),
            (
                torch.rand(2, 4, 2),
                torch.ones(3, 2).long(),
                r"expected targets of shape \(B, m\) with B = 2, got \(3, 2\)",
            ),
            (torch.rand(2, 4, 2), torch.tensor([[1, 5], [2, 0]]), "expected targets to be at most n = 4, got 5"),
        ],
    )
    def test_errors(self, points, targets, message):
        with pytest.raises(ValueError, match=message):
            network()(points, targets)

    def test_a_dictionary_cannot_name_a_ninth_point(self):
        points, targets = geometry.hull_batch(12, 2, 0)
        for call in (lambda m: m(points, targets), lambda m: chapter.decode(m, points)):
            with pytest.raises(ValueError, match="expected at most 8 points, the dictionary's size, got 12"):
                call(network(kind="blend"))


class TestDecoding:
    @settings(max_examples=25)
    @given(n=st.integers(3, 9), width=st.integers(1, 4), seed=st.integers(0, 1000))
    def test_valid_tour_always_gives_a_permutation(self, n, width, seed):
        points, _ = geometry.tsp_batch(n, 5, seed)
        for tour in chapter.decode(network(seed), points, "valid_tour", width=width):
            assert sorted(tour) == list(range(1, n + 1))

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_repeat_repeats_nothing_and_may_stop(self, kind):
        points, _ = geometry.hull_batch(8, 50, 0)
        answers = chapter.decode(network(3, kind=kind), points, "no_repeat")
        assert all(len(set(a)) == len(a) and 0 not in a for a in answers)

    def test_a_wide_enough_beam_finds_the_most_probable_tour(self):
        model, (points, _) = network(), geometry.tsp_batch(4, 10, 0)
        orders = torch.tensor([[*order, 0] for order in itertools.permutations(range(1, 5))])
        for board, tour in zip(points, chapter.decode(model, points, "valid_tour", width=24), strict=True):
            memory = chapter.start_decoding(model, board.expand(24, 4, 2))
            last, total = torch.full((24,), -1), torch.zeros(24)
            for i in range(5):
                with torch.no_grad():
                    logits, memory = chapter.make_step(model, "valid_tour")(last, memory)
                total += logits.log_softmax(-1).gather(1, orders[:, i : i + 1])[:, 0]
                last = orders[:, i]
            assert tour == orders[total.argmax(), :4].tolist()

    def test_the_mask_carried_along_is_the_mask_from_the_history(self):
        model, (points, _) = network(), geometry.hull_batch(6, 4, 0)
        for mode in ("free", "no_repeat", "valid_tour"):
            memory, last, history = chapter.start_decoding(model, points), torch.full((4,), -1), []
            for _ in range(5):
                logits, memory = chapter.make_step(model, mode)(last, memory)
                prev = torch.stack(history, 1) if history else torch.empty(4, 0, dtype=torch.long)
                allowed = chapter.solve_pointer_mask(prev, torch.full((4,), 6), 6, mode)
                assert torch.equal(torch.isfinite(logits), allowed)
                last = logits[:, 1:].argmax(-1) + 1
                history.append(last)

    def test_unknown_mode(self):
        with pytest.raises(ValueError, match="expected mode to be free, no_repeat or valid_tour, got 'tour'"):
            chapter.decode(network(), torch.rand(1, 4, 2), "tour")


class TestMetrics:
    def test_the_truth_scores_perfectly(self):
        points, targets = geometry.hull_batch(9, 40, 0)
        scores = chapter.hull_scores(geometry.answers(targets), points, targets)
        assert scores == pytest.approx(dict(accuracy=1, area=1, crossing=0))
        points, targets = geometry.delaunay_batch(6, 40, 0)
        assert chapter.delaunay_scores(geometry.answers(targets), targets) == dict(accuracy=1, coverage=1)

    def test_the_same_cycle_backwards_is_wrong_but_keeps_its_area(self):
        points, targets = geometry.hull_batch(9, 40, 0)
        scores = chapter.hull_scores([a[::-1] for a in geometry.answers(targets)], points, targets)
        assert scores == pytest.approx(dict(accuracy=0, area=1, crossing=0))

    def test_a_bow_tie_counts_as_crossing(self):
        points = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]])
        scores = chapter.hull_scores([[1, 3, 2, 4]], points, torch.tensor([[1, 2, 3, 4, 0]]))
        assert scores["crossing"] == 1 and scores["accuracy"] == 0

    def test_coverage_ignores_order_and_counts_a_triangle_once(self):
        targets = torch.tensor([[1, 2, 3, 2, 3, 4, 0]])
        assert chapter.delaunay_scores([[4, 3, 2, 1, 3, 2]], targets) == dict(accuracy=1, coverage=1)
        assert chapter.delaunay_scores([[1, 2, 3, 1, 2, 3]], targets) == dict(accuracy=0, coverage=0.5)
        assert chapter.delaunay_scores([[1, 2, 3, 2, 3, 4, 1]], targets) == dict(accuracy=0, coverage=1)
        assert chapter.delaunay_scores([[]], targets) == dict(accuracy=0, coverage=0)

    def test_respelling_keeps_the_answer(self):
        rng = np.random.default_rng(0)
        points, targets = geometry.hull_batch(7, 30, 0)
        _, other = chapter.turned((points, targets), rng)
        assert not torch.equal(other, targets) and chapter.same_cycle(geometry.answers(other), targets) == 1
        points, targets = geometry.delaunay_batch(6, 30, 0)
        _, other = chapter.shuffled((points, targets), rng)
        assert not torch.equal(other, targets)
        assert chapter.delaunay_scores(geometry.answers(other), targets) == dict(accuracy=1, coverage=1)


def nearest_neighbour_tour(distance):
    tour = [0]
    while len(tour) < len(distance):
        tour.append(min(set(range(len(distance))) - set(tour), key=lambda j: distance[tour[-1]][j]))
    return sum(distance[a][b] for a, b in zip(tour, [*tour[1:], 0], strict=True)), tour


def backward(**wrong):
    """The gradients by broadcasting, with one plausible mistake."""

    def answer(q, k, v, g):
        t = torch.tanh(q[:, :, None] + k[:, None])
        slope = g[..., None] * (v if "no v" not in wrong else 1) * (1 - (t**2 if "no square" not in wrong else t))
        dv = torch.einsum("bmn,bmnh->h", g, t)
        return slope.sum(1 if "swapped" in wrong else 2), slope.sum(2 if "swapped" in wrong else 1), dv

    return answer


def mask_with(change):
    def answer(prev, lengths, n, mode):
        return change(chapter.solve_pointer_mask(prev, lengths, n, mode), prev, lengths, n, mode)

    return answer


def mutate(mask, index, value):
    mask = mask.clone()
    mask[index] = value
    return mask


WRONG = {
    "check_ccw": [
        lambda a, b, c: -chapter.solve_ccw(a, b, c),
        lambda a, b, c: chapter.solve_ccw(a, b, c) / 2,
        lambda a, b, c: abs(chapter.solve_ccw(a, b, c)),
        lambda a, b, c: b[0] * c[1] - b[1] * c[0],
        lambda a, b, c: float(np.sign(chapter.solve_ccw(a, b, c))),
    ],
    "check_canonical_hull": [
        lambda cycle, points: list(cycle),
        lambda cycle, points: sorted(cycle),
        lambda cycle, points: cycle[cycle.index(min(cycle)) :] + cycle[: cycle.index(min(cycle))],
        lambda cycle, points: [i - 1 for i in chapter.solve_canonical_hull(cycle, points)],
        lambda cycle, points: chapter.solve_canonical_hull(cycle, points)[::-1],
    ],
    "check_shortest_tour": [
        nearest_neighbour_tour,
        lambda d: (chapter.solve_shortest_tour(d)[0] - 0.01, chapter.solve_shortest_tour(d)[1]),
        lambda d: (chapter.solve_shortest_tour(d)[0], chapter.solve_shortest_tour(d)[1][::-1]),
        lambda d: (sum(d[i][i - len(d) + 1] for i in range(len(d))), list(range(len(d)))),
        lambda d: chapter.solve_shortest_tour((np.asarray(d) + np.asarray(d).T) / 2),
    ],
    "check_pointer_mask": [
        mask_with(lambda m, prev, lengths, n, mode: ~m),
        mask_with(lambda m, prev, lengths, n, mode: m.float()),
        mask_with(lambda m, prev, lengths, n, mode: mutate(m, (slice(None), 0), True)),
        mask_with(lambda m, prev, lengths, n, mode: mutate(m, (0, 0), mode != "valid_tour" or prev.shape[1] >= n)),
        lambda prev, lengths, n, mode: chapter.solve_pointer_mask(prev, torch.full_like(lengths, n), n, mode),
        lambda prev, lengths, n, mode: chapter.solve_pointer_mask((prev - 1).clamp(min=0), lengths, n, mode),
        lambda prev, lengths, n, mode: chapter.solve_pointer_mask(prev[:, -1:], lengths, n, mode),
    ],
    "check_sort_targets": [
        lambda x: F.pad(x.argsort(1), (0, 1), value=0),
        lambda x: x.argsort(1) + 1,
        lambda x: F.pad(x.argsort(1).argsort(1) + 1, (0, 1), value=0),
        lambda x: F.pad(x.argsort(1, descending=True) + 1, (0, 1), value=0),
        lambda x: F.pad(x.argsort(1) + 1, (0, 1), value=-1),
        lambda x: F.pad(x.argsort(1) + 1, (0, 1), value=0).float(),
    ],
    "check_additive_scores_backward": [
        backward(**{"no v": True}),
        backward(**{"no square": True}),
        backward(**{"swapped": True}),
        lambda q, k, v, g: backward()(q, k, v, g)[:2],
        lambda q, k, v, g: (*backward()(q, k, v, g)[:2], backward()(q, k, v, g.abs())[2]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("check", list(WRONG))
class TestExercises:
    def test_plausible_wrong_answers_are_told_so(self, check):
        for number, answer in enumerate(WRONG[check]):
            verdict = getattr(chapter, check).verdict(answer)
            assert verdict.startswith("not yet: ") and len(verdict) > 20, f"wrong answer {number}: {verdict}"

    def test_the_solution_is_correct_and_an_empty_answer_is_not(self, check):
        def empty(*arguments): ...

        assert getattr(chapter, check).verdict(getattr(chapter, check.replace("check", "solve"))) == "correct"
        assert getattr(chapter, check).verdict(empty) == "not attempted yet"


def test_an_independent_backward_pass_is_accepted():
    assert chapter.check_additive_scores_backward.verdict(backward()) == "correct"
