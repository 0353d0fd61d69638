r"""What the ParaGRU and ParaLSTM kernels (``gru.py``, ``lstm.py``) share.

One program owns one batch row and a block of channels, and walks the sequence in tiles of 64 steps. A tile of w is read
into registers once; there the start $f(0, w)$ is formed and every Newton step done: shift the states by one to get
$h_{l-1}$, evaluate the cell and its Jacobian, solve the linear recurrence with `tl.associative_scan`, correct. Then the
states are written, and the last one, which is exact to the tile's own convergence, starts the next tile. So memory is
touched once per element, *whatever the number of Newton steps*.

The sequential mode is another kernel with the same grid that keeps one step in registers instead of a tile. It does one
evaluation per step and no scan, but its steps wait for each other: it wins when batch and channels alone fill the GPU.

The backward kernel is the same for both. It walks the tiles from the end (position i loads step L-1-i: Triton's own
reverse scan is wrong for tuples on some versions) and scans the adjoint $\lambda_l = g_l + J_{l+1}^\top \lambda_{l+1}$. The
Jacobian is that of the *next* step, recomputed from its inputs and the state before it; then the gates of the step itself
are recomputed and turn $\lambda_l$ into the gradient of w. The second reading comes out of the cache, and keeping gates
across the scan would cost registers that are not there. The gradients of the diagonals are sums over time: each program
keeps its own in registers, and they are added up outside. No atomics, and two runs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK_T = 64


@triton.jit
def tanh(x):
    e = tl.exp(-2 * tl.abs(x))  # at most 1: nothing overflows, however far the tanh is saturated
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def shift(x, start, BT: tl.constexpr, BD: tl.constexpr):
    """Move a tile [BT, BD] one position on along time, with `start` [BD] in the first: what comes before every step."""
    i = tl.broadcast_to(tl.arange(0, BT)[:, None], (BT, BD))
    return tl.where(i == 0, start[None, :], tl.gather(x, tl.maximum(i - 1, 0), 0))


@triton.jit
def row_of(x, position, BT: tl.constexpr):
    """Row `position` of a tile [BT, BD]."""
    return tl.sum(tl.where((tl.arange(0, BT) == position)[:, None], x, 0.0), axis=0)


@triton.jit
def corrected(x, change, bound):
    """x + change, put back into [-bound, bound]; a correction that overflowed to NaN is dropped."""
    x += tl.where(change == change, change, 0.0)
    return tl.minimum(tl.maximum(x, -bound[None, :]), bound[None, :])


@triton.jit
def furthest(worst, difference, live):
    """The largest |difference| of every channel so far; NaN counts as infinite."""
    size = tl.abs(difference)
    size = tl.where(live, tl.where(size == size, size, float("inf")), 0.0)
    return tl.maximum(worst, tl.max(size, axis=0))


@triton.jit
def load(base, at, live):
    return tl.load(base + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def put(base, at, x, live):
    tl.store(base + at, x.to(base.dtype.element_ty), mask=live)


def grid(w: Tensor, channels: int) -> tuple[int, int]:
    """One program per batch row and block of `channels`."""
    return w.shape[0], triton.cdiv(w.shape[3], channels)


def given(gradient: Tensor | None, like: Tensor) -> Tensor:
    """The gradient of an output, zero where nothing depends on it."""
    return like.new_zeros(like.shape) if gradient is None else gradient
