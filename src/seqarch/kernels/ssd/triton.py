r"""The scalar-decay recurrence on a GPU: all chunks at once, but for one short walk over their states.

The equations are those of ``parallel.py``. The forward pass is three kernels, each a sentence of it:

1. `_collect`, a program per chunk: what the chunk adds to the state, $\sum_s e^{c_Q - c_s} B_s X_s^\top$;
2. `_carry`, a program per head and piece of the state: walk over the chunks, and leave the state before each of them
   where the contribution of the chunk was;
3. `_outputs`, a program per chunk and block of P: the triangular matrix times x, plus what is read from the state.

The backward pass is the same three in reverse: `_collect` of $C_t$ and $g_t$, `_carry` from the last chunk to the first,
and then two kernels of a program per chunk: `_inputs` for all that belongs to one head (gradients of x, w, a and D),
and `_vectors`, which adds up over the heads of a group, for B and C. Blocks of P write their parts of sums over P side by
side, to be added afterwards: no atomics, and two runs agree bit for bit.

Where a transposed matrix is needed it is loaded or computed transposed, never turned around between two products.
Decays reach the kernels as running sums c that begin anew in every chunk, split into a float32 number and a float32
remainder: differences of c are then as exact as the decays themselves, after however strong a decay.

Float16 can hold neither a state that has grown nor a small gradient, so there the operands of products are float32,
multiplied in TF32, which keeps as many digits as float16 does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import dot_options
from .parallel import sums_in_chunks

WALK = 256  # elements of a state that one program carries from chunk to chunk


@triton.jit
def _place(chunks, H):
    """Program id -> (number of the chunk among all, batch row, head, number of the chunk in its sequence)."""
    chunk = tl.program_id(0)
    return chunk.to(tl.int64), chunk // chunks // H, chunk // chunks % H, chunk % chunks


@triton.jit
def _tile(base, row, first, i, h, column, T, H, width):
    """Tokens first + i of a (B, T, H, width) tensor. Which of i and column runs down is up to their shapes.

    Only the corner of the tile needs 64 bits; offsets inside it do not.
    """
    corner = base + ((row.to(tl.int64) * T + first) * H + h) * width
    return tl.load(corner + i * (H * width) + column, mask=(i < T - first) & (column < width), other=0.0)


@triton.jit
def _store(base, row, first, i, h, column, T, H, width, value):
    corner = base + ((row.to(tl.int64) * T + first) * H + h) * width
    inside = (i < T - first) & (column < width)
    tl.store(corner + i * (H * width) + column, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _state(base, chunk, n, p, N, P):
    """A tile of the (N, P) state of a chunk; what runs down is up to the shapes of n and p."""
    return tl.load(base + chunk * N * P + n * P + p, mask=(n < N) & (p < P), other=0.0)


@triton.jit
def _decay(high, low, chunk, Q: tl.constexpr, UPPER: tl.constexpr):
    """The decay from the token across to the token down, 0 where that is back in time; UPPER: from down to across."""
    i = tl.arange(0, Q)
    c, rest = tl.load(high + chunk * Q + i), tl.load(low + chunk * Q + i)
    if UPPER:
        between = (c[None, :] - c[:, None]) + (rest[None, :] - rest[:, None])
        seen = i[None, :] >= i[:, None]
    else:
        between = (c[:, None] - c[None, :]) + (rest[:, None] - rest[None, :])
        seen = i[:, None] >= i[None, :]
    return tl.exp(tl.where(seen, between, float("-inf")))


@triton.jit
def _collect(
    b, x, scale, out, T, H, G, N, P, chunks,
    Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum of b_s (scale_s x_s)^T over the tokens of a chunk: a tile of (N, P)."""
    chunk, row, h, k = _place(chunks, H)
    n, p, i = tl.program_id(1) * BN + tl.arange(0, BN), tl.program_id(2) * BP + tl.arange(0, BP), tl.arange(0, Q)
    first = k * Q
    vectors = _tile(b, row, first, i[None, :], h // (H // G), n[:, None], T, G, N)
    values = _tile(x, row, first, i[:, None], h, p[None, :], T, H, P).to(tl.float32)
    values = values * tl.load(scale + chunk * Q + i)[:, None]
    total = tl.dot(vectors.to(DOT), values.to(DOT), input_precision=PRECISION)
    at = chunk * N * P + n[:, None] * P + p[None, :]
    tl.store(out + at, total, mask=(n < N)[:, None] & (p < P)[None, :])


@triton.jit
def _carry(states, whole, first, last, chunks, size, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """Walk h <- whole_k h + states_k over the chunks of one head, leaving in states_k the h before the step."""
    head, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = e < size
    h = tl.load(first + head * size + e, mask=live, other=0.0)
    for step in range(0, chunks):
        k = head * chunks + (chunks - 1 - step if REVERSE else step)
        added = tl.load(states + k * size + e, mask=live, other=0.0)
        tl.store(states + k * size + e, h, mask=live)
        h = tl.load(whole + k) * h + added
    tl.store(last + head * size + e, h, mask=live)


@triton.jit
def _outputs(
    x, w, high, low, since, b, c, d, states, y, T, H, G, N, P, chunks,
    Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of a chunk for BP columns: M x + e^c C h + D x. The factor w of x is taken into the columns of M."""
    chunk, row, h, k = _place(chunks, H)
    p, i = tl.program_id(1) * BP + tl.arange(0, BP), tl.arange(0, Q)
    first, g = k * Q, h // (H // G)
    scores, from_state = tl.zeros((Q, Q), tl.float32), tl.zeros((Q, BP), tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        reads = _tile(c, row, first, i[:, None], g, n[None, :], T, G, N).to(DOT)
        writes = _tile(b, row, first, i[None, :], g, n[:, None], T, G, N).to(DOT)
        state = _state(states, chunk, n[:, None], p[None, :], N, P)
        scores = tl.dot(reads, writes, scores, input_precision=PRECISION)
        from_state = tl.dot(reads, state.to(DOT), from_state, input_precision=PRECISION)
    values = _tile(x, row, first, i[:, None], h, p[None, :], T, H, P)
    weights = scores * _decay(high, low, chunk, Q, False) * tl.load(w + chunk * Q + i)[None, :]
    out = from_state * tl.load(since + chunk * Q + i)[:, None] + tl.load(d + h) * values.to(tl.float32)
    out = tl.dot(weights.to(DOT), values.to(DOT), out, input_precision=PRECISION)
    _store(y, row, first, i[:, None], h, p[None, :], T, H, P, out)


@triton.jit
def _inputs(
    x, w, high, low, since, until, b, c, d, states, grad_states, g, dx, dw, before, after, carried, dd, T, H, G, N, P, chunks,
    Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one head in one chunk: dx for BP columns, and this block's part of dw, of the three sums of da, of dD.

    Matrices have token s (of x) down and token t (of g) across. `grad_states` are those of the states after the chunks.
    Of da, `carried` belongs to all steps, after[t] to all steps up to t, and before[j] to step j + 1.
    """
    chunk, row, h, k = _place(chunks, H)
    block, everywhere = tl.program_id(1), tl.num_programs(0).to(tl.int64)
    p, i = block * BP + tl.arange(0, BP), tl.arange(0, Q)
    first, group = k * Q, h // (H // G)
    scores, written = tl.zeros((Q, Q), tl.float32), tl.zeros((Q, BP), tl.float32)
    read, inner = tl.zeros((Q, BP), tl.float32), tl.zeros((BP,), tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        writes = _tile(b, row, first, i[:, None], group, n[None, :], T, G, N).to(DOT)
        reads = _tile(c, row, first, i[None, :], group, n[:, None], T, G, N).to(DOT)
        scores = tl.dot(writes, reads, scores, input_precision=PRECISION)
        k_after = _state(grad_states, chunk, n[:, None], p[None, :], N, P)
        written = tl.dot(writes, k_after.to(DOT), written, input_precision=PRECISION)
        state = _state(states, chunk, n[:, None], p[None, :], N, P)
        inner += tl.sum(state * k_after, axis=0)
        reads = _tile(c, row, first, i[:, None], group, n[None, :], T, G, N).to(DOT)
        read = tl.dot(reads, state.to(DOT), read, input_precision=PRECISION)
    values = _tile(x, row, first, i[:, None], h, p[None, :], T, H, P)
    grads = _tile(g, row, first, i[:, None], h, p[None, :], T, H, P)
    turned = _tile(g, row, first, i[None, :], h, p[:, None], T, H, P)
    scale = tl.load(w + chunk * Q + i)
    M = scores * _decay(high, low, chunk, Q, True)
    pairs = tl.dot(values.to(DOT), turned.to(DOT), input_precision=PRECISION) * scale[:, None]
    later = i[:, None] < i[None, :]
    crossing = tl.where(later, tl.cumsum(tl.where(later, M * pairs, 0.0), axis=0), 0.0)  # from s <= j to t > j, at j
    values, grads32 = values.to(tl.float32), grads.to(tl.float32)
    written = written * tl.load(until + chunk * Q + i)[:, None]
    written_sum = tl.cumsum(tl.sum(values * written, axis=1) * scale, axis=0)
    read_sum = tl.sum(grads32 * read, axis=1) * tl.load(since + chunk * Q + i)
    dX = tl.dot(M.to(DOT), grads.to(DOT), written, input_precision=PRECISION)
    _store(dx, row, first, i[:, None], h, p[None, :], T, H, P, dX * scale[:, None] + tl.load(d + h) * grads32)
    part = block * everywhere + chunk
    tl.store(dw + part * Q + i, tl.sum(values * dX, axis=1))
    tl.store(before + part * Q + i, tl.sum(crossing, axis=1) + written_sum)
    tl.store(after + part * Q + i, read_sum)
    tl.store(carried + part, tl.sum(inner, axis=0))
    tl.store(dd + part, tl.sum(tl.sum(values * grads32, axis=1), axis=0))


@triton.jit
def _vectors(
    u, scale, v, w, high, low, other, states, out, T, H, G, N, P, chunks,
    Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, UPPER: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dC of one group in one chunk from u = g, v = x, other = B, states = h; or dB from u = x, v = g, other = C, k.

    Over the heads of the group: (decay o u v^T) other + (scale u) states^T, with w on the tokens of x.
    """
    place, block = tl.program_id(0), tl.program_id(1)
    row, group, k = place // chunks // G, place // chunks % G, place % chunks
    n, i = block * BN + tl.arange(0, BN), tl.arange(0, Q)
    first = k * Q
    pairs, total = tl.zeros((Q, Q), tl.float32), tl.zeros((Q, BN), tl.float32)
    for h in range(group * (H // G), (group + 1) * (H // G)):
        chunk = (row * H + h).to(tl.int64) * chunks + k
        factor = tl.load(scale + chunk * Q + i)[:, None]
        products = tl.zeros((Q, Q), tl.float32)
        for start in range(0, P, BP):
            p = start + tl.arange(0, BP)
            rows = _tile(u, row, first, i[:, None], h, p[None, :], T, H, P)
            columns = _tile(v, row, first, i[None, :], h, p[:, None], T, H, P)
            products = tl.dot(rows.to(DOT), columns.to(DOT), products, input_precision=PRECISION)
            state = _state(states, chunk, n[None, :], p[:, None], N, P)
            scaled = rows.to(tl.float32) * factor
            total = tl.dot(scaled.to(DOT), state.to(DOT), total, input_precision=PRECISION)
        inserted = tl.load(w + chunk * Q + i)
        weights = inserted[:, None] if UPPER else inserted[None, :]
        pairs += products * _decay(high, low, chunk, Q, UPPER) * weights
    vectors = _tile(other, row, first, i[:, None], group, n[None, :], T, G, N)
    total = tl.dot(pairs.to(DOT), vectors.to(DOT), total, input_precision=PRECISION)
    _store(out, row, first, i[:, None], group, n[None, :], T, G, N, total)


def _largest(x: Tensor) -> int:
    """The largest side of a tile, chunks included: operands in float32 fill the registers at half the size."""
    return 64 if x.dtype == torch.bfloat16 else 32


def _blocks(x: Tensor, N: int, chunk: int) -> dict:
    """The constants of all kernels but `_carry`: tile sizes (`tl.dot` wants at least 16), and how products are formed."""
    BN, BP = (min(_largest(x), max(16, triton.next_power_of_2(width))) for width in (N, x.shape[-1]))
    half = {"DOT": tl.float32, "PRECISION": "tf32"}
    return {"Q": chunk, "BN": BN, "BP": BP, **(half if x.dtype == torch.float16 else dot_options(x.dtype))}


def _per_chunk(w: Tensor, a: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """w, the two parts of c, and the decays up to a token, from it to the end and over the whole chunk.

    Given ``(B, T, H)`` each is ``(B, H, chunks, Q)`` in float32, the last ``(B, H, chunks)``.
    """
    w, a = (z.transpose(1, 2).contiguous() for z in (w, a))
    c = sums_in_chunks(a, chunk)
    w = torch.nn.functional.pad(w, (0, c.shape[2] * chunk - w.shape[2])).view(c.shape)
    high, since, until = c.float(), c.exp().float(), torch.exp(c[..., -1:] - c).float()
    return w, high, (c - high).float(), since, until, since[..., -1].contiguous()


@torch.library.custom_op("seqarch::ssd", mutates_args=())
def _ssd(x: Tensor, w: Tensor, a: Tensor, B: Tensor, C: Tensor, D: Tensor, h0: Tensor, chunk: int) -> list[Tensor]:
    (batch, T, H, P), (G, N) = x.shape, B.shape[2:]
    x, B, C, D, h0 = (z.contiguous() for z in (x, B, C, D, h0))
    w, high, low, since, until, whole = _per_chunk(w, a, chunk)
    chunks = whole.shape[-1]
    sizes, blocks = (T, H, G, N, P, chunks), _blocks(x, N, chunk)
    tiles_N, tiles_P = triton.cdiv(N, blocks["BN"]), triton.cdiv(P, blocks["BP"])
    y, hT = torch.empty_like(x), torch.empty_like(h0)
    states = h0.new_empty(batch, H, chunks, N, P)
    _collect[(batch * H * chunks, tiles_N, tiles_P)](B, x, w * until, states, *sizes, **blocks)
    _carry[(batch * H, triton.cdiv(N * P, WALK))](states, whole, h0, hT, chunks, N * P, REVERSE=False, BLOCK=WALK)
    _outputs[(batch * H * chunks, tiles_P)](x, w, high, low, since, B, C, D, states, y, *sizes, **blocks, num_warps=8)
    return [y, hT, states]


@_ssd.register_fake
def _(x, w, a, B, C, D, h0, chunk):
    y, hT = (torch.empty_like(z, memory_format=torch.contiguous_format) for z in (x, h0))
    return [y, hT, h0.new_empty(x.shape[0], x.shape[2], -(-x.shape[1] // chunk), *h0.shape[2:])]


@torch.library.custom_op("seqarch::ssd_backward", mutates_args=())
def _ssd_backward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    states: Tensor,
    g: Tensor,
    grad_h: Tensor,
    chunk: int,
) -> list[Tensor]:
    (batch, T, H, P), (G, N) = x.shape, B.shape[2:]
    x, B, C, D, g, grad_h = (z.contiguous() for z in (x, B, C, D, g, grad_h))
    w, high, low, since, until, whole = _per_chunk(w, a, chunk)
    chunks = whole.shape[-1]
    sizes, blocks = (T, H, G, N, P, chunks), _blocks(x, N, chunk)
    tiles_N, tiles_P = triton.cdiv(N, blocks["BN"]), triton.cdiv(P, blocks["BP"])
    per_head, per_group = batch * H * chunks, batch * G * chunks

    dx, dB, dC, dh0, grad_states = (torch.empty_like(z) for z in (x, B, C, grad_h, states))
    _collect[(per_head, tiles_N, tiles_P)](C, g, since, grad_states, *sizes, **blocks)
    _carry[(batch * H, triton.cdiv(N * P, WALK))](
        grad_states, whole, grad_h, dh0, chunks, N * P, REVERSE=True, BLOCK=WALK
    )
    sums = w.new_empty(3, tiles_P, *w.shape)
    carried, dD = w.new_empty(2, tiles_P, *whole.shape)
    _inputs[(per_head, tiles_P)](
        x, w, high, low, since, until, B, C, D, states, grad_states, g, dx, *sums, carried, dD,
        *sizes, **blocks, num_warps=8,
    )  # fmt: skip
    _vectors[(per_group, tiles_N)](g, since, x, w, high, low, B, states, dC, *sizes, UPPER=False, **blocks, num_warps=8)
    _vectors[(per_group, tiles_N)](
        x, w * until, g, w, high, low, C, grad_states, dB, *sizes, UPPER=True, **blocks, num_warps=8
    )

    dw, before, after = sums.sum(1)
    da = after.flip(-1).cumsum(-1).flip(-1) + (carried.sum(0) * whole)[..., None]
    da[..., 1:] += before[..., :-1]
    dw, da = (z.flatten(2)[..., :T].transpose(1, 2).contiguous() for z in (dw, da))
    return [dx, dw, da, dB, dC, dD.sum((0, 1, 3)), dh0]


@_ssd_backward.register_fake
def _(x, w, a, B, C, D, states, g, grad_h, chunk):
    return [torch.empty_like(z, memory_format=torch.contiguous_format) for z in (x, w, a, B, C, D, grad_h)]


def _setup_context(ctx, inputs, output):
    *tensors, h0, ctx.chunk = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.shape = h0.shape


def _gradient(ctx, grads):
    x, *_, states = ctx.saved_tensors
    g = torch.zeros_like(x) if grads[0] is None else grads[0]
    grad_h = states.new_zeros(ctx.shape) if grads[1] is None else grads[1]
    return (*_ssd_backward(*ctx.saved_tensors, g, grad_h, ctx.chunk), None)


_ssd.register_autograd(_gradient, setup_context=_setup_context)


def ssd_triton(
    x: Tensor, w: Tensor, a: Tensor, B: Tensor, C: Tensor, D: Tensor, h0: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Forward and backward by the kernels above; shapes as in `ssd_reference`, D ``(H,)``; all but x, B, C float32."""
    y, h, _ = _ssd(x, w, a, B, C, D, h0, min(chunk, _largest(x)))
    return y, h
