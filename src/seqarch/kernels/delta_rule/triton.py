r"""The delta rule on a GPU: what needs the state walks from chunk to chunk, everything else runs for all chunks at once.

Forward, with the notation of ``parallel.py``; a program of a kernel owns one row (batch x head) and what is named:

- ``_invert``   (chunk): $M = (I + A)^{-1}$ in float32. Forward substitution inside blocks of 16 tokens gives the inverse B of
  the block diagonal of $I + A = B^{-1} + F$; with two blocks $(BF)^2 = 0$, hence $M = (I - BF)\,B$.
- ``_states``   (block of value columns, in a loop over chunks): $E = M X$ with $X = \beta \odot (V - \gamma \odot K S_0)$,
  and the next S_0, which waits in registers. Value columns never meet, so their blocks are separate programs.
- ``_outputs``  (chunk, block of value columns): $O = \gamma \odot Q S_0 + P E$ with $P = Q K^\top \odot D$.

Backward, with $\bar x$ for the gradient of x; $\bar S$ is that of the memory after the chunk:

- ``_adjoints`` (block of value columns, chunks from last to first):
  $\bar E = P^\top \bar O + D_{C\cdot} \odot K \bar S$, $\bar X = M^\top \bar E$, and the next
  $\bar S \leftarrow \gamma_C \bar S + Q^\top (\gamma \odot \bar O) - K^\top (\gamma\beta \odot \bar X)$.
- ``_inputs``   (chunk, block of key columns): with $\bar P = \bar O E^\top$ and $\bar A = -\bar X E^\top$,
  $\bar Q = \gamma \odot \bar O S_0^\top + (\bar P \odot D) K$,
  $\bar K = (\bar P \odot D)^\top Q + (\beta \odot \bar A \odot D) K + (\beta \odot \bar A \odot D)^\top K
  - \gamma\beta \odot \bar X S_0^\top + D_{C\cdot} \odot E \bar S^\top$.

The gradient of a decay collects $\partial L / \partial c_i$ of the summed logarithms c: an entry of weight $e^{c_i - c_j}$
adds its share to i and takes it from j. Transposed matrices are loaded or formed as such, never transposed in registers.
Key blocks write their parts of the gates' gradients side by side; no atomics, and two runs agree bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import dot_options


@triton.jit
def _tile(x, rows, columns, height, width):
    """Load x[rows, columns] of a row-major matrix, zeros outside; rows may run down or across (then it is transposed)."""
    return tl.load(x + rows * width + columns, mask=(rows < height) & (columns < width), other=0.0)


@triton.jit
def _sum_corrections(weights, E, sums, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Add weights times E. Corrections of similar keys largely cancel: what rounding takes from E is added separately."""
    high = E.to(DOT)
    sums = tl.dot(weights.to(DOT), high, sums, input_precision=PRECISION)
    if DOT != tl.float32:
        sums = tl.dot(weights.to(DOT), (E - high.to(tl.float32)).to(DOT), sums, input_precision=PRECISION)
    return sums


@triton.jit
def _gates(log_decay, i, j, n, GATED: tl.constexpr):
    """Decay of every token i ``(BT, 1)`` from the chunk's start, and from it to the chunk's end; j are the tokens across."""
    if GATED:
        g = tl.load(log_decay + j, mask=j < n, other=0.0)
        since = tl.exp(tl.sum(tl.where(j <= i, g, 0.0), axis=1))
        until = tl.exp(tl.sum(tl.where(j > i, g, 0.0), axis=1))
        return since[:, None], until[:, None], tl.exp(tl.sum(g))
    else:
        one = tl.where(i >= 0, 1.0, 0.0)
        return one, one, 1.0


@triton.jit
def _decays(log_decay, late, early, n, AXIS: tl.constexpr, GATED: tl.constexpr):
    """The table of decays from token early to token late, 0 where early > late; late runs along AXIS."""
    if GATED:
        g = tl.load(log_decay + late, mask=late < n, other=0.0)
        sums = tl.cumsum(tl.where(late > early, g, 0.0), axis=AXIS)
        return tl.where(late >= early, tl.exp(sums), 0.0)
    else:
        return tl.where(late >= early, 1.0, 0.0)


@triton.jit
def _invert(
    k, beta, log_decay, inverse, T, K,
    BT: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """(I + A)^-1 of every chunk, ``(R, T, BT)`` in float32."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    head, n = row.to(tl.int64) * T + chunk * BT, T - chunk * BT  # the chunk's first token; how many the row has from it
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    products = tl.zeros([BT, BT], tl.float32)
    for start in range(0, K, BK):
        x, xt = start + tl.arange(0, BK)[None, :], start + tl.arange(0, BK)[:, None]
        keys, across = _tile(k + head * K, i, x, n, K), _tile(k + head * K, j, xt, n, K)
        products = tl.dot(keys.to(DOT), across.to(DOT), products, input_precision=PRECISION)
    # A and its transpose: the latter has row r of A as a column, ready to scale the rows of the inverse
    A = products * tl.load(beta + head + i, mask=i < n, other=0.0) * _decays(log_decay + head, i, j, n, 0, GATED)
    At = products * tl.load(beta + head + j, mask=j < n, other=0.0) * _decays(log_decay + head, j, i, n, 1, GATED)
    result = tl.where(i == j, 1.0, 0.0)
    for r in range(1, 16):
        # row r of every block at once: column c of the result is zero outside its own block
        factors = tl.sum(tl.where((j == i // 16 * 16 + r) & (j > i), At, 0.0), axis=1)
        change = tl.sum(factors[:, None] * result, axis=0)
        result = tl.where((i % 16 == r) & (i // 16 == j // 16), result - change[None, :], result)
    if BT == 32:
        F = tl.where(i // 16 > j // 16, A, 0.0)
        result -= tl.dot(tl.dot(result, F, input_precision="ieee"), result, input_precision="ieee")
    tl.store(inverse + head * BT + i * BT + j, result, mask=i < n)


@triton.jit
def _states(
    k, v, beta, log_decay, inverse, S0, corrections, states, last, T, K, V,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """E of every token, the memory before every chunk ``(R, N, K, V)``, and the last one."""
    row, block = tl.program_id(0), tl.program_id(1)
    head, memory, N = row.to(tl.int64) * T, row.to(tl.int64) * K * V, tl.cdiv(T, BT)
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    x, xt, y = tl.arange(0, BK)[None, :], tl.arange(0, BK)[:, None], block * BV + tl.arange(0, BV)[None, :]
    inside = (xt < K) & (y < V)
    S = _tile(S0 + memory, xt, y, K, V)
    for chunk in range(0, N):
        n = T - chunk * BT
        tl.store(states + memory * N + chunk * K * V + xt * V + y, S, mask=inside)
        since, until, whole = _gates(log_decay + head, i, j, n, GATED)
        found = tl.dot(_tile(k + head * K, i, x, n, K).to(DOT), S.to(DOT), input_precision=PRECISION)
        wanted = _tile(v + head * V, i, y, n, V).to(tl.float32)
        X = tl.load(beta + head + i, mask=i < n, other=0.0) * (wanted - since * found)
        M = _tile(inverse + head * BT, i, j, n, BT)
        E = tl.dot(M, X, input_precision="ieee")  # small, and its rounding errors would add up over the chunk
        tl.store(corrections + head * V + i * V + y, E, mask=(i < n) & (y < V))
        across = _tile(k + head * K, j, xt, n, K)
        S = _sum_corrections(across, until * E, whole * S, DOT, PRECISION)
        head += BT
    tl.store(last + memory + xt * V + y, S, mask=inside)


@triton.jit
def _outputs(
    q, k, log_decay, corrections, states, o, T, K, V,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """What every query reads: the memory before its chunk, and what its chunk wrote up to it."""
    row, chunk, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head, n = row.to(tl.int64) * T + chunk * BT, T - chunk * BT
    memory = (row.to(tl.int64) * tl.num_programs(1) + chunk) * K * V
    i, j, y = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :], block * BV + tl.arange(0, BV)[None, :]
    scores, read = tl.zeros([BT, BT], tl.float32), tl.zeros([BT, BV], tl.float32)
    for start in range(0, K, BK):
        x, xt = start + tl.arange(0, BK)[None, :], start + tl.arange(0, BK)[:, None]
        queries = _tile(q + head * K, i, x, n, K).to(DOT)
        scores = tl.dot(queries, _tile(k + head * K, j, xt, n, K).to(DOT), scores, input_precision=PRECISION)
        read = tl.dot(queries, _tile(states + memory, xt, y, K, V).to(DOT), read, input_precision=PRECISION)
    since, _, _ = _gates(log_decay + head, i, j, n, GATED)
    P = scores * _decays(log_decay + head, i, j, n, 0, GATED)
    E = _tile(corrections + head * V, i, y, n, V)
    result = _sum_corrections(P, E, since * read, DOT, PRECISION)
    tl.store(o + head * V + i * V + y, result.to(o.dtype.element_ty), mask=(i < n) & (y < V))


@triton.jit
def _adjoints(
    q, k, beta, log_decay, inverse, g, gS, dX, adjoints, first, T, K, V,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Gradients of X, and of the memory after every chunk ``(R, N, K, V)`` and before the first; g is that of o."""
    row, block = tl.program_id(0), tl.program_id(1)
    memory, N = row.to(tl.int64) * K * V, tl.cdiv(T, BT)
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    x, xt, y = tl.arange(0, BK)[None, :], tl.arange(0, BK)[:, None], block * BV + tl.arange(0, BV)[None, :]
    inside = (xt < K) & (y < V)
    dS = _tile(gS + memory, xt, y, K, V)
    for back in range(0, N):
        chunk = N - 1 - back
        head, n = row.to(tl.int64) * T + chunk * BT, T - chunk * BT
        tl.store(adjoints + memory * N + chunk * K * V + xt * V + y, dS, mask=inside)
        since, until, whole = _gates(log_decay + head, i, j, n, GATED)
        queries = _tile(q + head * K, j, xt, n, K).to(DOT)  # (BK, BT)
        keys = _tile(k + head * K, i, x, n, K).to(DOT)
        Pt = tl.dot(keys, queries, input_precision=PRECISION) * _decays(log_decay + head, j, i, n, 1, GATED)
        dO = _tile(g + head * V, i, y, n, V)
        dE = until * tl.dot(keys, dS.to(DOT), input_precision=PRECISION)
        dE = tl.dot(Pt.to(DOT), dO.to(DOT), dE, input_precision=PRECISION)
        Mt = _tile(inverse + head * BT, j, i, n, BT)
        change = tl.dot(Mt, dE, input_precision="ieee")
        taken = since * tl.load(beta + head + i, mask=i < n, other=0.0) * change
        dS = tl.dot(queries, (since * dO).to(DOT), whole * dS, input_precision=PRECISION)
        across = _tile(k + head * K, j, xt, n, K).to(DOT)
        dS -= tl.dot(across, taken.to(DOT), input_precision=PRECISION)
        # stored last: earlier in the loop, the compiler of Triton 3.9 fails for sm_90
        tl.store(dX + head * V + i * V + y, change.to(dX.dtype.element_ty), mask=(i < n) & (y < V))
    tl.store(first + memory + xt * V + y, dS, mask=inside)


@triton.jit
def _inputs(
    q, k, v, beta, log_decay, g, corrections, dX, states, adjoints, dq, dk, dbeta, dc, T, K, V,
    BT: tl.constexpr, BX: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Gradients of q and k; of beta and of the summed logarithms, ``(blocks, R, N, BT)``, the part of these key columns."""
    row, chunk, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head, n = row.to(tl.int64) * T + chunk * BT, T - chunk * BT
    memory = (row.to(tl.int64) * tl.num_programs(1) + chunk) * K * V
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    x, xt = block * BX + tl.arange(0, BX)[None, :], block * BX + tl.arange(0, BX)[:, None]
    since, until, whole = _gates(log_decay + head, i, j, n, GATED)
    step = tl.load(beta + head + i, mask=i < n, other=0.0)
    keys, across = _tile(k + head * K, i, x, n, K).to(DOT), _tile(k + head * K, j, xt, n, K).to(DOT)
    queries = _tile(q + head * K, i, x, n, K).to(DOT)

    # as a token that reads: its own row of the tables
    dP, dA = tl.zeros([BT, BT], tl.float32), tl.zeros([BT, BT], tl.float32)
    asked, missed = tl.zeros([BT, BX], tl.float32), tl.zeros([BT, BX], tl.float32)
    change = tl.zeros([BT], tl.float32)
    for start in range(0, V, BV):
        y, yt = start + tl.arange(0, BV)[None, :], start + tl.arange(0, BV)[:, None]
        dO, lost = _tile(g + head * V, i, y, n, V).to(DOT), _tile(dX + head * V, i, y, n, V).to(DOT)
        Et, St = _tile(corrections + head * V, j, yt, n, V).to(DOT), _tile(states + memory, x, yt, K, V).to(DOT)
        dP = tl.dot(dO, Et, dP, input_precision=PRECISION)
        dA = tl.dot(lost, Et, dA, input_precision=PRECISION)
        asked = tl.dot(dO, St, asked, input_precision=PRECISION)
        missed = tl.dot(lost, St, missed, input_precision=PRECISION)
        if block == 0:
            change += tl.sum(lost.to(tl.float32) * _tile(v + head * V, i, y, n, V).to(tl.float32), axis=1)
    D = _decays(log_decay + head, i, j, n, 0, GATED)
    P, A = dP * D, tl.where(i > j, -dA * D, 0.0)
    asked, missed = since * asked, since * missed
    shares = A * tl.dot(keys, across, input_precision=PRECISION)
    change += tl.sum(shares, axis=1) - tl.sum(missed * keys.to(tl.float32), axis=1)
    here = ((block * tl.num_programs(0) + row).to(tl.int64) * tl.num_programs(1) + chunk) * BT + tl.arange(0, BT)
    tl.store(dbeta + here, change)
    dQ = tl.dot(P.to(DOT), keys, asked, input_precision=PRECISION)
    tl.store(dq + head * K + i * K + x, dQ.to(dq.dtype.element_ty), mask=(i < n) & (x < K))
    dK = tl.dot((step * A).to(DOT), keys, -step * missed, input_precision=PRECISION)
    gained = tl.zeros([BT], tl.float32)
    if GATED:
        shares = step * shares
        shares += tl.where(i > j, P, 0.0) * tl.dot(queries, across, input_precision=PRECISION)
        sums = asked * queries.to(tl.float32) - step * missed * keys.to(tl.float32)
        gained = tl.sum(shares, axis=1) + tl.sum(sums, axis=1)

    # as a token that was written: its column of the tables, formed as a row
    dPt, dAt = tl.zeros([BT, BT], tl.float32), tl.zeros([BT, BT], tl.float32)
    kept, overlap = tl.zeros([BT, BX], tl.float32), 0.0
    for start in range(0, V, BV):
        y, yt = start + tl.arange(0, BV)[None, :], start + tl.arange(0, BV)[:, None]
        E, dSt = _tile(corrections + head * V, i, y, n, V).to(DOT), _tile(adjoints + memory, x, yt, K, V)
        dPt = tl.dot(E, _tile(g + head * V, j, yt, n, V).to(DOT), dPt, input_precision=PRECISION)
        dAt = tl.dot(E, _tile(dX + head * V, j, yt, n, V).to(DOT), dAt, input_precision=PRECISION)
        kept = tl.dot(E, dSt.to(DOT), kept, input_precision=PRECISION)
        if GATED:
            overlap += tl.sum(dSt * _tile(states + memory, x, yt, K, V))
    Dt = _decays(log_decay + head, j, i, n, 1, GATED)
    Pt = dPt * Dt
    At = tl.where(j > i, -dAt * Dt * tl.load(beta + head + j, mask=j < n, other=0.0), 0.0)
    kept *= until
    dK = tl.dot(Pt.to(DOT), queries, dK + kept, input_precision=PRECISION)
    dK = tl.dot(At.to(DOT), keys, dK, input_precision=PRECISION)
    tl.store(dk + head * K + i * K + x, dK.to(dk.dtype.element_ty), mask=(i < n) & (x < K))
    if GATED:
        seen = _tile(q + head * K, j, xt, n, K).to(DOT)
        shares = At * tl.dot(keys, across, input_precision=PRECISION)
        shares += tl.where(j > i, Pt, 0.0) * tl.dot(keys, seen, input_precision=PRECISION)
        carried = tl.sum(kept * keys.to(tl.float32), axis=1)
        gained -= tl.sum(shares, axis=1) + carried
        # what reaches the end of the chunk depends on the sum of all its logarithms
        end = tl.sum(carried, axis=0) + whole * overlap
        tl.store(dc + here, gained + tl.where(tl.arange(0, BT) == BT - 1, end, 0.0))


def _blocks(q: Tensor, V: int, gated: bool) -> dict:
    """The constants of a launch: tokens in a chunk, key columns, value columns, and how products are computed."""
    exact = q.dtype == torch.float32  # products of float32 need many registers: smaller tiles
    keys = max(16, triton.next_power_of_2(q.shape[-1]))
    return {
        "BT": 16 if exact else 32,
        "BK": keys,
        "BV": min(16 if exact else 32, max(16, triton.next_power_of_2(V))),
        "GATED": gated,
        "num_warps": 8,
        **dot_options(q.dtype),
    }


@torch.library.custom_op("seqarch::delta_rule", mutates_args=())
def _delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, S: Tensor) -> list[Tensor]:
    (R, T, K), V = q.shape, v.shape[-1]
    blocks = _blocks(q, V, log_decay is not None)
    small = blocks | {"BK": min(32, blocks["BK"])}
    BT, columns = blocks["BT"], triton.cdiv(V, blocks["BV"])
    N = triton.cdiv(T, BT)
    q, k, v, beta, S = (x.contiguous() for x in (q, k, v, beta, S))
    gate = beta if log_decay is None else log_decay.contiguous()  # an ungated kernel never reads it
    inverse, states, last = beta.new_empty(R, T, BT), beta.new_empty(R, N, K, V), torch.empty_like(S)
    corrections, o = beta.new_empty(R, T, V), torch.empty_like(v)
    _invert[R, N](k, beta, gate, inverse, T, K, **{n: x for n, x in small.items() if n != "BV"})
    _states[R, columns](k, v, beta, gate, inverse, S, corrections, states, last, T, K, V, **blocks)
    _outputs[R, N, columns](q, k, gate, corrections, states, o, T, K, V, **small)
    return [o, last, inverse, states, corrections]


@_delta_rule.register_fake
def _(q, k, v, beta, log_decay, S):
    (R, T, K), V = q.shape, v.shape[-1]
    BT = 16 if q.dtype == torch.float32 else 32
    wide = torch.empty_like(v, memory_format=torch.contiguous_format)
    return [
        wide, torch.empty_like(S, memory_format=torch.contiguous_format), beta.new_empty(R, T, BT),
        beta.new_empty(R, -(-T // BT), K, V), beta.new_empty(R, T, V),
    ]  # fmt: skip


@torch.library.custom_op("seqarch::delta_rule_backward", mutates_args=())
def _delta_rule_backward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None,
    inverse: Tensor, states: Tensor, corrections: Tensor, g: Tensor, gS: Tensor,
) -> list[Tensor]:  # fmt: skip
    (R, T, K), V = q.shape, v.shape[-1]
    blocks = _blocks(q, V, log_decay is not None)
    BT, N = blocks["BT"], states.shape[1]
    q, k, v, beta, g, gS = (x.contiguous() for x in (q, k, v, beta, g, gS))
    gate = beta if log_decay is None else log_decay.contiguous()
    dX, adjoints, dS = torch.empty_like(v), torch.empty_like(states), torch.empty_like(gS)
    grid = R, triton.cdiv(V, blocks["BV"])
    _adjoints[grid](q, k, beta, gate, inverse, g, gS, dX, adjoints, dS, T, K, V, **blocks)
    width = min(32, blocks.pop("BK"))
    parts = triton.cdiv(K, width)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dbeta, dc = beta.new_empty(2, parts, R, N, BT).unbind()
    _inputs[R, N, parts](
        q, k, v, beta, gate, g, corrections, dX, states, adjoints, dq, dk, dbeta, dc, T, K, V,
        BX=width, num_stages=1, **blocks,
    )  # fmt: skip
    dbeta = dbeta.sum(0).flatten(1)[:, :T].contiguous()
    dv = (beta[..., None] * dX).to(v.dtype)
    if log_decay is None:
        return [dq, dk, dv, dbeta, dS]
    # a logarithm is in the sums of its own token and of all later ones of its chunk
    later = dc.sum(0).flip(-1).cumsum(-1).flip(-1)
    return [dq, dk, dv, dbeta, dS, later.flatten(1)[:, :T].contiguous()]


@_delta_rule_backward.register_fake
def _(q, k, v, beta, log_decay, inverse, states, corrections, g, gS):
    gates = [] if log_decay is None else [log_decay]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, beta, gS, *gates)]


def _setup_context(ctx, inputs, output):
    _, last, *kept = output
    ctx.gated = inputs[4] is not None
    ctx.save_for_backward(*inputs[:4], *inputs[4:5] * ctx.gated, *kept)
    ctx.shape = last.shape


def _gradient(ctx, grads):
    q, k, v, beta, *gate, inverse, states, corrections = ctx.saved_tensors
    g = torch.zeros_like(v) if grads[0] is None else grads[0]
    gS = beta.new_zeros(ctx.shape) if grads[1] is None else grads[1]
    log_decay = gate[0] if ctx.gated else None
    dq, dk, dv, dbeta, dS, *dg = _delta_rule_backward(q, k, v, beta, log_decay, inverse, states, corrections, g, gS)
    return dq, dk, dv, dbeta, dg[0] if ctx.gated else None, dS


_delta_rule.register_autograd(_gradient, setup_context=_setup_context)


def delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, S: Tensor
) -> tuple[Tensor, Tensor]:
    """Forward and backward by the kernels above; rows as in `delta_rule_reference`; gates and S float32."""
    o, S, *_ = _delta_rule(q, k, v, beta, log_decay, S)
    return o, S
