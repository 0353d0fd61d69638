r"""The kernels of ``triton.py``, which says how they work together.

Rows are flattened as in ``reference.py``. Sizes: T tokens in N chunks of BT; D entries of q and k; F features in tiles of
BF; E value columns in blocks of BE; W decays per token. MAP is the feature map (0 none, 1 elu, 2 Taylor), DECAY is 0 for
none, 1 for one per token, 2 for one per feature; SUMS: the column z of the state is there. A product multiplies operands of
type DOT. `first` and `second` are the factors of the Taylor features.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _factor(x, at, i, D, live):
    # entry i of a token with a 1 appended: entry D is the 1
    return tl.load(x + at + i, mask=live & (i < D), other=1.0).to(tl.float32)


@triton.jit
def _entries(f, D):
    # Taylor feature f is a multiple of x_i x_j, where x_D = 1
    second = f - 1 - D
    return tl.where(f == 0, D, tl.where(second < 0, f - 1, second // D)), tl.where(second < 0, D, second % D)


@triton.jit
def _multiple(f, D, first, second):
    return tl.where(f == 0, 1.0, tl.where(f <= D, first, second))


@triton.jit
def _features(x, at, f, D, live, first, second, MAP: tl.constexpr):
    # features f of the tokens whose first entry is at x + at; the two broadcast to a tile; 0 where not live
    if MAP == 2:
        i, j = _entries(f, D)
        tile = _factor(x, at, i, D, live) * _factor(x, at, j, D, live) * _multiple(f, D, first, second)
        return tl.where(live, tile, 0.0)
    tile = tl.load(x + at + f, mask=live, other=0.0).to(tl.float32)
    if MAP == 1:
        tile = tl.where(live, tl.where(tile > 0, tile + 1, tl.exp(tile)), 0.0)
    return tile


@triton.jit
def _between(c, later, earlier, plane, live):
    # log of the decay from one token to a later one: a difference of two sums, each in two parts (see _cumulate)
    high = tl.load(c + later, mask=live, other=0.0) - tl.load(c + earlier, mask=live, other=0.0)
    low = tl.load(c + plane + later, mask=live, other=0.0) - tl.load(c + plane + earlier, mask=live, other=0.0)
    return high + low


@triton.jit
def _cumulate(x, c, T, W, N, plane, BT: tl.constexpr, BW: tl.constexpr):
    """Sums over each chunk, from its start to each token, of x ``(R, T, W)``: c ``(2, R, N BT, W)``.

    They are computed in double precision and stored as a float32 number and what it leaves over, so that differences keep
    their digits after a few decays of e^-300. Tokens beyond T do not decay.
    """
    row, n = tl.program_id(0).to(tl.int64) // N, tl.program_id(0) % N
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    t = n * BT + tl.arange(0, BT)
    here, there = (row * T + t)[:, None] * W + w[None, :], (row * N * BT + t)[:, None] * W + w[None, :]
    tile = tl.load(x + here, mask=(t < T)[:, None] & (w < W)[None, :], other=0.0)
    total = tl.cumsum(tile.to(tl.float64), axis=0)
    high = total.to(tl.float32)
    tl.store(c + there, high, mask=(w < W)[None, :])
    tl.store(c + plane + there, (total - high.to(tl.float64)).to(tl.float32), mask=(w < W)[None, :])


@triton.jit
def _states(
    k, v, ones, c, S0, z0, states, zs, ST, zT, others, other_zs, end, T, N, D, F, E, W, plane, first, second,
    BACK: tl.constexpr, MAP: tl.constexpr, DECAY: tl.constexpr, SUMS: tl.constexpr, ENDS: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk the chunks with one tile of the state in registers.

    Slot n of states ``(R, N + 1, F, E)`` gets the state before chunk n. BACK: k and v are q and g, slot n gets the gradient
    of the state after chunk n; ENDS: also its rowsum with the decayed state before the chunk. SUMS: the column z.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(2)
    i, f = tl.arange(0, BT), tl.program_id(1) * BF + tl.arange(0, BF)
    e = block * BE + tl.arange(0, BE)
    tile = (f < F)[:, None] & (e < E)[None, :]
    S = tl.load(S0 + (row * F + f)[:, None] * E + e[None, :], mask=tile, other=0.0)
    z = tl.zeros((BF,), tl.float32)
    if SUMS:
        z = tl.load(z0 + row * F + f, mask=f < F, other=0.0)
    width = f if DECAY == 2 else f * 0  # where in a row of c the decay of feature f is
    for step in range(0, N):
        n = N - 1 - step if BACK else step
        slot = (row * (N + 1) + n) * F + f
        tl.store(states + slot[:, None] * E + e[None, :], S.to(states.dtype.element_ty), mask=tile)
        if SUMS and block == 0:
            tl.store(zs + slot, z, mask=f < F)
        t = n * BT + i
        kept = (f < F)[:, None] & (t < T)[None, :]
        keys = _features(k, (row * T + t)[None, :] * D, f[:, None], D, kept, first, second, MAP)
        values = tl.load(
            v + (row * T + t)[:, None] * E + e[None, :], mask=(t < T)[:, None] & (e < E)[None, :], other=0.0
        )
        if DECAY > 0:
            at = (row * N * BT + t)[None, :] * W + width[:, None]
            last = (row * N * BT + n * BT + BT - 1) * W + width
            if BACK:
                keys *= tl.exp(tl.load(c + at, mask=kept, other=0.0))
            else:
                keys *= tl.exp(_between(c, last[:, None], at, plane, kept))
            gate = tl.exp(tl.load(c + last, mask=f < F, other=0.0))
            S *= gate[:, None]
            z *= gate
            if ENDS:
                S_before = tl.load(others + slot[:, None] * E + e[None, :], mask=tile, other=0.0).to(tl.float32)
                sums = tl.sum(S_before * S, axis=1)
                if SUMS and block == 0:
                    sums += tl.load(other_zs + slot, mask=f < F, other=0.0) * z
                rows = tl.num_programs(0).to(tl.int64)
                tl.store(end + ((block * rows + row) * N + n) * F + f, sums, mask=f < F)
        S += tl.dot(keys.to(DOT), values.to(DOT), input_precision=PRECISION)
        if SUMS:
            z += tl.sum(keys * tl.load(ones + row * T + t, mask=t < T, other=0.0)[None, :], axis=1)
    tl.store(ST + (row * F + f)[:, None] * E + e[None, :], S, mask=tile)
    slot = (row * (N + 1) + N) * F + f
    tl.store(states + slot[:, None] * E + e[None, :], S.to(states.dtype.element_ty), mask=tile)
    if SUMS and block == 0:
        tl.store(zT + row * F + f, z, mask=f < F)
        tl.store(zs + slot, z, mask=f < F)


@triton.jit
def _scores(
    q, k, extra, c, A, T, N, D, F, W, plane, first, second,
    MAP: tl.constexpr, DECAY: tl.constexpr, TAYLOR: tl.constexpr, EXTRA: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The lower triangle of A, one chunk of 64 rows: A ``(R, T, BT)``.

    TAYLOR: q and k are raw, and the product of their Taylor features is a polynomial of <q, k>. EXTRA adds extra_i to
    every entry of row i.
    """
    row, n = tl.program_id(0).to(tl.int64) // N, tl.program_id(0) % N
    i, j = tl.arange(0, BT), tl.arange(0, BT)
    t, start = n * BT + i, row * N * BT + n * BT
    A_tile = tl.zeros((BT, BT), tl.float32)
    for low in range(0, F, BF):
        f = low + tl.arange(0, BF)
        here, there = (t < T)[:, None] & (f < F)[None, :], (f < F)[:, None] & (t < T)[None, :]
        queries = _features(q, (row * T + t)[:, None] * D, f[None, :], D, here, first, second, MAP)
        keys = _features(k, (row * T + t)[None, :] * D, f[:, None], D, there, first, second, MAP)
        if DECAY == 2:
            for level in range(6 if BT == 64 else 5):
                half = (BT // 2) >> level
                edge = i // (2 * half) * (2 * half) + half - 1  # the last token of the earlier half
                later = (i // half) % 2 == 1
                at, mid = (start + i) * W, (start + edge) * W
                since = _between(c, at[:, None] + f[None, :], mid[:, None] + f[None, :], plane, here)
                until = _between(c, mid[None, :] + f[:, None], at[None, :] + f[:, None], plane, there)
                x = tl.where(later[:, None], queries * tl.exp(tl.minimum(since, 0.0)), 0.0)
                y = tl.where(later[None, :], 0.0, keys * tl.exp(tl.minimum(until, 0.0)))
                pair = tl.dot(x.to(DOT), y.to(DOT), input_precision=PRECISION)
                A_tile += tl.where((i // (2 * half))[:, None] == (j // (2 * half))[None, :], pair, 0.0)
            keys = _features(k, (row * T + t)[:, None] * D, f[None, :], D, here, first, second, MAP)
            A_tile += tl.where(i[:, None] == j[None, :], tl.sum(queries * keys, axis=1)[:, None], 0.0)
        else:
            A_tile += tl.dot(queries.to(DOT), keys.to(DOT), input_precision=PRECISION)
    if TAYLOR:
        s = A_tile * (first * first)
        A_tile = 1 + s + 0.5 * s * s
    if EXTRA:
        A_tile += tl.load(extra + row * T + t, mask=t < T, other=0.0)[:, None]
    past = i[:, None] >= j[None, :]
    if DECAY == 1:
        A_tile *= tl.exp(_between(c, (start + i)[:, None], (start + j)[None, :], plane, past))
    A_tile = tl.where(past, A_tile, 0.0)
    tl.store(A + (row * T + t)[:, None] * BT + j[None, :], A_tile.to(A.dtype.element_ty), mask=(t < T)[:, None])


@triton.jit
def _outputs(
    A, q, v, c, states, zs, o, den, T, N, D, F, E, W, plane, eps, first, second,
    BACK: tl.constexpr, MAP: tl.constexpr, DECAY: tl.constexpr, SUMS: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk; SUMS: divided by the sum of the weights, which is stored in den ``(R, T)``.

    BACK: the gradient of the values: A is transposed, q, v and the states are k, g and the gradients of the states.
    """
    row, n, block = tl.program_id(0).to(tl.int64) // N, tl.program_id(0) % N, tl.program_id(1)
    i, e = tl.arange(0, BT), block * BE + tl.arange(0, BE)
    t, start = n * BT + i, row * N * BT + n * BT
    live = t < T
    inside = live[:, None] & (e < E)[None, :]
    here = (row * T + t)[:, None] * E + e[None, :]
    if BACK:
        weights = tl.load(A + (row * T + t)[None, :] * BT + i[:, None], mask=live[None, :], other=0.0)
    else:
        weights = tl.load(A + (row * T + t)[:, None] * BT + i[None, :], mask=live[:, None], other=0.0)
    values = tl.load(v + here, mask=inside, other=0.0)
    total = tl.dot(weights.to(DOT), values.to(DOT), input_precision=PRECISION)
    sums = tl.sum(weights.to(tl.float32), axis=1)
    for low in range(0, F, BF):
        f = low + tl.arange(0, BF)
        kept = live[:, None] & (f < F)[None, :]
        queries = _features(q, (row * T + t)[:, None] * D, f[None, :], D, kept, first, second, MAP)
        if DECAY > 0:
            width = f if DECAY == 2 else f * 0
            at, last = (start + i)[:, None] * W + width[None, :], (start + BT - 1) * W + width[None, :]
            if BACK:
                queries *= tl.exp(_between(c, last, at, plane, kept))
            else:
                queries *= tl.exp(tl.load(c + at, mask=kept, other=0.0))
        slot = (row * (N + 1) + n) * F + f
        S = tl.load(states + slot[:, None] * E + e[None, :], mask=(f < F)[:, None] & (e < E)[None, :], other=0.0)
        total += tl.dot(queries.to(DOT), S.to(DOT), input_precision=PRECISION)
        if SUMS:
            sums += tl.sum(queries * tl.load(zs + slot, mask=f < F, other=0.0)[None, :], axis=1)
    if SUMS:
        if block == 0:
            tl.store(den + row * T + t, sums, mask=live)
        size = tl.maximum(tl.abs(sums), eps)
        total *= tl.where(sums > 0, 1 / size, tl.where(sums < 0, -1 / size, 0.0))[:, None]
    tl.store(o + here, total.to(o.dtype.element_ty), mask=inside)


@triton.jit
def _gradients(
    own, other, A, P, g, extra, c, states, zs, grad, parts, paths_of, T, N, D, F, E, W, plane, span, first, second,
    BACK: tl.constexpr, MAP: tl.constexpr, DECAY: tl.constexpr, SUMS: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of q (own = q, other = k, g = dL/do) or, with BACK, of k (own = k, other = q, g = v).

    A program treats `span` features of one chunk: a tile, or all of them with the Taylor map, whose gradient sums over
    them. With decay, parts gets its share of the gradient of log decay t: the sum over all that decays on the way from
    a token before t to token t or a later one. Here q_i times its gradient counts for t <= i and k_j times its gradient for
    t > j, each since or until the edge that the path crosses: the start or end of the chunk, or the edge of two halves.
    """
    row, n = tl.program_id(0).to(tl.int64) // N, tl.program_id(0) % N
    i, j, d = tl.arange(0, BT), tl.arange(0, BT), tl.arange(0, BD)
    t, start = n * BT + i, row * N * BT + n * BT
    live, at = t < T, (row * T + t)[:, None] * D
    if BACK:
        pairs = tl.load(P + (row * T + t)[None, :] * BT + i[:, None], mask=live[None, :], other=0.0).to(tl.float32)
        past = i[:, None] <= j[None, :]
    else:
        pairs = tl.load(P + (row * T + t)[:, None] * BT + i[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        past = i[:, None] >= j[None, :]
    if DECAY == 1:
        if BACK:
            pairs *= tl.exp(_between(c, (start + j)[None, :], (start + i)[:, None], plane, past))
        else:
            pairs *= tl.exp(_between(c, (start + i)[:, None], (start + j)[None, :], plane, past))
    counts = (i[:, None] > j[None, :]) if BACK else (i[:, None] <= j[None, :])  # log decay i on the way of token j
    summed, through = tl.zeros((BT,), tl.float32), tl.zeros((BT, BD), tl.float32)
    if DECAY == 1 and not BACK and tl.program_id(1) == 0:
        # column t of `paths` sums the pairs (i, j) with j < t; those with i >= t pass decay t
        shifted = past & (j > 0)[None, :] & live[:, None]
        before = (row * T + t)[:, None] * BT + j[None, :] - 1
        pair = tl.load(A + before, mask=shifted, other=0.0).to(tl.float32)
        paths = tl.cumsum(pair * tl.load(P + before, mask=shifted, other=0.0).to(tl.float32), axis=1)
        tl.store(paths_of + row * T + n * BT + j, tl.sum(tl.where(past, paths, 0.0), axis=0), mask=n * BT + j < T)
    begin = tl.program_id(1) * span
    for low in range(begin, tl.minimum(begin + span, F), BF):
        f = low + tl.arange(0, BF)
        kept = live[:, None] & (f < F)[None, :]
        theirs = _features(other, at, f[None, :], D, kept, first, second, MAP)
        # what comes through the state
        total = tl.zeros((BT, BF), tl.float32)
        slot = (row * (N + 1) + n) * F + f
        for left in range(0, E, BE):
            e = left + tl.arange(0, BE)
            outer = tl.load(
                g + (row * T + t)[:, None] * E + e[None, :], mask=live[:, None] & (e < E)[None, :], other=0.0
            )
            S = tl.load(states + slot[None, :] * E + e[:, None], mask=(f < F)[None, :] & (e < E)[:, None], other=0.0)
            total += tl.dot(outer.to(DOT), S.to(DOT), input_precision=PRECISION)
        if SUMS:
            weight = tl.load(extra + row * T + t, mask=live, other=0.0)
            total += weight[:, None] * tl.load(zs + slot, mask=f < F, other=0.0)[None, :]
        width = f if DECAY == 2 else f * 0
        here, last = (start + i)[:, None] * W + width[None, :], (start + BT - 1) * W + width[None, :]
        if DECAY > 0:
            if BACK:
                total *= tl.exp(_between(c, last, here, plane, kept))
            else:
                total *= tl.exp(tl.load(c + here, mask=kept, other=0.0))
            mine = _features(own, at, f[None, :], D, kept, first, second, MAP)
            share = tl.zeros((BT, BF), tl.float32)
            if DECAY == 2:
                share = tl.dot(counts.to(DOT), (total * mine).to(DOT), input_precision=PRECISION)
            else:
                summed += tl.sum(total * mine, axis=1)
        # what comes from the other tokens of the chunk
        if DECAY == 2:
            for level in range(6 if BT == 64 else 5):
                half = (BT // 2) >> level
                edge = i // (2 * half) * (2 * half) + half - 1
                same = (i // (2 * half))[:, None] == (j // (2 * half))[None, :]
                mid = (start + edge)[:, None] * W + width[None, :]
                # a later token fades since the edge, an earlier one until the edge
                fade = tl.exp(-tl.abs(_between(c, here, mid, plane, kept)))
                own_half = (i // half) % 2 == (0 if BACK else 1)  # the halves whose tokens are the own ones
                x = tl.where(same & own_half[:, None], pairs, 0.0)
                y = tl.where(own_half[:, None], 0.0, theirs * fade)
                change = tl.dot(x.to(DOT), y.to(DOT), input_precision=PRECISION)
                change = tl.where(own_half[:, None], change * fade, 0.0)
                total += change
                on_way = counts & ((i // half)[:, None] == (j // half)[None, :])
                share += tl.dot(on_way.to(DOT), (change * mine).to(DOT), input_precision=PRECISION)
            total += tl.sum(tl.where(i[:, None] == j[None, :], pairs, 0.0), axis=1)[:, None] * theirs
        else:
            total += tl.dot(pairs.to(DOT), theirs.to(DOT), input_precision=PRECISION)
        if DECAY == 2:
            tl.store(parts + (row * T + t)[:, None] * F + f[None, :], share, mask=kept)
        if MAP == 2:  # the gradient of a multiple of x_i x_j goes to x_i and to x_j
            u, w = _entries(f, D)
            total = tl.where(kept, total * _multiple(f, D, first, second)[None, :], 0.0)
            to_u, to_w = total * _factor(own, at, w[None, :], D, kept), total * _factor(own, at, u[None, :], D, kept)
            through += tl.dot(to_u.to(DOT), (u[:, None] == d[None, :]).to(DOT), input_precision=PRECISION)
            through += tl.dot(to_w.to(DOT), (w[:, None] == d[None, :]).to(DOT), input_precision=PRECISION)
        else:
            if MAP == 1:
                phi = _features(own, at, f[None, :], D, kept, first, second, MAP)
                total *= tl.minimum(phi, 1.0)  # 1 where x > 0, and e^x, the feature itself, where not
            tl.store(grad + at + f[None, :], total.to(grad.dtype.element_ty), mask=kept)
    if DECAY == 1:
        summed = tl.sum(tl.where(counts, summed[None, :], 0.0), axis=1)
        tl.store(parts + (tl.program_id(1) * (tl.num_programs(0).to(tl.int64) // N) + row) * T + t, summed, mask=live)
    if MAP == 2:
        tl.store(grad + at + d[None, :], through.to(grad.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])
