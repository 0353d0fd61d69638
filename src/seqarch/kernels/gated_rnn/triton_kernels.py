r"""The gated recurrences on a GPU: one program owns 16 rows of the batch and walks the whole sequence with them.

The state stays in registers, a ``[16, H]`` tile. A step loads its piece of xp, multiplies the state by each block of
W_h (the smallest product the tensor cores take has 16 rows, hence 16), applies the gates and stores h. What limits it is
latency, T steps one after another: memory traffic hardly counts. That decides what is kept for the backward pass: the
activated gates, in float32, so that the way back needs one product per block and step and not two.

The backward kernel walks from T to 1 and leaves the gradients of the pre-activations; the weight gradient is one matrix
product over all steps afterwards, outside. No sum has two owners, so two runs give the same bits.

Hidden sizes are padded to a power of two inside the tiles. Padded units start at 0 and stay there: their weights are
read as 0, and then so is tanh of their pre-activation.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    e = tl.exp(-2 * tl.abs(x))  # at most 1: nothing overflows, however far the tanh is saturated
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def _times(x, w, block, H, BH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply x [16, BH] by the square block of w ``(blocks, H, H)`` that stands at `block`."""
    i, j = tl.arange(0, BH)[:, None], tl.arange(0, BH)[None, :]
    tile = tl.load(w + block * H * H + i * H + j, mask=(i < H) & (j < H), other=0.0)
    return tl.dot(x.to(DOT), tile.to(DOT), input_precision=PRECISION)


@triton.jit
def _load(base, at, live):
    return tl.load(base + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _rnn_forward(
    xp,
    w,
    h0,
    h_all,
    hT,
    B,
    T,
    H,
    RELU: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walk forward: h = phi(xp_t + h W^T)."""
    row, unit = tl.program_id(0) * BR + tl.arange(0, BR)[:, None], tl.arange(0, BH)[None, :]
    live = (row < B) & (unit < H)
    state = row * H + unit
    step = row.to(tl.int64) * T * H + unit
    h = _load(h0, state, live)
    for _ in range(0, T):
        a = _load(xp, step, live) + _times(h, w, 0, H, BH, DOT, PRECISION)
        if RELU:
            h = tl.maximum(a, 0.0)
        else:
            h = _tanh(a)
        tl.store(h_all + step, h.to(h_all.dtype.element_ty), mask=live)
        step += H
    tl.store(hT + state, h, mask=live)


@triton.jit
def _rnn_backward(
    w,
    h_all,
    grad_h,
    grad_hT,
    delta,
    grad_h0,
    B,
    T,
    H,
    RELU: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walk back: delta_t = (g_t + delta_{t+1} W) phi'."""
    row, unit = tl.program_id(0) * BR + tl.arange(0, BR)[:, None], tl.arange(0, BH)[None, :]
    live = (row < B) & (unit < H)
    state = row * H + unit
    step = (row.to(tl.int64) * T + T - 1) * H + unit
    dh = _load(grad_hT, state, live)
    for _ in range(0, T):
        h = _load(h_all, step, live)
        dh += _load(grad_h, step, live)
        if RELU:
            da = tl.where(h > 0, dh, 0.0)
        else:
            da = dh * (1 - h * h)
        tl.store(delta + step, da, mask=live)
        dh = _times(da, w, 0, H, BH, DOT, PRECISION)
        step -= H
    tl.store(grad_h0 + state, dh, mask=live)


@triton.jit
def _lstm_forward(
    xp, w, h0, s0, cont, h_all, gates, s_all, hT, sT, B, T, H,
    FLAGS: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk forward: s = f s + i g, h = o tanh(s); keep the activated gates and the cell states."""
    row, unit = tl.program_id(0) * BR + tl.arange(0, BR)[:, None], tl.arange(0, BH)[None, :]
    live = (row < B) & (unit < H)
    state = row * H + unit
    step = row.to(tl.int64) * T * H + unit  # of a (B, T, H) tensor
    packed = row.to(tl.int64) * T * 4 * H + unit  # of a (B, T, 4H) tensor
    h, s = _load(h0, state, live), _load(s0, state, live)
    for t in range(0, T):
        if FLAGS:
            goes_on = tl.load(cont + row.to(tl.int64) * T + t, mask=row < B, other=0) != 0
            h, s = tl.where(goes_on, h, 0.0), tl.where(goes_on, s, 0.0)
        i = _sigmoid(_load(xp, packed, live) + _times(h, w, 0, H, BH, DOT, PRECISION))
        f = _sigmoid(_load(xp, packed + H, live) + _times(h, w, 1, H, BH, DOT, PRECISION))
        g = _tanh(_load(xp, packed + 2 * H, live) + _times(h, w, 2, H, BH, DOT, PRECISION))
        o = _sigmoid(_load(xp, packed + 3 * H, live) + _times(h, w, 3, H, BH, DOT, PRECISION))
        s = f * s + i * g
        h = o * _tanh(s)
        tl.store(gates + packed, i, mask=live)
        tl.store(gates + packed + H, f, mask=live)
        tl.store(gates + packed + 2 * H, g, mask=live)
        tl.store(gates + packed + 3 * H, o, mask=live)
        tl.store(s_all + step, s, mask=live)
        tl.store(h_all + step, h.to(h_all.dtype.element_ty), mask=live)
        step += H
        packed += 4 * H
    tl.store(hT + state, h, mask=live)
    tl.store(sT + state, s, mask=live)


@triton.jit
def _lstm_backward(
    w, gates, s_all, s0, cont, grad_h, grad_hT, grad_sT, delta, grad_h0, grad_s0, B, T, H,
    FLAGS: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk back with dh and ds; delta holds the gradients of the four pre-activations."""
    row, unit = tl.program_id(0) * BR + tl.arange(0, BR)[:, None], tl.arange(0, BH)[None, :]
    live = (row < B) & (unit < H)
    state = row * H + unit
    first = row.to(tl.int64) * T * H + unit
    step = first + (T - 1) * H
    packed = (row.to(tl.int64) * T + T - 1) * 4 * H + unit
    dh, ds = _load(grad_hT, state, live), _load(grad_sT, state, live)
    start = _load(s0, state, live)
    s = _load(s_all, step, live)
    for back in range(0, T):
        earlier = live & (step > first)  # at the first step, the state before is the one given
        last = tl.where(earlier, _load(s_all, step - H, earlier), start)
        before = last
        if FLAGS:
            goes_on = tl.load(cont + row.to(tl.int64) * T + T - 1 - back, mask=row < B, other=0) != 0
            before = tl.where(goes_on, last, 0.0)
        i, f = _load(gates, packed, live), _load(gates, packed + H, live)
        g, o = _load(gates, packed + 2 * H, live), _load(gates, packed + 3 * H, live)
        dh += _load(grad_h, step, live)
        squashed = _tanh(s)
        ds += dh * o * (1 - squashed * squashed)
        di, df = ds * g * i * (1 - i), ds * before * f * (1 - f)
        dg, do = ds * i * (1 - g * g), dh * squashed * o * (1 - o)
        tl.store(delta + packed, di, mask=live)
        tl.store(delta + packed + H, df, mask=live)
        tl.store(delta + packed + 2 * H, dg, mask=live)
        tl.store(delta + packed + 3 * H, do, mask=live)
        dh = _times(di, w, 0, H, BH, DOT, PRECISION) + _times(df, w, 1, H, BH, DOT, PRECISION)
        dh += _times(dg, w, 2, H, BH, DOT, PRECISION) + _times(do, w, 3, H, BH, DOT, PRECISION)
        ds *= f
        if FLAGS:
            dh, ds = tl.where(goes_on, dh, 0.0), tl.where(goes_on, ds, 0.0)
        s = last
        step -= H
        packed -= 4 * H
    tl.store(grad_h0 + state, dh, mask=live)
    tl.store(grad_s0 + state, ds, mask=live)


@triton.jit
def _gru_forward(
    xp,
    w,
    b,
    h0,
    h_all,
    gates,
    q_all,
    hT,
    B,
    T,
    H,
    BR: tl.constexpr,
    BH: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walk forward: h = (1 - z) n + z h; keep the activated gates and q = h W_n^T + b_n."""
    row, unit = tl.program_id(0) * BR + tl.arange(0, BR)[:, None], tl.arange(0, BH)[None, :]
    live = (row < B) & (unit < H)
    state = row * H + unit
    step = row.to(tl.int64) * T * H + unit
    packed = row.to(tl.int64) * T * 3 * H + unit
    b_r, b_z, b_n = _load(b, unit, unit < H), _load(b, unit + H, unit < H), _load(b, unit + 2 * H, unit < H)
    h = _load(h0, state, live)
    for _ in range(0, T):
        r = _sigmoid(_load(xp, packed, live) + _times(h, w, 0, H, BH, DOT, PRECISION) + b_r)
        z = _sigmoid(_load(xp, packed + H, live) + _times(h, w, 1, H, BH, DOT, PRECISION) + b_z)
        q = _times(h, w, 2, H, BH, DOT, PRECISION) + b_n
        n = _tanh(_load(xp, packed + 2 * H, live) + r * q)
        h = (1 - z) * n + z * h
        tl.store(gates + packed, r, mask=live)
        tl.store(gates + packed + H, z, mask=live)
        tl.store(gates + packed + 2 * H, n, mask=live)
        tl.store(q_all + step, q, mask=live)
        tl.store(h_all + step, h.to(h_all.dtype.element_ty), mask=live)
        step += H
        packed += 3 * H
    tl.store(hT + state, h, mask=live)


@triton.jit
def _gru_backward(
    w, gates, q_all, h_all, h0, grad_h, grad_hT, delta, grad_h0, B, T, H,
    BR: tl.constexpr, BH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk back with dh; delta holds the gradients of the three pre-activations (of q_n: r times its n block)."""
    row, unit = tl.program_id(0) * BR + tl.arange(0, BR)[:, None], tl.arange(0, BH)[None, :]
    live = (row < B) & (unit < H)
    state = row * H + unit
    first = row.to(tl.int64) * T * H + unit
    step = first + (T - 1) * H
    packed = (row.to(tl.int64) * T + T - 1) * 3 * H + unit
    dh = _load(grad_hT, state, live)
    start = _load(h0, state, live)
    for _ in range(0, T):
        earlier = live & (step > first)  # at the first step, the state before is the one given
        before = tl.where(earlier, _load(h_all, step - H, earlier), start)
        r, z = _load(gates, packed, live), _load(gates, packed + H, live)
        n, q = _load(gates, packed + 2 * H, live), _load(q_all, step, live)
        dh += _load(grad_h, step, live)
        dn = dh * (1 - z) * (1 - n * n)
        dz = dh * (before - n) * z * (1 - z)
        dr = dn * q * r * (1 - r)
        tl.store(delta + packed, dr, mask=live)
        tl.store(delta + packed + H, dz, mask=live)
        tl.store(delta + packed + 2 * H, dn, mask=live)
        dh = dh * z + _times(dr, w, 0, H, BH, DOT, PRECISION)
        dh += _times(dz, w, 1, H, BH, DOT, PRECISION) + _times(dn * r, w, 2, H, BH, DOT, PRECISION)
        step -= H
        packed -= 3 * H
    tl.store(grad_h0 + state, dh, mask=live)
