r"""Attention on a GPU, the forward pass: a program owns a tile of queries and walks over the tiles of keys they see.

The running maximum, denominator and numerator of ``parallel.py`` wait in registers; memory sees q, k, v once per program
that needs them, o and lse. Which keys a tile of queries must visit, and what it sees of them, comes from one table,
`intervals` of ``parallel.py``: first, stop and near for every query. The program takes the smallest first and the
largest stop of its queries, skips all tiles outside, and compares single positions only inside. So all kinds of
attention are one kernel.

Values wider than `BLOCK_E` columns are split over programs. Each computes the scores again, and its own columns of o.

Read on in ``triton_backward.py``: the three kernels of the backward pass use the same `scores`.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import dot_options
from .parallel import band, intervals
from .reference import Pattern

BLOCK_E = 128  # columns of v, and the widest q and k


@triton.jit
def tile(x, base, r, c, rows, columns):
    # entries (r, c) of a matrix that starts at `base`, 0 outside; r and c broadcast to the tile, either way round
    return tl.load(x + base + r * columns + c, mask=(r >= 0) & (r < rows) & (c < columns), other=0.0)


@triton.jit
def limits(rows, i, T):
    # first, stop and near of queries i; a dead query sees nothing and does not widen the range of its tile
    live = (i >= 0) & (i < T)
    first = tl.load(rows + i, mask=live, other=2147483647)
    return first, tl.load(rows + T + i, mask=live, other=0), tl.load(rows + 2 * T + i, mask=live, other=0)


@triton.jit
def alive(keep, b, j, S, KEYED: tl.constexpr):
    # j itself where the key exists and somebody may see it, otherwise S: a row that `tile` does not load
    live = j < S
    if KEYED:
        live = live & (tl.load(keep + b.to(tl.int64) * S + j, mask=live, other=0) != 0)
    return tl.where(live, j, S)


@triton.jit
def scores(
    product, i, j, first, stop, near, b, h, bias, mask, scale, T, S, N, shift, bias_rows, bias_columns, bias_head,
    mask_batch, BIASED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The scores of a tile from the products <q_i, k_j>, -inf where query i does not see key j.

    i, first, stop and near broadcast against j, either way round, so that the same lines serve the transposed tile.
    """
    seen = (j < S) & (((j >= first) & (j < stop)) | (j < near))
    s = product * scale
    if BIASED:
        r, c = (i + shift) % bias_rows, j % bias_columns
        there = h.to(tl.int64) * bias_head + r.to(tl.int64) * bias_columns + c
        s += tl.load(bias + there, mask=seen, other=0.0).to(tl.float32)
    if MASKED:
        n = j - (S - N)  # keys before the mask are a cache, seen by all
        there = b.to(tl.int64) * mask_batch + i.to(tl.int64) * N + n
        seen = seen & ((n < 0) | (tl.load(mask + there, mask=seen & (n >= 0), other=0) != 0))
    return tl.where(seen, s, float("-inf"))


@triton.jit
def safe(m):
    # a maximum of -inf (nothing seen) becomes +inf, so that exp(-inf - m) is 0 and never nan
    return tl.where(m == float("-inf"), float("inf"), m)


@triton.jit
def key_tiles(first, stop, near, BN: tl.constexpr):
    # how many leading tiles hold global keys, where the band begins, how many tiles there are in all
    leading = tl.cdiv(tl.max(near, axis=0), BN)
    start = tl.maximum(tl.min(first, axis=0) // BN, leading)
    return leading, start, leading + tl.maximum(tl.cdiv(tl.max(stop, axis=0), BN) - start, 0)


@triton.jit
def _forward(
    q, k, v, bias, mask, keep, rows, o, lse, scale, H, G, T, S, N, d, E, shift, bias_rows, bias_columns, bias_head,
    mask_batch, BIASED: tl.constexpr, MASKED: tl.constexpr, KEYED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o and lse of BM queries of one head, for BE columns of the values."""
    row, block = tl.program_id(0) // tl.cdiv(T, BM), tl.program_id(1)
    b, h = row // H, row % H
    of_q, of_k = row.to(tl.int64) * T, (b * (H // G) + h // G).to(tl.int64) * S
    i = tl.program_id(0) % tl.cdiv(T, BM) * BM + tl.arange(0, BM)
    c, e = tl.arange(0, BD), block * BE + tl.arange(0, BE)
    x = tile(q, of_q * d, i[:, None], c[None, :], T, d).to(DOT)
    first, stop, near = limits(rows, i, T)
    leading, start, tiles = key_tiles(first, stop, near, BN)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total, sums = tl.zeros((BM,), tl.float32), tl.zeros((BM, BE), tl.float32)
    for n in range(0, tiles):
        j = tl.where(n < leading, n, start + n - leading) * BN + tl.arange(0, BN)
        j = alive(keep, b, j, S, KEYED)
        y = tile(k, of_k * d, j[None, :], c[:, None], S, d).to(DOT)  # loaded transposed
        values = tile(v, of_k * E, j[:, None], e[None, :], S, E).to(DOT)
        s = scores(
            tl.dot(x, y, input_precision=PRECISION), i[:, None], j[None, :], first[:, None], stop[:, None],
            near[:, None], b, h, bias, mask, scale, T, S, N, shift, bias_rows, bias_columns, bias_head, mask_batch,
            BIASED, MASKED,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(s, axis=1))
        weights = tl.exp(s - safe(new)[:, None])
        kept = tl.exp(top - safe(new))
        total = total * kept + tl.sum(weights, axis=1)
        sums = sums * kept[:, None] + tl.dot(weights.to(DOT), values, input_precision=PRECISION)
        top = new
    some = total > 0
    total = tl.where(some, total, 1.0)
    here = of_q * E + i[:, None] * E + e[None, :]
    tl.store(o + here, (sums / total[:, None]).to(o.dtype.element_ty), mask=(i < T)[:, None] & (e < E)[None, :])
    if block == 0:
        tl.store(lse + of_q + i, tl.where(some, top + tl.log(total), float("-inf")), mask=i < T)


@functools.lru_cache(maxsize=64)
def _fixed_tables(pattern: Pattern, T: int, S: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tables of a pattern that holds no tensor: the same for every batch, so they are made once."""
    return _tables(pattern, T, S, device)


def _tables(pattern: Pattern, T: int, S: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`intervals` ``(3, T)``, and the other way round ``(2, S)``: begin and end of the queries that see a key.

    First and stop do not fall, so the queries of the band that see key j are those with stop > j, up to the last with
    first <= j. A global key is seen by all of them, from its own position on if the kind is causal.
    """
    first, stop = (x.contiguous() for x in band(pattern, T, S, device))
    j = torch.arange(S, device=device)
    begin, end = (torch.searchsorted(edge, j, right=True) for edge in (stop, first))
    if pattern.n_global:
        earliest = (j - (S - T)).clamp(0, T) if pattern.causal else torch.zeros_like(j)
        begin = torch.where(j < pattern.n_global, earliest, begin)
        end = torch.where(j < pattern.n_global, T, end)
    return intervals(pattern, T, S, device).int().contiguous(), torch.stack([begin, end]).int().contiguous()


def problem(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, pattern: Pattern):
    """What all kernels take: the tensors with the tables, the sizes, and the compile-time settings."""
    (B, H, T, d), (_, heads, S, _), E = q.shape, k.shape, v.shape[-1]
    mask, cu_seqlens, keep = pattern.mask, pattern.cu_seqlens, pattern.key_mask
    if cu_seqlens is None:
        fixed = pattern._replace(mask=None, key_mask=None)
        tables = _fixed_tables(fixed, T, S, q.device)
    else:
        tables = _tables(pattern, T, S, q.device)
        j = torch.arange(S, device=q.device)
        inside = ((j >= cu_seqlens[0]) & (j < cu_seqlens[-1])).expand(B, S)
        keep = inside if keep is None else keep & inside
    flags = dict(BIASED=bias is not None, MASKED=mask is not None, KEYED=keep is not None)
    bias_rows, bias_columns = (1, 1) if bias is None else bias.shape[-2:]
    shift = (S - T) % pattern.width if pattern.kind == "chunk" else 0
    bias_head = bias_rows * bias_columns if bias is not None and bias.ndim == 3 else 0
    N = 0 if mask is None else mask.shape[-1]
    mask_batch = T * N if mask is not None and len(mask) > 1 else 0
    sizes = (H, H // heads, T, S, N, d, E, shift, bias_rows, bias_columns, bias_head, mask_batch)
    # what is absent is never read: any pointer will do
    optional = [q if x is None else x.contiguous() for x in (bias, mask, keep)]
    optional[1:] = [x.view(torch.uint8) if x.dtype == torch.bool else x for x in optional[1:]]
    return (
        ([x.contiguous() for x in (q, k, v)] + optional, tables),
        sizes,
        flags | blocks(q, E, bias is not None or N > 0),
    )


def blocks(q: Tensor, E: int, has_table: bool) -> dict:
    """The sizes of a tile. Exact products of float32 keep whole rows in registers, so their tiles are smaller.

    Chosen for no or next to no spilled registers on compute capability 8.0 and 9.0.
    """
    BD, BE = (min(BLOCK_E, max(16, triton.next_power_of_2(n))) for n in (q.shape[-1], E))  # tl.dot wants at least 16
    wide, exact = max(BD, BE) > 64, q.dtype == torch.float32
    BM, BN = (32, 16 if wide else 32) if exact else (64, 32 if wide else 64)
    warps = 8 if wide or exact or has_table else 4  # a table (bias, mask) has one address for every entry of the tile
    return dict(BM=BM, BN=BN, BD=BD, BE=BE, num_warps=warps, num_stages=2, **dot_options(q.dtype))


def split(E: int, flags: dict) -> int:
    """How many programs share the columns of the values."""
    return triton.cdiv(E, flags["BE"])


@torch.library.custom_op("seqarch::block_attention", mutates_args=())
def _block_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, mask: Tensor | None,
    key_mask: Tensor | None, kind: str, width: int, n_global: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    pattern = Pattern(kind, width, n_global, causal, cu_seqlens, mask, key_mask)
    (tensors, (rows, _)), sizes, flags = problem(q, k, v, bias, pattern)
    (B, H, T, _), E = q.shape, v.shape[-1]
    o, lse = q.new_empty(B, H, T, E), q.new_empty(B, H, T, dtype=torch.float32)
    _forward[B * H * triton.cdiv(T, flags["BM"]), split(E, flags)](*tensors, rows, o, lse, scale, *sizes, **flags)
    return o, lse


@_block_attention.register_fake
def _(q, k, v, *rest):
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("seqarch::block_attention_backward", mutates_args=())
def _block_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, mask: Tensor | None,
    key_mask: Tensor | None, kind: str, width: int, n_global: int, causal: bool, scale: float,
    o: Tensor, lse: Tensor, g: Tensor, grad_lse: Tensor, wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from .triton_backward import gradients

    pattern = Pattern(kind, width, n_global, causal, cu_seqlens, mask, key_mask)
    return gradients(q, k, v, bias, pattern, scale, o, lse, g, grad_lse, wants_bias)


@_block_attention_backward.register_fake
def _(q, k, v, bias, *rest):
    dbias = q.new_empty(0) if bias is None or not rest[-1] else bias
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, dbias))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.options = inputs[7:]


def _gradient(ctx, g, grad_lse):
    *inputs, o, lse = ctx.saved_tensors
    g = torch.zeros_like(o) if g is None else g
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    wants_bias = inputs[3] is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dbias = _block_attention_backward(*inputs, *ctx.options, o, lse, g, grad_lse, wants_bias)
    return dq, dk, dv, dbias if wants_bias else None, *[None] * 8


_block_attention.register_autograd(_gradient, setup_context=_setup_context)


def block_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, pattern: Pattern, scale: float
) -> tuple[Tensor, Tensor]:
    """Forward and backward by the kernels; shapes as in `block_attention`, o and lse."""
    p = pattern
    options = p.kind, p.width, p.n_global, p.causal, scale
    return _block_attention(q, k, v, bias, p.cu_seqlens, p.mask, p.key_mask, *options)
