r"""The scalar-decay recurrence in PyTorch, a chunk of Q tokens at a time.

Number the tokens of a chunk 1..Q, let h be the state before it, $X_s = w_s x_s$ what token s inserts and
$c_t = a_1 + \dots + a_t$ the log of the decay since the chunk began. Unrolling the recurrence gives

$$y_t = \sum_{s \le t} M_{ts} X_s + e^{c_t} C_t^\top h, \quad M_{ts} = e^{c_t - c_s}\, C_t^\top B_s, \qquad
  h' = e^{c_Q} h + \sum_s e^{c_Q - c_s} B_s X_s^\top :$$

a triangular ``(Q, Q)`` matrix for what happens inside the chunk, one product to read the state, one to write it. T tokens
cost T/Q steps of matrix products instead of T steps of vector products; all exponents are sums of decays, at most 0.

The gradient has the same shape, walked from the last chunk to the first. With $g_t = \partial L/\partial y_t$, and k the
gradient of the state after the chunk,

$$\partial X_s = \sum_{t \ge s} M_{ts}\, g_t + e^{c_Q - c_s} k^\top B_s, \qquad
  k_{\text{before}} = e^{c_Q} k + \sum_t e^{c_t} C_t\, g_t^\top ,$$
$$\partial C_t = \sum_{s \le t} G_{ts} B_s + e^{c_t} h\, g_t, \qquad
  \partial B_s = \sum_{t \ge s} G_{ts} C_t + e^{c_Q - c_s} k X_s, \qquad
  G_{ts} = e^{c_t - c_s} \langle g_t, X_s \rangle .$$

The decay $a_j$ multiplies everything that is carried across step j: from a token s < j to a token t >= j of the chunk,
from the old state to t >= j, from s < j to the new state, and from the old state to the new one. Hence

$$\partial a_j = \sum_{s < j \le t} W_{ts} + \sum_{t \ge j} e^{c_t} \langle C_t, h g_t \rangle
  + \sum_{s < j} e^{c_Q - c_s} \langle B_s, k X_s \rangle + e^{c_Q} \langle h, k \rangle,
  \qquad W_{ts} = M_{ts} \langle g_t, X_s \rangle .$$

Chapter 12 writes the same as one sum over all later tokens of $\langle g_t, y_t \rangle - \langle X_t, \partial X_t \rangle$.
That is the difference of two long sums, and where a decay forgets everything, so that its gradient is 0, their rounding
errors are all that is left of it. Above, every term carries the factor $e^{a_j}$, and none is subtracted.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def sums_in_chunks(a: Tensor, chunk: int) -> Tensor:
    """Running sums c of the log-decays that begin anew in every chunk; ``(..., T)`` to ``(..., chunks, chunk)``, float64.

    The last chunk is filled up with decays of 1 (logs of 0), which carry the state on unchanged. Double precision, since
    only differences of c are used: after a few strong decays c is in the thousands, where float32 knows no thousandths.
    """
    a = torch.nn.functional.pad(a.double(), (0, -a.shape[-1] % chunk))
    return a.unflatten(-1, (-1, chunk)).cumsum(-1)


def _factors(c: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For one chunk ``(..., Q)``: decay from s to t ``(..., Q, Q)``, to t, from s to the end, and over the whole chunk."""
    between = c[..., :, None] - c[..., None, :]
    future = torch.ones(between.shape[-2:], dtype=torch.bool, device=c.device).triu(1)
    between = between.to(dtype).masked_fill_(future, -torch.inf).exp_()
    since, until = c.exp().to(dtype), torch.exp(c[..., -1:] - c).to(dtype)
    return between, since[..., None], until[..., None], since[..., -1:, None]


class _Chunks(torch.autograd.Function):
    """The chunked recurrence and its gradient (equations at the top of this file).

    Heads are flattened to Z groups of R heads that share B and C: X ``(Z, R, T, P)``, a ``(Z, R, T)``, B and C
    ``(Z, 1, T, N)``, h ``(Z, R, N, P)``.
    """

    @staticmethod
    def forward(ctx, X: Tensor, a: Tensor, B: Tensor, C: Tensor, h: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        c, y, starts = sums_in_chunks(a, chunk), torch.empty_like(X), []
        for k, start in enumerate(range(0, X.shape[2], chunk)):
            part = slice(start, min(start + chunk, X.shape[2]))
            Xk, Bk, Ck = X[:, :, part], B[:, :, part], C[:, :, part]
            between, since, until, whole = _factors(c[:, :, k, : Xk.shape[2]], X.dtype)
            starts.append(h)
            between *= Ck @ Bk.mT
            torch.add(between @ Xk, since * (Ck @ h), out=y[:, :, part])
            h = whole * h + Bk.mT @ (until * Xk)
        ctx.save_for_backward(X, c, B, C, *starts)
        ctx.chunk = chunk
        return y, h.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor, k: Tensor) -> tuple[Tensor | None, ...]:
        X, c, B, C, *starts = ctx.saved_tensors
        T, chunk = X.shape[2], ctx.chunk
        dX, da, dB, dC = torch.empty_like(X), X.new_empty(X.shape[:3]), torch.empty_like(B), torch.empty_like(C)
        for n in reversed(range(len(starts))):
            part, h = slice(n * chunk, min((n + 1) * chunk, T)), starts[n]
            Xk, Bk, Ck, gk = X[:, :, part], B[:, :, part], C[:, :, part], g[:, :, part]
            Q = Xk.shape[2]
            between, since, until, whole = _factors(c[:, :, n, :Q], X.dtype)
            scores = Ck @ Bk.mT
            G = (gk @ Xk.mT).mul_(between)
            M = between.mul_(scores)
            read, written = since * gk, until * Xk
            torch.add(M.mT @ gk, until * (Bk @ k), out=dX[:, :, part])
            from_state, to_state = read @ h.mT, written @ k.mT
            pairs = G.sum(1, keepdim=True)
            torch.add(pairs @ Bk, from_state.sum(1, keepdim=True), out=dC[:, :, part])
            torch.add(pairs.mT @ Ck, to_state.sum(1, keepdim=True), out=dB[:, :, part])
            # the gradient of a decay, from what crosses its step; crossing[j] and before[j] belong to step j + 1
            crossing = G.mul_(scores).tril_(-1).cumsum(-1)[..., :-1].tril_(-1).sum(-2)
            before = crossing + (to_state * Bk).sum(-1).cumsum(-1)[..., :-1]
            after = (from_state * Ck).sum(-1).flip(-1).cumsum(-1).flip(-1)
            da[:, :, part] = after + whole[..., 0] * (h * k).sum((-1, -2))[..., None]
            da[:, :, part][..., 1:] += before
            k = whole * k + Ck.mT @ read
        return dX, da, dB, dC, k, None


def ssd_parallel(
    x: Tensor, w: Tensor, a: Tensor, B: Tensor, C: Tensor, h0: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Chunked recurrence with its hand-written gradient; shapes as in `ssd_reference`."""
    (batch, T, H, P), (G, N) = x.shape, B.shape[2:]
    Z, R = batch * G, H // G
    X = (w[..., None] * x).transpose(1, 2).reshape(Z, R, T, P)
    grouped = (z.transpose(1, 2).reshape(Z, 1, T, N) for z in (B, C))
    y, h = _Chunks.apply(X, a.transpose(1, 2).reshape(Z, R, T), *grouped, h0.reshape(Z, R, N, P), chunk)
    return y.view(batch, H, T, P).transpose(1, 2), h.view(batch, H, N, P)
