r"""The softmax scan in PyTorch, a chunk of tokens at a time.

Append a 1 to every value, $x_j = [v_j, 1]$. Then numerator and denominator are one vector $y_t = [w_t, u_t]$, and

$$y_t = \sum_{j \le t} e^{s_j - m_t} x_j, \qquad m_t = \max_{j \le t} s_j, \qquad o_t = w_t / u_t .$$

Inside a chunk of C tokens the sum is a product with a lower-triangular ``(C, C)`` matrix; the chunks before it enter
through the state, scaled by $e^{m_{\text{before}} - m_t}$. Every exponent is at most 0, so nothing can overflow.

The output does not change when m does, so the gradient may treat m as a constant. With
$G_t = \partial L / \partial y_t = [g_t,\, -\langle g_t, o_t\rangle] / u_t$ what is left is the transpose of the sum above:

$$\partial x_j = \sum_{t \ge j} e^{s_j - m_t} G_t, \qquad \partial s_j = \langle x_j, \partial x_j \rangle ,$$

again a triangular product per chunk, walked from the last chunk to the first. What is carried from chunk to chunk,
$r = \sum_{t} e^{m_{\text{before}} - m_t} G_t$ over all later t, ends as the gradient of the incoming state.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import inverse

CHUNK = 32


def _safe(m: Tensor) -> Tensor:
    """Replace a maximum of -inf (nothing seen) by +inf, so that exp(-inf - m) is 0 and never nan."""
    return torch.where(m == -torch.inf, torch.inf, m)


def _triangle(size: int, like: Tensor, upper: bool) -> Tensor:
    """0 on the kept triangle and its diagonal, -inf on the other: to be added to exponents. ``(size, size)``."""
    full = like.new_full((size, size), -torch.inf)
    return full.tril(-1) if upper else full.triu(1)


def _forward(s: Tensor, v: Tensor, m: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return o ``(R, T, E)``, 1/u ``(R, T)``, the maxima ``(R, T + 1)`` that start with the incoming m, and the last y."""
    R, T, E = v.shape
    tops = torch.cat([m[:, None], s], dim=1).cummax(dim=1).values
    o, shares = torch.empty_like(v), torch.empty_like(s)
    triangle = _triangle(min(CHUNK, T), s, upper=False)
    for start in range(0, T, CHUNK):
        part = slice(start, min(start + CHUNK, T))
        n = part.stop - part.start
        top = _safe(tops[:, start + 1 : part.stop + 1])
        x = torch.nn.functional.pad(v[:, part], (0, 1), value=1.0)
        weights = (s[:, None, part] - top[:, :, None]).add_(triangle[:n, :n]).exp_()
        kept = torch.exp(tops[:, start, None] - top)
        rows = torch.baddbmm(kept[:, :, None] * y[:, None, :], weights, x)
        shares[:, part] = inverse(rows[..., E])
        torch.mul(rows[..., :E], shares[:, part, None], out=o[:, part])
        y = rows[:, -1]
    return o, shares, tops, y


def _backward(s: Tensor, v: Tensor, tops: Tensor, G: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of s, v and of the incoming y, from those of all y ``(R, T, E + 1)`` and of the last one."""
    R, T, E = v.shape
    ds, dv = torch.empty_like(s), torch.empty_like(v)
    triangle = _triangle(min(CHUNK, T), s, upper=True)
    for start in reversed(range(0, T, CHUNK)):
        part = slice(start, min(start + CHUNK, T))
        n = part.stop - part.start
        top = _safe(tops[:, start + 1 : part.stop + 1])
        weights = (s[:, part, None] - top[:, None, :]).add_(triangle[:n, :n]).exp_()
        later = torch.exp(s[:, part] - top[:, -1:])
        dx = torch.baddbmm(later[:, :, None] * r[:, None, :], weights, G[:, part])
        dv[:, part] = dx[..., :E]
        ds[:, part] = torch.linalg.vecdot(v[:, part], dx[..., :E]) + dx[..., E]
        before = tops[:, start, None]
        r = torch.exp(before - top[:, -1:]) * r + torch.einsum("rt,rte->re", torch.exp(before - top), G[:, part])
    return ds, dv, r


class _SoftmaxScan(torch.autograd.Function):
    """The chunked sum and its transpose (equations at the top of this file)."""

    @staticmethod
    def forward(ctx, s: Tensor, v: Tensor, m: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        o, shares, tops, y = _forward(s, v, m, torch.cat([w, u[:, None]], dim=1))
        ctx.save_for_backward(s, v, o, shares, tops)
        top = tops[:, -1].clone()
        ctx.mark_non_differentiable(top)
        return o, top, y[:, -1].clone(), y[:, :-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor, _, grad_u: Tensor, grad_w: Tensor) -> tuple[Tensor | None, ...]:
        s, v, o, shares, tops = ctx.saved_tensors
        delta = torch.linalg.vecdot(g, o)
        G = torch.cat([g, -delta[..., None]], dim=-1).mul_(shares[..., None])
        ds, dv, r = _backward(s, v, tops, G, torch.cat([grad_w, grad_u[:, None]], dim=1))
        return ds, dv, None, r[:, -1], r[:, :-1]


def softmax_scan_parallel(s: Tensor, v: Tensor, m: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Chunked scan with its hand-written gradient; flattened rows as in `softmax_scan_reference`."""
    return _SoftmaxScan.apply(s, v, m, u, w)
