r"""Group-local plus global attention on a GPU: three kernels, each of which serves the forward and the backward pass.

`_collect`   sums $k'_s v_s^\top$ over a stretch of tokens: a tile of a K x E matrix, one matrix per stretch
`_attend`    owns a tile of tokens and some columns of v: walks over its group, $\sum_s A_{ts} v_s + M^\top q'_t$
`_respond`   owns a tile of tokens: walks over its group, $\sum_s Z_{ts} k_s$, and multiplies $M g_t$

The equations are those of ``parallel.py``. Look at them in pairs, and the backward pass needs nothing new:

* v and g change places when q and k, q' and k' do: $\partial v_s = \sum_t A_{ts} g_t + N k'_s$ is `_attend` with
  queries for keys, g for v, and for M the matrix collected from q' and g;
* $\partial k_s = \sum_t Z_{ts} q_t$ and $\partial k'_s$ are `_respond` with the same exchange.

If the kind is causal, the exchange also turns "the tokens before me" into "the tokens after me" (``UPPER``), and the sum
over earlier groups into one over later groups. Every sum has one owner: no atomics, and two runs agree bit for bit.

There is nothing to normalise, so unlike softmax attention a tile needs no running maximum. A token outside the group
is loaded as zeros; its score is 0, so its weight is 0 and no mask is needed for it.

Float16 can hold neither a sum over all tokens nor the small weights of a large group, so there the operands of products
are float32, multiplied in TF32, which keeps as many digits as float16 does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import dot_options
from .parallel import before

STRETCH = 1024  # tokens that one program of `_collect` sums over, if the linear part is not causal


@triton.jit
def _tile(x, row, first, i, column, T, stop, width):
    """Tokens first + i, up to stop, of a (B, T, width) tensor. Which of i and column runs down is up to their shapes."""
    corner = x + (row.to(tl.int64) * T + first) * width
    return tl.load(corner + i * width + column, mask=(first + i < stop) & (column < width), other=0.0)


@triton.jit
def _store(x, row, first, i, column, T, stop, width, value):
    corner = x + (row.to(tl.int64) * T + first) * width
    mask = (first + i < stop) & (column < width)
    tl.store(corner + i * width + column, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _place(T, group, BT: tl.constexpr):
    """Program id -> (batch row, number of its group, first token of the group, first of the tile, stop of the group)."""
    tiles, groups = tl.cdiv(tl.minimum(group, T), BT), tl.cdiv(T, group)
    tile, n, row = tl.program_id(0) % tiles, tl.program_id(0) // tiles % groups, tl.program_id(0) // tiles // groups
    return row, n, n * group, n * group + tile * BT, tl.minimum(n * group + group, T)


@triton.jit
def _range(begin, first, stop, BT: tl.constexpr, CAUSAL: tl.constexpr, UPPER: tl.constexpr):
    """The tokens of the group that a tile must visit; tiles of the walk start at begin plus multiples of BT."""
    low = first if CAUSAL and UPPER else begin
    high = tl.minimum(first + BT, stop) if CAUSAL and not UPPER else stop
    return low, high


@triton.jit
def _positive(q, k, scale, t, s, CAUSAL: tl.constexpr, UPPER: tl.constexpr, PRECISION: tl.constexpr):
    """The tile P of positive scores, tokens t down and s across."""
    P = tl.maximum(tl.dot(q, k, input_precision=PRECISION) * scale, 0.0)
    if CAUSAL:
        seen = s[None, :] >= t[:, None] if UPPER else s[None, :] <= t[:, None]
        P = tl.where(seen, P, 0.0)
    return P


@triton.jit
def _collect(
    k, v, out, T, K, E, length,
    BT: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum of k_s v_s^T over `length` tokens: a (BK, BE) tile of it."""
    pieces = tl.cdiv(T, length)
    row, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    c, e, i = tl.arange(0, BK), tl.program_id(1) * BE + tl.arange(0, BE), tl.arange(0, BT)
    c += tl.program_id(2) * BK
    stop = tl.minimum((piece + 1) * length, T)
    total = tl.zeros((BK, BE), tl.float32)
    for first in range(piece * length, stop, BT):
        keys = _tile(k, row, first, i[None, :], c[:, None], T, stop, K)  # loaded transposed
        values = _tile(v, row, first, i[:, None], e[None, :], T, stop, E)
        total = tl.dot(keys.to(DOT), values.to(DOT), total, input_precision=PRECISION)
    here = out + tl.program_id(0).to(tl.int64) * K * E + c[:, None] * E + e[None, :]
    tl.store(here, total, mask=(c < K)[:, None] & (e < E)[None, :])


@triton.jit
def _attend(
    q, k, lin, v, states, o, scale, T, K, E, group, states_row, states_group,
    CAUSAL: tl.constexpr, UPPER: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o of BT tokens for BE columns: the squared P times v, plus what q' reads from the matrix of the group."""
    row, n, begin, first, stop = _place(T, group, BT)
    c, e, i = tl.arange(0, BK), tl.program_id(1) * BE + tl.arange(0, BE), tl.arange(0, BT)
    matrix = states + (row * states_row + n * states_group).to(tl.int64) * K * E
    state = tl.load(matrix + c[:, None] * E + e[None, :], mask=(c < K)[:, None] & (e < E)[None, :], other=0.0)
    reads = _tile(lin, row, first, i[:, None], c[None, :], T, stop, K)
    total = tl.dot(reads.to(DOT), state.to(DOT), input_precision=PRECISION)
    queries = _tile(q, row, first, i[:, None], c[None, :], T, stop, K).to(DOT)
    low, high = _range(begin, first, stop, BT, CAUSAL, UPPER)
    for s in range(low, high, BT):
        keys = _tile(k, row, s, i[None, :], c[:, None], T, stop, K).to(DOT)  # loaded transposed
        values = _tile(v, row, s, i[:, None], e[None, :], T, stop, E).to(DOT)
        P = _positive(queries, keys, scale, first + i, s + i, CAUSAL, UPPER, PRECISION)
        total = tl.dot((P * P).to(DOT), values, total, input_precision=PRECISION)
    _store(o, row, first, i[:, None], e[None, :], T, stop, E, total)


@triton.jit
def _respond(
    q, k, g, v, states, dq, dlin, scale, T, K, E, group, states_row, states_group,
    CAUSAL: tl.constexpr, UPPER: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq = Z k and dlin = M g of BT tokens. Products with E columns are summed up BE columns at a time."""
    row, n, begin, first, stop = _place(T, group, BT)
    c, i = tl.arange(0, BK), tl.arange(0, BT)
    matrix = states + (row * states_row + n * states_group).to(tl.int64) * K * E
    total = tl.zeros((BT, BK), tl.float32)
    for start in range(0, E, BE):
        e = start + tl.arange(0, BE)
        grads = _tile(g, row, first, i[:, None], e[None, :], T, stop, E)
        state = tl.load(matrix + c[None, :] * E + e[:, None], mask=(c < K)[None, :] & (e < E)[:, None], other=0.0)
        total = tl.dot(grads.to(DOT), state.to(DOT), total, input_precision=PRECISION)
    _store(dlin, row, first, i[:, None], c[None, :], T, stop, K, total)

    total = tl.zeros((BT, BK), tl.float32)
    queries = _tile(q, row, first, i[:, None], c[None, :], T, stop, K).to(DOT)
    low, high = _range(begin, first, stop, BT, CAUSAL, UPPER)
    for s in range(low, high, BT):
        keys = _tile(k, row, s, i[None, :], c[:, None], T, stop, K).to(DOT)
        P = _positive(queries, keys, scale, first + i, s + i, CAUSAL, UPPER, PRECISION)
        change = tl.zeros((BT, BT), tl.float32)
        for start in range(0, E, BE):
            e = start + tl.arange(0, BE)
            grads = _tile(g, row, first, i[:, None], e[None, :], T, stop, E)
            values = _tile(v, row, s, i[None, :], e[:, None], T, stop, E)
            change = tl.dot(grads.to(DOT), values.to(DOT), change, input_precision=PRECISION)
        Z = P * change * (2 * scale)
        keys = _tile(k, row, s, i[:, None], c[None, :], T, stop, K).to(DOT)
        total = tl.dot(Z.to(DOT), keys, total, input_precision=PRECISION)
    _store(dq, row, first, i[:, None], c[None, :], T, stop, K, total)


def _blocks(v: Tensor, K: int, group: int) -> dict:
    """The constants of `_attend` and `_respond`: sizes of a tile (`tl.dot` wants at least 16), and how products are formed."""
    exact = v.dtype != torch.bfloat16  # operands in float32 fill the registers at half the size
    BT, BE, BK = (max(16, triton.next_power_of_2(n)) for n in (min(group, v.shape[1]), v.shape[2], K))
    half = {"DOT": tl.float32, "PRECISION": "tf32"}
    options = half if v.dtype == torch.float16 else dot_options(v.dtype)
    return dict(BT=min(BT, 32 if exact else 64), BK=BK, BE=min(BE, 32 if exact else 64), num_warps=8, **options)


def _matrices(k: Tensor, v: Tensor, group: int, causal: bool, blocks: dict, later: bool = False) -> Tensor:
    """The matrix k^T v that the tokens meet, ``(B, K, E)``; if causal, one for every group, ``(B, n, K, E)``; float32.

    The matrix of a group is the sum over the groups before it, or, if `later`, over those after it.
    """
    (B, T, K), E = k.shape, v.shape[2]
    length = group if causal else STRETCH
    pieces = triton.cdiv(T, length)
    blocks = blocks | {"BK": min(blocks["BK"], 64)}
    parts = torch.empty(B, pieces, K, E, dtype=torch.float32, device=v.device)
    grid = B * pieces, triton.cdiv(E, blocks["BE"]), triton.cdiv(K, blocks["BK"])
    _collect[grid](k, v, parts, T, K, E, length, **blocks)
    if not causal:
        return parts.sum(1) / T
    return (before(parts.flip(1)).flip(1).contiguous() if later else before(parts)) / group


def _launch(v: Tensor, K: int, group: int, causal: bool) -> tuple[int, tuple, dict]:
    """How many tiles of tokens there are, the sizes and the constants."""
    B, T, E = v.shape
    blocks, n = _blocks(v, K, group), triton.cdiv(T, group)
    tiles = B * n * triton.cdiv(min(group, T), blocks["BT"])
    return tiles, (1 / group, T, K, E, group, n if causal else 1, int(causal)), blocks


@torch.library.custom_op("seqarch::gau_attention", mutates_args=())
def _gau_attention(
    quad_q: Tensor, quad_k: Tensor, lin_q: Tensor, lin_k: Tensor, v: Tensor, group: int, causal: bool
) -> Tensor:
    quad_q, quad_k, lin_q, lin_k, v = (x.contiguous() for x in (quad_q, quad_k, lin_q, lin_k, v))
    tiles, sizes, blocks = _launch(v, quad_q.shape[2], group, causal)
    read, o = _matrices(lin_k, v, group, causal, blocks), torch.empty_like(v)
    grid = tiles, triton.cdiv(v.shape[2], blocks["BE"])
    _attend[grid](quad_q, quad_k, lin_q, v, read, o, *sizes, CAUSAL=causal, UPPER=False, **blocks)
    return o


@_gau_attention.register_fake
def _(quad_q, quad_k, lin_q, lin_k, v, group, causal):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@torch.library.custom_op("seqarch::gau_attention_backward", mutates_args=())
def _gau_attention_backward(
    quad_q: Tensor, quad_k: Tensor, lin_q: Tensor, lin_k: Tensor, v: Tensor, g: Tensor, group: int, causal: bool
) -> list[Tensor]:
    q, k, lin_q, lin_k, v, g = (x.contiguous() for x in (quad_q, quad_k, lin_q, lin_k, v, g))
    tiles, sizes, blocks = _launch(v, q.shape[2], group, causal)
    dq, dk, dlin_q, dlin_k, dv = (torch.empty_like(x) for x in (q, k, lin_q, lin_k, v))
    read = _matrices(lin_k, v, group, causal, blocks)
    written = _matrices(lin_q, g, group, causal, blocks, later=True)
    _respond[(tiles,)](q, k, g, v, read, dq, dlin_q, *sizes, CAUSAL=causal, UPPER=False, **blocks)
    _respond[(tiles,)](k, q, v, g, written, dk, dlin_k, *sizes, CAUSAL=causal, UPPER=True, **blocks)
    grid = tiles, triton.cdiv(v.shape[2], blocks["BE"])
    _attend[grid](k, q, lin_k, g, written, dv, *sizes, CAUSAL=causal, UPPER=True, **blocks)
    return [dq, dk, dlin_q, dlin_k, dv]


@_gau_attention_backward.register_fake
def _(quad_q, quad_k, lin_q, lin_k, v, g, group, causal):
    inputs = quad_q, quad_k, lin_q, lin_k, v
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.group, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, g):
    return *_gau_attention_backward(*ctx.saved_tensors, g, ctx.group, ctx.causal), None, None


_gau_attention.register_autograd(_gradient, setup_context=_setup_context)


def gau_attention_triton(
    quad_q: Tensor, quad_k: Tensor, lin_q: Tensor, lin_k: Tensor, v: Tensor, group: int, causal: bool
) -> Tensor:
    """Forward and backward by the kernels above; shapes as in `gau_attention`."""
    return _gau_attention(quad_q, quad_k, lin_q, lin_k, v, group, causal)
