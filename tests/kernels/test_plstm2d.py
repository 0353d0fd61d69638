"""plstm2d: one definition, three implementations, checked against a loop over cells and against sums over paths."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import use
from seqarch.kernels.linear_scan import linear_scan
from seqarch.kernels.plstm2d import GATES, ORIENTATIONS, cost, plstm2d, plstm2d_four
from seqarch.kernels.plstm2d.parallel import from_tiles, tile_matrices, to_tiles

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error

BACKENDS = ["reference", "parallel", "triton"]
ALL = pytest.mark.parametrize("backend", BACKENDS)
NAMES = ("q", "k", "v", *GATES)


def transitions(kind, shape, g):
    """[[TRL, TRU], [TDL, TDU]] of one kind; `kind` picks what is hard in its own way."""
    if kind in ("beam", "beam right", "beam down"):  # P-mode with decay 1: columns add up to 1, so nothing is lost
        alpha = {
            "beam": torch.rand(shape, generator=g),
            "beam right": torch.ones(shape),
            "beam down": torch.zeros(shape),
        }
        alpha = alpha[kind].double()
        return alpha, alpha, 1 - alpha, 1 - alpha
    signs = [torch.randint(0, 2, shape, generator=g).double() * 2 - 1 for _ in range(3)]
    if kind == "fan":  # D-mode with |T| = 1: one path for every pair of cells
        return signs[0], signs[1], torch.zeros(shape, dtype=torch.float64), signs[2]
    T = [torch.rand(shape, generator=g, dtype=torch.float64) - 0.5 for _ in range(4)]
    if kind == "closed":  # some gates exactly 0
        T = [torch.where(torch.rand(shape, generator=g) < 0.5, 0.0, t) for t in T]
    return T


def inputs(N, X, Y, K, V, dtype=torch.float32, kind="soft", rows=None, seed=0):
    """Random q, k, v and the nine gates of a grid; `rows` is the batch size of the gates."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(N, X, Y, K, generator=g, dtype=torch.float64) for _ in range(2))
    v = torch.randn(N, X, Y, V, generator=g, dtype=torch.float64)
    shape = (N if rows is None else rows, X, Y)
    TRL, TRU, TDL, TDU = transitions(kind, shape, g)
    SR, SD, ML, MU, D = (torch.rand(shape, generator=g, dtype=torch.float64) for _ in range(5))
    if kind == "closed":
        SR, ML, D = (torch.where(torch.rand(shape, generator=g) < 0.5, 0.0, x) for x in (SR, ML, D))
    return [x.to(dtype).to(DEVICE) for x in (q, k, v, TRL, TRU, SR, TDL, TDU, SD, ML, MU, D)]


def runner(backend, tile=8):
    def run(q, k, v, *gates):
        return (plstm2d(q, k, v, dict(zip(GATES, gates, strict=True)), tile=tile, backend=backend),)

    return run


def edge_matrices(X, Y, gates):
    """T, S, M over the edges of the grid and diag(D), so that G = M (I - T)^-1 S + diag(D): the form over all edges."""
    edges = {}
    for x in range(X):
        for y in range(Y):
            edges[x, y, "R"], edges[x, y, "D"] = len(edges), len(edges) + 1
    T, S, M = torch.zeros(len(edges), len(edges)), torch.zeros(len(edges), X * Y), torch.zeros(X * Y, len(edges))
    T, S, M = T.double(), S.double(), M.double()
    for x in range(X):
        for y in range(Y):
            arriving = {"L": edges.get((x - 1, y, "R")), "U": edges.get((x, y - 1, "D"))}
            for out in "RD":
                S[edges[x, y, out], x * Y + y] = gates["S" + out][x, y]
            for source, edge in arriving.items():
                if edge is not None:
                    M[x * Y + y, edge] = gates["M" + source][x, y]
                    for out in "RD":
                        T[edges[x, y, out], edge] = gates["T" + out + source][x, y]
    return T, S, M, torch.diag(gates["D"].flatten())


grids = dict(
    # (N, X, Y): mostly a single tile, because Triton's interpreter needs half a second for each
    grid=st.one_of(
        st.tuples(st.just(1), st.integers(1, 8), st.integers(1, 8)),
        st.sampled_from([(1, 1, 1), (1, 2, 2), (1, 3, 5), (1, 8, 8), (1, 1, 11), (1, 9, 2)]),
    ),
    K=st.sampled_from([1, 2, 3, 17]),
    V=st.sampled_from([1, 2, 3, 17]),
    kind=st.sampled_from(["soft", "beam", "beam right", "beam down", "fan", "closed"]),
    seed=st.integers(0, 10**6),
)


def check_against_the_definition(backends, dtype, grid, K, V, kind, seed, rows=None, tile=8):
    tensors = inputs(*grid, K, V, dtype, kind, rows, seed)
    for backend in backends:
        assert_agree(
            runner(backend, tile), runner("reference"), tensors,
            steps=grid[1] + grid[2], names=NAMES, loose=GATES, matmul=True,
        )  # fmt: skip


@settings(max_examples=60)
@given(**grids)
def test_three_implementations_agree_in_float32(**case):
    check_against_the_definition(["parallel", "triton"], torch.float32, **case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=20)
@given(**grids)
def test_three_implementations_agree_in_half_precision(dtype, **case):
    check_against_the_definition(["triton"], dtype, **case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiles_agree_in_half_precision(dtype):
    check_against_the_definition(["parallel"], dtype, (2, 9, 13), 4, 3, "beam", 0)


@settings(max_examples=80)
@given(
    **grids | dict(grid=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20))),
    tile=st.sampled_from([1, 2, 4, 8, 16]),
    shared=st.booleans(),
)
def test_tiles_of_any_size_agree_in_float64(shared, **case):
    check_against_the_definition(["parallel"], torch.float64, rows=1 if shared else None, **case)


@ALL
@pytest.mark.parametrize("rows", [1, 2])
def test_gates_of_the_batch_or_of_each_row_on_several_tiles(backend, rows):
    check_against_the_definition([backend], torch.float32, (2, 9, 4), 3, 2, "fan", 0, rows=rows)


def test_some_gates_shared_and_some_not():
    q, k, v, *gates = inputs(2, 3, 5, 2, 2, torch.float64)
    gates = [gate[:1] if i % 2 else gate for i, gate in enumerate(gates)]
    assert_agree(runner("parallel"), runner("reference"), [q, k, v, *gates], steps=8, names=NAMES)


@pytest.mark.parametrize("backend", ["parallel", "triton"])
def test_the_widest_heads(backend):
    q, *others = inputs(1, 4, 9, 33, 64)
    assert_agree(
        runner(backend), runner("reference"), [q / 6, *others], steps=13, names=NAMES, loose=GATES, matmul=True
    )


@pytest.mark.parametrize("backend", ["reference", "parallel"])
@pytest.mark.parametrize("rows", [1, 2])
def test_gradcheck(backend, rows):
    tensors = [x.requires_grad_() for x in inputs(2, 2, 3, 2, 2, torch.float64, rows=rows)]
    assert torch.autograd.gradcheck(runner(backend, tile=2), tensors)


@pytest.mark.parametrize("kind", ["fan", "beam right"])
def test_a_long_way_with_transitions_of_one(kind):
    """64 x 64 cells: nothing decays on the way, and nothing grows beyond what float32 can hold."""
    check_against_the_definition(["parallel"], torch.float32, (1, 64, 64), 2, 2, kind, 0, rows=1)


def test_a_grid_of_65536_cells():
    tensors = inputs(1, 256, 256, 2, 2, kind="beam", rows=1)
    with torch.no_grad():
        (o,) = runner("parallel")(*tensors)
        (want,) = runner("reference")(*[x.double() for x in tensors])
    assert error(o, want) <= 1e-5


@pytest.mark.parametrize("rows", [1, 2])
def test_memory_is_linear_in_the_number_of_cells(rows):
    assert_memory_is_linear(runner("parallel"), lambda T: inputs(2, T // 32, 32, 4, 4, rows=rows))


@ALL
class TestLaws:
    def test_is_attention_with_the_sums_over_all_paths(self, backend):
        """o = (q k^T * G) v with G = M (I - T)^-1 S + diag(D) over the edges of the grid."""
        X, Y = 4, 5
        q, k, v, *gates = inputs(1, X, Y, 3, 2)
        T, S, M, D = edge_matrices(
            X, Y, {name: gate[0].double().cpu() for name, gate in zip(GATES, gates, strict=True)}
        )
        G = M @ torch.linalg.solve(torch.eye(len(T)).double() - T, S) + D
        flat_q, flat_k, flat_v = (x[0].flatten(0, 1).double().cpu() for x in (q, k, v))
        want = (flat_q @ flat_k.mT * G) @ flat_v
        (o,) = runner(backend)(q, k, v, *gates)
        assert error(o[0].flatten(0, 1).cpu(), want) < 1e-5

    def test_gates_of_one_count_paths(self, backend):
        """From one corner to the other of 9 x 9 cells there are C(16, 8) paths."""
        ones = torch.ones(1, 9, 9, 1, device=DEVICE)
        source = torch.zeros_like(ones)
        source[0, 0, 0] = 1
        gates = [torch.ones(1, 9, 9, device=DEVICE) for _ in GATES]
        (o,) = runner(backend)(ones, ones, source, *gates)
        counts = [[math.comb(x + y, x) for y in range(9)] for x in range(9)]
        assert torch.equal(o[0, ..., 0], torch.tensor(counts, dtype=torch.float32, device=DEVICE))

    def test_a_beam_loses_nothing(self, backend):
        """P-mode with decay 1: what a source sends out adds up to 1 on every anti-diagonal."""
        ones = torch.ones(1, 9, 9, 1, device=DEVICE)
        source = torch.zeros_like(ones)
        source[0, 0, 0] = 1
        alpha = torch.full((1, 9, 9), 0.3, device=DEVICE)
        one = torch.ones_like(alpha)
        gates = [alpha, alpha, alpha, 1 - alpha, 1 - alpha, 1 - alpha, one, one, one]
        o = runner(backend)(ones, ones, source, *gates)[0][0, ..., 0]
        sums = torch.stack([o.fliplr().diagonal(8 - d).sum() for d in range(9)])
        torch.testing.assert_close(sums, torch.ones_like(sums))

    def test_a_fan_reaches_every_cell_behind_it_once(self, backend):
        ones = torch.ones(1, 10, 7, 1, device=DEVICE)
        source = torch.zeros_like(ones)
        source[0, 2, 1] = 1
        one = torch.ones(1, 10, 7, device=DEVICE)
        gates = [one, one, one, 0 * one, one, one, one, one, one]
        o = runner(backend)(ones, ones, source, *gates)[0][0, ..., 0]
        want = torch.zeros_like(o)
        want[2:, 1:] = 1
        assert torch.equal(o, want)

    def test_one_row_is_a_linear_scan(self, backend):
        q, k, v, *gates = inputs(1, 1, 11, 2, 3)
        named = dict(zip(GATES, gates, strict=True))
        states, _ = linear_scan(
            named["TDU"][0, 0, None, :, None], (named["SD"][..., None, None] * k[..., :, None] * v[..., None, :])[0].flatten(2)
        )  # fmt: skip
        before = torch.nn.functional.pad(states[0, :-1], (0, 0, 1, 0)).view(11, 2, 3)
        own = named["D"][0, 0, :, None] * (q * k).sum(-1)[0, 0, :, None] * v[0, 0]
        want = named["MU"][0, 0, :, None] * torch.einsum("tk,tkv->tv", q[0, 0], before) + own
        torch.testing.assert_close(runner(backend)(q, k, v, *gates)[0][0, 0], want, rtol=1e-4, atol=1e-5)

    def test_exchanging_the_axes_exchanges_the_roles_of_the_gates(self, backend):
        q, k, v, *gates = inputs(1, 9, 5, 2, 3)
        other = {"R": "D", "D": "R", "L": "U", "U": "L"}
        named = dict(zip(GATES, gates, strict=True))
        turned = [
            named["".join(g[:1] + "".join(other[c] for c in g[1:]))].mT if g != "D" else named[g].mT for g in GATES
        ]
        o = runner(backend)(*(x.transpose(1, 2) for x in (q, k, v)), *turned)[0].transpose(1, 2)
        torch.testing.assert_close(o, runner(backend)(q, k, v, *gates)[0], rtol=1e-4, atol=1e-5)

    def test_a_row_of_closed_gates_cuts_the_grid_in_two(self, backend):
        """Nothing crosses row 3 when its cells neither read nor pass on what comes from row 2."""
        q, k, v, *gates = inputs(1, 9, 5, 2, 3)
        for name in ("TRL", "TDL", "ML"):
            gates[GATES.index(name)][:, 3] = 0
        (whole,) = runner(backend)(q, k, v, *gates)
        parts = [runner(backend)(*(x[:, part] for x in (q, k, v, *gates)))[0] for part in (slice(3), slice(3, 9))]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)

    def test_a_cell_changes_nothing_that_does_not_lie_behind_it(self, backend):
        tensors = inputs(1, 9, 6, 2, 2, kind="beam")
        (o,) = runner(backend)(*tensors)
        for x, y in ((4, 3), (8, 0)):
            changed = [t.clone() for t in tensors]
            for t in changed:
                t[:, x, y] += 1
            (p,) = runner(backend)(*changed)
            assert torch.equal(o[:, :x], p[:, :x]) and torch.equal(o[:, :, :y], p[:, :, :y])
            assert not torch.equal(o[:, x, y], p[:, x, y])

    def test_four_orientations_see_the_flipped_grid_with_their_gates_exchanged(self, backend):
        q, k, v, *_ = inputs(1, 3, 4, 2, 2)
        gates = [dict(zip(GATES[:-1], inputs(1, 3, 4, 1, 1, seed=i)[3:-1], strict=True)) for i in range(4)]
        D = inputs(1, 3, 4, 1, 1)[-1]
        o = plstm2d_four(q, k, v, gates, D, backend=backend)
        flipped = [{name: gate.flip(1) for name, gate in own.items()} for own in gates]
        exchanged = [flipped[ORIENTATIONS.index(tuple(sorted({*axes} ^ {1})))] for axes in ORIENTATIONS]
        p = plstm2d_four(q.flip(1), k.flip(1), v.flip(1), exchanged, D.flip(1), backend=backend)
        torch.testing.assert_close(p.flip(1), o, rtol=1e-4, atol=1e-5)
        # D counts once: with all other gates closed, every cell sees itself
        closed = [{name: torch.zeros_like(gate) for name, gate in own.items()} for own in gates]
        alone = plstm2d_four(q, k, v, closed, D, backend=backend)
        torch.testing.assert_close(alone, D[..., None] * (q * k).sum(-1, keepdim=True) * v, rtol=1e-4, atol=1e-5)

    def test_strides_do_not_matter(self, backend):
        tensors = inputs(2, 4, 5, 2, 3)
        strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
        assert torch.equal(runner(backend)(*strided)[0], runner(backend)(*tensors)[0])

    def test_two_runs_are_bit_identical(self, backend):
        results = []
        for _ in range(2):
            tensors = [x.requires_grad_() for x in inputs(2, 5, 6, 2, 3, rows=1)]
            (o,) = runner(backend)(*tensors)
            results.append((o, *torch.autograd.grad((o * o).sum(), tensors)))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))

    @pytest.mark.parametrize("shape", [(2, 0, 3, 2, 2), (2, 3, 0, 2, 2), (0, 3, 3, 2, 2), (2, 3, 3, 0, 2)])
    def test_nothing_in_nothing_out(self, backend, shape):
        q, k, v, *gates = inputs(*shape, rows=1)
        o = runner(backend)(q.requires_grad_(), k, v.requires_grad_(), *gates)[0]
        assert o.shape == v.shape and (o == 0).all()
        torch.autograd.grad(o.sum(), (q, v), allow_unused=True)

    def test_gates_may_be_wider_than_the_values(self, backend):
        q, k, v, *_ = inputs(1, 3, 4, 2, 3, torch.bfloat16)
        gates = inputs(1, 3, 4, 2, 3)[3:]
        (o,) = runner(backend)(q, k, v, *gates)
        assert o.dtype == torch.bfloat16
        assert error(o, runner("reference")(*[x.double() for x in (q, k, v, *gates)])[0]) < 1e-2


def test_the_matrices_of_tiles_are_sums_over_paths():
    """One tile that covers the grid: its lower right block is G."""
    gates = inputs(1, 4, 4, 1, 1, torch.float64)[3:]
    E = tile_matrices(torch.stack(gates, dim=-1), 4)
    T, S, M, D = edge_matrices(4, 4, {name: gate[0].cpu() for name, gate in zip(GATES, gates, strict=True)})
    G = M @ torch.linalg.solve(torch.eye(len(T)).double() - T, S) + D
    along_the_curve = to_tiles(torch.arange(16, device=DEVICE).view(1, 4, 4, 1), 4).flatten().cpu()
    torch.testing.assert_close(E[0, 0, 8:, 8:].cpu(), G[along_the_curve][:, along_the_curve])


@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_cutting_into_tiles_and_back(p):
    x = torch.randn(2, 7, 9, 3, device=DEVICE)
    assert torch.equal(from_tiles(to_tiles(x, p), 7, 9, p), x)


def test_compiled_without_graph_break():
    tensors = inputs(1, 3, 4, 2, 2)
    compiled = torch.compile(lambda *t: runner("triton")(*t)[0] * 2, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), runner("reference")(*tensors)[0] * 2, rtol=1e-4, atol=1e-5)


def test_what_triton_cannot_take():
    tensors = inputs(1, 2, 2, 2, 2, torch.float64)
    with use("triton"), pytest.raises(ValueError, match="float64"):
        runner("auto")(*tensors)
    with pytest.raises(ValueError, match="takes K and V up to 64, got K = 65 and V = 2"):
        runner("triton")(*inputs(1, 2, 2, 65, 2))


def test_the_cost_model_counts_a_small_case():
    assert cost.bytes(2, 3, 5, 4, 6, 1) == 4 * (2 * 15 * (2 * 4 + 2 * 6) + 9 * 15)
    assert cost.bytes(2, 3, 5, 4, 6, 2) - cost.bytes(2, 3, 5, 4, 6, 1) == 4 * 9 * 15
    assert cost.flops(2, 3, 5, 4, 6, 1) == 30 * cost.flops(1, 1, 1, 4, 6, 1)
    assert cost.flops(2, 3, 5, 4, 6, 1, backward=True) > 2 * cost.flops(2, 3, 5, 4, 6, 1)
    # twice the side of a tile, half as many states kept
    assert cost.edge_floats(2, 64, 64, 4, 6, 8) == 2 * cost.edge_floats(2, 64, 64, 4, 6, 16)


q, k, v, *gates = inputs(2, 3, 4, 5, 6)
named = dict(zip(GATES, gates, strict=True))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((q[0], k, v, named), r"expected q of shape \(N, X, Y, K\), got \(3, 4, 5\)"),
        ((q, k[..., :2], v, named), r"expected k of shape \(N, X, Y, K\) with N = 2, .* K = 5, got \(2, 3, 4, 2\)"),
        ((q, k, v[:, :2], named), r"expected v of shape \(N, X, Y, V\) with N = 2, X = 3, Y = 4, got \(2, 2, 4, 6\)"),
        ((q, k, v.double(), named), "expected v of dtype torch.float32 like q, got torch.float64"),
        ((q + 0j, k + 0j, v + 0j, named), "expected q of a real dtype, got torch.complex64"),
        ((q, k, v, gates), "expected gates to be a mapping with the names TRL, .* got list"),
        ((q, k, v, {"TRL": gates[0]}), "expected gates to be a mapping with the names .* got TRL$"),
        ((q, k, v, named | {"SD": gates[0][0]}), r"expected gate SD of shape \(N, X, Y\) with .* got \(3, 4\)"),
        ((q, k, v, named | {"D": gates[0][:1, :1]}), r"expected gate D of shape \(1, X, Y\) with .* got \(1, 1, 4\)"),
        ((q, k, v, named | {"ML": gates[0] + 0j}), "expected gate ML of a real floating-point dtype, got torch.complex64"),
        ((q, k, v, named | {"ML": gates[0].to("meta")}), "expected gate ML on .* like q, got meta"),
    ],
)  # fmt: skip
def test_errors_name_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        plstm2d(*arguments)


@pytest.mark.parametrize("tile", [0, 3, 12, -8, 2.0])
def test_tiles_are_powers_of_two(tile):
    with pytest.raises(ValueError, match=f"expected tile to be a power of two, got {tile}"):
        plstm2d(q, k, v, named, tile=tile)


def test_errors_of_four_orientations():
    with pytest.raises(ValueError, match="expected gates to be a sequence of 4 mappings, got 3"):
        plstm2d_four(q, k, v, [named] * 3, named["D"])
    with pytest.raises(ValueError, match="with the names TRL, TRU, SR, TDL, TDU, SD, ML, MU, got D, MU"):
        plstm2d_four(q, k, v, [{"MU": gates[0], "D": gates[0]}] * 4, named["D"])


def test_debug_names_the_input_with_nan():
    broken = named | {"TDU": named["TDU"].clone()}
    broken["TDU"][0, 1, 2] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected TDU without NaN, got 1 NaN"):
        plstm2d(q, k, v, broken)
