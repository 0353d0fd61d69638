r"""A linear recurrence on a two-dimensional grid whose states live on the edges between cells (chapter 15).

At cell (x, y) the edge from (x-1, y) arrives with the matrix L, the edge from (x, y-1) with the matrix U (zero outside the
grid). The edges to (x+1, y) and (x, y+1) leave with R and D, and the cell reads what arrives:

$$R = T^{RL} L + T^{RU} U + S^R k v^\top,\qquad D = T^{DL} L + T^{DU} U + S^D k v^\top,$$
$$o = (M^L L + M^U U)^\top q + D_{xy}\, (q \cdot k)\, v .$$

Read the folder in this order: ``reference.py`` (the definition), ``parallel.py`` (tiles), ``triton.py`` (GPU).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype, check_same, check_shape, check_values, choose
from .parallel import plstm2d_parallel
from .reference import plstm2d_reference

__all__ = ["GATES", "ORIENTATIONS", "plstm2d", "plstm2d_four"]

# Row by row: what leaves right, what leaves down, what is read; column by column: from the left, from above, from here.
GATES = ("TRL", "TRU", "SR", "TDL", "TDU", "SD", "ML", "MU", "D")
# The axes of (N, X, Y) that are flipped before the walk from the first corner to the last, and back after it.
ORIENTATIONS = ((), (1,), (2,), (1, 2))
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_WIDTH = 64  # largest K and V of the Triton kernels


def plstm2d(
    q: Tensor, k: Tensor, v: Tensor, gates: Mapping[str, Tensor], *, tile: int = 8, backend: str = "auto"
) -> Tensor:
    r"""Walk over the grid from (0, 0) to the opposite corner with gates that do not depend on the states.

    All of it is one matrix over pairs of cells, $o_n = \sum_m G_{nm} (q_n \cdot k_m) v_m$, where $G_{nm}$ sums over all
    paths from m to n the product $M\,T \cdots T\,S$ of the gates on the path, and $G_{nn} = D_n$.

    Args:
        q, k: queries and keys, ``(N, X, Y, K)``; N is batch x heads. Any scaling of q is the caller's.
        v: values, ``(N, X, Y, V)``, of q's dtype.
        gates: a mapping with the nine names of `GATES`, each ``(N, X, Y)``, or ``(1, X, Y)`` where all of the batch share
            the gate. ``TRL`` is the weight from L (in) to R (out), and so on.
        tile: side of the tiles of ``parallel.py``, a power of two. The result does not depend on it; the Triton
            kernels have tiles of their own size, 8.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``.

    Returns:
        ``o`` of v's shape and dtype; states are kept in float32 where the inputs are float16 or bfloat16.

    Gradients flow to q, k, v and all gates. With $\bar o = \partial L/\partial o$ and the adjoints $\bar R, \bar D$ of the
    edges that leave, walked from the last corner to the first, the edges that arrive have the adjoints
    $$\bar L = T^{RL} \bar R + T^{DL} \bar D + M^L q \bar o^\top,\qquad
      \bar U = T^{RU} \bar R + T^{DU} \bar D + M^U q \bar o^\top,$$
    and $\partial T^{RL} = \langle \bar R, L \rangle$, $\partial S^R = k^\top \bar R v$, $\partial M^L = q^\top L \bar o$ (the
    others alike), $\partial k = (S^R \bar R + S^D \bar D) v + D (v \cdot \bar o) q$. A gate shared by the batch receives
    the sum. Nothing is ever divided by a gate, so gates may be 0. Inputs of any stride are accepted; a contiguous copy
    is made where the kernel needs one. The gradient itself is not differentiable (no second derivatives) except with
    ``backend="reference"``.

    Raises:
        ValueError: wrong shape, dtype, device, gate names, tile or backend, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("q", q, "N X Y K", sizes)
    check_shape("k", k, "N X Y K", sizes)
    check_shape("v", v, "N X Y V", sizes)
    check_same(("q", q), ("k", k), ("v", v))
    if not q.is_floating_point():
        raise ValueError(f"expected q of a real dtype, got {q.dtype}")
    _check_gates(gates, GATES, q, sizes)
    if not isinstance(tile, int) or tile < 1 or tile & (tile - 1):
        raise ValueError(f"expected tile to be a power of two, got {tile!r}")
    check_values(q=q, k=k, v=v, **gates)

    dtype = accumulate_dtype(q.dtype)
    shared = all(gates[name].shape[0] == 1 for name in GATES)
    batch = 1 if shared else sizes["N"]
    stacked = torch.stack([gates[name].to(dtype).expand(batch, -1, -1) for name in GATES], dim=-1)
    limit = None
    if max(sizes["K"], sizes["V"]) > TRITON_WIDTH:
        limit = f"it takes K and V up to {TRITON_WIDTH}, got K = {sizes['K']} and V = {sizes['V']}"
    chosen = choose(backend, q, k, v, dtypes=TRITON_DTYPES, limit=limit)
    if 0 in sizes.values():
        chosen = "reference"
    if chosen == "triton":
        from .triton import plstm2d_triton

        return plstm2d_triton(q, k, v, stacked)
    q, k, stored, v = q.to(dtype), k.to(dtype), v.dtype, v.to(dtype)
    if chosen == "reference":
        return plstm2d_reference(q, k, v, stacked).to(stored)
    return plstm2d_parallel(q, k, v, stacked, tile).to(stored)


def plstm2d_four(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Sequence[Mapping[str, Tensor]],
    D: Tensor,
    *,
    tile: int = 8,
    backend: str = "auto",
) -> Tensor:
    """Add the walks from all four corners, so that every cell sees the whole grid.

    Args:
        q, k, v, tile, backend: as in `plstm2d`.
        gates: four mappings, one for each of `ORIENTATIONS`, with the gates of `GATES` except D. They are given at the
            cell where they act; the flips happen inside. "Right" and "down" are the directions of that walk.
        D: the weight of a cell's own value, ``(N or 1, X, Y)``; it enters once, not once per orientation.

    Returns:
        ``o`` of v's shape and dtype.

    Raises:
        ValueError: as in `plstm2d`.
    """
    if not isinstance(gates, Sequence) or len(gates) != len(ORIENTATIONS):
        given = f"{len(gates)}" if hasattr(gates, "__len__") else type(gates).__name__
        raise ValueError(f"expected gates to be a sequence of {len(ORIENTATIONS)} mappings, got {given}")
    sizes: dict[str, int] = {}
    check_shape("q", q, "N X Y K", sizes)
    total = None
    for axes, own in zip(ORIENTATIONS, gates, strict=True):
        _check_gates(own, GATES[:-1], q, sizes)
        all_nine = {**own, "D": D if total is None else torch.zeros_like(D)}
        flipped = {name: gate.flip(axes) for name, gate in all_nine.items()}
        o = plstm2d(q.flip(axes), k.flip(axes), v.flip(axes), flipped, tile=tile, backend=backend).flip(axes)
        total = o if total is None else total + o
    return total


def _check_gates(gates: Mapping[str, Tensor], names: Sequence[str], q: Tensor, sizes: dict[str, int]) -> None:
    """Check the names of the gates and that each is (N, X, Y) or (1, X, Y), real, and on q's device."""
    if not isinstance(gates, Mapping) or set(gates) != set(names):
        given = ", ".join(sorted(map(str, gates))) if isinstance(gates, Mapping) else type(gates).__name__
        raise ValueError(f"expected gates to be a mapping with the names {', '.join(names)}, got {given}")
    for name in names:
        gate = gates[name]
        shared = isinstance(gate, Tensor) and gate.ndim == 3 and gate.shape[0] == 1
        check_shape(f"gate {name}", gate, "1 X Y" if shared else "N X Y", dict(sizes))
        check_same(("q", q), (f"gate {name}", gate), dtype=False)
        if not gate.is_floating_point():
            raise ValueError(f"expected gate {name} of a real floating-point dtype, got {gate.dtype}")
