r"""The Cauchy sum on a GPU: no reuse of memory to speak of, all arithmetic.

Forward: a program owns one row and a block of points and walks the poles; the sum of its points stays in registers.
Backward: a program owns one row and a block of poles and walks the points, with both sums of a pole (equations in
`cauchy`) spread over registers until the last point; no atomics, so two runs agree bit for bit. With few rows there
are too few programs: then the points are cut into parts, every part writes its own sums, and they are added afterwards.

Complex numbers are pairs of floats in memory (torch.view_as_real). As in ``parallel.py``, the difference of a point and
a pole is formed first and squared afterwards: near a pole this keeps all digits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

POINTS = 256  # of a program in the forward pass
POLES, STRIDE = 8, 128  # a program in the backward pass: poles it owns, points it takes at a time
FILL = 512  # programs that keep a large GPU busy


@triton.jit
def _forward(v, zeta, w, y, S, L, row_stride, BL: tl.constexpr):
    row, l = tl.program_id(0).to(tl.int64), tl.program_id(1) * BL + tl.arange(0, BL)
    z = tl.load(zeta + row * row_stride + l, mask=l < L, other=0.0)
    real, imag = tl.zeros((BL,), tl.float32), tl.zeros((BL,), tl.float32)
    for n in range(S):
        pole = (row * S + n) * 2
        p, q = tl.load(v + pole), tl.load(v + pole + 1)
        a, b = tl.load(w + pole), tl.load(w + pole + 1)
        den, den_i = a * a + (b - z) * (b + z), -2 * a * z
        norm = 1 / (den * den + den_i * den_i)
        X, Y = den * norm, -den_i * norm  # one over the denominator
        num, num_i = -2 * (p * a + q * b), 2 * p * z
        real += num * X - num_i * Y
        imag += num * Y + num_i * X
    out = y + (row * L + l) * 2
    tl.store(out, real, mask=l < L)
    tl.store(out + 1, imag, mask=l < L)


@triton.jit
def _backward(zeta, w, G, sums, squares, R, S, L, row_stride, length, BN: tl.constexpr, BL: tl.constexpr):
    """Sums of G c + conj(G) r and of G c^2 + conj(G) r^2 over one part of the points, for BN poles of a row."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    pole = (row * S + n) * 2
    # a dead pole lies at -1: it is a valid number, and it is not stored
    a = tl.load(w + pole, mask=n < S, other=-1.0)[:, None]
    b = tl.load(w + pole + 1, mask=n < S, other=0.0)[:, None]
    first, first_i = tl.zeros((BN, BL), tl.float32), tl.zeros((BN, BL), tl.float32)
    second, second_i = tl.zeros((BN, BL), tl.float32), tl.zeros((BN, BL), tl.float32)
    low = part * length
    high = tl.minimum(low + length, L)
    for start in range(low, high, BL):
        l = start + tl.arange(0, BL)
        live = l < high
        z = tl.load(zeta + row * row_stride + l, mask=live, other=0.0)[None, :]
        g = tl.load(G + (row * L + l) * 2, mask=live, other=0.0)[None, :]
        h = tl.load(G + (row * L + l) * 2 + 1, mask=live, other=0.0)[None, :]
        below, above = z - b, z + b
        # c = conj(1 / (z - w)) with G, r = 1 / (z - conj(w)) with conj(G)
        near = tl.where(live[None, :], 1 / (a * a + below * below), 0.0)  # dead points add nothing
        far = tl.where(live[None, :], 1 / (a * a + above * above), 0.0)
        c, c_i = -a * near, below * near
        r, r_i = -a * far, -above * far
        first += g * c - h * c_i + g * r + h * r_i
        first_i += g * c_i + h * c + g * r_i - h * r
        c, c_i = c * c - c_i * c_i, 2 * c * c_i
        r, r_i = r * r - r_i * r_i, 2 * r * r_i
        second += g * c - h * c_i + g * r + h * r_i
        second_i += g * c_i + h * c + g * r_i - h * r
    out = ((part * R + row) * S + n) * 2
    tl.store(sums + out, tl.sum(first, axis=1), mask=n < S)
    tl.store(sums + out + 1, tl.sum(first_i, axis=1), mask=n < S)
    tl.store(squares + out, tl.sum(second, axis=1), mask=n < S)
    tl.store(squares + out + 1, tl.sum(second_i, axis=1), mask=n < S)


def _planes(x: Tensor) -> Tensor:
    """A contiguous real view ``(..., 2)`` of a complex tensor."""
    return torch.view_as_real(x.resolve_conj().contiguous())


def _parts(programs: int, L: int) -> tuple[int, int]:
    """How many parts to cut the points into so that about FILL programs run, and their length (whole strides)."""
    wanted = max(1, min(FILL // programs, triton.cdiv(L, 4 * STRIDE)))
    length = triton.cdiv(triton.cdiv(L, wanted), STRIDE) * STRIDE
    return triton.cdiv(L, length), length


@torch.library.custom_op("seqarch::cauchy", mutates_args=())
def _cauchy(v: Tensor, zeta: Tensor, w: Tensor) -> Tensor:
    (R, S), L = v.shape, zeta.shape[-1]
    y = torch.empty(R, L, dtype=v.dtype, device=v.device)
    grid = (R, triton.cdiv(L, POINTS))
    _forward[grid](
        _planes(v), zeta.contiguous(), _planes(w), torch.view_as_real(y), S, L, L if zeta.ndim == 2 else 0, BL=POINTS
    )
    return y


@_cauchy.register_fake
def _(v, zeta, w):
    return v.new_empty(v.shape[0], zeta.shape[-1])


@torch.library.custom_op("seqarch::cauchy_backward", mutates_args=())
def _cauchy_backward(v: Tensor, zeta: Tensor, w: Tensor, G: Tensor) -> list[Tensor]:
    (R, S), L = v.shape, zeta.shape[-1]
    blocks = triton.cdiv(S, POLES)
    parts, length = _parts(R * blocks, L)
    sums = torch.empty(parts, R, S, dtype=v.dtype, device=v.device)
    squares = torch.empty_like(sums)
    _backward[(R, blocks, parts)](
        zeta.contiguous(), _planes(w), _planes(G), torch.view_as_real(sums), torch.view_as_real(squares),
        R, S, L, L if zeta.ndim == 2 else 0, length, BN=POLES, BL=STRIDE,
    )  # fmt: skip
    return [sums.sum(0), v.conj() * squares.sum(0)]


@_cauchy_backward.register_fake
def _(v, zeta, w, G):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v, w)]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient(ctx, G):
    v, zeta, w = ctx.saved_tensors
    dv, dw = _cauchy_backward(v, zeta, w, G)
    return dv, None, dw


_cauchy.register_autograd(_gradient, setup_context=_setup_context)


def cauchy_triton(v: Tensor, z_imag: Tensor, w: Tensor) -> Tensor:
    """Forward and backward by the kernels above; shapes as in `cauchy`."""
    return _cauchy(v, z_imag, w)
