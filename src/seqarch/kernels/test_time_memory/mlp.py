r"""A test-time memory with a hidden layer: $M(k) = k + W_2\,\mathrm{silu}(W_1 k)$ (chapter 17).

Both matrices take a step of gradient descent with momentum and decay at every token, as the matrix of `titans_linear`
does. With $z = W_1 k$, $h = \mathrm{silu}(z)$, $e = k + W_2 h - v$ and $g = (W_2^\top e) \odot \mathrm{silu}'(z)$ the
gradients of $\tfrac12 \lVert M(k) - v \rVert^2$ are $g\,k^\top$ for $W_1$ and $e\,h^\top$ for $W_2$: outer products again,
taken where the chunk starts. So each layer is a linear memory of its own, with the pairs (k, g) and (h, e), and the
tables A and R of ``parallel.py`` serve both:

$$Z_q = \beta \odot Q W_1^\top + a \odot Q S_1^\top - (Q K^\top \odot A)\, G,\qquad H_q = \mathrm{silu}(Z_q),$$

$$Y = Q + \beta \odot H_q W_2^\top + a \odot H_q S_2^\top - (H_q H^\top \odot A)\, E .$$

Matrix products are all there is, so PyTorch's are used on every device; there is no Triton kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .parallel import product_table

Pair = tuple[Tensor, Tensor]


def mlp_reference(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor, W: Pair, S: Pair, chunk: int
) -> tuple[Tensor, Pair, Pair]:
    """Walk along T one token at a time; autograd gives the gradients.

    Rows are flattened: q, k, v ``(R, T, e)``, gates ``(R, T)``, W and S ``(R, m, e)`` and ``(R, e, m)``. All of one dtype.
    """
    outputs, start = [], W
    tokens = [x.unbind(1) for x in (q, k, v)] + [x[..., None, None].unbind(1) for x in (theta, eta, alpha)]
    for t, (q_t, k_t, v_t, theta_t, eta_t, alpha_t) in enumerate(zip(*tokens, strict=True)):
        if t % chunk == 0:
            start = W  # all gradients of a chunk are taken where it begins
        q_t, k_t, v_t = q_t[..., None], k_t[..., None], v_t[..., None]
        z = start[0] @ k_t
        h = F.silu(z)
        e = k_t + start[1] @ h - v_t
        g = (start[1].mT @ e) * silu_slope(z)
        gradients = (g @ k_t.mT, e @ h.mT)
        S = tuple(eta_t * s - theta_t * d for s, d in zip(S, gradients, strict=True))
        W = tuple((1 - alpha_t) * w + s for w, s in zip(W, S, strict=True))
        outputs.append((q_t + W[1] @ F.silu(W[0] @ q_t))[..., 0])
    return (torch.stack(outputs, dim=1) if outputs else v.clone()), W, S


def mlp_parallel(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor, W: Pair, S: Pair, chunk: int
) -> tuple[Tensor, Pair, Pair]:
    """All whole chunks, then the shorter one that may be left; rows as in `mlp_reference`."""
    tokens, T = (q, k, v, theta, eta, alpha), q.shape[1]
    whole, outputs = T - T % chunk, []
    for part, size in ((slice(0, whole), chunk), (slice(whole, T), T - whole)):
        piece = [x[:, part] for x in tokens]
        if piece[0].shape[1]:
            y, W, S = _chunks(*piece, W, S, size)
            outputs.append(y)
    return torch.cat(outputs, dim=1), W, S


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor, W: Pair, S: Pair, C: int
) -> tuple[Tensor, Pair, Pair]:
    """Chunks of C tokens each; the equations at the top of this file."""
    q, k, v, theta, eta, alpha = (x.unflatten(1, (-1, C)) for x in (q, k, v, theta, eta, alpha))
    keep, kept = 1 - alpha, product_table(1 - alpha)
    R = product_table(eta) * theta[..., None, :]
    A, beta, h = kept @ R, keep.cumprod(-1), eta.cumprod(-1)
    a = (kept @ h[..., None])[..., 0]
    near = q @ k.mT * A  # what the first layer's pairs contribute does not depend on the memory
    # of each chunk: tokens, the table, what the start leaves at each token, and what each token leaves at the end
    parts = (q, k, v, A, near, beta[..., None], a[..., None], A[..., -1, :, None], R[..., -1, :, None])
    ends = torch.stack([x[..., -1] for x in (beta, a, h)], dim=-1)[..., None, None]
    outputs = []
    for q_n, k_n, v_n, table, near_n, *gates, to_W, to_S, end in zip(
        *(x.unbind(1) for x in (*parts, ends)), strict=True
    ):
        old, new, fade = end.unbind(1)
        z = k_n @ W[0].mT
        hidden = F.silu(z)
        error = k_n + hidden @ W[1].mT - v_n
        slope = (error @ W[1]) * silu_slope(z)
        hq = F.silu(_read(q_n, W[0], S[0], gates) - near_n @ slope)
        outputs.append(q_n + _read(hq, W[1], S[1], gates) - (hq @ hidden.mT * table) @ error)
        pairs = ((slope, k_n), (error, hidden))
        W, S = (
            tuple(old * w + new * s - (to_W * x).mT @ y for w, s, (x, y) in zip(W, S, pairs, strict=True)),
            tuple(fade * s - (to_S * x).mT @ y for s, (x, y) in zip(S, pairs, strict=True)),
        )
    return torch.cat(outputs, dim=1), W, S


def _read(x: Tensor, W: Tensor, S: Tensor, gates: Pair) -> Tensor:
    """What is left at every token of the memory and the momentum from the start of the chunk."""
    return gates[0] * (x @ W.mT) + gates[1] * (x @ S.mT)


def silu_slope(z: Tensor) -> Tensor:
    """The derivative of silu."""
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))
