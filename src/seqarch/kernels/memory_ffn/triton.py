r"""The fetched memory on a GPU: matrix products that read their weights where they lie, at the block that idx names.

A pick is a pair (sequence b, slot j). Three kernels do everything:

``_inside``   owns (pick, a tile of its tokens and rows): the products with B and A over d, then $h$. In the backward
              pass it computes them again, with $V^\top g$ beside them, and leaves $h$, $\partial q$ and $\partial p$.
``_outside``  owns (sequence, a tile of tokens and columns), walks over the sequence's picks and their r rows:
              $y = \sum h V^\top$, and, the same sums with other matrices, $\partial x = \sum \partial q B + \partial p A$.
``_blocks``   owns (block, a tile of its matrix), walks over the picks of that block and their tokens: $\partial A$,
              $\partial B$ and $\partial V$. Sums have one owner and one order: no atomics, and two runs give the same bits.

Picks are launched in the order of their blocks. Sequences that share a block then run side by side, and what one of them
has read is in the cache for the next.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import dot_options

DEPTH = 32  # how much of a sum is loaded at a time


@triton.jit
def _tile(base, i, I, stride_i, j, J, stride_j, DOT: tl.constexpr):
    # tile [i, j] of a matrix (I, J) with any strides; 0 outside. Swapped strides read the transpose.
    live = (i < I)[:, None] & (j < J)[None, :]
    return tl.load(base + i[:, None] * stride_i + j[None, :] * stride_j, mask=live, other=0.0).to(DOT)


@triton.jit
def _put(base, i, I, j, J, value):
    live = (i < I)[:, None] & (j < J)[None, :]
    tl.store(base + i[:, None] * J + j[None, :], value.to(base.dtype.element_ty), mask=live)


@triton.jit
def _inside(
    x, bank_in, bank_gate, bank_out, idx, w, order, grad, h, grad_q, grad_p, share_w, L, d, r, k,
    GATED: tl.constexpr, WEIGHTED: tl.constexpr, GRAD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BL: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A tile of h of one pick, weighted; with GRAD also of the gradients of q and p, and its share of that of w."""
    row_tiles, token_tiles = tl.cdiv(r, BR), tl.cdiv(L, BL)
    pid = tl.program_id(0)
    n, rest = pid % row_tiles * BR + tl.arange(0, BR), pid // row_tiles
    l = rest % token_tiles * BL + tl.arange(0, BL)
    pick = tl.load(order + rest // token_tiles)
    block = tl.load(idx + pick) * r * d
    tokens = (pick // k) * L * d
    q, p, u = tl.zeros((BL, BR), tl.float32), tl.zeros((BL, BR), tl.float32), tl.zeros((BL, BR), tl.float32)
    for start in range(0, d, BD):
        c = start + tl.arange(0, BD)
        z = _tile(x + tokens, l, L, d, c, d, 1, DOT)
        q = tl.dot(z, _tile(bank_in + block, c, d, 1, n, r, d, DOT), q, input_precision=PRECISION)
        if GATED:
            p = tl.dot(z, _tile(bank_gate + block, c, d, 1, n, r, d, DOT), p, input_precision=PRECISION)
        if GRAD:
            g = _tile(grad + tokens, l, L, d, c, d, 1, DOT)
            u = tl.dot(g, _tile(bank_out + block, c, d, r, n, r, 1, DOT), u, input_precision=PRECISION)
    if not GATED:
        p = q
    s = tl.sigmoid(p)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(w + pick).to(tl.float32)
    value = p * s * q if GATED else p * s
    here = pick * L * r
    _put(h + here, l, L, n, r, weight * value)
    if GRAD:
        slope = weight * u * s * (1 + p * (1 - s))
        if GATED:
            _put(grad_q + here, l, L, n, r, weight * u * p * s)
            _put(grad_p + here, l, L, n, r, slope * q)
        else:
            _put(grad_q + here, l, L, n, r, slope)
        if WEIGHTED:  # rows and tokens outside contribute nothing: their u is 0
            tile = (pick * token_tiles + rest % token_tiles) * row_tiles + pid % row_tiles
            tl.store(share_w + tile, tl.sum(tl.sum(u * value, axis=1), axis=0))


@triton.jit
def _outside(
    a, bank_a, b, bank_b, idx, order, y, L, d, r, k, stride_n, stride_c,
    TWO: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A tile of y: the sum over picks and rows n of a[n] bank_a[n, c] and, with TWO, of b[n] bank_b[n, c]."""
    column_tiles, token_tiles = tl.cdiv(d, BC), tl.cdiv(L, BL)
    pid = tl.program_id(0)
    c, rest = pid % column_tiles * BC + tl.arange(0, BC), pid // column_tiles
    l = rest % token_tiles * BL + tl.arange(0, BL)
    row = tl.load(order + rest // token_tiles)
    total = tl.zeros((BL, BC), tl.float32)
    for j in range(k):
        pick = row * k + j
        block = tl.load(idx + pick) * r * d
        for start in range(0, r, BR):
            n = start + tl.arange(0, BR)
            left = _tile(a + pick * L * r, l, L, r, n, r, 1, DOT)
            right = _tile(bank_a + block, n, r, stride_n, c, d, stride_c, DOT)
            total = tl.dot(left, right, total, input_precision=PRECISION)
            if TWO:
                left = _tile(b + pick * L * r, l, L, r, n, r, 1, DOT)
                right = _tile(bank_b + block, n, r, stride_n, c, d, stride_c, DOT)
                total = tl.dot(left, right, total, input_precision=PRECISION)
    _put(y + row * L * d, l, L, c, d, total)


@triton.jit
def _blocks(
    a, b, order, slots, stops, out, L, I, J, k,
    A_PICKS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of one block (I, J): the sum over its picks and their tokens of a[i] b[j].

    One of a and b has a row for each pick (a with A_PICKS, else b), the other one for each sequence. Positions are picks
    sorted by block: the first one of a block walks to the block's stop, the others have nothing to do.
    """
    i_tiles, j_tiles = tl.cdiv(I, BI), tl.cdiv(J, BJ)
    pid = tl.program_id(0)
    j, rest = pid % j_tiles * BJ + tl.arange(0, BJ), pid // j_tiles
    i, first = rest % i_tiles * BI + tl.arange(0, BI), rest // i_tiles
    stop = tl.load(stops + first)
    total = tl.zeros((BI, BJ), tl.float32)
    for position in range(first, stop):
        pick = tl.load(order + position)
        of_a = pick if A_PICKS else pick // k
        of_b = pick // k if A_PICKS else pick
        for start in range(0, L, BL):
            l = start + tl.arange(0, BL)
            left = _tile(a + of_a * L * I, i, I, 1, l, L, I, DOT)
            total = tl.dot(left, _tile(b + of_b * L * J, l, L, J, j, J, 1, DOT), total, input_precision=PRECISION)
    rows = tl.where(stop > first, I, 0)
    _put(out + tl.load(slots + first) * I * J, i, rows, j, J, total)


def _tile_size(x: Tensor) -> int:
    """Tokens, rows and columns of the tile of a result: products of float32 need many registers, so less of them."""
    return 32 if x.dtype == torch.float32 else 64


def _scratch(x: Tensor, *shape: int) -> Tensor:
    """Memory for what passes from one product to the next, in the type in which they multiply."""
    exact = dot_options(x.dtype)["DOT"] is tl.float32
    return x.new_empty(shape, dtype=torch.float32 if exact else x.dtype)


def _tiles(x: Tensor, *sizes: int) -> int:
    """How many tiles cover a tensor of these sizes."""
    count = 1
    for size in sizes:
        count *= triton.cdiv(size, _tile_size(x))
    return count


def _run_inside(tensors, w, grad, scratch, share_w):
    """Launch `_inside`; scratch is h, or h with the gradients of q and p."""
    x, bank_in, bank_gate, bank_out, idx = tensors
    (_, L, d), r, k = x.shape, bank_in.shape[1], idx.shape[1]
    h, grad_q, grad_p = (scratch * 3)[:3]
    size = _tile_size(x)
    _inside[idx.numel() * _tiles(x, L, r),](
        x, bank_in, bank_in if bank_gate is None else bank_gate, bank_out, idx, idx if w is None else w,
        idx.flatten().argsort(stable=True), x if grad is None else grad, h, grad_q, grad_p, share_w, L, d, r, k,
        GATED=bank_gate is not None, WEIGHTED=w is not None, GRAD=grad is not None, BL=size, BR=size, BD=DEPTH,
        num_warps=8, **dot_options(x.dtype),
    )  # fmt: skip


def _run_outside(x, parts, idx, strides):
    """Launch `_outside` for one or two pairs (rows of every pick, bank); strides of a bank's row n and column c."""
    (B, L, d), r = x.shape, parts[0][0].shape[2]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _outside[B * _tiles(x, L, d),](
        *parts[0], *parts[-1], idx, idx[:, 0].argsort(stable=True), y, L, d, r, idx.shape[1], *strides,
        TWO=len(parts) == 2, BL=_tile_size(x), BC=_tile_size(x), BR=DEPTH, num_warps=8, **dot_options(x.dtype),
    )  # fmt: skip
    return y


def _contiguous(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


@torch.library.custom_op("seqarch::memory_ffn", mutates_args=())
def _memory_ffn(
    x: Tensor, bank_in: Tensor, bank_gate: Tensor | None, bank_out: Tensor, idx: Tensor, w: Tensor | None
) -> Tensor:
    *tensors, w = _contiguous(x, bank_in, bank_gate, bank_out, idx, w)
    h = _scratch(x, idx.numel(), x.shape[1], bank_in.shape[1])
    _run_inside(tensors, w, None, [h], h)
    return _run_outside(tensors[0], [(h, tensors[3])], tensors[4], (1, bank_in.shape[1]))


@_memory_ffn.register_fake
def _(x, bank_in, bank_gate, bank_out, idx, w):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("seqarch::memory_ffn_backward", mutates_args=())
def _memory_ffn_backward(
    x: Tensor, bank_in: Tensor, bank_gate: Tensor | None, bank_out: Tensor, idx: Tensor, w: Tensor | None,
    grad: Tensor, slots: Tensor, count: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, of `count` blocks of each bank, and of w. Slots say where the block of a sorted pick goes."""
    *tensors, w, grad = _contiguous(x, bank_in, bank_gate, bank_out, idx, w, grad)
    x, bank_in, bank_gate, bank_out, idx = tensors
    (_, L, d), r, k = x.shape, bank_in.shape[1], idx.shape[1]
    gated = bank_gate is not None
    scratch = [_scratch(x, idx.numel(), L, r) for _ in range(3 if gated else 2)]
    share_w = torch.zeros(idx.numel(), _tiles(x, L, r), dtype=torch.float32, device=x.device)
    _run_inside(tensors, w, grad, scratch, share_w)
    h, *inner = scratch
    parts = list(zip(inner, [bank_in, bank_gate], strict=False))
    grad_x = _run_outside(x, parts, idx, (d, 1))

    ids, order = idx.flatten().sort(stable=True)
    position = torch.arange(len(ids), device=x.device)
    leads = torch.searchsorted(ids, ids) == position
    stops = torch.where(leads, torch.searchsorted(ids, ids, right=True), position)

    def of_bank(a: Tensor, b: Tensor, shape: tuple[int, int], a_picks: bool) -> Tensor:
        out = x.new_zeros(count, *shape)
        _blocks[len(ids) * _tiles(x, *shape),](
            a, b, order, slots, stops, out, L, *shape, k,
            A_PICKS=a_picks, BI=_tile_size(x), BJ=_tile_size(x), BL=DEPTH, num_warps=8, **dot_options(x.dtype),
        )  # fmt: skip
        return out

    of_in = of_bank(inner[0], x, (r, d), True)
    of_gate = of_bank(inner[1], x, (r, d), True) if gated else x.new_empty(0)
    of_out = of_bank(grad, h, (d, r), False)
    of_w = x.new_empty(0) if w is None else share_w.sum(1).view(idx.shape).to(w.dtype)
    return [grad_x, of_in, of_gate, of_out, of_w]


@_memory_ffn_backward.register_fake
def _(x, bank_in, bank_gate, bank_out, idx, w, grad, slots, count):
    blocks = [x.new_empty(0 if b is None else (count, *b.shape[1:])) for b in (bank_in, bank_gate, bank_out)]
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format),
        *blocks,
        x.new_empty(0 if w is None else w.shape),
    ]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    tensors = ctx.saved_tensors
    x, bank_in, bank_gate, bank_out, idx, w = tensors
    ids = idx.flatten().sort(stable=True).values
    grads = _memory_ffn_backward(*tensors, grad, ids, len(bank_in))
    absent = (False, False, bank_gate is None, False, True, w is None)
    return tuple(None if gone else g for gone, g in zip(absent, (*grads[:4], None, grads[4]), strict=True))


_memory_ffn.register_autograd(_backward, setup_context=_setup_context)


class _SparseMemoryFFN(torch.autograd.Function):
    """The same kernels, with gradients of the banks that hold the picked blocks only."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        return _memory_ffn(*tensors)

    @staticmethod
    def backward(ctx, grad):
        tensors = ctx.saved_tensors
        idx, w = tensors[4:]
        touched, slots = idx.flatten().sort(stable=True).values.unique_consecutive(return_inverse=True)
        grad_x, *of_banks, of_w = _memory_ffn_backward(*tensors, grad, slots, len(touched))
        # sorted and without repetition: the indices need no second pass
        kind = dict(is_coalesced=True, check_invariants=False)
        sparse = [
            None if bank is None else torch.sparse_coo_tensor(touched[None], g, bank.shape, **kind)
            for bank, g in zip(tensors[1:4], of_banks, strict=True)
        ]
        return grad_x, *sparse, None, None if w is None else of_w


def memory_ffn_triton(
    x: Tensor,
    bank_in: Tensor,
    bank_gate: Tensor | None,
    bank_out: Tensor,
    idx: Tensor,
    w: Tensor | None,
    sparse_grad: bool,
) -> Tensor:
    """Forward and backward by the kernels above; arguments as in `memory_ffn`."""
    run = _SparseMemoryFFN.apply if sparse_grad else _memory_ffn
    return run(x, bank_in, bank_gate, bank_out, idx, w)
