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

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
# Triton's interpreter multiplies the bits of bfloat16 numbers as if they were integers: there, widen rounded operands.
WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


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
def _times(x, w, block, H, BACK: tl.constexpr, BH: tl.constexpr):
    """Multiply x [16, BH] by the transpose of block W of w, or, on the way BACK, by W itself."""
    i, j = tl.arange(0, BH)[:, None], tl.arange(0, BH)[None, :]
    row, column = (i, j) if BACK else (j, i)
    tile = tl.load(w + (block * H + row) * H + column, mask=(i < H) & (j < H), other=0.0)
    x = x.to(tile.dtype)
    if WIDEN:
        x, tile = x.to(tl.float32), tile.to(tl.float32)
    return tl.dot(x, tile, input_precision="ieee")


@triton.jit
def _load(base, at, live):
    return tl.load(base + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _rnn_forward(xp, w, h0, h_all, hT, B, T, H, RELU: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr):
    """Walk forward: h = phi(xp_t + h W^T)."""
    row, unit = tl.program_id(0) * BR + tl.arange(0, BR)[:, None], tl.arange(0, BH)[None, :]
    live = (row < B) & (unit < H)
    state = row * H + unit
    step = row.to(tl.int64) * T * H + unit
    h = _load(h0, state, live)
    for _ in range(0, T):
        a = _load(xp, step, live) + _times(h, w, 0, H, False, BH)
        if RELU:
            h = tl.maximum(a, 0.0)
        else:
            h = _tanh(a)
        tl.store(h_all + step, h.to(h_all.dtype.element_ty), mask=live)
        step += H
    tl.store(hT + state, h, mask=live)


@triton.jit
def _rnn_backward(
    w, h_all, grad_h, grad_hT, delta, grad_h0, B, T, H, RELU: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr
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
        dh = _times(da, w, 0, H, True, BH)
        step -= H
    tl.store(grad_h0 + state, dh, mask=live)


@triton.jit
def _lstm_forward(
    xp, w, h0, s0, h_all, gates, s_all, hT, sT, B, T, H, BR: tl.constexpr, BH: tl.constexpr
):  # fmt: skip
    """Walk forward: s = f s + i g, h = o tanh(s); keep the activated gates and the cell states."""
    row, unit = tl.program_id(0) * BR + tl.arange(0, BR)[:, None], tl.arange(0, BH)[None, :]
    live = (row < B) & (unit < H)
    state = row * H + unit
    step = row.to(tl.int64) * T * H + unit  # of a (B, T, H) tensor
    packed = row.to(tl.int64) * T * 4 * H + unit  # of a (B, T, 4H) tensor
    h, s = _load(h0, state, live), _load(s0, state, live)
    for _ in range(0, T):
        i = _sigmoid(_load(xp, packed, live) + _times(h, w, 0, H, False, BH))
        f = _sigmoid(_load(xp, packed + H, live) + _times(h, w, 1, H, False, BH))
        g = _tanh(_load(xp, packed + 2 * H, live) + _times(h, w, 2, H, False, BH))
        o = _sigmoid(_load(xp, packed + 3 * H, live) + _times(h, w, 3, H, False, BH))
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
    w, gates, s_all, s0, grad_h, grad_hT, grad_sT, delta, grad_h0, grad_s0, B, T, H,
    BR: tl.constexpr, BH: tl.constexpr,
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
    for _ in range(0, T):
        earlier = live & (step > first)  # at the first step, the state before is the one given
        before = tl.where(earlier, _load(s_all, step - H, earlier), start)
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
        dh = _times(di, w, 0, H, True, BH) + _times(df, w, 1, H, True, BH)
        dh += _times(dg, w, 2, H, True, BH) + _times(do, w, 3, H, True, BH)
        ds *= f
        s = before
        step -= H
        packed -= 4 * H
    tl.store(grad_h0 + state, dh, mask=live)
    tl.store(grad_s0 + state, ds, mask=live)


@triton.jit
def _gru_forward(xp, w, b, h0, h_all, gates, q_all, hT, B, T, H, BR: tl.constexpr, BH: tl.constexpr):
    """Walk forward: h = (1 - z) n + z h; keep the activated gates and q = h W_n^T + b_n."""
    row, unit = tl.program_id(0) * BR + tl.arange(0, BR)[:, None], tl.arange(0, BH)[None, :]
    live = (row < B) & (unit < H)
    state = row * H + unit
    step = row.to(tl.int64) * T * H + unit
    packed = row.to(tl.int64) * T * 3 * H + unit
    b_r, b_z, b_n = _load(b, unit, unit < H), _load(b, unit + H, unit < H), _load(b, unit + 2 * H, unit < H)
    h = _load(h0, state, live)
    for _ in range(0, T):
        r = _sigmoid(_load(xp, packed, live) + _times(h, w, 0, H, False, BH) + b_r)
        z = _sigmoid(_load(xp, packed + H, live) + _times(h, w, 1, H, False, BH) + b_z)
        q = _times(h, w, 2, H, False, BH) + b_n
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
    w, gates, q_all, h_all, h0, grad_h, grad_hT, delta, grad_h0, B, T, H, BR: tl.constexpr, BH: tl.constexpr
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
        dh = dh * z + _times(dr, w, 0, H, True, BH)
        dh += _times(dz, w, 1, H, True, BH) + _times(dn * r, w, 2, H, True, BH)
        step -= H
        packed -= 3 * H
    tl.store(grad_h0 + state, dh, mask=live)


def _grid(B: int, H: int) -> tuple[tuple[int], dict]:
    tile = max(16, triton.next_power_of_2(H))
    return (triton.cdiv(B, ROWS),), dict(BR=ROWS, BH=tile, num_warps=8 if tile >= 128 else 4, num_stages=1)


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _weight_gradient(delta: Tensor, h: Tensor, h0: Tensor) -> Tensor:
    """One product for all steps: delta ``(B, T, kH)``, h ``(B, T, H)`` -> ``(kH, H)``."""
    before = torch.cat([h0[:, None], h[:, :-1].float()], dim=1)
    return delta.flatten(0, 1).T @ before.flatten(0, 1)


@torch.library.custom_op("seqarch::rnn_scan", mutates_args=())
def _rnn(xp: Tensor, w_h: Tensor, h0: Tensor, relu: bool) -> list[Tensor]:
    B, T, H = xp.shape
    grid, sizes = _grid(B, H)
    h, hT = _empty(xp, B, T, H, dtype=xp.dtype), _empty(xp, B, H)
    _rnn_forward[grid](xp.contiguous(), w_h.contiguous(), h0.contiguous(), h, hT, B, T, H, RELU=relu, **sizes)
    return [h, hT]


@_rnn.register_fake
def _(xp, w_h, h0, relu):
    return [xp.new_empty(xp.shape), h0.new_empty(h0.shape)]


@torch.library.custom_op("seqarch::rnn_scan_backward", mutates_args=())
def _rnn_grad(w_h: Tensor, h: Tensor, h0: Tensor, grad_h: Tensor, grad_hT: Tensor, relu: bool) -> list[Tensor]:
    B, T, H = h.shape
    grid, sizes = _grid(B, H)
    delta, grad_h0 = _empty(h, B, T, H), _empty(h, B, H)
    _rnn_backward[grid](
        w_h.contiguous(),
        h,
        grad_h.contiguous(),
        grad_hT.contiguous(),
        delta,
        grad_h0,
        B,
        T,
        H,
        RELU=relu,
        **sizes,
    )
    return [delta.to(h.dtype), _weight_gradient(delta, h, h0).to(w_h.dtype), grad_h0]


@_rnn_grad.register_fake
def _(w_h, h, h0, grad_h, grad_hT, relu):
    return [h.new_empty(h.shape), w_h.new_empty(w_h.shape), h0.new_empty(h0.shape)]


def _rnn_context(ctx, inputs, output):
    _, w_h, h0, ctx.relu = inputs
    ctx.save_for_backward(w_h, output[0], h0)


def _given(grads: list[Tensor | None], *like: Tensor) -> list[Tensor]:
    """The gradients of outputs, zero where nothing depends on one."""
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, like, strict=False)]


def _rnn_autograd(ctx, grads):
    w_h, h, h0 = ctx.saved_tensors
    return (*_rnn_grad(w_h, h, h0, *_given(grads, h, h0), ctx.relu), None)


_rnn.register_autograd(_rnn_autograd, setup_context=_rnn_context)


@torch.library.custom_op("seqarch::lstm_scan", mutates_args=())
def _lstm(xp: Tensor, w_h: Tensor, h0: Tensor, s0: Tensor) -> list[Tensor]:
    B, T, H = *xp.shape[:2], h0.shape[1]
    grid, sizes = _grid(B, H)
    h, gates, s = _empty(xp, B, T, H, dtype=xp.dtype), _empty(xp, B, T, 4 * H), _empty(xp, B, T, H)
    hT, sT = _empty(xp, B, H), _empty(xp, B, H)
    _lstm_forward[grid](
        xp.contiguous(),
        w_h.contiguous(),
        h0.contiguous(),
        s0.contiguous(),
        h,
        gates,
        s,
        hT,
        sT,
        B,
        T,
        H,
        **sizes,
    )
    return [h, hT, sT, gates, s]


@_lstm.register_fake
def _(xp, w_h, h0, s0):
    B, T, H = *xp.shape[:2], h0.shape[1]
    kept = [h0.new_empty(B, T, 4 * H), h0.new_empty(B, T, H)]
    return [xp.new_empty(B, T, H), h0.new_empty(B, H), h0.new_empty(B, H), *kept]


@torch.library.custom_op("seqarch::lstm_scan_backward", mutates_args=())
def _lstm_grad(
    w_h: Tensor, h: Tensor, gates: Tensor, s: Tensor, h0: Tensor, s0: Tensor,
    grad_h: Tensor, grad_hT: Tensor, grad_sT: Tensor,
) -> list[Tensor]:  # fmt: skip
    B, T, H = h.shape
    grid, sizes = _grid(B, H)
    delta, grad_h0, grad_s0 = _empty(h, B, T, 4 * H), _empty(h, B, H), _empty(h, B, H)
    _lstm_backward[grid](
        w_h.contiguous(), gates, s, s0.contiguous(), grad_h.contiguous(), grad_hT.contiguous(), grad_sT.contiguous(),
        delta, grad_h0, grad_s0, B, T, H, **sizes,
    )  # fmt: skip
    return [delta.to(h.dtype), _weight_gradient(delta, h, h0).to(w_h.dtype), grad_h0, grad_s0]


@_lstm_grad.register_fake
def _(w_h, h, gates, s, h0, s0, grad_h, grad_hT, grad_sT):
    return [h.new_empty(*h.shape[:2], 4 * h.shape[2]), *(x.new_empty(x.shape) for x in (w_h, h0, s0))]


def _lstm_context(ctx, inputs, output):
    _, w_h, h0, s0 = inputs
    h, _, _, gates, s = output
    ctx.save_for_backward(w_h, h, gates, s, h0, s0)


def _lstm_autograd(ctx, grads):
    w_h, h, gates, s, h0, s0 = ctx.saved_tensors
    return tuple(_lstm_grad(w_h, h, gates, s, h0, s0, *_given(grads, h, h0, s0)))


_lstm.register_autograd(_lstm_autograd, setup_context=_lstm_context)


@torch.library.custom_op("seqarch::gru_scan", mutates_args=())
def _gru(xp: Tensor, w_h: Tensor, b_h: Tensor, h0: Tensor) -> list[Tensor]:
    B, T, H = *xp.shape[:2], h0.shape[1]
    grid, sizes = _grid(B, H)
    h, gates, q = _empty(xp, B, T, H, dtype=xp.dtype), _empty(xp, B, T, 3 * H), _empty(xp, B, T, H)
    hT = _empty(xp, B, H)
    _gru_forward[grid](
        xp.contiguous(),
        w_h.contiguous(),
        b_h.contiguous(),
        h0.contiguous(),
        h,
        gates,
        q,
        hT,
        B,
        T,
        H,
        **sizes,
    )
    return [h, hT, gates, q]


@_gru.register_fake
def _(xp, w_h, b_h, h0):
    B, T, H = *xp.shape[:2], h0.shape[1]
    return [xp.new_empty(B, T, H), h0.new_empty(B, H), h0.new_empty(B, T, 3 * H), h0.new_empty(B, T, H)]


@torch.library.custom_op("seqarch::gru_scan_backward", mutates_args=())
def _gru_grad(
    w_h: Tensor, b_h: Tensor, h: Tensor, gates: Tensor, q: Tensor, h0: Tensor, grad_h: Tensor, grad_hT: Tensor
) -> list[Tensor]:
    B, T, H = h.shape
    grid, sizes = _grid(B, H)
    delta, grad_h0 = _empty(h, B, T, 3 * H), _empty(h, B, H)
    _gru_backward[grid](
        w_h.contiguous(), gates, q, h, h0.contiguous(), grad_h.contiguous(), grad_hT.contiguous(), delta, grad_h0,
        B, T, H, **sizes,
    )  # fmt: skip
    delta_q = torch.cat([delta[..., : 2 * H], delta[..., 2 * H :] * gates[..., :H]], dim=-1)
    grad_w, grad_b = _weight_gradient(delta_q, h, h0), delta_q.sum((0, 1))
    return [delta.to(h.dtype), grad_w.to(w_h.dtype), grad_b.to(b_h.dtype), grad_h0]


@_gru_grad.register_fake
def _(w_h, b_h, h, gates, q, h0, grad_h, grad_hT):
    return [h.new_empty(*h.shape[:2], 3 * h.shape[2]), *(x.new_empty(x.shape) for x in (w_h, b_h, h0))]


def _gru_context(ctx, inputs, output):
    _, w_h, b_h, h0 = inputs
    h, _, gates, q = output
    ctx.save_for_backward(w_h, b_h, h, gates, q, h0)


def _gru_autograd(ctx, grads):
    w_h, b_h, h, gates, q, h0 = ctx.saved_tensors
    return tuple(_gru_grad(w_h, b_h, h, gates, q, h0, *_given(grads, h, h0)))


_gru.register_autograd(_gru_autograd, setup_context=_gru_context)


def rnn_scan_triton(xp: Tensor, w_h: Tensor, h0: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Elman recurrence by the kernels above; shapes as in `rnn_scan`."""
    h, hT = _rnn(xp, w_h.to(xp.dtype), h0, activation == "relu")
    return h, hT


def lstm_scan_triton(xp: Tensor, w_h: Tensor, h0: Tensor, s0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """LSTM recurrence by the kernels above; shapes as in `lstm_scan`."""
    h, hT, sT, _, _ = _lstm(xp, w_h.to(xp.dtype), h0, s0)
    return h, hT, sT


def gru_scan_triton(xp: Tensor, w_h: Tensor, b_h: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """GRU recurrence by the kernels above; shapes as in `gru_scan`."""
    h, hT, _, _ = _gru(xp, w_h.to(xp.dtype), b_h, h0)
    return h, hT
