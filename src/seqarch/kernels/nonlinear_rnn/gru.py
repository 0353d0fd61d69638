"""ParaGRU on a GPU: Newton in tiles, the sequential walk, and the gradient (layout: ``triton.py``)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton import BLOCK_T, corrected, furthest, given, grid, load, put, row_of, shift, sigmoid, tanh

BLOCK_D = 32


@triton.jit
def _then(a1, b1, a2, b2):
    """First h -> a1 h + b1, then h -> a2 h + b2."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _cell(w_z, w_r, w_c, a_z, a_r, a_c, h):
    """The next state and the gates (``reference.py``)."""
    z, r = sigmoid(a_z * h + w_z), sigmoid(a_r * h + w_r)
    c = tanh(a_c * (h * r) + w_c)
    return (1 - z) * h + z * c, z, r, c


@triton.jit
def _jacobian(a_z, a_r, a_c, h, z, r, c):
    """The derivative of the next state by h: directly, through the gate z, and through the candidate c."""
    return (1 - z) + (c - h) * z * (1 - z) * a_z + z * (1 - c * c) * a_c * (r + h * r * (1 - r) * a_r)


@triton.jit
def _gru_newton(
    w, a, h0, h, hT, residual, T, D, iters,
    PROJECT: tl.constexpr, CHECK: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Solve the tiles of one row in order, `iters` Newton steps each; CHECK measures what is left."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    i = tl.arange(0, BT)
    at, at3 = i[:, None] * D + d[None, :], i[:, None] * 3 * D + d[None, :]
    a_z, a_r, a_c = (
        load(a, d, d < D)[None, :], load(a, D + d, d < D)[None, :], load(a, 2 * D + d, d < D)[None, :]
    )  # fmt: skip
    carry, worst = load(h0, row * D + d, d < D), tl.zeros((BD,), tl.float32)
    for start in range(0, T, BT):
        live = (start + i < T)[:, None] & (d < D)[None, :]
        tile = row * T + start  # a scalar of 64 bits: offsets inside the tile need no more than 32
        here, packed = tile * D, w + tile * 3 * D
        w_z, w_r, w_c = load(packed, at3, live), load(packed + D, at3, live), load(packed + 2 * D, at3, live)
        bound = tl.maximum(tl.abs(carry), 1.0)
        states, _, _, _ = _cell(w_z, w_r, w_c, a_z, a_r, a_c, shift(tl.zeros((BT, BD), tl.float32), carry, BT, BD))
        for _ in range(0, iters):
            before = shift(states, carry, BT, BD)
            new, z, r, c = _cell(w_z, w_r, w_c, a_z, a_r, a_c, before)
            J = _jacobian(a_z, a_r, a_c, before, z, r, c)
            _, change = tl.associative_scan((J, new - states), 0, _then)  # from 0: the carry itself needs no correction
            if PROJECT:
                states = corrected(states, change, bound)
            else:
                states += change
        if CHECK:
            after, _, _, _ = _cell(w_z, w_r, w_c, a_z, a_r, a_c, shift(states, carry, BT, BD))
            worst = furthest(worst, after - states, live)
        put(h + here, at, states, live)
        carry = row_of(states, tl.minimum(BT, T - start) - 1, BT)  # dead positions come after it and cannot reach it
    tl.store(hT + row * D + d, carry, mask=d < D)
    tl.store(residual + row * D + d, worst, mask=d < D)


@triton.jit
def _gru_sequential(w, a, h0, h, hT, T, D, BD: tl.constexpr):
    """Take the steps one after another; the inputs of the next one are on their way meanwhile."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    live = d < D
    a_z, a_r, a_c = load(a, d, live), load(a, D + d, live), load(a, 2 * D + d, live)
    state = load(h0, row * D + d, live)
    packed, here, end = row * T * 3 * D + d, row * T * D + d, (row + 1) * T * 3 * D
    w_z, w_r, w_c = load(w, packed, live), load(w, packed + D, live), load(w, packed + 2 * D, live)
    for _ in range(0, T):
        packed += 3 * D
        more = live & (packed < end)
        next_z, next_r, next_c = load(w, packed, more), load(w, packed + D, more), load(w, packed + 2 * D, more)
        state, _, _, _ = _cell(w_z, w_r, w_c, a_z, a_r, a_c, state)
        put(h, here, state, live)
        here += D
        w_z, w_r, w_c = next_z, next_r, next_c
    tl.store(hT + row * D + d, state, mask=live)


@triton.jit
def _gru_backward(
    w, a, h0, h, grad_h, grad_hT, grad_w, grad_a, grad_h0, T, D, BT: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Walk the tiles of one row from the end; grad_a ``(B, 3, D)`` is this row's part."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    i = tl.arange(0, BT)
    at, at3 = d[None, :] - i[:, None] * D, d[None, :] - i[:, None] * 3 * D
    a_z, a_r, a_c = (
        load(a, d, d < D)[None, :], load(a, D + d, d < D)[None, :], load(a, 2 * D + d, d < D)[None, :]
    )  # fmt: skip
    first, lam_1 = load(h0, row * D + d, d < D), load(grad_hT, row * D + d, d < D)
    zero = tl.zeros((BD,), tl.float32)
    sum_z, sum_r, sum_c = zero, zero, zero
    for start in range(0, T, BT):
        live = (start + i < T)[:, None] & (d < D)[None, :]
        later = live & (start + i > 0)[:, None]  # the last step has no next one
        initial = (start + i == T - 1)[:, None]  # the first one: the state before it is the given one
        tile = row * T + T - 1 - start  # a scalar of 64 bits: offsets inside the tile need no more than 32
        here, packed = tile * D, w + tile * 3 * D
        after = packed + 3 * D
        w_z, w_r, w_c = load(after, at3, later), load(after + D, at3, later), load(after + 2 * D, at3, later)
        state, g = load(h + here, at, live), load(grad_h + here, at, live)
        _, z, r, c = _cell(w_z, w_r, w_c, a_z, a_r, a_c, state)
        # without a next step, and in dead positions, the identity map: the last row is always what to hand on
        J = tl.where(later, _jacobian(a_z, a_r, a_c, state, z, r, c), 1.0)
        product, local = tl.associative_scan((J, g), 0, _then)
        lam = local + product * lam_1[None, :]
        lam_1 = row_of(lam, BT - 1, BT)
        lam = tl.where(live, lam, 0.0)

        w_z, w_r, w_c = load(packed, at3, live), load(packed + D, at3, live), load(packed + 2 * D, at3, live)
        before = tl.where(initial, first[None, :], load(h + here - D, at, live & ~initial))
        _, z, r, c = _cell(w_z, w_r, w_c, a_z, a_r, a_c, before)
        by_z = lam * (c - before) * z * (1 - z)  # the cotangents of the three pre-activations
        by_c = lam * z * (1 - c * c)
        by_r = by_c * a_c * before * r * (1 - r)
        grads = grad_w + tile * 3 * D
        put(grads, at3, by_z, live)
        put(grads + D, at3, by_r, live)
        put(grads + 2 * D, at3, by_c, live)
        sum_z += tl.sum(by_z * before, axis=0)
        sum_r += tl.sum(by_r * before, axis=0)
        sum_c += tl.sum(by_c * r * before, axis=0)
    start_w = row * T * 3 * D + d
    w_z, w_r, w_c = load(w, start_w, d < D), load(w, start_w + D, d < D), load(w, start_w + 2 * D, d < D)
    a_z, a_r, a_c = load(a, d, d < D), load(a, D + d, d < D), load(a, 2 * D + d, d < D)
    _, z, r, c = _cell(w_z, w_r, w_c, a_z, a_r, a_c, first)
    tl.store(grad_h0 + row * D + d, lam_1 * _jacobian(a_z, a_r, a_c, first, z, r, c), mask=d < D)
    tl.store(grad_a + row * 3 * D + d, sum_z, mask=d < D)
    tl.store(grad_a + row * 3 * D + D + d, sum_r, mask=d < D)
    tl.store(grad_a + row * 3 * D + 2 * D + d, sum_c, mask=d < D)


@torch.library.custom_op("seqarch::para_gru", mutates_args=())
def _para_gru(w: Tensor, a: Tensor, h0: Tensor, iters: int, project: bool, check: bool) -> list[Tensor]:
    B, T, _, D = w.shape
    h = torch.empty(B, T, D, dtype=w.dtype, device=w.device)
    hT, residual = torch.empty(B, D, dtype=h0.dtype, device=w.device), h0.new_zeros(B, D)
    inputs = [x.contiguous() for x in (w, a, h0)]
    if iters < 0:
        _gru_sequential[grid(w, BLOCK_D)](*inputs, h, hT, T, D, BD=BLOCK_D, num_warps=1)
    else:
        flags = dict(PROJECT=project, CHECK=check, BT=BLOCK_T, BD=BLOCK_D, num_warps=8)
        _gru_newton[grid(w, BLOCK_D)](*inputs, h, hT, residual, T, D, iters, **flags)
    return [h, hT, residual.amax(-1)]


@_para_gru.register_fake
def _(w, a, h0, iters, project, check):
    B, T, _, D = w.shape
    return [w.new_empty(B, T, D), h0.new_empty(B, D), h0.new_empty(B)]


@torch.library.custom_op("seqarch::para_gru_backward", mutates_args=())
def _para_gru_backward(w: Tensor, a: Tensor, h0: Tensor, h: Tensor, grad_h: Tensor, grad_hT: Tensor) -> list[Tensor]:
    B, T, _, D = w.shape
    grad_w = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    grad_a, grad_h0 = h0.new_empty(B, 3, D), h0.new_empty(B, D)
    inputs = [x.contiguous() for x in (w, a, h0, h, grad_h, grad_hT)]
    _gru_backward[grid(w, BLOCK_D)](*inputs, grad_w, grad_a, grad_h0, T, D, BT=BLOCK_T, BD=BLOCK_D, num_warps=8)
    return [grad_w, grad_a.sum(0), grad_h0]


@_para_gru_backward.register_fake
def _(w, a, h0, h, grad_h, grad_hT):
    return [x.new_empty(x.shape) for x in (w, a, h0)]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], output[0])


def _gradient(ctx, grads):
    w, a, h0, h = ctx.saved_tensors
    return (*_para_gru_backward(w, a, h0, h, given(grads[0], h), given(grads[1], h0)), None, None, None)


_para_gru.register_autograd(_gradient, setup_context=_setup_context)


def para_gru_triton(
    w: Tensor, a: Tensor, h0: Tensor, iters: int | None, project: bool, check: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward by the kernels above; arguments as in `para_gru_parallel`."""
    h, hT, residual = _para_gru(w, a, h0, -1 if iters is None else iters, project, check)
    return h, hT, residual.detach()
