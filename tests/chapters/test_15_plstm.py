"""Chapter 15: all forms of the recurrence agree, its modes are stable, and the checks of exercises can tell."""

import math

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import plstm2d
from tests.notebooks import load_definitions

chapter = load_definitions("15-plstm")


def tokens(N, X, Y, K=2, V=2):
    return [torch.randn(N, X, Y, n, dtype=torch.float64) for n in (K, K, V)]


class TestGraphs:
    @settings(max_examples=20, deadline=None)
    @given(N=st.integers(2, 12), seed=st.integers(0, 999))
    def test_the_loop_is_masked_attention(self, N, seed):
        graph = chapter.random_dag(N, 0.4, seed)
        gates = chapter.random_gates(graph, seed)
        q, k, v = (torch.randn(N, 3, dtype=torch.float64) for _ in range(3))
        G = chapter.gating_by_solve(graph, *gates)
        torch.testing.assert_close(chapter.dag_loop(graph, q, k, v, *gates), ((q @ k.mT) * G) @ v, rtol=0, atol=1e-9)
        assert torch.equal(G.diagonal(), gates[3])

    def test_a_cycle_is_an_error(self):
        graph, x = nx.DiGraph([(0, 1), (1, 0)]), torch.zeros(2, 1)
        with pytest.raises(ValueError, match="expected a graph without cycles"):
            chapter.dag_loop(graph, x, x, x, {}, {}, {}, x)

    @settings(max_examples=20, deadline=None)
    @given(N=st.integers(2, 14), seed=st.integers(0, 999))
    def test_modes(self, N, seed):
        graph = chapter.random_dag(N, 0.4, seed)
        T = chapter.random_gates(graph, seed, -3, 3)[1]
        for e in graph.edges:
            assert sum(abs(v) for (_, old), v in chapter.p_mode(graph, T).items() if old == e) <= 1 + 1e-9
        kept = chapter.d_mode(graph, T)
        lines = nx.DiGraph((old, e) for e, old in kept)
        assert set(kept) <= set(T) and all(kept[pair] == T[pair] for pair in kept)
        for a in lines:
            for b in nx.descendants(lines, a):
                assert len(list(nx.all_simple_paths(lines, a, b))) == 1


class TestLine:
    @settings(max_examples=20, deadline=None)
    @given(L=st.integers(1, 40), seed=st.integers(0, 999))
    def test_doubling_is_the_loop_and_a_grid_of_one_row(self, L, seed):
        g = torch.Generator().manual_seed(seed)
        S, T, M, D = (torch.rand(2, L, generator=g, dtype=torch.float64) for _ in range(4))
        q, k, v = (torch.randn(2, L, 3, generator=g, dtype=torch.float64) for _ in range(3))
        want = chapter.line_loop(q, k, v, S, T, M, D)
        torch.testing.assert_close(((q @ k.mT) * chapter.line_doubling(S, T, M, D)) @ v, want, rtol=0, atol=1e-9)
        none = torch.zeros(2, 1, L, dtype=torch.float64)
        gates = {"TRL": none, "TRU": none, "SR": none, "TDL": none, "TDU": T[:, None], "SD": S[:, None], "ML": none,
                 "MU": M[:, None], "D": D[:, None]}  # fmt: skip
        grid = chapter.grid_loop(q[:, None], k[:, None], v[:, None], gates)[:, 0]
        torch.testing.assert_close(grid, want, rtol=0, atol=1e-9)


class TestGrid:
    @pytest.mark.parametrize(("X", "Y"), [(1, 1), (1, 5), (2, 2), (3, 5), (7, 4), (8, 8)])
    @pytest.mark.parametrize("shared", [True, False])
    def test_every_form_is_the_loop(self, X, Y, shared):
        gates = chapter.random_grid(1 if shared else 3, X, Y)
        q, k, v = tokens(3, X, Y)
        want = chapter.grid_loop(q, k, v, gates)
        torch.testing.assert_close(chapter.grid_wavefront(q, k, v, gates), want, rtol=0, atol=1e-11)
        torch.testing.assert_close(plstm2d(q, k, v, gates, tile=4), want, rtol=0, atol=1e-11)
        G, x, y = chapter.grid_doubling(gates)
        masked = ((q[:, x, y] @ k[:, x, y].mT) * G) @ v[:, x, y]
        torch.testing.assert_close(masked, want[:, x, y], rtol=0, atol=1e-11)
        rows = (x * Y + y).argsort()
        solved = chapter.grid_by_solve({name: gate[0] for name, gate in gates.items()})
        torch.testing.assert_close(G[0][rows][:, rows], solved, rtol=0, atol=1e-11)

    def test_gradients(self):
        names, gates = zip(*chapter.random_grid(1, 2, 3).items(), strict=True)
        inputs = [z.requires_grad_() for z in (*tokens(1, 2, 3), *gates)]
        run = lambda form: lambda q, k, v, *g: form(q, k, v, dict(zip(names, g, strict=True)))  # noqa: E731
        assert torch.autograd.gradcheck(run(chapter.grid_wavefront), inputs)

    def test_nothing_flows_back(self):
        gates, (q, k, v) = chapter.random_grid(1, 5, 6), tokens(1, 5, 6)
        other = v.clone()
        other[0, 2, 3] += 1
        moved = (plstm2d(q, k, v, gates) != plstm2d(q, k, other, gates)).any(-1)[0]
        assert moved[2:, 3:].all() and not moved[:2].any() and not moved[:, :3].any()


class TestModes:
    @settings(max_examples=20, deadline=None)
    @given(alpha=st.floats(0.01, 0.99), gamma=st.floats(-1, 1))
    def test_a_beam_never_carries_more_than_it_was_given(self, alpha, gamma):
        gates = chapter.p_gates([alpha], gamma)
        assert (gates["TRL"].abs() + gates["TDL"].abs() <= 1 + 1e-9).all()
        beam = chapter.response(gates, 12, 12)[0].abs()
        assert (chapter.diagonal_sums(beam) <= 1 + 1e-9).all() if hasattr(chapter, "diagonal_sums") else beam.max() <= 1

    @pytest.mark.parametrize("alpha", [0.0, 1.0, -0.2])
    def test_an_angle_must_be_inside(self, alpha):
        with pytest.raises(ValueError, match="expected angles between 0 and 1"):
            chapter.p_gates([alpha])

    def test_a_fan_is_a_product_along_one_road(self):
        fan = chapter.response(chapter.d_gates(0.9, (1,)), 6, 6)[0]
        for x in range(6):
            for y in range(6):
                if x + y:
                    assert fan[x, y].item() == pytest.approx(0.9 ** (x + y - 1))

    @pytest.mark.parametrize("mode", ["P", "D"])
    def test_gates_of_any_numbers_are_stable(self, mode):
        raw = 5 * torch.randn(50, len(chapter.RAW[mode]), dtype=torch.float64)
        gates = chapter.squash(mode, raw)
        G = chapter.response({**gates, "D": torch.zeros(50, dtype=torch.float64)}, 16, 16)
        assert (G.abs() <= 2 + 1e-9).all()  # at most one road from each of the two edges that arrive, or shares of one


class TestModels:
    @pytest.mark.parametrize("mode", ["P", "D"])
    @pytest.mark.parametrize(("X", "Y"), [(4, 4), (3, 5), (1, 6), (9, 2)])
    def test_constant_gates_two_ways(self, mode, X, Y):
        torch.manual_seed(0)
        slow, fast = chapter.PLSTM2d(8, 2, mode, per_token=True), chapter.PLSTM2d(8, 2, mode)
        fast.load_state_dict(slow.state_dict(), strict=False)
        x = torch.randn(2, X, Y, 8)
        torch.testing.assert_close(fast(x), slow(x), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("per_token", [True, False])
    @pytest.mark.parametrize("mode", ["P", "D"])
    def test_every_parameter_learns(self, mode, per_token):
        torch.manual_seed(0)
        layer, x = chapter.PLSTM2d(8, 2, mode, per_token), torch.randn(2, 4, 4, 8)
        (layer(x) * torch.randn(2, 4, 4, 8)).sum().backward()
        assert not [n for n, p in layer.named_parameters() if p.grad is None or not p.grad.any()]

    @pytest.mark.parametrize("kind", ["pLSTM", "ViT"])
    def test_any_grid(self, kind):
        model = chapter.Vision(kind, 8, 2)
        for size in (8, 5, 11):
            assert model(torch.randn(3, size, size, 4)).shape == (3, 2)

    def test_the_line_model_looks_back_only(self):
        torch.manual_seed(0)
        model, x = chapter.LineModel(True, 8, 2), torch.randint(16, (2, 20))
        other = x.clone()
        other[:, 12] = (other[:, 12] + 1) % 16
        moved = (model(x) - model(other)).abs().amax((0, 2)) > 1e-7
        assert not moved[:12].any() and moved[12]

    def test_targets_of_the_marked_task(self):
        x, y = chapter.latest_marked(30, 40, torch.Generator().manual_seed(0))
        for row, target in zip(x.tolist(), y.tolist(), strict=True):
            assert row[0] >= 8 and target[0] == -100
            for t in range(1, 40):
                assert target[t] == next(row[s] - 8 for s in range(t - 1, -1, -1) if row[s] >= 8)

    def test_area_under_the_curve(self):
        score, y = torch.tensor([0.1, 0.4, 0.35, 0.8, 0.4]), torch.tensor([0, 0, 1, 1, 1])
        assert chapter.area_under_roc(score, y) == pytest.approx((1 + 2 + 1 + 0.5) / 6)


def columns_and_rows(T):
    return T / T.abs().sum(-1, keepdim=True).clamp_min(1)


def rows_only(G, X, Y, flip_x, flip_y):
    axes = [axis for axis, flip in ((0, flip_x), (1, flip_y)) if flip]
    return G.view(X, Y, X, Y).flip(axes).reshape(X * Y, X * Y)


def one_way(A, B, C, E):
    upper = torch.cat([B["RL"] @ A["RL"], torch.zeros_like(A["RL"])], dim=1)
    return torch.cat([upper, torch.cat([E["RU"] @ B["DL"] @ A["RL"], E["RL"] @ C["RL"]], dim=1)], dim=0)


def in_order_of_numbers(graph, S, T, M, D):
    """Visits nodes by their numbers, which need not be a topological order."""
    rows, G = {e: torch.zeros(len(graph), dtype=torch.float64) for e in graph.edges}, torch.diag(D)
    for n in sorted(graph):
        for e in graph.out_edges(n):
            rows[e] = sum((T[e, old] * rows[old] for old in graph.in_edges(n)), torch.zeros(len(graph)).double())
            rows[e][n] += S[e]
        for e in graph.in_edges(n):
            G[n] += M[e] * rows[e]
    return G


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        ("check_path_count", lambda dx, dy: 2 ** (dx + dy)),
        ("check_path_count", lambda dx, dy: math.gamma(dx + dy + 1) / math.gamma(dx + 1) / math.gamma(dy + 1)),
        ("check_p_normalise", columns_and_rows),
        ("check_p_normalise", lambda T: T / T.abs().sum(-2, keepdim=True)),
        ("check_gating_matrix", in_order_of_numbers),
        ("check_gating_matrix", lambda *a: chapter.gating_by_solve(*a).mT),
        ("check_undo_flips", rows_only),
        ("check_merge_RL", one_way),
    ],
)
def test_checks_refuse_plausible_mistakes(check, answer):
    assert getattr(chapter, check).verdict(answer).startswith("not yet")


def test_patches_are_pieces_of_the_picture():
    images = torch.randn(2, 12, 18)
    cells = chapter.patches(images, 6)
    assert cells.shape == (2, 2, 3, 36)
    for x in range(2):
        for y in range(3):
            piece = images[:, 6 * x : 6 * x + 6, 6 * y : 6 * y + 6]
            assert torch.equal(cells[:, x, y], piece.flatten(1))


@pytest.mark.parametrize("design", [dict(modes="PP"), dict(modes="DD"), dict(positions=True), dict(start=-4.0)])
def test_the_designs_of_the_ablation_are_what_they_say(design):
    torch.manual_seed(0)
    model = chapter.Vision("pLSTM", 8, 2, pairs=2, inputs=3, grid=4, **design)
    assert "".join(m.mode for m in model.mixers) == 2 * design.get("modes", "PD")
    assert (model.positions is not None) == design.get("positions", False)
    assert all((m.own == design.get("start", -1.0)).all() for m in model.mixers)
    assert model(torch.randn(2, 6, 5, 3)).shape == (2, 2)  # a larger grid than that of the positions
