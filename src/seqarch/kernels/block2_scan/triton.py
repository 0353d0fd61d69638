r"""The 2 x 2 block scan on a GPU: one program owns a block of channels and walks the sequence in tiles.

Inside a tile, `tl.associative_scan` combines the maps $h \mapsto Jh + r$ of all steps, six numbers each, by four-number
matrix products in registers; the state that leaves one tile enters the next. Global memory is touched once per element:
read J and r, write h. The four numbers of a matrix are neighbours in memory, so a block of 16 channels is 256 bytes in a
row: the four loads of a tile, one per component, share their cache lines.

The same kernel serves the backward pass, which is a scan in the other direction with transposed matrices moved by one
step (``GRAD=True`` adds the four products that give the gradient of J). Triton's own reverse scan is avoided: it is
wrong for tuples on some versions, so a reversed walk loads step T-1-i at position i.

One walk per channel block cannot fill a GPU when there are few channels and many steps. Then the sequence is cut into
segments: `_fold` reduces each to one map, a scan over these maps gives every segment its start, and the main kernel runs
all segments side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T, BLOCK_D = 64, 16
FILL = 512  # programs that keep a large GPU busy; below this the sequence is cut into segments


@triton.jit
def _then(a, b, c, d, u, v, A, B, C, D, U, V):
    # first h -> [a b; c d] h + (u, v), then h -> [A B; C D] h + (U, V): the later matrix stands on the left
    return (
        A * a + B * c, A * b + B * d,
        C * a + D * c, C * b + D * d,
        A * u + B * v + U, C * u + D * v + V,
    )  # fmt: skip


@triton.jit
def _tile(
    J, r, row, start, high, d, T, D, BACKWARD: tl.constexpr, SHIFT: tl.constexpr, GRAD: tl.constexpr, BT: tl.constexpr
):
    """Load the maps of one tile and combine them along time: six tensors [BT, BD], and which elements are live.

    Dead positions are the identity map, so the last row of the tile always holds the map of the whole tile.
    """
    step = start + tl.arange(0, BT)
    t = T - 1 - step if BACKWARD else step
    live = (step < high)[:, None] & (d < D)[None, :]
    known = live & ((t + SHIFT >= 0) & (t + SHIFT < T))[:, None]  # the step out of range has no matrix: identity
    here = ((row * T + t)[:, None] * D + d[None, :]) * 2
    matrix = J + ((row * T + t + SHIFT)[:, None] * D + d[None, :]) * 4
    a = tl.load(matrix, mask=known, other=1.0).to(tl.float32)
    b = tl.load(matrix + (2 if GRAD else 1), mask=known, other=0.0).to(tl.float32)  # the gradient uses J transposed
    c = tl.load(matrix + (1 if GRAD else 2), mask=known, other=0.0).to(tl.float32)
    e = tl.load(matrix + 3, mask=known, other=1.0).to(tl.float32)
    u = tl.load(r + here, mask=live, other=0.0).to(tl.float32)
    v = tl.load(r + here + 1, mask=live, other=0.0).to(tl.float32)
    a, b, c, e, u, v = tl.associative_scan((a, b, c, e, u, v), 0, _then)
    return a, b, c, e, u, v, t, here, live


@triton.jit
def _last(x, BT: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, BT) == BT - 1)[:, None], x, 0.0), axis=0)


@triton.jit
def _scan(
    J, r, h0, h, hT, before, grad_J, T, D, segments, length,
    BACKWARD: tl.constexpr, SHIFT: tl.constexpr, GRAD: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Scan one segment of one batch row for BD channels.

    BACKWARD walks from T-1 to 0. SHIFT is the offset of the matrix that belongs to a step: 0 in the forward pass, and one
    step against the walk (+1 when walking backwards) in the gradient.
    """
    program, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    row = program.to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    state = ((row * segments + segment) * D + d) * 2
    x = tl.load(h0 + state, mask=d < D, other=0.0)
    y = tl.load(h0 + state + 1, mask=d < D, other=0.0)
    low = segment * length
    high = tl.minimum(low + length, T)
    for start in range(low, high, BT):
        a, b, c, e, u, v, t, here, live = _tile(J, r, row, start, high, d, T, D, BACKWARD, SHIFT, GRAD, BT)
        u += a * x[None, :] + b * y[None, :]
        v += c * x[None, :] + e * y[None, :]
        tl.store(h + here, u.to(h.dtype.element_ty), mask=live)
        tl.store(h + here + 1, v.to(h.dtype.element_ty), mask=live)
        x, y = _last(u, BT), _last(v, BT)
        if GRAD:  # the outer product of lambda_t and the state before; the first state h0 is handled outside
            prior = live & ((t - SHIFT >= 0) & (t - SHIFT < T))[:, None]
            p = tl.load(before + here - SHIFT * D * 2, mask=prior, other=0.0).to(tl.float32)
            q = tl.load(before + here - SHIFT * D * 2 + 1, mask=prior, other=0.0).to(tl.float32)
            entry = grad_J + here * 2
            tl.store(entry, (u * p).to(grad_J.dtype.element_ty), mask=live)
            tl.store(entry + 1, (u * q).to(grad_J.dtype.element_ty), mask=live)
            tl.store(entry + 2, (v * p).to(grad_J.dtype.element_ty), mask=live)
            tl.store(entry + 3, (v * q).to(grad_J.dtype.element_ty), mask=live)
    if segment == segments - 1:
        tl.store(hT + (row * D + d) * 2, x, mask=d < D)
        tl.store(hT + (row * D + d) * 2 + 1, y, mask=d < D)


@triton.jit
def _fold(
    J, r, product, local, T, D, segments, length,
    BACKWARD: tl.constexpr, SHIFT: tl.constexpr, GRAD: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Reduce one segment to the single map (product of its matrices, its last state from a zero start)."""
    program, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    row = program.to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    one, zero = tl.full((BD,), 1.0, tl.float32), tl.zeros((BD,), tl.float32)
    A, B, C, E, U, V = one, zero, zero, one, zero, zero
    low = segment * length
    high = tl.minimum(low + length, T)
    for start in range(low, high, BT):
        a, b, c, e, u, v, _, _, _ = _tile(J, r, row, start, high, d, T, D, BACKWARD, SHIFT, GRAD, BT)
        A, B, C, E, U, V = _then(
            A, B, C, E, U, V, _last(a, BT), _last(b, BT), _last(c, BT), _last(e, BT), _last(u, BT), _last(v, BT)
        )
    out = (row * segments + segment) * D + d
    tl.store(product + out * 4, A, mask=d < D)
    tl.store(product + out * 4 + 1, B, mask=d < D)
    tl.store(product + out * 4 + 2, C, mask=d < D)
    tl.store(product + out * 4 + 3, E, mask=d < D)
    tl.store(local + out * 2, U, mask=d < D)
    tl.store(local + out * 2 + 1, V, mask=d < D)


def _segments(B: int, T: int, D: int) -> tuple[int, int]:
    """How many segments to cut T into so that about FILL programs run, and their length (whole tiles)."""
    programs = B * triton.cdiv(D, BLOCK_D)
    wanted = max(1, min(FILL // programs, T // (4 * BLOCK_T)))
    length = triton.cdiv(triton.cdiv(T, wanted), BLOCK_T) * BLOCK_T
    return triton.cdiv(T, length), length


def _launch(J: Tensor, r: Tensor, h0: Tensor, backward: bool, before: Tensor | None = None) -> list[Tensor]:
    """Run the kernel; with `before` (the states of the forward pass) it is the gradient and also returns grad_J."""
    B, T, D, _ = r.shape
    segments, length = _segments(B, T, D)
    grad = before is not None
    J, r, starts = J.contiguous(), r.contiguous(), h0[:, None].contiguous()
    h = torch.empty(r.shape, dtype=r.dtype, device=r.device)
    hT = torch.empty(h0.shape, dtype=h0.dtype, device=r.device)
    grad_J = torch.empty(J.shape, dtype=J.dtype, device=J.device) if grad else h
    shift = (1 if backward else -1) if grad else 0
    flags = dict(BACKWARD=backward, SHIFT=shift, GRAD=grad, BT=BLOCK_T, BD=BLOCK_D)
    grid = (B * segments, triton.cdiv(D, BLOCK_D))
    if segments > 1:
        product = torch.empty(B, segments, D, 2, 2, dtype=h0.dtype, device=r.device)
        local = torch.empty(B, segments, D, 2, dtype=h0.dtype, device=r.device)
        _fold[grid](J, r, product, local, T, D, segments, length, **flags)
        states, _ = block2_scan_triton(product[:, :-1], local[:, :-1], h0, False)
        starts = torch.cat([starts, states], dim=1)
    _scan[grid](J, r, starts, h, hT, before if grad else h, grad_J, T, D, segments, length, **flags)
    return [h, hT, grad_J] if grad else [h, hT]


@torch.library.custom_op("seqarch::block2_scan", mutates_args=())
def _block2_scan(J: Tensor, r: Tensor, h0: Tensor, reverse: bool) -> list[Tensor]:
    return _launch(J, r, h0, reverse)


@_block2_scan.register_fake
def _(J, r, h0, reverse):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (r, h0)]


@torch.library.custom_op("seqarch::block2_scan_backward", mutates_args=())
def _block2_scan_backward(
    J: Tensor, h: Tensor, h0: Tensor, grad_h: Tensor, grad_hT: Tensor, reverse: bool
) -> list[Tensor]:
    lam, carry, grad_J = _launch(J, grad_h, grad_hT, not reverse, before=h)
    first = -1 if reverse else 0
    grad_J[:, first] = (carry[..., :, None] * h0[..., None, :]).to(grad_J.dtype)
    # carry is lambda_1 before it was rounded to the storage dtype
    grad_h0 = (J[:, first].to(h0.dtype) * carry[..., :, None]).sum(-2)
    return [grad_J, lam, grad_h0]


@_block2_scan_backward.register_fake
def _(J, h, h0, grad_h, grad_hT, reverse):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (J, h, h0)]


def _setup_context(ctx, inputs, output):
    J, _, h0, ctx.reverse = inputs
    ctx.save_for_backward(J, output[0], h0)


def _backward(ctx, grads):
    J, h, h0 = ctx.saved_tensors
    grad_h = torch.zeros_like(h) if grads[0] is None else grads[0]
    grad_hT = torch.zeros_like(h0) if grads[1] is None else grads[1]
    return (*_block2_scan_backward(J, h, h0, grad_h, grad_hT, ctx.reverse), None)


_block2_scan.register_autograd(_backward, setup_context=_setup_context)


def block2_scan_triton(J: Tensor, r: Tensor, h0: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Forward and backward by the kernels above; shapes as in `block2_scan`."""
    h, hT = _block2_scan(J, r, h0, reverse)
    return h, hT
