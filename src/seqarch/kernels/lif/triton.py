r"""Spiking neurons on a GPU: rows side by side, and time outermost in memory.

``_forward``   one program owns a block of rows and walks along time, the voltages in registers. Neighbouring lanes hold
               neighbouring rows, so that one step of a block is one contiguous piece of memory: hence ``(N, R)``.
               Nothing else can run in parallel. Each step waits for the one before, but its input does not: the inputs
               of the next four steps are already on their way.
``_backward``  the linear scan of ``parallel.py``. Tiles of steps and rows are scanned inside with `tl.associative_scan`,
               from the last tile to the first, with step N-1-i at position i (a reversed walk, not a reversed scan:
               Triton's own is wrong for tuples on some versions).

The spikes must be those of the definition bit for bit. So the division is the correctly rounded one (Triton's ordinary
one is faster and may be off by a rounding), unless tau is a power of two: then multiplying by its inverse is exact.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 32  # one warp, one row a lane: many small programs, since the loop leaves no other parallelism
TILE_N, TILE_R = 32, 64


@triton.jit
def _input(x, there, end, live):
    return tl.load(x + there, mask=live & (there < end), other=0.0).to(tl.float32)


@triton.jit
def _forward(
    x, v0, spikes, slopes, vN, N, R, tau, inverse, v_th, v_reset, alpha,
    EXACT: tl.constexpr, SAVE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Spikes ``(N, R)``, the last voltage and, with SAVE, the slopes of the surrogate."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    live, here, end = r < R, r.to(tl.int64), N * tl.cast(R, tl.int64)
    v = tl.load(v0 + r, mask=live, other=0.0)
    x0, x1 = _input(x, here, end, live), _input(x, here + R, end, live)
    x2, x3 = _input(x, here + 2 * R, end, live), _input(x, here + 3 * R, end, live)
    for _ in range(N):
        drive = x0 - (v - v_reset)
        x0, x1, x2, x3 = x1, x2, x3, _input(x, here + 4 * R, end, live)
        h = v + (drive * inverse if EXACT else tl.div_rn(drive, tau))
        fired = h >= v_th
        tl.store(spikes + here, tl.where(fired, 1.0, 0.0).to(spikes.dtype.element_ty), mask=live)
        if SAVE:
            z = alpha * (h - v_th)
            slope = alpha * tl.sigmoid(z) * tl.sigmoid(-z)
            tl.store(slopes + here, slope.to(slopes.dtype.element_ty), mask=live)
        v = tl.where(fired, v_reset, h)
        here += R
    tl.store(vN + r, v, mask=live)


@triton.jit
def _then(a1, b1, a2, b2):
    # first the map g -> a1 g + b1, then g -> a2 g + b2
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _backward(
    grad, slopes, spikes, grad_vN, grad_x, grad_v0, N, R, inverse,
    BT: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs ``(N, R)`` and of the first voltage."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    i = tl.arange(0, BT)
    keep = 1 - inverse
    last = tl.load(grad_vN + r, mask=r < R, other=0.0)
    carry = tl.zeros((BR,), tl.float32)  # the gradient of h one step later
    for start in range(0, N, BT):
        t = N - 1 - start - i
        here = t.to(tl.int64)[:, None] * R + r[None, :]
        live = (t >= 0)[:, None] & (r < R)[None, :]
        quiet = 1 - tl.load(spikes + here, mask=live, other=0.0).to(tl.float32)
        slope = tl.load(slopes + here, mask=live, other=0.0).to(tl.float32)
        direct = slope * tl.load(grad + here, mask=live, other=0.0).to(tl.float32)
        direct += tl.where((t == N - 1)[:, None], quiet * last[None, :], 0.0)
        # dead positions are the identity map (1, 0), so the last row of the tile is always the state
        gate, own = tl.associative_scan((tl.where(live, keep * quiet, 1.0), direct), 0, _then)
        grad_h = own + gate * carry[None, :]
        tl.store(grad_x + here, (grad_h * inverse).to(grad_x.dtype.element_ty), mask=live)
        carry = tl.sum(tl.where((i == BT - 1)[:, None], grad_h, 0.0), axis=0)
    tl.store(grad_v0 + r, keep * carry, mask=r < R)


@torch.library.custom_op("seqarch::lif", mutates_args=())
def _lif(x: Tensor, v0: Tensor, tau: float, v_th: float, v_reset: float, alpha: float, save: bool) -> list[Tensor]:
    N, R = x.shape
    x, v0 = x.contiguous(), v0.contiguous()
    spikes, vN = torch.empty_like(x), torch.empty_like(v0)
    slopes = torch.empty_like(x) if save else x.new_empty(0)
    flags = dict(EXACT=math.frexp(tau)[0] == 0.5, SAVE=save, BR=BLOCK_ROWS, num_warps=1)
    _forward[triton.cdiv(R, BLOCK_ROWS),](x, v0, spikes, slopes, vN, N, R, tau, 1 / tau, v_th, v_reset, alpha, **flags)
    return [spikes, vN, slopes]


@_lif.register_fake
def _(x, v0, tau, v_th, v_reset, alpha, save):
    spikes = torch.empty_like(x, memory_format=torch.contiguous_format)
    return [spikes, torch.empty_like(v0), torch.empty_like(spikes) if save else x.new_empty(0)]


@torch.library.custom_op("seqarch::lif_backward", mutates_args=())
def _lif_backward(grad: Tensor, slopes: Tensor, spikes: Tensor, grad_vN: Tensor, tau: float) -> list[Tensor]:
    N, R = spikes.shape
    grad, grad_vN = grad.contiguous(), grad_vN.contiguous()
    grad_x, grad_v0 = torch.empty_like(spikes), torch.empty_like(grad_vN)
    _backward[triton.cdiv(R, TILE_R),](
        grad, slopes, spikes, grad_vN, grad_x, grad_v0, N, R, 1 / tau, BT=TILE_N, BR=TILE_R
    )  # fmt: skip
    return [grad_x, grad_v0]


@_lif_backward.register_fake
def _(grad, slopes, spikes, grad_vN, tau):
    return [torch.empty_like(spikes), torch.empty_like(grad_vN, memory_format=torch.contiguous_format)]


def _setup_context(ctx, inputs, output):
    ctx.tau = inputs[2]
    spikes, vN, slopes = output
    ctx.save_for_backward(slopes, spikes, vN)


def _gradient(ctx, grads):
    slopes, spikes, vN = ctx.saved_tensors
    grad = torch.zeros_like(spikes) if grads[0] is None else grads[0]
    grad_vN = torch.zeros_like(vN) if grads[1] is None else grads[1]
    return *_lif_backward(grad, slopes, spikes, grad_vN, ctx.tau), None, None, None, None, None


_lif.register_autograd(_gradient, setup_context=_setup_context)


def lif_triton(x: Tensor, v: Tensor, tau: float, v_th: float, v_reset: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Forward and backward by the kernels above; flattened rows as in `lif_reference`, v float32."""
    save = torch.is_grad_enabled() and (x.requires_grad or v.requires_grad)
    spikes, v, _ = _lif(x.T.contiguous(), v, tau, v_th, v_reset, alpha, save)
    return spikes.T.contiguous(), v
