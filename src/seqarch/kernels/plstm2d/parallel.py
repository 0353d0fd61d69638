r"""The recurrence on a grid in PyTorch, a diagonal of tiles at a time.

**A block of cells is one matrix.** Everything is linear in what enters. Collect what enters a block of a x b cells: the
edges from the left (one per y, b of them), the edges from above (one per x, a of them), and the sources $k v^\top$ of
its cells. Collect likewise what comes out: the edges to the right, the edges down, and what the cells read. Then

$$\begin{bmatrix} \text{right} \\ \text{down} \\ \text{read} \end{bmatrix} = E
  \begin{bmatrix} \text{left} \\ \text{above} \\ \text{source} \end{bmatrix},\qquad
  E = \begin{bmatrix} T & S \\ M & G \end{bmatrix},\qquad
  E_{1 \times 1} = \begin{bmatrix} T^{RL} & T^{RU} & S^R \\ T^{DL} & T^{DU} & S^D \\ M^L & M^U & D \end{bmatrix},$$

one number per pair, the same for all $K \times V$ entries of the states: the gates of one cell are already such a matrix.

**Doubling.** Put block B behind block A along x. What leaves A to the right enters B from the left, and nothing flows back.
So all of B's rows gain the product (B's columns *left*) x (A's rows *right*), A's other rows and B's other columns stay,
and A sees nothing of B. Along y the same holds with *down* and *above*. Joining in x, then in y, doubles the side of a
square block; $2 \log_2 p$ joins make all p x p tiles of the grid at once, whatever K and V are.

**Diagonals.** Tiles with equal i + j do not depend on each other. For each of them in turn, with the states X that enter
it (2p matrices K x V), keys k and values v of its $p^2$ cells,

$$X' = T X + \sum_c S_c\, k_c v_c^\top,\qquad
  o = (q k^\top \odot G)\, v + \sum_b M_b \odot (q X_b).$$

Only the 2p states on the border of each tile are kept for the gradient. It walks the diagonals backwards:

$$\bar X = T^\top \bar X' + \sum_c M_c\, q_c \bar o_c^\top,\qquad \partial T = \bar X' X^\top,\qquad
  \partial G = q k^\top \odot \bar o v^\top,$$

and $\partial E$ goes back through the joins by autograd. The cells of a tile are listed along a Z-shaped curve, in
which both halves of every block, and both halves of each half, are contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def to_tiles(x: Tensor, p: int) -> Tensor:
    """Cut ``(N, X, Y, F)`` into ``(N, tiles, p * p, F)``, padded with zeros, cells along the Z-curve."""
    X, Y = x.shape[1:3]
    x = torch.nn.functional.pad(x, (0, 0, 0, -Y % p, 0, -X % p))
    levels = p.bit_length() - 1
    # the binary digits of x and y inside a tile, the coarsest first: y, x, y, x, ...
    x = x.unflatten(1, (-1, *[2] * levels)).unflatten(levels + 2, (-1, *[2] * levels))
    digits = [d for i in range(levels) for d in (levels + 3 + i, 2 + i)]
    x = x.permute(0, 1, levels + 2, *digits, -1)
    return x.flatten(3, -2).flatten(1, 2) if levels else x.flatten(1, 2)[:, :, None]


def from_tiles(x: Tensor, X: int, Y: int, p: int) -> Tensor:
    """The inverse of `to_tiles`: ``(N, X, Y, F)`` from ``(N, tiles, p * p, F)``."""
    levels = p.bit_length() - 1
    x = x.unflatten(2, [2] * (2 * levels)) if levels else x[:, :, 0]
    x = x.unflatten(1, (-(-X // p), -(-Y // p)))
    digits_x, digits_y = range(4, 2 * levels + 3, 2), range(3, 2 * levels + 3, 2)
    x = x.permute(0, 1, *digits_x, 2, *digits_y, -1)
    return x.flatten(levels + 2, -2).flatten(1, levels + 1)[:, :X, :Y]


def join(A: Tensor, B: Tensor, sizes: list[int], along_x: bool) -> Tensor:
    """The matrix of two blocks side by side, A first; `sizes` counts one block's edges across x, across y, and cells."""

    def split(E: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        across_x, across_y, cells = E.split(sizes, dim)
        return (across_x, across_y, cells) if along_x else (across_y, across_x, cells)

    def put(passed: Tensor, kept: list[Tensor], cells: list[Tensor], dim: int) -> Tensor:
        return torch.cat([passed, *kept, *cells] if along_x else [*kept, passed, *cells], dim)

    def row(first: Tensor, second: Tensor) -> Tensor:
        """One row over all columns: `first` over those of A (with the entrance of both), `second` over those of B."""
        passed, kept, cells = split(first, -1)
        _, kept_too, cells_too = split(second, -1)
        return put(passed, [kept, kept_too], [cells, cells_too], -1)

    from_A = row(A, torch.zeros_like(B))
    from_B = row(split(B, -1)[0] @ split(A, -2)[0], B)
    _, kept, cells = split(from_A, -2)
    passed, kept_too, cells_too = split(from_B, -2)
    return put(passed, [kept, kept_too], [cells, cells_too], -2)


def tile_matrices(gates: Tensor, p: int) -> Tensor:
    """E of every p x p tile, ``(N or 1, tiles, 2p + p * p, 2p + p * p)``, from the gates ``(N or 1, X, Y, 9)``."""
    E = to_tiles(gates, p)
    tiles = E.shape[1]
    E = E.flatten(1, 2).unflatten(-1, (3, 3))
    a = b = 1  # extent of a block along x and along y
    while b < p:
        E = join(E[:, 0::2], E[:, 1::2], [b, a, a * b], along_x=True)
        a *= 2
        E = join(E[:, 0::2], E[:, 1::2], [b, a, a * b], along_x=False)
        b *= 2
    return E.view(E.shape[0], tiles, *E.shape[-2:])


def diagonals(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """For every diagonal of tiles: where they lie among all tiles (row-major), and the range of their i."""
    for d in range(rows + columns - 1):
        low, high = max(0, d - columns + 1), min(d + 1, rows)
        step = max(1, columns - 1)  # from (i, j) to (i + 1, j - 1)
        first = low * columns + d - low
        yield slice(first, first + (high - low - 1) * step + 1, step), slice(low, high)


def _spread(weights: Tensor, x: Tensor) -> Tensor:
    """Every cell's vector once per edge, weighted: ``(..., c, b)`` and ``(..., c, K)`` give ``(..., c, b * K)``."""
    return (weights[..., None] * x[..., None, :]).flatten(-2)


def _spread_gradient(g: Tensor, weights: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weights and x from that of `_spread`."""
    g = g.unflatten(-1, (weights.shape[-1], x.shape[-1]))
    return (g @ x[..., None]).squeeze(-1), (weights[..., None, :] @ g).squeeze(-2)


class _Tiles(torch.autograd.Function):
    """From q, k, v ``(N, tiles, c, .)`` and E to the outputs; equations at the top of this file."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, E: Tensor, rows: int, columns: int) -> Tensor:
        N, tiles, c, K = q.shape
        V, b = v.shape[-1], E.shape[-1] - c
        p = b // 2
        entering = q.new_empty(N, tiles, b, K, V)
        right = q.new_zeros(N, rows + 1, p, K, V)  # what leaves tile (i, j) to the right waits at i + 1, for tile i + 1
        down = q.new_zeros(N, rows, p, K, V)
        o = torch.empty_like(v)
        for part, i in diagonals(rows, columns):
            queries, keys, values = q[:, part], k[:, part], v[:, part]
            T, S, M, G = E[:, part, :b, :b], E[:, part, :b, b:], E[:, part, b:, :b], E[:, part, b:, b:]
            X = torch.cat([right[:, i], down[:, i]], dim=2)
            entering[:, part] = X
            o[:, part] = (queries @ keys.mT * G) @ values + _spread(M, queries) @ X.flatten(2, 3)
            leaving = (_spread(S.mT, keys).mT @ values).view(X.shape)
            leaving += (T @ X.flatten(3)).view(X.shape)
            right[:, i.start + 1 : i.stop + 1], down[:, i] = leaving.split(p, dim=2)
        ctx.save_for_backward(q, k, v, E, entering)
        ctx.grid = rows, columns
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, E, entering = ctx.saved_tensors
        rows, columns = ctx.grid
        N, _, b, K, V = entering.shape
        p = b // 2
        right, down = q.new_zeros(N, rows + 1, p, K, V), q.new_zeros(N, rows, p, K, V)
        dq, dk, dv, dE = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, E))
        for part, i in reversed(list(diagonals(rows, columns))):
            queries, keys, values, g, X = (x[:, part] for x in (q, k, v, grad, entering))
            T, S, M, G = E[:, part, :b, :b], E[:, part, :b, b:], E[:, part, b:, :b], E[:, part, b:, b:]
            leaving = torch.cat([right[:, i.start + 1 : i.stop + 1], down[:, i]], dim=2)
            products, grads = queries @ keys.mT, g @ values.mT
            weighted = grads * G
            dM, dq_border = _spread_gradient(g @ X.flatten(2, 3).mT, M, queries)
            dS, dk_border = _spread_gradient(values @ leaving.flatten(2, 3).mT, S.mT, keys)
            dq[:, part] = weighted @ keys + dq_border
            dk[:, part] = weighted.mT @ queries + dk_border
            dv[:, part] = (products * G).mT @ g + _spread(S.mT, keys) @ leaving.flatten(2, 3)
            dT = leaving.flatten(3) @ X.flatten(3).mT
            for to, x in (
                (dE[:, part, :b, :b], dT),
                (dE[:, part, :b, b:], dS.mT),
                (dE[:, part, b:, :b], dM),
                (dE[:, part, b:, b:], products * grads),
            ):
                to.copy_(x.sum_to_size(to.shape))  # gates shared by the batch
            X = (_spread(M, queries).mT @ g).view(leaving.shape)
            X += (T.mT @ leaving.flatten(3)).view(leaving.shape)
            right[:, i], down[:, i] = X.split(p, dim=2)
        return dq, dk, dv, dE, None, None


def plstm2d_parallel(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, tile: int) -> Tensor:
    """All of the above; shapes as in `plstm2d_reference`."""
    X, Y = q.shape[1:3]
    p = min(tile, 1 << (max(X, Y) - 1).bit_length())  # no larger than the grid needs
    E = tile_matrices(gates, p)
    o = _Tiles.apply(to_tiles(q, p), to_tiles(k, p), to_tiles(v, p), E, -(-X // p), -(-Y // p))
    return from_tiles(o, X, Y, p)
