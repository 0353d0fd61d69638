r"""The linear test-time memory in chunks: attention with a learned table of decays.

Every gradient inside a chunk of C tokens is taken at the memory W_0 with which the chunk starts. Then the residuals
$E_i = W_0 k_i - v_i$ are known at once, S and W follow from two linear recurrences, one after the other, and both have a
closed form. Write $L_{ts} = x_{s+1} \cdots x_t$ for $t \ge s$, else 0, for the products of a gate x, with L^θ those of
the momentum and L^α those of what is kept; B for the band of weights, $B_{ti} = \gamma_i$ if token i is among the last c
tokens at t, else 0; and h and β for the products of the two gates from the start of the chunk. With

$$R = L^{\theta}\, \mathrm{diag}(\eta)\, B,\qquad A = L^{\alpha} R,\qquad a = L^{\alpha} h,$$

$$S_t = h_t S_0 - \sum_i R_{ti} E_i k_i^\top,\qquad W_t = \beta_t W_0 + a_t S_0 - \sum_i A_{ti} E_i k_i^\top,$$

$$Y = \beta \odot Q W_0^\top + a \odot Q S_0^\top - (Q K^\top \odot A)\, E .$$

The columns i are the C tokens of the chunk and the c - 1 before it, whose residuals are formed anew with this chunk's
W_0. What is left of the loop over time carries (W, S) from chunk to chunk with the last rows of the tables.

Products are multiplied up column by column, never divided: a gate may be 0. Autograd gives the gradient; what it keeps
is a few ``(T, C)`` tables and two matrices per chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .window import Tail, next_tail, with_tail

Walk = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def product_table(x: Tensor) -> Tensor:
    """Return L ``(..., C, C)`` of the gates x ``(..., C)``."""
    C = x.shape[-1]
    above = torch.ones(C, C, dtype=torch.bool, device=x.device).triu()
    return x[..., :, None].expand(*x.shape, C).masked_fill(above, 1).cumprod(-2).tril()


def memory_parallel(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, step: Tensor, momentum: Tensor, weight: Tensor,
    W: Tensor, S: Tensor, tail: Tail, window: int, chunk: int, walk: Walk | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """All whole chunks together, then the shorter one that may be left; rows as in `memory_reference`.

    `walk` carries the memory from chunk to chunk; None is `walk_chunks`.
    """
    tokens, T = (q, k, v, keep, step, momentum, weight), q.shape[1]
    whole, outputs = T - T % chunk, []
    for part, size in ((slice(0, whole), chunk), (slice(whole, T), T - whole)):
        piece = [x[:, part] for x in tokens]
        if piece[0].shape[1]:
            y, W, S = _chunks(*piece, W, S, tail, window, size, walk or walk_chunks)
            outputs.append(y)
            tail = next_tail(tail, piece[1], piece[2], piece[-1])
    return torch.cat(outputs, dim=1), W, S


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, step: Tensor, momentum: Tensor, weight: Tensor,
    W: Tensor, S: Tensor, tail: Tail, window: int, C: int, walk: Walk,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Chunks of C tokens each; the equations at the top of this file."""
    width = C + window - 1
    q, keep, step, momentum = (x.unflatten(1, (-1, C)) for x in (q, keep, step, momentum))
    # the columns of chunk n are tokens nC - (c - 1) ... nC + C - 1
    k, v, weight = (x.unfold(1, width, C) for x in with_tail(tail, k, v, weight))
    k, v = k.mT, v.mT  # unfold puts the tokens last
    ages = torch.arange(C, device=q.device)[:, None] + window - 1 - torch.arange(width, device=q.device)
    band = weight[..., None, :].masked_fill((ages < 0) | (ages >= window), 0)
    kept, faded = product_table(keep), momentum.cumprod(-1)
    R = product_table(momentum) @ (step[..., None] * band)
    A, beta = kept @ R, keep.cumprod(-1)
    a = (kept @ faded[..., None])[..., 0]

    carry = torch.stack([x[..., -1] for x in (beta, a, faded)], dim=-1)
    Ws, Ss, E = walk(k, v, A[..., -1, :], R[..., -1, :], carry, W, S)
    W0, S0 = Ws[:, :-1], Ss[:, :-1]
    y = (beta[..., None] * q) @ W0.mT + (a[..., None] * q) @ S0.mT - (q @ k.mT * A) @ E
    return y.flatten(1, 2), Ws[:, -1], Ss[:, -1]


def walk_chunks(
    keys: Tensor, values: Tensor, to_W: Tensor, to_S: Tensor, carry: Tensor, W: Tensor, S: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Carry W and S from chunk to chunk.

    Args:
        keys, values: the columns of all N chunks, ``(R, N, w, K)`` and ``(R, N, w, V)``.
        to_W, to_S: last rows of the tables A and R, ``(R, N, w)``.
        carry: what a chunk keeps of W in W, of S in W and of S in S: the last β, a and h, ``(R, N, 3)``.
        W, S: memory and momentum before the first chunk, ``(R, V, K)``.

    Returns:
        W and S before every chunk and after the last one, ``(R, N + 1, V, K)``, and the residuals E ``(R, N, w, V)``.
    """
    Ws, Ss, errors = [W], [S], []
    to_W, to_S, carry = to_W[..., None].unbind(1), to_S[..., None].unbind(1), carry[..., None, None].unbind(1)
    for n, (key, value) in enumerate(zip(keys.unbind(1), values.unbind(1), strict=True)):
        E = torch.baddbmm(value, key, W.mT, beta=-1)
        old, new, fade = carry[n].unbind(1)
        W, S = (
            torch.baddbmm(old * W + new * S, (to_W[n] * E).mT, key, alpha=-1),
            torch.baddbmm(fade * S, (to_S[n] * E).mT, key, alpha=-1),
        )
        Ws.append(W)
        Ss.append(S)
        errors.append(E)
    return tuple(torch.stack(x, dim=1) for x in (Ws, Ss, errors))
