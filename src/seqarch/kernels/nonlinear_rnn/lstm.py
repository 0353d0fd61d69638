"""ParaLSTM on a GPU: Newton in tiles, the sequential walk, and the gradient (layout: ``triton.py``)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block2_scan.triton import _then
from .triton import BLOCK_T, corrected, furthest, given, grid, load, put, row_of, shift, sigmoid, tanh

BLOCK_D = 16  # channels in a tile: four derivatives and two states per element must stay in registers
WALK_D = 32  # channels of a sequential walk


@triton.jit
def _cell(w_f, w_o, w_z, a_f, a_o, a_z, p_f, p_o, c, h):
    """The next states, the gates, and the tanh of the new cell (``reference.py``)."""
    f, z = sigmoid(a_f * h + p_f * c + w_f), tanh(a_z * h + w_z)
    new = f * c + (1 - f) * z
    o = sigmoid(a_o * h + p_o * new + w_o)
    squashed = tanh(new)
    return new, o * squashed, f, o, z, squashed


@triton.jit
def _jacobian(a_f, a_o, a_z, p_f, p_o, c, f, o, z, t):
    """The derivatives of the next (c, h) by c and h, row by row."""
    by_f, by_o = (c - z) * f * (1 - f), t * o * (1 - o)
    J_cc, J_ch = f + by_f * p_f, by_f * a_f + (1 - f) * (1 - z * z) * a_z
    through = by_o * p_o + o * (1 - t * t)  # of h' by the new cell: through the output gate, and directly
    return J_cc, J_ch, through * J_cc, by_o * a_o + through * J_ch


@triton.jit
def _lstm_newton(
    w, a, p, c0, h0, c_all, h_all, cT, hT, residual, T, D, iters,
    PROJECT: tl.constexpr, CHECK: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Solve the tiles of one row in order, `iters` Newton steps each; CHECK measures what is left."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    i = tl.arange(0, BT)
    at, at3 = i[:, None] * D + d[None, :], i[:, None] * 3 * D + d[None, :]
    a_f, a_o, a_z = (
        load(a, d, d < D)[None, :], load(a, D + d, d < D)[None, :], load(a, 2 * D + d, d < D)[None, :]
    )  # fmt: skip
    p_f, p_o = load(p, d, d < D)[None, :], load(p, D + d, d < D)[None, :]
    carry_c, carry_h = load(c0, row * D + d, d < D), load(h0, row * D + d, d < D)
    worst, zeros = tl.zeros((BD,), tl.float32), tl.zeros((BT, BD), tl.float32)
    for start in range(0, T, BT):
        live = (start + i < T)[:, None] & (d < D)[None, :]
        tile = row * T + start  # a scalar of 64 bits: offsets inside the tile need no more than 32
        here, packed = tile * D, w + tile * 3 * D
        w_f, w_o, w_z = load(packed, at3, live), load(packed + D, at3, live), load(packed + 2 * D, at3, live)
        bound_c, bound_h = tl.maximum(tl.abs(carry_c), 1.0), tl.maximum(tl.abs(carry_h), 1.0)
        before_c, before_h = shift(zeros, carry_c, BT, BD), shift(zeros, carry_h, BT, BD)
        c, h, _, _, _, _ = _cell(w_f, w_o, w_z, a_f, a_o, a_z, p_f, p_o, before_c, before_h)
        for _ in range(0, iters):
            before_c, before_h = shift(c, carry_c, BT, BD), shift(h, carry_h, BT, BD)
            new_c, new_h, f, o, z, squashed = _cell(w_f, w_o, w_z, a_f, a_o, a_z, p_f, p_o, before_c, before_h)
            cc, ch, hc, hh = _jacobian(a_f, a_o, a_z, p_f, p_o, before_c, f, o, z, squashed)
            # from 0: the carry itself needs no correction
            _, _, _, _, change_c, change_h = tl.associative_scan((cc, ch, hc, hh, new_c - c, new_h - h), 0, _then)
            if PROJECT:
                c, h = corrected(c, change_c, bound_c), corrected(h, change_h, bound_h)
            else:
                c, h = c + change_c, h + change_h
        if CHECK:
            before_c, before_h = shift(c, carry_c, BT, BD), shift(h, carry_h, BT, BD)
            new_c, new_h, _, _, _, _ = _cell(w_f, w_o, w_z, a_f, a_o, a_z, p_f, p_o, before_c, before_h)
            worst = furthest(furthest(worst, new_c - c, live), new_h - h, live)
        put(c_all + here, at, c, live)
        put(h_all + here, at, h, live)
        last = tl.minimum(BT, T - start) - 1  # dead positions come after it and cannot reach it
        carry_c, carry_h = row_of(c, last, BT), row_of(h, last, BT)
    tl.store(cT + row * D + d, carry_c, mask=d < D)
    tl.store(hT + row * D + d, carry_h, mask=d < D)
    tl.store(residual + row * D + d, worst, mask=d < D)


@triton.jit
def _lstm_sequential(w, a, p, c0, h0, c_all, h_all, cT, hT, T, D, BD: tl.constexpr):
    """Take the steps one after another; the inputs of the next one are on their way meanwhile."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    live = d < D
    a_f, a_o, a_z = load(a, d, live), load(a, D + d, live), load(a, 2 * D + d, live)
    p_f, p_o = load(p, d, live), load(p, D + d, live)
    c, h = load(c0, row * D + d, live), load(h0, row * D + d, live)
    packed, here, end = row * T * 3 * D + d, row * T * D + d, (row + 1) * T * 3 * D
    w_f, w_o, w_z = load(w, packed, live), load(w, packed + D, live), load(w, packed + 2 * D, live)
    for _ in range(0, T):
        packed += 3 * D
        more = live & (packed < end)
        next_f, next_o, next_z = load(w, packed, more), load(w, packed + D, more), load(w, packed + 2 * D, more)
        c, h, _, _, _, _ = _cell(w_f, w_o, w_z, a_f, a_o, a_z, p_f, p_o, c, h)
        put(c_all, here, c, live)
        put(h_all, here, h, live)
        here += D
        w_f, w_o, w_z = next_f, next_o, next_z
    tl.store(cT + row * D + d, c, mask=live)
    tl.store(hT + row * D + d, h, mask=live)


@triton.jit
def _lstm_backward(
    w, a, p, c0, h0, c_all, h_all, grad_c, grad_h, grad_cT, grad_hT, grad_w, parts, grad_c0, grad_h0, T, D,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Walk the tiles of one row from the end; parts ``(B, 5, D)`` are this row's gradients of a and p."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    i = tl.arange(0, BT)
    at, at3 = d[None, :] - i[:, None] * D, d[None, :] - i[:, None] * 3 * D
    a_f, a_o, a_z = (
        load(a, d, d < D)[None, :], load(a, D + d, d < D)[None, :], load(a, 2 * D + d, d < D)[None, :]
    )  # fmt: skip
    p_f, p_o = load(p, d, d < D)[None, :], load(p, D + d, d < D)[None, :]
    first_c, first_h = load(c0, row * D + d, d < D), load(h0, row * D + d, d < D)
    last_c, last_h = load(grad_cT, row * D + d, d < D), load(grad_hT, row * D + d, d < D)
    zero = tl.zeros((BD,), tl.float32)
    sum_f, sum_o, sum_z, sum_pf, sum_po = zero, zero, zero, zero, zero
    for start in range(0, T, BT):
        live = (start + i < T)[:, None] & (d < D)[None, :]
        later = live & (start + i > 0)[:, None]  # the last step has no next one
        initial = (start + i == T - 1)[:, None]  # the first one: the state before it is the given one
        tile = row * T + T - 1 - start  # a scalar of 64 bits: offsets inside the tile need no more than 32
        here, packed = tile * D, w + tile * 3 * D
        after = packed + 3 * D
        w_f, w_o, w_z = load(after, at3, later), load(after + D, at3, later), load(after + 2 * D, at3, later)
        c, h = load(c_all + here, at, live), load(h_all + here, at, live)
        g_c, g_h = load(grad_c + here, at, live), load(grad_h + here, at, live)
        _, _, f, o, z, squashed = _cell(w_f, w_o, w_z, a_f, a_o, a_z, p_f, p_o, c, h)
        cc, ch, hc, hh = _jacobian(a_f, a_o, a_z, p_f, p_o, c, f, o, z, squashed)
        # without a next step, and in dead positions, the identity map: the last row is always what to hand on
        cc, ch = tl.where(later, cc, 1.0), tl.where(later, ch, 0.0)
        hc, hh = tl.where(later, hc, 0.0), tl.where(later, hh, 1.0)
        # the adjoint uses the transposed matrices, of rows (cc, hc) and (ch, hh)
        cc, hc, ch, hh, lam_c, lam_h = tl.associative_scan((cc, hc, ch, hh, g_c, g_h), 0, _then)
        lam_c += cc * last_c[None, :] + hc * last_h[None, :]
        lam_h += ch * last_c[None, :] + hh * last_h[None, :]
        last_c, last_h = row_of(lam_c, BT - 1, BT), row_of(lam_h, BT - 1, BT)
        lam_c, lam_h = tl.where(live, lam_c, 0.0), tl.where(live, lam_h, 0.0)

        w_f, w_o, w_z = load(packed, at3, live), load(packed + D, at3, live), load(packed + 2 * D, at3, live)
        c = tl.where(initial, first_c[None, :], load(c_all + here - D, at, live & ~initial))
        h = tl.where(initial, first_h[None, :], load(h_all + here - D, at, live & ~initial))
        new, _, f, o, z, squashed = _cell(w_f, w_o, w_z, a_f, a_o, a_z, p_f, p_o, c, h)
        by_o = lam_h * squashed * o * (1 - o)  # the cotangents of the three pre-activations
        cell = lam_c + lam_h * o * (1 - squashed * squashed) + by_o * p_o  # and of the new cell
        by_f = cell * (c - z) * f * (1 - f)
        by_z = cell * (1 - f) * (1 - z * z)
        grads = grad_w + tile * 3 * D
        put(grads, at3, by_f, live)
        put(grads + D, at3, by_o, live)
        put(grads + 2 * D, at3, by_z, live)
        sum_f += tl.sum(by_f * h, axis=0)
        sum_o += tl.sum(by_o * h, axis=0)
        sum_z += tl.sum(by_z * h, axis=0)
        sum_pf += tl.sum(by_f * c, axis=0)
        sum_po += tl.sum(by_o * new, axis=0)
    start_w = row * T * 3 * D + d
    w_f, w_o, w_z = load(w, start_w, d < D), load(w, start_w + D, d < D), load(w, start_w + 2 * D, d < D)
    a_f, a_o, a_z = load(a, d, d < D), load(a, D + d, d < D), load(a, 2 * D + d, d < D)
    p_f, p_o = load(p, d, d < D), load(p, D + d, d < D)
    _, _, f, o, z, squashed = _cell(w_f, w_o, w_z, a_f, a_o, a_z, p_f, p_o, first_c, first_h)
    cc, ch, hc, hh = _jacobian(a_f, a_o, a_z, p_f, p_o, first_c, f, o, z, squashed)
    tl.store(grad_c0 + row * D + d, cc * last_c + hc * last_h, mask=d < D)
    tl.store(grad_h0 + row * D + d, ch * last_c + hh * last_h, mask=d < D)
    mine = parts + row * 5 * D + d
    tl.store(mine, sum_f, mask=d < D)
    tl.store(mine + D, sum_o, mask=d < D)
    tl.store(mine + 2 * D, sum_z, mask=d < D)
    tl.store(mine + 3 * D, sum_pf, mask=d < D)
    tl.store(mine + 4 * D, sum_po, mask=d < D)


@torch.library.custom_op("seqarch::para_lstm", mutates_args=())
def _para_lstm(
    w: Tensor, a: Tensor, p: Tensor, c0: Tensor, h0: Tensor, iters: int, project: bool, check: bool
) -> list[Tensor]:
    B, T, _, D = w.shape
    c, h = (torch.empty(B, T, D, dtype=w.dtype, device=w.device) for _ in range(2))
    cT, hT = (torch.empty(B, D, dtype=h0.dtype, device=w.device) for _ in range(2))
    residual = h0.new_zeros(B, D)
    inputs = [x.contiguous() for x in (w, a, p, c0, h0)]
    if iters < 0:
        _lstm_sequential[grid(w, WALK_D)](*inputs, c, h, cT, hT, T, D, BD=WALK_D, num_warps=1)
    else:
        flags = dict(PROJECT=project, CHECK=check, BT=BLOCK_T, BD=BLOCK_D, num_warps=4)
        _lstm_newton[grid(w, BLOCK_D)](*inputs, c, h, cT, hT, residual, T, D, iters, **flags)
    return [h, c, cT, hT, residual.amax(-1)]


@_para_lstm.register_fake
def _(w, a, p, c0, h0, iters, project, check):
    B, T, _, D = w.shape
    states = [h0.new_empty(B, D), h0.new_empty(B, D)]
    return [w.new_empty(B, T, D), w.new_empty(B, T, D), *states, h0.new_empty(B)]


@torch.library.custom_op("seqarch::para_lstm_backward", mutates_args=())
def _para_lstm_backward(
    w: Tensor, a: Tensor, p: Tensor, c0: Tensor, h0: Tensor, c: Tensor, h: Tensor,
    grad_c: Tensor, grad_h: Tensor, grad_cT: Tensor, grad_hT: Tensor,
) -> list[Tensor]:  # fmt: skip
    B, T, _, D = w.shape
    grad_w = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    parts, grad_c0, grad_h0 = h0.new_empty(B, 5, D), h0.new_empty(B, D), h0.new_empty(B, D)
    inputs = [x.contiguous() for x in (w, a, p, c0, h0, c, h, grad_c, grad_h, grad_cT, grad_hT)]
    flags = dict(BT=BLOCK_T, BD=BLOCK_D, num_warps=4)
    _lstm_backward[grid(w, BLOCK_D)](*inputs, grad_w, parts, grad_c0, grad_h0, T, D, **flags)
    total = parts.sum(0)
    return [grad_w, total[:3].clone(), total[3:].clone(), grad_c0, grad_h0]


@_para_lstm_backward.register_fake
def _(w, a, p, c0, h0, c, h, grad_c, grad_h, grad_cT, grad_hT):
    return [x.new_empty(x.shape) for x in (w, a, p, c0, h0)]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], output[1], output[0])


def _gradient(ctx, grads):
    w, a, p, c0, h0, c, h = ctx.saved_tensors
    given_ones = [given(g, x) for g, x in zip((grads[1], grads[0], grads[2], grads[3]), (c, h, c0, h0), strict=True)]
    return (*_para_lstm_backward(w, a, p, c0, h0, c, h, *given_ones), None, None, None)


_para_lstm.register_autograd(_gradient, setup_context=_setup_context)


def para_lstm_triton(
    w: Tensor, a: Tensor, p: Tensor, c0: Tensor, h0: Tensor, iters: int | None, project: bool, check: bool
) -> tuple[Tensor, ...]:
    """Forward and backward by the kernels above; arguments as in `para_lstm_parallel`."""
    h, c, cT, hT, residual = _para_lstm(w, a, p, c0, h0, -1 if iters is None else iters, project, check)
    return h, c, cT, hT, residual.detach()
