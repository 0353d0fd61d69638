r"""The recurrence on a grid on a GPU: the tiles and diagonals of ``parallel.py``, with one program per tile.

The grid is cut into 8 x 8 tiles; the cells of a tile are listed row by row, c = 8 x + y, its edges first those across x
(from the left, to the right; one per y), then those across y. Every tile has the matrix E = [[T, S], [M, G]] of
``parallel.py``, 16 + 64 rows and columns, float32. Kernels of the forward pass, in order:

``_matrices``  E from the gates. One program per tile keeps a row of 8 cells x all 80 columns and walks over the 8 rows.
               Along y the walk is the scan $D_y = T^{DU}_y D_{y-1} + (T^{DL} L + S^D e)_y$.
``_inject``    what the sources of a tile send to each of its outgoing edges, $(S_b \odot k)^\top v$, all tiles at once
``_advance``   one launch per diagonal: add T x (what enters), which the diagonal before has finished. The only
               sequential part, and it touches nothing but the edges between tiles.
``_read``      $o = (q k^\top \odot G) v + \sum_b (M_b \odot q) X_b$, all tiles at once

Read backwards, the grid is a grid of the same kind, with E transposed, q and k exchanged, and the gradient of o in the
place of v. So the backward pass calls the last three again, with the two strides of E exchanged and the diagonals
reversed: that gives the adjoint of every edge, and the gradient of v. ``_grad_vectors`` (once for q and M, once for k
and S) and ``_grad_edges`` give the gradients of q, k and E tile by tile; ``_grad_gates`` walks each tile backwards from the
gradient of E to those of the gates. Gates shared by the batch: E is made once, and its gradient summed over the batch
before that walk.

The states on the edges are float32, 16 K V numbers per tile, and dominate the traffic: at K = V = 64 they are ten times
as many as the numbers in E, which is why E may as well be stored. There are no atomics; two runs agree bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import dot_options

TILE = 8
EDGES = 2 * TILE  # that enter a tile, or leave it
CELLS = TILE * TILE
SIZE = EDGES + CELLS  # rows and columns of E


@triton.jit
def _compose(a1, b1, a2, b2):
    # first d -> a1 d + b1, then d -> a2 d + b2
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _moved(x, i, first):
    # row i - 1 of x at row i, and `first` at row 0
    previous = tl.sum(tl.where((i[None, :, None] + 1) == i[:, None, None], x[None, :, :], 0.0), axis=1)
    return tl.where((i == 0)[:, None], first[None, :], previous)


@triton.jit
def _matrices(
    gates, E, paths, X, Y, columns, tiles,
    KEEP: tl.constexpr, P: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """E of one tile. KEEP stores L and U of every cell too: the sums of paths to it from every column of E."""
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    y, s = tl.arange(0, P), tl.arange(0, BS)
    inside = (y >= 0)[:, None] & (s < SIZE)[None, :]
    E += tl.program_id(0).to(tl.int64) * SIZE * SIZE
    paths += tl.program_id(0).to(tl.int64) * 2 * C * SIZE
    L = tl.where(s[None, :] == y[:, None], 1.0, 0.0)
    for x in range(P):
        grid_x, grid_y = tile // columns * P + x, tile % columns * P + y
        live, at = grid_y < tl.where(grid_x < X, Y, 0), (row.to(tl.int64) * X + grid_x) * Y + grid_y
        gate = gates + at * 9
        here = tl.where(s[None, :] == 2 * P + x * P + y[:, None], 1.0, 0.0)
        above = tl.where(s == P + x, 1.0, 0.0)
        stay = tl.broadcast_to(tl.load(gate + 4, mask=live, other=0.0)[:, None], (P, BS))
        arrives = (
            tl.load(gate + 3, mask=live, other=0.0)[:, None] * L
            + tl.load(gate + 5, mask=live, other=0.0)[:, None] * here
        )
        kept, D = tl.associative_scan((stay, arrives), 0, _compose)
        D += kept * above[None, :]
        U = _moved(D, y, above)
        read = (
            tl.load(gate + 6, mask=live, other=0.0)[:, None] * L
            + tl.load(gate + 7, mask=live, other=0.0)[:, None] * U
            + tl.load(gate + 8, mask=live, other=0.0)[:, None] * here
        )
        cells = (x * P + y)[:, None] * SIZE + s[None, :]
        tl.store(E + 2 * P * SIZE + cells, read, mask=inside)
        if KEEP:
            tl.store(paths + cells, L, mask=inside)
            tl.store(paths + C * SIZE + cells, U, mask=inside)
        down = tl.sum(tl.where((y == P - 1)[:, None], D, 0.0), axis=0)
        tl.store(E + (P + x) * SIZE + s, down, mask=s < SIZE)
        L = (
            tl.load(gate, mask=live, other=0.0)[:, None] * L
            + tl.load(gate + 1, mask=live, other=0.0)[:, None] * U
            + tl.load(gate + 2, mask=live, other=0.0)[:, None] * here
        )
    tl.store(E + y[:, None] * SIZE + s[None, :], L, mask=inside)


@triton.jit
def _grad_gates(
    gates, dE, paths, grad, X, Y, columns, tiles,
    P: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates of one tile from that of E: the walk of `_matrices` from the last cell to the first.

    Position i of a row is cell y = P - 1 - i, so that the scan along y runs forwards here too.
    """
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i, s = tl.arange(0, P), tl.arange(0, BS)
    y = P - 1 - i
    inside = (y >= 0)[:, None] & (s < SIZE)[None, :]
    dE += tl.program_id(0).to(tl.int64) * SIZE * SIZE
    paths += tl.program_id(0).to(tl.int64) * 2 * C * SIZE
    R = tl.load(dE + y[:, None] * SIZE + s[None, :], mask=inside, other=0.0)  # the adjoint of what leaves to the right
    for back in range(P):
        x = P - 1 - back
        grid_x, grid_y = tile // columns * P + x, tile % columns * P + y
        live, at = grid_y < tl.where(grid_x < X, Y, 0), (row.to(tl.int64) * X + grid_x) * Y + grid_y
        gate = gates + at * 9
        here = s[None, :] == 2 * P + x * P + y[:, None]
        cells = (x * P + y)[:, None] * SIZE + s[None, :]
        L = tl.load(paths + cells, mask=inside, other=0.0)
        U = tl.load(paths + C * SIZE + cells, mask=inside, other=0.0)
        read = tl.load(dE + 2 * P * SIZE + cells, mask=inside, other=0.0)
        below = tl.load(dE + (P + x) * SIZE + s, mask=s < SIZE, other=0.0)
        stay = tl.broadcast_to(tl.load(gate + 4, mask=live, other=0.0)[:, None], (P, BS))
        arrives = (
            tl.load(gate + 1, mask=live, other=0.0)[:, None] * R
            + tl.load(gate + 7, mask=live, other=0.0)[:, None] * read
        )
        kept, adjoint_U = tl.associative_scan((stay, arrives), 0, _compose)
        adjoint_U += kept * below[None, :]
        D = _moved(adjoint_U, i, below)  # what leaves cell y downwards is what enters cell y + 1
        out = grad + at * 9
        tl.store(out, tl.sum(R * L, axis=1), mask=live)
        tl.store(out + 1, tl.sum(R * U, axis=1), mask=live)
        tl.store(out + 2, tl.sum(tl.where(here, R, 0.0), axis=1), mask=live)
        tl.store(out + 3, tl.sum(D * L, axis=1), mask=live)
        tl.store(out + 4, tl.sum(D * U, axis=1), mask=live)
        tl.store(out + 5, tl.sum(tl.where(here, D, 0.0), axis=1), mask=live)
        tl.store(out + 6, tl.sum(read * L, axis=1), mask=live)
        tl.store(out + 7, tl.sum(read * U, axis=1), mask=live)
        tl.store(out + 8, tl.sum(tl.where(here, read, 0.0), axis=1), mask=live)
        R = (
            tl.load(gate, mask=live, other=0.0)[:, None] * R
            + tl.load(gate + 3, mask=live, other=0.0)[:, None] * D
            + tl.load(gate + 6, mask=live, other=0.0)[:, None] * read
        )


@triton.jit
def _cells(row, tile, X, Y, columns, C: tl.constexpr, P: tl.constexpr):
    # where the cells of a tile lie in the grid, and which of them exist
    c = tl.arange(0, C)
    x, y = tile // columns * P + c // P, tile % columns * P + c % P
    return (row.to(tl.int64) * X + x) * Y + y, (x < X) & (y < Y)


@triton.jit
def _rows(base, at, live, f, F):
    # vectors of F numbers, one per cell: [cells, features]
    return tl.load(base + at[:, None] * F + f[None, :], mask=live[:, None] & (f < F)[None, :], other=0.0)


@triton.jit
def _columns(base, at, live, f, F):
    # the same, transposed: [features, cells]
    return tl.load(base + at[None, :] * F + f[:, None], mask=live[None, :] & (f < F)[:, None], other=0.0)


@triton.jit
def _beyond(tile, edge, rows, columns, step, P: tl.constexpr):
    # the tile on the other side of an edge (step -1: where it comes from, +1: where it goes), and whether it exists
    i = tile // columns + tl.where(edge < P, step, 0)
    j = tile % columns + tl.where(edge < P, 0, step)
    return i * columns + j, (i >= 0) & (i < rows) & (j >= 0) & (j < columns)


@triton.jit
def _inject(
    a, b, E, edges, X, Y, K, V, columns, tiles, per_row, stride_edge, stride_cell,
    P: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write sum_c W_ec a_c b_c^T to the edges e of one side of a tile; W is S, or M when the strides are exchanged."""
    row, tile, side = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    k, v, c = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, C)
    at, live = _cells(row, tile, X, Y, columns, C, P)
    left, right = _columns(a, at, live, k, K).to(tl.float32), _rows(b, at, live, v, V).to(DOT)
    E += (row * per_row * tiles + tile).to(tl.int64) * SIZE * SIZE
    inside = (k < K)[:, None] & (v < V)[None, :]
    to = edges + (tl.program_id(0).to(tl.int64) * 2 + side) * P * K * V + k[:, None] * V + v[None, :]
    for edge in range(P):
        weight = tl.load(E + (side * P + edge) * stride_edge + c * stride_cell)
        total = tl.dot((left * weight[None, :]).to(DOT), right, input_precision=PRECISION)
        tl.store(to + edge * K * V, total, mask=inside)


@triton.jit
def _advance(
    E, edges, KV, rows, columns, tiles, first, count, per_row, step, stride_out, stride_in,
    P: tl.constexpr, SIZE: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Add T x (the states of the diagonal before) to the states of one tile of this diagonal."""
    row, i = tl.program_id(0) // count, tl.program_id(0) % count
    tile = first + i * (columns - 1)
    b, e = tl.arange(0, 2 * P), tl.program_id(1) * BE + tl.arange(0, BE)
    other, exists = _beyond(tile, b, rows, columns, step, P)
    there = ((row.to(tl.int64) * tiles + other) * (2 * P) + b) * KV
    entering = tl.load(edges + there[:, None] + e[None, :], mask=exists[:, None] & (e < KV)[None, :], other=0.0)
    E += (row * per_row * tiles + tile).to(tl.int64) * SIZE * SIZE
    T = tl.load(E + b[:, None] * stride_out + b[None, :] * stride_in)
    here = edges + ((row.to(tl.int64) * tiles + tile) * (2 * P) + b)[:, None] * KV + e[None, :]
    inside = (b >= 0)[:, None] & (e < KV)[None, :]
    own = tl.load(here, mask=inside, other=0.0)
    tl.store(here, own + tl.dot(T, entering, input_precision="ieee"), mask=inside)


@triton.jit
def _read(
    a, b, u, E, edges, out, X, Y, K, V, rows, columns, tiles, per_row, step, stride_row, stride_column,
    P: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(a b^T * G) u + sum_e (W_e * a) X_e for the 64 cells of a tile: o, with W = M; dv, with G^T and W = S."""
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    k, v, c = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, C)
    at, live = _cells(row, tile, X, Y, columns, C, P)
    E += (row * per_row * tiles + tile).to(tl.int64) * SIZE * SIZE
    down, across = (2 * P + c) * stride_row, (2 * P + c) * stride_column
    left = _rows(a, at, live, k, K)
    scores = tl.dot(left.to(DOT), _columns(b, at, live, k, K).to(DOT), input_precision=PRECISION)
    scores *= tl.load(E + down[:, None] + across[None, :])
    total = tl.dot(scores.to(DOT), _rows(u, at, live, v, V).to(DOT), input_precision=PRECISION)
    left = left.to(tl.float32)
    for side in range(2):
        other, exists = _beyond(tile, side * P, rows, columns, step, P)
        states = edges + ((row.to(tl.int64) * tiles + other) * 2 + side) * P * K * V + k[:, None] * V + v[None, :]
        inside = (k < tl.where(exists, K, 0))[:, None] & (v < V)[None, :]
        for edge in range(P):
            weight = tl.load(E + down + (side * P + edge) * stride_column)
            state = tl.load(states + edge * K * V, mask=inside, other=0.0)
            total += tl.dot((left * weight[:, None]).to(DOT), state.to(DOT), input_precision=PRECISION)
    here = out + at[:, None] * V + v[None, :]
    tl.store(here, total.to(out.dtype.element_ty), mask=live[:, None] & (v < V)[None, :])


@triton.jit
def _grad_vectors(
    a, b, u, w, E, edges, da, dE, X, Y, K, V, rows, columns, tiles, per_row, step, stride_row, stride_column,
    PAIRS: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """da = (u w^T * G) b + sum_e W_e * (u X_e^T) and dW_e = <a, u X_e^T>, for (a, b, u, w) = (q, k, g, v) and W = M,
    or (k, q, v, g), G^T and W = S. PAIRS: also dG = a b^T * u w^T."""
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    k, v, c = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, C)
    at, live = _cells(row, tile, X, Y, columns, C, P)
    E += (row * per_row * tiles + tile).to(tl.int64) * SIZE * SIZE
    dE += tl.program_id(0).to(tl.int64) * SIZE * SIZE
    down, across = (2 * P + c) * stride_row, (2 * P + c) * stride_column
    own, grads = _rows(a, at, live, k, K), _rows(u, at, live, v, V).to(DOT)
    pairs = tl.dot(grads, _columns(w, at, live, v, V).to(DOT), input_precision=PRECISION)
    if PAIRS:
        scores = tl.dot(own.to(DOT), _columns(b, at, live, k, K).to(DOT), input_precision=PRECISION)
        tl.store(dE + down[:, None] + across[None, :], scores * pairs)
    pairs *= tl.load(E + down[:, None] + across[None, :])
    total = tl.dot(pairs.to(DOT), _rows(b, at, live, k, K).to(DOT), input_precision=PRECISION)
    own = own.to(tl.float32)
    for side in range(2):
        other, exists = _beyond(tile, side * P, rows, columns, step, P)
        states = edges + ((row.to(tl.int64) * tiles + other) * 2 + side) * P * K * V + k[None, :] * V + v[:, None]
        inside = (k < tl.where(exists, K, 0))[None, :] & (v < V)[:, None]
        for edge in range(P):
            here = down + (side * P + edge) * stride_column
            state = tl.load(states + edge * K * V, mask=inside, other=0.0)  # transposed
            read = tl.dot(grads, state.to(DOT), input_precision=PRECISION)
            tl.store(dE + here, tl.sum(own * read, axis=1))
            total += tl.load(E + here)[:, None] * read
    here = da + at[:, None] * K + k[None, :]
    tl.store(here, total.to(da.dtype.element_ty), mask=live[:, None] & (k < K)[None, :])


@triton.jit
def _grad_edges(
    edges, adjoints, dE, KV, rows, columns, tiles,
    P: tl.constexpr, SIZE: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dT = <A_b, X_b'>, over all K x V entries, for every pair of a leaving edge b and an entering edge b'."""
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b = tl.arange(0, 2 * P)
    source, source_exists = _beyond(tile, b, rows, columns, -1, P)
    target, target_exists = _beyond(tile, b, rows, columns, 1, P)
    entering = edges + ((row.to(tl.int64) * tiles + source) * (2 * P) + b)[None, :] * KV
    leaving = adjoints + ((row.to(tl.int64) * tiles + target) * (2 * P) + b)[:, None] * KV
    total = tl.zeros((2 * P, 2 * P), tl.float32)
    for start in range(0, KV, BE):
        e = start + tl.arange(0, BE)
        A = tl.load(leaving + e[None, :], mask=target_exists[:, None] & (e < KV)[None, :], other=0.0)
        X = tl.load(entering + e[:, None], mask=source_exists[None, :] & (e < KV)[:, None], other=0.0)
        total += tl.dot(A, X, input_precision="ieee")
    to = dE + tl.program_id(0).to(tl.int64) * SIZE * SIZE
    tl.store(to + b[:, None] * SIZE + b[None, :], total)


class _Plan:
    """Sizes and settings that the launches of one call share."""

    def __init__(self, q: Tensor, v: Tensor, gates: Tensor):
        N, X, Y, K = q.shape
        V = v.shape[-1]
        self.rows, self.columns = triton.cdiv(X, TILE), triton.cdiv(Y, TILE)
        self.tiles = self.rows * self.columns
        self.N, self.KV = N, K * V
        self.per_row = int(gates.shape[0] > 1)  # whether every row of the batch has its own E
        self.grid, self.sizes = (X, Y), (X, Y, K, V)
        width_k, width_v = (max(16, triton.next_power_of_2(F)) for F in (K, V))  # tl.dot wants at least 16
        # float32 products run on the ordinary cores, which hold both operands in registers: more threads share them
        warps = max(width_k, width_v) // (4 if q.dtype == torch.float32 else 8)
        self.matrix = dict(P=TILE, C=CELLS, SIZE=SIZE)
        self.blocks = dict(**self.matrix, BK=width_k, BV=width_v, **dot_options(q.dtype), num_warps=max(4, warps))

    def matrices(self, gates: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """E of every tile and, with `keep`, the path sums to every cell."""
        E = gates.new_empty(gates.shape[0], self.tiles, SIZE, SIZE)
        paths = gates.new_empty(gates.shape[0], self.tiles, 2, CELLS, SIZE) if keep else E
        blocks = dict(**self.matrix, BS=triton.next_power_of_2(SIZE))
        _matrices[gates.shape[0] * self.tiles,](gates, E, paths, *self.grid, self.columns, self.tiles, keep, **blocks)
        return E, paths

    def states(self, a: Tensor, b: Tensor, E: Tensor, backward: bool) -> Tensor:
        """The state on every edge that leaves a tile; `backward`: the adjoint of every edge that enters one."""
        edges = E.new_empty(self.N, self.tiles, EDGES, self.KV)
        out, into = (1, SIZE) if backward else (SIZE, 1)
        W = E.flatten()[EDGES * into :]  # S, or M: the columns (or rows) of E that belong to cells
        _inject[self.N * self.tiles, 2](
            a, b, W, edges, *self.sizes, self.columns, self.tiles, self.per_row, out, into, **self.blocks
        )  # fmt: skip
        diagonals = range(self.rows + self.columns - 1)
        for d in reversed(diagonals) if backward else diagonals:
            low, high = max(0, d - self.columns + 1), min(d + 1, self.rows)
            _advance[self.N * (high - low), triton.cdiv(self.KV, 64)](
                E, edges, self.KV, self.rows, self.columns, self.tiles, low * self.columns + d - low, high - low,
                self.per_row, 1 if backward else -1, out, into, P=TILE, SIZE=SIZE, BE=64,
            )  # fmt: skip
        return edges

    def arguments(self, backward: bool) -> tuple:
        """What `_read` and `_grad_vectors` take after their tensors."""
        strides = (1, SIZE) if backward else (SIZE, 1)
        return *self.sizes, self.rows, self.columns, self.tiles, self.per_row, 1 if backward else -1, *strides


@torch.library.custom_op("seqarch::plstm2d", mutates_args=())
def _plstm2d(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> list[Tensor]:
    plan = _Plan(q, v, gates)
    q, k, v, gates = (x.contiguous() for x in (q, k, v, gates))
    E, _ = plan.matrices(gates, keep=False)
    edges = plan.states(k, v, E, backward=False)
    o = torch.empty_like(v)
    _read[plan.N * plan.tiles,](q, k, v, E, edges, o, *plan.arguments(False), **plan.blocks)
    return [o, edges]


@_plstm2d.register_fake
def _(q, k, v, gates):
    N, X, Y, K = q.shape
    tiles = -(-X // TILE) * -(-Y // TILE)
    return [
        torch.empty_like(v, memory_format=torch.contiguous_format),
        gates.new_empty(N, tiles, EDGES, K * v.shape[-1]),
    ]


@torch.library.custom_op("seqarch::plstm2d_backward", mutates_args=())
def _plstm2d_backward(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, edges: Tensor, grad: Tensor) -> list[Tensor]:
    plan = _Plan(q, v, gates)
    q, k, v, gates, grad = (x.contiguous() for x in (q, k, v, gates, grad))
    E, paths = plan.matrices(gates, keep=True)
    adjoints = plan.states(q, grad, E, backward=True)
    dq, dk, dv, dgates = (torch.empty_like(x) for x in (q, k, v, gates))
    dE = E.new_empty(plan.N, plan.tiles, SIZE, SIZE)
    grid = (plan.N * plan.tiles,)
    _read[grid](k, q, grad, E, adjoints, dv, *plan.arguments(True), **plan.blocks)
    _grad_vectors[grid](q, k, grad, v, E, edges, dq, dE, *plan.arguments(False), PAIRS=True, **plan.blocks)
    _grad_vectors[grid](k, q, v, grad, E, adjoints, dk, dE, *plan.arguments(True), PAIRS=False, **plan.blocks)
    _grad_edges[grid](edges, adjoints, dE, plan.KV, plan.rows, plan.columns, plan.tiles, P=TILE, SIZE=SIZE, BE=64)
    if not plan.per_row:
        dE = dE.sum(0)
    blocks = dict(**plan.matrix, BS=triton.next_power_of_2(SIZE))
    _grad_gates[gates.shape[0] * plan.tiles,](
        gates, dE, paths, dgates, *plan.grid, plan.columns, plan.tiles, **blocks
    )  # fmt: skip
    return [dq, dk, dv, dgates]


@_plstm2d_backward.register_fake
def _(q, k, v, gates, edges, grad):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, gates)]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx, grads):
    return tuple(_plstm2d_backward(*ctx.saved_tensors, grads[0]))


_plstm2d.register_autograd(_backward, setup_context=_setup_context)


def plstm2d_triton(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    """Forward and backward by the kernels above; shapes as in `plstm2d_reference`, gates float32."""
    return _plstm2d(q, k, v, gates)[0]
