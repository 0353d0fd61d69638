r"""The linear scan on a GPU: one program owns a block of channels and walks the sequence in tiles.

Inside a tile, `tl.associative_scan` combines the maps $h \mapsto ah+b$ of all steps; the state that leaves one tile
enters the next in registers. Global memory is touched once per element: read a and b, write h.

The same kernel serves the backward pass, which is a scan in the other direction with the gates moved by one step
(``GRAD=True`` adds the two products that give the gradient of a). Triton's own reverse scan is avoided: it is wrong
for tuples on some versions, so a reversed walk loads step T-1-i at position i.

One walk per channel block cannot fill a GPU when there are few channels and many steps. Then the sequence is cut
into segments: `_fold` reduces each to one map, a scan over these maps gives every segment its start, and the main
kernel runs all segments side by side.

Complex numbers are two real planes, ``(..., 2)`` in memory (torch.view_as_real).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T, BLOCK_D = 64, 64
FILL = 512  # programs that keep a large GPU busy; below this the sequence is cut into segments


@triton.jit
def _then(a1, b1, a2, b2):
    # first (a1, b1), then (a2, b2)
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _then_complex(ar, ai, br, bi, cr, ci, dr, di):
    return ar * cr - ai * ci, ar * ci + ai * cr, cr * br - ci * bi + dr, cr * bi + ci * br + di


@triton.jit
def _scan(
    a, b, h0, h, hT, before, grad_a, T, D, segments, length, a_t, a_d,
    COMPLEX: tl.constexpr, BACKWARD: tl.constexpr, SHIFT: tl.constexpr, GRAD: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Scan one segment of one batch row for BD channels.

    BACKWARD walks from T-1 to 0. SHIFT is the offset of the gate that belongs to a step: 0 in the forward pass, and one
    step against the walk (+1 when walking backwards) in the gradient. Gates out of range are 1.
    """
    row, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    i = tl.arange(0, BT)
    P: tl.constexpr = 2 if COMPLEX else 1  # planes: floats per number
    state = ((row * segments + segment) * D + d) * P
    carry = tl.load(h0 + state, mask=d < D, other=0.0).to(tl.float32)
    if COMPLEX:
        carry_i = tl.load(h0 + state + 1, mask=d < D, other=0.0).to(tl.float32)
    low = segment * length
    high = tl.minimum(low + length, T)
    for start in range(low, high, BT):
        step = start + i
        t = T - 1 - step if BACKWARD else step
        live = (step < high)[:, None] & (d < D)[None, :]
        gated = live & ((t + SHIFT >= 0) & (t + SHIFT < T))[:, None]
        here = ((row.to(tl.int64) * T + t)[:, None] * D + d[None, :]) * P
        gate = ((row.to(tl.int64) * T + t + SHIFT)[:, None] * a_t + d[None, :] * a_d) * P
        # dead positions are the identity map (1, 0), so the last row of the tile is always the state
        x = tl.load(a + gate, mask=gated, other=1.0).to(tl.float32)
        y = tl.load(b + here, mask=live, other=0.0).to(tl.float32)
        if COMPLEX:
            xi = tl.load(a + gate + 1, mask=gated, other=0.0).to(tl.float32)
            yi = tl.load(b + here + 1, mask=live, other=0.0).to(tl.float32)
            if GRAD:
                xi = -xi  # the gradient uses the conjugate gates
            x, xi, y, yi = tl.associative_scan((x, xi, y, yi), 0, _then_complex)
            y, yi = (
                y + x * carry[None, :] - xi * carry_i[None, :],
                yi + x * carry_i[None, :] + xi * carry[None, :],
            )
            tl.store(h + here + 1, yi, mask=live)
            carry_i = tl.sum(tl.where((i == BT - 1)[:, None], yi, 0.0), axis=0)
        else:
            x, y = tl.associative_scan((x, y), 0, _then)
            y = y + x * carry[None, :]
        tl.store(h + here, y.to(h.dtype.element_ty), mask=live)
        carry = tl.sum(tl.where((i == BT - 1)[:, None], y, 0.0), axis=0)
        if GRAD:  # grad a_t = lambda_t conj(h_{t-1}); the first state h0 is handled outside
            prior = live & ((t - SHIFT >= 0) & (t - SHIFT < T))[:, None]
            there = here - SHIFT * D * P
            u = tl.load(before + there, mask=prior, other=0.0).to(tl.float32)
            if COMPLEX:
                ui = tl.load(before + there + 1, mask=prior, other=0.0).to(tl.float32)
                tl.store(grad_a + here, y * u + yi * ui, mask=live)
                tl.store(grad_a + here + 1, yi * u - y * ui, mask=live)
            else:
                tl.store(grad_a + here, (y * u).to(grad_a.dtype.element_ty), mask=live)
    if segment == segments - 1:
        final = (row * D + d) * P
        tl.store(hT + final, carry, mask=d < D)
        if COMPLEX:
            tl.store(hT + final + 1, carry_i, mask=d < D)


@triton.jit
def _fold(
    a, b, product, local, T, D, segments, length, a_t, a_d,
    COMPLEX: tl.constexpr, BACKWARD: tl.constexpr, SHIFT: tl.constexpr, GRAD: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Reduce one segment to the single map (product of its gates, its last state from a zero start)."""
    row, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    i = tl.arange(0, BT)
    P: tl.constexpr = 2 if COMPLEX else 1
    total, carry = tl.full((BD,), 1.0, tl.float32), tl.zeros((BD,), tl.float32)
    total_i, carry_i = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    low = segment * length
    high = tl.minimum(low + length, T)
    for start in range(low, high, BT):
        step = start + i
        t = T - 1 - step if BACKWARD else step
        live = (step < high)[:, None] & (d < D)[None, :]
        gated = live & ((t + SHIFT >= 0) & (t + SHIFT < T))[:, None]
        here = ((row.to(tl.int64) * T + t)[:, None] * D + d[None, :]) * P
        gate = ((row.to(tl.int64) * T + t + SHIFT)[:, None] * a_t + d[None, :] * a_d) * P
        x = tl.load(a + gate, mask=gated, other=1.0).to(tl.float32)
        y = tl.load(b + here, mask=live, other=0.0).to(tl.float32)
        last = (i == BT - 1)[:, None]
        if COMPLEX:
            xi = tl.load(a + gate + 1, mask=gated, other=0.0).to(tl.float32)
            yi = tl.load(b + here + 1, mask=live, other=0.0).to(tl.float32)
            if GRAD:
                xi = -xi
            x, xi, y, yi = tl.associative_scan((x, xi, y, yi), 0, _then_complex)
            xi = tl.sum(tl.where(last, xi, 0.0), axis=0)
            yi = tl.sum(tl.where(last, yi, 0.0), axis=0)
        else:
            x, y = tl.associative_scan((x, y), 0, _then)
        x = tl.sum(tl.where(last, x, 0.0), axis=0)
        y = tl.sum(tl.where(last, y, 0.0), axis=0)
        if COMPLEX:
            total, total_i, carry, carry_i = _then_complex(total, total_i, carry, carry_i, x, xi, y, yi)
        else:
            total, carry = _then(total, carry, x, y)
    out = ((row * segments + segment) * D + d) * P
    tl.store(product + out, total, mask=d < D)
    tl.store(local + out, carry, mask=d < D)
    if COMPLEX:
        tl.store(product + out + 1, total_i, mask=d < D)
        tl.store(local + out + 1, carry_i, mask=d < D)


def _planes(x: Tensor) -> Tensor:
    """A contiguous real view: complex numbers as pairs of floats."""
    x = x.resolve_conj().contiguous()
    return torch.view_as_real(x) if x.is_complex() else x


def _segments(B: int, T: int, D: int) -> tuple[int, int]:
    """How many segments to cut T into so that about FILL programs run, and their length (whole tiles)."""
    programs = B * triton.cdiv(D, BLOCK_D)
    wanted = max(1, min(FILL // programs, T // (4 * BLOCK_T)))
    length = triton.cdiv(triton.cdiv(T, wanted), BLOCK_T) * BLOCK_T
    return triton.cdiv(T, length), length


def _launch(a: Tensor, b: Tensor, h0: Tensor, backward: bool, before: Tensor | None = None) -> list[Tensor]:
    """Run the kernel; with `before` (the states of the forward pass) it is the gradient and also returns grad_a."""
    B, T, D = b.shape
    segments, length = _segments(B, T, D)
    grad = before is not None
    h = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    hT = torch.empty(B, D, dtype=h0.dtype, device=b.device)
    grad_a = torch.empty_like(h) if grad else h
    a_planes, b_planes = _planes(a), _planes(b)
    a_strides = (1, 0) if a.shape[-1] != D else (D, 1)
    shift = (1 if backward else -1) if grad else 0
    flags = dict(COMPLEX=b.is_complex(), BACKWARD=backward, SHIFT=shift, GRAD=grad, BT=BLOCK_T, BD=BLOCK_D)
    grid = (B * segments, triton.cdiv(D, BLOCK_D))
    starts = h0[:, None]
    if segments > 1:
        product = torch.empty(B, segments, D, dtype=h0.dtype, device=b.device)
        local = torch.empty_like(product)
        _fold[grid](
            a_planes, b_planes, _planes(product), _planes(local), T, D, segments, length, *a_strides, **flags
        )  # fmt: skip
        states, _ = linear_scan_triton(product[:, :-1], local[:, :-1], h0, False)
        starts = torch.cat([starts, states], dim=1)
    _scan[grid](
        a_planes, b_planes, _planes(starts), _planes(h), _planes(hT), _planes(before if grad else h), _planes(grad_a),
        T, D, segments, length, *a_strides, **flags,
    )  # fmt: skip
    return [h, hT, grad_a] if grad else [h, hT]


@torch.library.custom_op("seqarch::linear_scan", mutates_args=())
def _linear_scan(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> list[Tensor]:
    return _launch(a, b, h0, reverse)


@_linear_scan.register_fake
def _(a, b, h0, reverse):
    return [torch.empty_like(b, memory_format=torch.contiguous_format), torch.empty_like(h0)]


@torch.library.custom_op("seqarch::linear_scan_backward", mutates_args=())
def _linear_scan_backward(
    a: Tensor, h: Tensor, h0: Tensor, grad_h: Tensor, grad_hT: Tensor, reverse: bool
) -> list[Tensor]:
    lam, carry, grad_a = _launch(a, grad_h, grad_hT, not reverse, before=h)
    first = -1 if reverse else 0
    grad_a[:, first] = (lam[:, first].to(h0.dtype) * h0.conj()).to(grad_a.dtype)
    if a.shape[-1] != h.shape[-1]:
        grad_a = grad_a.to(h0.dtype).sum(-1, keepdim=True).to(a.dtype)
    # carry is lambda_1 before it was rounded to the storage dtype
    return [grad_a, lam, a[:, first].conj().to(h0.dtype) * carry]


@_linear_scan_backward.register_fake
def _(a, h, h0, grad_h, grad_hT, reverse):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (a, h, h0)]


def _setup_context(ctx, inputs, output):
    a, _, h0, ctx.reverse = inputs
    ctx.save_for_backward(a, output[0], h0)


def _backward(ctx, grads):
    a, h, h0 = ctx.saved_tensors
    grad_h = torch.zeros_like(h) if grads[0] is None else grads[0]
    grad_hT = torch.zeros_like(h0) if grads[1] is None else grads[1]
    return (*_linear_scan_backward(a, h, h0, grad_h, grad_hT, ctx.reverse), None)


_linear_scan.register_autograd(_backward, setup_context=_setup_context)


def linear_scan_triton(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Forward and backward by the kernels above; shapes as in `linear_scan`."""
    h, hT = _linear_scan(a, b, h0, reverse)
    return h, hT
