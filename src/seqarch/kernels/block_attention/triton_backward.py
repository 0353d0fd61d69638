r"""Attention on a GPU, the backward pass: three kernels, so that every sum has one owner and no atomics are needed.

``_grad_queries``  owns BM queries, walks over the keys they see: dq, and $\delta_i = \langle g_i, o_i\rangle - \gamma_i$
``_grad_keys``     owns BN keys, walks over the queries that see them, for all heads that share the keys: dk and dv
``_grad_bias``     owns a tile of the bias, walks over all places where it was added (sequences, chunks)

All three form the weights again from lse (equations in ``parallel.py``). ``_grad_keys`` needs the transposed tile
$P^\top$; it multiplies k with q transposed rather than transposing a product.

Where the values are split into several blocks of columns, everything is linear in them: $\delta$ and $\langle g, v\rangle$
of one block give that block's share of dq, dk and of the bias, and the shares are added outside in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import Pattern
from .triton import alive, key_tiles, limits, problem, safe, scores, split, tile

PROGRAMS = 256  # so many at least share the sum over all places of a bias, if there are so many places


@triton.jit
def _grad_queries(
    q, k, v, bias, mask, keep, rows, o, lse, g, grad_lse, dq, delta, heads, scale, H, G, T, S, N, d, E, shift,
    bias_rows, bias_columns, bias_head, mask_batch, BIASED: tl.constexpr, MASKED: tl.constexpr, KEYED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq_i = c sum_j ds_ij k_j for BM queries: the share of BE columns of the values; also their delta."""
    row, block = tl.program_id(0) // tl.cdiv(T, BM), tl.program_id(1)
    b, h = row // H, row % H
    of_q, of_k = row.to(tl.int64) * T, (b * (H // G) + h // G).to(tl.int64) * S
    share = (block * heads + row).to(tl.int64) * T
    i = tl.program_id(0) % tl.cdiv(T, BM) * BM + tl.arange(0, BM)
    c, e = tl.arange(0, BD), block * BE + tl.arange(0, BE)
    x = tile(q, of_q * d, i[:, None], c[None, :], T, d).to(DOT)
    outer = tile(g, of_q * E, i[:, None], e[None, :], T, E)
    shift_i = tl.sum(outer.to(tl.float32) * tile(o, of_q * E, i[:, None], e[None, :], T, E).to(tl.float32), axis=1)
    if block == 0:
        shift_i -= tl.load(grad_lse + of_q + i, mask=i < T, other=0.0)
    tl.store(delta + share + i, shift_i, mask=i < T)
    top = safe(tl.load(lse + of_q + i, mask=i < T, other=float("inf")))
    first, stop, near = limits(rows, i, T)
    leading, start, tiles = key_tiles(first, stop, near, BN)
    total = tl.zeros((BM, BD), tl.float32)
    for n in range(0, tiles):
        j = tl.where(n < leading, n, start + n - leading) * BN + tl.arange(0, BN)
        j = alive(keep, b, j, S, KEYED)
        y = tile(k, of_k * d, j[:, None], c[None, :], S, d).to(DOT)
        values = tile(v, of_k * E, j[None, :], e[:, None], S, E).to(DOT)  # loaded transposed
        s = scores(
            tl.dot(x, tl.trans(y), input_precision=PRECISION), i[:, None], j[None, :], first[:, None], stop[:, None],
            near[:, None], b, h, bias, mask, scale, T, S, N, shift, bias_rows, bias_columns, bias_head, mask_batch,
            BIASED, MASKED,
        )  # fmt: skip
        weights = tl.exp(s - top[:, None])
        ds = weights * (tl.dot(outer.to(DOT), values, input_precision=PRECISION) - shift_i[:, None])
        total += tl.dot(ds.to(DOT), y, input_precision=PRECISION)
    here = share * d + i[:, None] * d + c[None, :]
    tl.store(dq + here, (total * scale).to(dq.dtype.element_ty), mask=(i < T)[:, None] & (c < d)[None, :])


@triton.jit
def _grad_keys(
    q, k, v, bias, mask, keep, rows, columns, lse, g, delta, dk, dv, heads, global_rows, scale, H, G, T, S, N, d, E,
    shift, bias_rows, bias_columns, bias_head, mask_batch, BIASED: tl.constexpr, MASKED: tl.constexpr,
    KEYED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk_j = c sum_i ds_ij q_i and dv_j = sum_i P_ij g_i for BN keys; tiles are transposed, keys down, queries across."""
    row, block = tl.program_id(0) // tl.cdiv(S, BN), tl.program_id(1)
    b, group = row // (H // G), row % (H // G)
    of_k = row.to(tl.int64) * S
    j = tl.program_id(0) % tl.cdiv(S, BN) * BN + tl.arange(0, BN)
    here_j, exists = j, j < S
    c, e = tl.arange(0, BD), block * BE + tl.arange(0, BE)
    begin = tl.min(tl.load(columns + j, mask=exists, other=2147483647), axis=0)
    end = tl.max(tl.load(columns + S + j, mask=exists, other=0), axis=0)
    leading = tl.cdiv(global_rows, BM)  # tiles with queries that see everything, then the band
    start = tl.maximum(begin // BM, leading)
    tiles = leading + tl.maximum(tl.cdiv(end, BM) - start, 0)
    j = alive(keep, b, j, S, KEYED)
    y = tile(k, of_k * d, j[:, None], c[None, :], S, d).to(DOT)
    values = tile(v, of_k * E, j[:, None], e[None, :], S, E).to(DOT)
    to_k, to_v = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BE), tl.float32)
    for n in range(0, G * tiles):
        h, m = group * G + n // tiles, n % tiles
        of_q = (b * H + h).to(tl.int64) * T
        i = tl.where(m < leading, m, start + m - leading) * BM + tl.arange(0, BM)
        first, stop, near = limits(rows, i, T)
        x = tile(q, of_q * d, i[:, None], c[None, :], T, d).to(DOT)
        outer = tile(g, of_q * E, i[:, None], e[None, :], T, E).to(DOT)
        top = safe(tl.load(lse + of_q + i, mask=i < T, other=float("inf")))
        shift_i = tl.load(delta + block.to(tl.int64) * heads * T + of_q + i, mask=i < T, other=0.0)
        s = scores(
            tl.dot(y, tl.trans(x), input_precision=PRECISION), i[None, :], j[:, None], first[None, :], stop[None, :],
            near[None, :], b, h, bias, mask, scale, T, S, N, shift, bias_rows, bias_columns, bias_head, mask_batch,
            BIASED, MASKED,
        )  # fmt: skip
        weights = tl.exp(s - top[None, :])
        to_v += tl.dot(weights.to(DOT), outer, input_precision=PRECISION)
        ds = weights * (tl.dot(values, tl.trans(outer), input_precision=PRECISION) - shift_i[None, :])
        to_k += tl.dot(ds.to(DOT), x, input_precision=PRECISION)
    there = ((block * (heads // G) + row).to(tl.int64) * S + here_j[:, None]) * d + c[None, :]
    tl.store(dk + there, (to_k * scale).to(dk.dtype.element_ty), mask=exists[:, None] & (c < d)[None, :])
    there = (of_k + here_j[:, None]) * E + e[None, :]
    tl.store(dv + there, to_v.to(dv.dtype.element_ty), mask=exists[:, None] & (e < E)[None, :])


@triton.jit
def _grad_bias(
    q, k, v, bias, mask, keep, rows, lse, g, delta, shares, heads, first_i, first_j, places, per_piece, repeats, scale,
    H, G, T, S, N, d, E, shift, bias_rows, bias_columns, bias_head, mask_batch, BIASED: tl.constexpr,
    MASKED: tl.constexpr, KEYED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ds of one head, summed over some of the places where a tile of the bias was added.

    Place n of a sequence covers the queries from first_i + n x columns on and the keys from first_j + n x columns on.
    """
    across = tl.cdiv(bias_columns, BN)
    tiles = tl.cdiv(bias_rows, BM) * across
    piece, h, block = tl.program_id(0) // tiles, tl.program_id(1), tl.program_id(2)
    r = tl.program_id(0) % tiles // across * BM + tl.arange(0, BM)
    u = tl.program_id(0) % across * BN + tl.arange(0, BN)
    inside = (r < bias_rows)[:, None] & (u < bias_columns)[None, :]
    c, e = tl.arange(0, BD), block * BE + tl.arange(0, BE)
    total = tl.zeros((BM, BN), tl.float32)
    for place in range(piece * per_piece, tl.minimum((piece + 1) * per_piece, places)):
        b, corner = place // repeats, place % repeats * bias_columns
        of_q, of_k = (b * H + h).to(tl.int64) * T, (b * (H // G) + h // G).to(tl.int64) * S
        i = tl.where(r < bias_rows, first_i + corner + r, T)
        j = alive(keep, b, tl.where(u < bias_columns, first_j + corner + u, S), S, KEYED)
        live = (i >= 0) & (i < T)
        first, stop, near = limits(rows, i, T)
        x = tile(q, of_q * d, i[:, None], c[None, :], T, d).to(DOT)
        y = tile(k, of_k * d, j[None, :], c[:, None], S, d).to(DOT)  # loaded transposed, and so are the values
        outer = tile(g, of_q * E, i[:, None], e[None, :], T, E).to(DOT)
        values = tile(v, of_k * E, j[None, :], e[:, None], S, E).to(DOT)
        top = safe(tl.load(lse + of_q + i, mask=live, other=float("inf")))
        shift_i = tl.load(delta + block.to(tl.int64) * heads * T + of_q + i, mask=live, other=0.0)
        s = scores(
            tl.dot(x, y, input_precision=PRECISION), i[:, None], j[None, :], first[:, None], stop[:, None],
            near[:, None], b, h, bias, mask, scale, T, S, N, shift, bias_rows, bias_columns, bias_head, mask_batch,
            BIASED, MASKED,
        )  # fmt: skip
        total += tl.exp(s - top[:, None]) * (tl.dot(outer, values, input_precision=PRECISION) - shift_i[:, None])
    share = ((piece * tl.num_programs(2) + block) * H + h).to(tl.int64) * bias_rows * bias_columns
    there = share + r[:, None].to(tl.int64) * bias_columns + u[None, :]
    tl.store(shares + there, total, mask=inside)


def gradients(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, pattern: Pattern, scale: float, o: Tensor, lse: Tensor,
    g: Tensor, grad_lse: Tensor, wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v and bias (empty, unless wanted) from those of o and lse."""
    (tensors, (rows, columns)), sizes, flags = problem(q, k, v, bias, pattern)
    (B, H, T, _), (_, G, S, _), pieces = q.shape, k.shape, split(v.shape[-1], flags)
    g, grad_lse = g.contiguous(), grad_lse.contiguous()
    # one share for each block of values; a single one needs no sum and is written in its final type
    stored = q.dtype if pieces == 1 else torch.float32
    dq, dk = (torch.empty(pieces, *x.shape, dtype=stored, device=q.device) for x in (q, k))
    dv, delta = torch.empty(v.shape, dtype=v.dtype, device=v.device), lse.new_empty(pieces, B, H, T)
    global_rows = 0 if pattern.causal else min(max(pattern.n_global - max(S - T, 0), 0), T)
    _grad_queries[B * H * triton.cdiv(T, flags["BM"]), pieces](
        *tensors, rows, o, lse, g, grad_lse, dq, delta, B * H, scale, *sizes, **flags
    )
    _grad_keys[B * G * triton.cdiv(S, flags["BN"]), pieces](
        *tensors, rows, columns, lse, g, delta, dk, dv, B * H, global_rows, scale, *sizes, **flags
    )
    dbias = q.new_empty(0)
    if wants_bias:
        shares = _bias_shares(tensors, rows, lse, g, delta, pattern, scale, (B, H, T, S, pieces), sizes, flags)
        dbias = shares.sum((0, 1)) if bias.ndim == 3 else shares.sum((0, 1, 2))
        dbias = dbias.to(bias.dtype)
    return dq.sum(0).to(q.dtype) if pieces > 1 else dq[0], dk.sum(0).to(k.dtype) if pieces > 1 else dk[0], dv, dbias


def _bias_shares(tensors, rows, lse, g, delta, pattern, scale, shape, sizes, flags) -> Tensor:
    """What `_grad_bias` writes, ``(pieces, blocks of values, H, rows, columns)``, to be summed over the first two."""
    (B, H, T, S, blocks), (height, width) = shape, tensors[3].shape[-2:]
    first_i = first_j = 0
    repeats = 1
    if pattern.kind == "chunk":
        first = max((S - T) // width, 0)  # the first chunk that a query is in, unless it has no keys
        first_i, first_j, repeats = first * width - (S - T), first * width, triton.cdiv(S, width) - first
    tiles, places = triton.cdiv(height, flags["BM"]) * triton.cdiv(width, flags["BN"]), B * repeats
    pieces = max(1, min(places, PROGRAMS // (tiles * H * blocks)))
    shares = lse.new_empty(pieces, blocks, H, height, width)
    _grad_bias[pieces * tiles, H, blocks](
        *tensors, rows, lse, g, delta, shares, B * H, first_i, first_j, places, triton.cdiv(places, pieces), repeats,
        scale, *sizes, **flags,
    )  # fmt: skip
    return shares
