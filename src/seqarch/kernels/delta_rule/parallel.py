r"""The delta rule in chunks: all corrections of a chunk at once, by one triangular system of equations.

Let S_0 be the memory before a chunk of C tokens, $\gamma_i = \alpha_1 \cdots \alpha_i$ the decay since then, and
$D_{ij} = \alpha_{j+1} \cdots \alpha_i$ the decay from token j to token $i \ge j$. Unrolled from S_0, the memory is a sum of
what was written: with the scaled corrections $E_i = \beta_i e_i$,

$$S_i = \gamma_i S_0 + \sum_{j \le i} D_{ij}\, k_j E_j^\top .$$

Put this, for the memory that token i finds, into the definition of its correction:

$$E_i = \beta_i \Big( v_i - \gamma_i S_0^\top k_i - \sum_{j < i} D_{ij} (k_i \cdot k_j) E_j \Big)
  \quad\Longleftrightarrow\quad (I + A)\, E = \beta \odot (V - \gamma \odot K S_0),\qquad
  A_{ij} = \beta_i\, (k_i \cdot k_j)\, D_{ij}\ \ (j < i).$$

The matrix is unit lower triangular, so forward substitution solves it, for every chunk at the same time: the right side
is linear in S_0, hence $E = U - W S_0$ with $(I + A)[U, W] = [\beta \odot V,\ \beta\gamma \odot K]$. What is left of the
loop over time carries the state from chunk to chunk, and then all outputs are matrix products:

$$S_0 \leftarrow \gamma_C S_0 + (D_{C\cdot} \odot K)^\top E,\qquad
  O = \gamma \odot Q S_0 + \big(Q K^\top \odot D\big) E .$$

Autograd gives the gradient: what it keeps is a few ``(T, C)`` and ``(T, K)`` matrices and one state per chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 32


def decay_table(log_decay: Tensor) -> Tensor:
    """Return D ``(..., C, C)``: how much of what token j wrote is left at token i; 0 above the diagonal.

    Each column adds up its own logarithms from its token on. Subtracting running sums that start at the head of the
    chunk would lose the digits of a weak decay behind a strong one, and give nan where a decay is exactly 0.
    """
    C = log_decay.shape[-1]
    table = log_decay[..., :, None].expand(*log_decay.shape, C)
    return table.masked_fill(_above(C, 0, table), 0).cumsum(-2).exp().tril()


def _above(size: int, diagonal: int, like: Tensor) -> Tensor:
    """True on and above the given diagonal of a square."""
    return torch.ones(size, size, dtype=torch.bool, device=like.device).triu(diagonal)


def delta_rule_parallel(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, S: Tensor
) -> tuple[Tensor, Tensor]:
    """Chunked form of the equations at the top of this file; flattened rows as in `delta_rule_reference`."""
    T, V = v.shape[1:]
    C = min(CHUNK, T)
    missing = -T % C  # tokens with a zero key and step that fill the last chunk: they change nothing
    q, k, v = (pad(x, (0, 0, 0, missing)).unflatten(1, (-1, C)) for x in (q, k, v))
    beta = pad(beta, (0, missing)).unflatten(1, (-1, C))[..., None]
    if log_decay is None:
        D, since, until, whole = q.new_ones(C, C).tril(), 1.0, 1.0, q.new_ones(q.shape[:2])
    else:
        log_decay = pad(log_decay, (0, missing)).unflatten(1, (-1, C))
        D = decay_table(log_decay)
        since = log_decay.cumsum(-1).exp()[..., None]
        until, whole = D[..., -1, :, None], since[..., -1, 0]

    A = (beta * k) @ k.mT * D
    right = torch.cat([beta * v, beta * since * k], dim=-1)
    U, W = torch.linalg.solve_triangular(A, right, upper=False, unitriangular=True).split([V, k.shape[-1]], dim=-1)

    starts, corrections = [], []
    chunks = zip(U.unbind(1), W.unbind(1), (until * k).mT.unbind(1), whole.unbind(1), strict=True)
    for u, w, keys, keep in chunks:
        E = torch.baddbmm(u, w, S, alpha=-1)
        starts.append(S)
        corrections.append(E)
        S = torch.baddbmm(keep[:, None, None] * S, keys, E)
    S0, E = torch.stack(starts, dim=1), torch.stack(corrections, dim=1)
    o = (since * q) @ S0 + (q @ k.mT * D) @ E
    return o.flatten(1, 2)[:, :T], S
