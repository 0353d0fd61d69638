r"""Group-local plus global attention in PyTorch: every group is one small matrix, every linear part one product.

Cut the tokens into groups of G and stack them, so that q and k are ``(groups, G, K)`` and v is ``(groups, G, E)``. Then
inside a group

$$o = A v, \qquad A = P \circ P, \qquad P = \mathrm{relu}(q k^\top / G),$$

and A is set to 0 above its diagonal if it is causal. A ragged end is filled with zero tokens: their score is 0, so their
weight is 0. By the product rule, with $g = \partial L / \partial o$,

$$\partial v = A^\top g, \qquad Z = \tfrac2G\, P \circ (g v^\top), \qquad \partial q = Z k, \qquad \partial k = Z^\top q .$$

The matrices P of all groups are T x G numbers, so the gradient is written by hand: P is formed again, a few groups at a
time, instead of being kept.

The linear part needs no matrix of T x T: $q' (k'^\top v)$ has the same value as $(q' k'^\top) v$, and $k'^\top v$ is K x E
whatever T is. If it is causal there is one such matrix per group, and the sum of those before a group is what it sees.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._dispatch import accumulate_dtype

TILE = 2**18  # numbers in the matrices P that are formed at a time: 1 MB in float32, which stays in the cache


def before(x: Tensor) -> Tensor:
    """Sum over all earlier groups: ``(B, n, K, E)`` to the same shape; the first group gets 0."""
    return F.pad(x[:, :-1], (0, 0, 0, 0, 1, 0)).cumsum(1)


class _Local(torch.autograd.Function):
    """Attention inside groups and its gradient (equations at the top of this file): q, k ``(n, G, K)``, v ``(n, G, E)``.

    `group` is the divisor, which the tokens of a group may be fewer than, when there is one group only.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, group: int, causal: bool) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.options = group, causal
        o = torch.empty_like(v)
        for part in _parts(q):
            torch.bmm(_positive(q[part], k[part], group, causal).square_(), v[part], out=o[part])
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v), (group, causal) = ctx.saved_tensors, ctx.options
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part in _parts(q):
            P = _positive(q[part], k[part], group, causal)
            Z = torch.bmm(g[part], v[part].mT).mul_(P).mul_(2 / group)
            torch.bmm(Z, k[part], out=dq[part])
            torch.bmm(Z.mT, q[part], out=dk[part])
            torch.bmm(P.square_().mT, g[part], out=dv[part])
        return dq, dk, dv, None, None


def _parts(q: Tensor) -> list[slice]:
    """Cut n groups of G tokens into parts of which the matrices P fill a tile."""
    (n, G, _) = q.shape
    step = max(1, TILE // G**2)
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def _positive(q: Tensor, k: Tensor, group: int, causal: bool) -> Tensor:
    """The positive parts P of the scores of some groups, ``(n, G, G)``."""
    P = torch.bmm(q, k.mT).div_(group).relu_()
    return P.tril_() if causal else P


def gau_attention_parallel(
    quad_q: Tensor, quad_k: Tensor, lin_q: Tensor, lin_k: Tensor, v: Tensor, group: int, causal: bool
) -> Tensor:
    """All groups at once; shapes as in `gau_attention`."""
    (B, T, E), dtype = v.shape, accumulate_dtype(v.dtype)
    size = min(group, T)
    n = -(-T // size)
    quad_q, quad_k, lin_q, lin_k, values = (
        F.pad(x.to(dtype), (0, 0, 0, n * size - T)).unflatten(1, (n, size)) for x in (quad_q, quad_k, lin_q, lin_k, v)
    )
    local = _Local.apply(*(x.flatten(0, 1).contiguous() for x in (quad_q, quad_k, values)), group, causal)
    if causal:
        memory = before(lin_k.mT @ values / group)
        linear = lin_q @ memory
    else:
        memory = lin_k.flatten(1, 2).mT @ values.flatten(1, 2) / T
        linear = lin_q.flatten(1, 2) @ memory
    return (local.view(B, n * size, E) + linear.view(B, n * size, E))[:, :T].to(v.dtype)
