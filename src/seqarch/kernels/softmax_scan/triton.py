r"""The softmax scan on a GPU: one program owns one row (batch x head) and a block of value columns, and walks the tiles.

A tile is BT tokens. Its triangular matrix of weights $e^{s_j - m_t}$ is formed in registers and multiplied with the
values by the tensor cores; the state (m, u, w) waits in registers for the next tile. Memory is touched once per
element: read s and v, write o. The backward pass is the transposed product, walked from the last tile to the first
(equations in ``parallel.py``). It forms the transposed matrix directly rather than transposing one.

Value blocks of one row are separate programs. All of them need u and recompute it; the first one stores it. The
gradient of s sums over value columns, so every block writes its part and the parts are added afterwards: no atomics,
and two runs agree bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import dot_options

BLOCK_T = 64


@triton.jit
def _safe(m):
    # a maximum of -inf (nothing seen) becomes +inf, so that exp(-inf - m) is 0 and never nan
    return tl.where(m == float("-inf"), float("inf"), m)


@triton.jit
def _forward(
    s, v, m0, u0, w0, o, shares, tops, uT, wT, T, E,
    BT: tl.constexpr, BE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and final state; also 1/u of every token, and the running maxima (T + 1 of them, the first is m0)."""
    row, block = tl.program_id(0), tl.program_id(1)
    i, e = tl.arange(0, BT), block * BE + tl.arange(0, BE)
    scalar, vector = row.to(tl.int64) * T, row.to(tl.int64) * T * E
    top, u = tl.load(m0 + row), tl.load(u0 + row)
    w = tl.load(w0 + row * E + e, mask=e < E, other=0.0)
    if block == 0:
        tl.store(tops + scalar + row, top)
    for start in range(0, T, BT):
        t = start + i
        live = t < T
        here = vector + t[:, None] * E + e[None, :]
        inside = live[:, None] & (e < E)[None, :]
        scores = tl.load(s + scalar + t, mask=live, other=float("-inf"))
        values = tl.load(v + here, mask=inside, other=0.0)
        table = tl.where(i[:, None] >= i[None, :], scores[None, :], float("-inf"))  # token t down, token j across
        m = tl.maximum(tl.max(table, axis=1), top)
        safe = _safe(m)
        weights = tl.exp(table - safe[:, None])
        kept = tl.exp(top - safe)
        sums = u * kept + tl.sum(weights, axis=1)
        rows = w[None, :] * kept[:, None] + tl.dot(weights.to(DOT), values.to(DOT), input_precision=PRECISION)
        share = tl.where(sums > 0, 1 / tl.where(sums > 0, sums, 1.0), 0.0)
        tl.store(o + here, (rows * share[:, None]).to(o.dtype.element_ty), mask=inside)
        if block == 0:
            tl.store(shares + scalar + t, share, mask=live)
            tl.store(tops + scalar + row + t + 1, m, mask=live)
        # dead positions change nothing (score -inf), so the last row of the tile is always the state
        last = i == BT - 1
        top = tl.max(m, axis=0)
        u = tl.sum(tl.where(last, sums, 0.0), axis=0)
        w = tl.sum(tl.where(last[:, None], rows, 0.0), axis=0)
    if block == 0:
        tl.store(uT + row, u)
    tl.store(wT + row * E + e, w, mask=e < E)


@triton.jit
def _backward(
    s, v, g, delta, tops, r0, q0, ds, dv, r1, q1, T, E, rows,
    BT: tl.constexpr, BE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of s (one part per value block), v and the incoming state.

    g is dL/do / u and delta is -<dL/do, o> / u: together G of ``parallel.py``. The carry [r, q] starts as the gradient of
    the final state [w, u] and ends as that of the incoming one.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    i, e = tl.arange(0, BT), block * BE + tl.arange(0, BE)
    scalar, vector = row.to(tl.int64) * T, row.to(tl.int64) * T * E
    part = (block * rows + row).to(tl.int64) * T
    r, q = tl.load(r0 + row * E + e, mask=e < E, other=0.0), tl.load(q0 + row)
    for back in range(0, T, BT):
        start = (T - 1) // BT * BT - back
        t = start + i
        live = t < T
        here = vector + t[:, None] * E + e[None, :]
        inside = live[:, None] & (e < E)[None, :]
        scores = tl.load(s + scalar + t, mask=live, other=float("-inf"))
        values = tl.load(v + here, mask=inside, other=0.0).to(tl.float32)
        grads = tl.load(g + here, mask=inside, other=0.0)
        deltas = tl.load(delta + scalar + t, mask=live, other=0.0)
        # a dead position gets a maximum of +inf: weight 0
        safe = _safe(tl.load(tops + scalar + row + t + 1, mask=live, other=float("inf")))
        end = _safe(tl.load(tops + scalar + row + tl.minimum(start + BT, T)))
        before = tl.load(tops + scalar + row + start)
        table = tl.where(i[None, :] >= i[:, None], scores[:, None], float("-inf"))  # token j down, token t across
        weights = tl.exp(table - safe[None, :])
        later = tl.exp(scores - end)
        dx = r[None, :] * later[:, None] + tl.dot(weights.to(DOT), grads.to(DOT), input_precision=PRECISION)
        tl.store(dv + here, dx.to(dv.dtype.element_ty), mask=inside)
        change = tl.sum(values * dx, axis=1)
        if block == 0:
            change += q * later + tl.sum(weights * deltas[None, :], axis=1)
        tl.store(ds + part + t, change, mask=live)
        kept, seen = tl.exp(before - end), tl.exp(before - safe)
        r = r * kept + tl.sum(grads.to(tl.float32) * seen[:, None], axis=0)
        q = q * kept + tl.sum(deltas * seen, axis=0)
    tl.store(r1 + row * E + e, r, mask=e < E)
    if block == 0:
        tl.store(q1 + row, q)


def _grid(x: Tensor) -> tuple[tuple[int, int], dict]:
    """The launch grid (rows, value blocks) and the constants; x is the matrix operand of the tile product."""
    R, _, E = x.shape
    width = min(64, max(16, triton.next_power_of_2(E)))  # tl.dot wants at least 16 columns
    # without tensor cores (float32) a product keeps far more in registers
    rows, warps = (32, 8) if x.dtype == torch.float32 else (BLOCK_T, 4)
    return (R, triton.cdiv(E, width)), {"BT": rows, "BE": width, "num_warps": warps, **dot_options(x.dtype)}


@torch.library.custom_op("seqarch::softmax_scan", mutates_args=())
def _softmax_scan(s: Tensor, v: Tensor, m: Tensor, u: Tensor, w: Tensor) -> list[Tensor]:
    R, T, E = v.shape
    grid, blocks = _grid(v)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    shares, tops = s.new_empty(R, T), s.new_empty(R, T + 1)
    uT, wT = s.new_empty(R), s.new_empty(R, E)
    inputs = [x.contiguous() for x in (s, v, m, u, w)]
    _forward[grid](*inputs, o, shares, tops, uT, wT, T, E, **blocks)
    return [o, tops[:, -1].clone(), uT, wT, shares, tops]


@_softmax_scan.register_fake
def _(s, v, m, u, w):
    R, T, E = v.shape
    return [
        torch.empty_like(v, memory_format=torch.contiguous_format),
        s.new_empty(R), s.new_empty(R), s.new_empty(R, E), s.new_empty(R, T), s.new_empty(R, T + 1),
    ]  # fmt: skip


@torch.library.custom_op("seqarch::softmax_scan_backward", mutates_args=())
def _softmax_scan_backward(
    s: Tensor, v: Tensor, o: Tensor, shares: Tensor, tops: Tensor, g: Tensor, grad_u: Tensor, grad_w: Tensor
) -> list[Tensor]:
    R, T, E = v.shape
    g = g.float()
    delta = -torch.linalg.vecdot(g, o.float()) * shares
    g = g * shares[..., None]
    g = g if v.dtype == torch.float16 else g.to(v.dtype)  # g / u of a late token can be below the range of float16
    grid, blocks = _grid(g)
    ds, dv = s.new_empty(grid[1], R, T), torch.empty(v.shape, dtype=v.dtype, device=v.device)
    dw, du = s.new_empty(R, E), s.new_empty(R)
    inputs = [x.contiguous() for x in (s, v, g, delta, tops, grad_w, grad_u)]
    _backward[grid](*inputs, ds, dv, dw, du, T, E, R, **blocks)
    return [ds.sum(0), dv, du, dw]


@_softmax_scan_backward.register_fake
def _(s, v, o, shares, tops, g, grad_u, grad_w):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (s, v, grad_u, grad_w)]


def _setup_context(ctx, inputs, output):
    o, top, _, _, shares, tops = output
    ctx.save_for_backward(inputs[0], inputs[1], o, shares, tops)
    ctx.shape = inputs[4].shape


def _gradient(ctx, grads):
    s, v, o, shares, tops = ctx.saved_tensors
    g = torch.zeros_like(o) if grads[0] is None else grads[0]
    grad_u = s.new_zeros(ctx.shape[0]) if grads[2] is None else grads[2]
    grad_w = s.new_zeros(ctx.shape) if grads[3] is None else grads[3]
    ds, dv, du, dw = _softmax_scan_backward(s, v, o, shares, tops, g, grad_u, grad_w)
    return ds, dv, None, du, dw


_softmax_scan.register_autograd(_gradient, setup_context=_setup_context)


def softmax_scan_triton(s: Tensor, v: Tensor, m: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward by the kernels above; flattened rows as in `softmax_scan_reference`, all but v float32."""
    o, top, u, w, _, _ = _softmax_scan(s, v, m, u, w)
    return o, top.detach(), u, w
