r"""The Vandermonde sum on a GPU: outer products of the two tables of ``parallel.py``, kept in registers.

Forward: a program owns one row and a tile of BC x BB samples, $l = cB + j$. For each term it loads BC powers
$2 v e^{w c B}$ and BB powers $e^{w j}$, and adds the real part of their outer product to its tile: two multiplications
per sample and term, and no exponential.

Backward: a program owns BS terms of a row and BB of the offsets j, and walks c. It collects

$$A_{nj} = \sum_c g_{cB+j}\, \overline{e^{w_n c B}},\qquad A'_{nj} = \sum_c cB\, g_{cB+j}\, \overline{e^{w_n c B}}$$

in registers. At the end $\sum_j \overline{e^{w_n j}} A_{nj}$ is the sum that $\partial v_n$ needs, and
$\sum_j \overline{e^{w_n j}} (A'_{nj} + j A_{nj})$ the one of $\partial w_n$. Programs that share a term write their parts,
which are added afterwards: no atomics, and two runs agree bit for bit.

The tables are computed by PyTorch in double precision, about $2 S \sqrt L$ exponentials for a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .parallel import planes, tables

BLOCK_C, BLOCK_B = 16, 128  # a tile of samples in the forward pass
TERMS = 8  # of a program in the backward pass


@triton.jit
def _forward(far, far_i, near, near_i, K, S, L, C, B, BC: tl.constexpr, BB: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c, j = tl.program_id(1) * BC + tl.arange(0, BC), tl.program_id(2) * BB + tl.arange(0, BB)
    total = tl.zeros((BC, BB), tl.float32)
    for n in range(S):
        left, right = (row * S + n) * C + c, (row * S + n) * B + j
        x, x_i = tl.load(far + left, mask=c < C, other=0.0), tl.load(far_i + left, mask=c < C, other=0.0)
        y, y_i = tl.load(near + right, mask=j < B, other=0.0), tl.load(near_i + right, mask=j < B, other=0.0)
        total += x[:, None] * y[None, :] - x_i[:, None] * y_i[None, :]
    l = c[:, None] * B + j[None, :]
    tl.store(K + row * L + l, total, mask=(l < L) & (j < B)[None, :])


@triton.jit
def _backward(far, far_i, near, near_i, g, sums, weighted, R, S, L, C, B, BS: tl.constexpr, BB: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    n, j = tl.program_id(1) * BS + tl.arange(0, BS), part * BB + tl.arange(0, BB)
    a, a_i = tl.zeros((BS, BB), tl.float32), tl.zeros((BS, BB), tl.float32)
    d, d_i = tl.zeros((BS, BB), tl.float32), tl.zeros((BS, BB), tl.float32)
    left = (row * S + n) * C
    for c in range(C):
        x, x_i = tl.load(far + left + c, mask=n < S, other=0.0), tl.load(far_i + left + c, mask=n < S, other=0.0)
        l = c * B + j
        grad = tl.load(g + row * L + l, mask=(j < B) & (l < L), other=0.0)
        real, imag = x[:, None] * grad[None, :], -x_i[:, None] * grad[None, :]
        start = (c * B).to(tl.float32)
        a, a_i = a + real, a_i + imag
        d, d_i = d + start * real, d_i + start * imag
    right = (row * S + n)[:, None] * B + j[None, :]
    live = (n < S)[:, None] & (j < B)[None, :]
    y, y_i = tl.load(near + right, mask=live, other=0.0), -tl.load(near_i + right, mask=live, other=0.0)
    offset = j[None, :].to(tl.float32)
    d, d_i = d + offset * a, d_i + offset * a_i
    out = ((part * R + row) * S + n) * 2
    tl.store(sums + out, tl.sum(a * y - a_i * y_i, axis=1), mask=n < S)
    tl.store(sums + out + 1, tl.sum(a * y_i + a_i * y, axis=1), mask=n < S)
    tl.store(weighted + out, tl.sum(d * y - d_i * y_i, axis=1), mask=n < S)
    tl.store(weighted + out + 1, tl.sum(d * y_i + d_i * y, axis=1), mask=n < S)


def _launch_tables(w: Tensor, C: int, B: int, v: Tensor | None = None) -> list[Tensor]:
    """The four contiguous float32 tables that a kernel reads: real and imaginary parts of both powers, times v."""
    far, near = tables(w, C, B)
    far = far if v is None else v[..., None] * far
    return [part.contiguous() for table in (far, near) for part in planes(table, torch.float32)]


def _sizes(L: int) -> tuple[int, int]:
    """Return C and B of l = cB + j: B is about the root of L, in whole blocks of offsets; no offset is beyond L."""
    B = min(L, BLOCK_B * max(1, round(L**0.5 / BLOCK_B)))
    return triton.cdiv(L, B), B


@torch.library.custom_op("seqarch::vandermonde", mutates_args=())
def _vandermonde(v: Tensor, w: Tensor, L: int) -> Tensor:
    R, S = v.shape
    C, B = _sizes(L)
    K = torch.empty(R, L, dtype=torch.float32, device=v.device)
    grid = (R, triton.cdiv(C, BLOCK_C), triton.cdiv(B, BLOCK_B))
    _forward[grid](*_launch_tables(w, C, B, 2 * v), K, S, L, C, B, BC=BLOCK_C, BB=BLOCK_B)
    return K


@_vandermonde.register_fake
def _(v, w, L):
    return v.new_empty(v.shape[0], L, dtype=torch.float32)


@torch.library.custom_op("seqarch::vandermonde_backward", mutates_args=())
def _vandermonde_backward(v: Tensor, w: Tensor, g: Tensor) -> list[Tensor]:
    (R, S), L = v.shape, g.shape[-1]
    C, B = _sizes(L)
    grid = (R, triton.cdiv(S, TERMS), triton.cdiv(B, BLOCK_B))
    sums = torch.empty(grid[2], R, S, 2, dtype=torch.float32, device=v.device)
    weighted = torch.empty_like(sums)
    _backward[grid](
        *_launch_tables(w, C, B), g.contiguous(), sums, weighted, R, S, L, C, B, BS=TERMS, BB=BLOCK_B
    )  # fmt: skip
    sums, weighted = (torch.view_as_complex(x.sum(0)) for x in (sums, weighted))
    return [2 * sums, 2 * v.conj() * weighted]


@_vandermonde_backward.register_fake
def _(v, w, g):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v, w)]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])


def _gradient(ctx, g):
    return (*_vandermonde_backward(*ctx.saved_tensors, g), None)


_vandermonde.register_autograd(_gradient, setup_context=_setup_context)


def vandermonde_triton(v: Tensor, w: Tensor, L: int) -> Tensor:
    """Forward and backward by the kernels above; shapes as in `vandermonde`."""
    return _vandermonde(v, w, L)
