r"""Linear attention in PyTorch, all chunks of C tokens at once.

Unroll the definition inside a chunk that starts in state $S$. With $c_t = \sum_{s \le t} \log\alpha_s$, summed from the
start of the chunk (a vector of F numbers, or one number for all),

$$o_i = \sum_{j \le i} A_{ij} v_j + (q_i \odot e^{c_i})^\top S,\qquad
  A_{ij} = \sum_f q_{if}\, k_{jf}\, e^{c_{if} - c_{jf}},\qquad
  S' = \mathrm{diag}(e^{c_C})\, S + \sum_j (k_j \odot e^{c_C - c_j})\, v_j^\top .$$

All of it is matrix products over whole chunks, except for the chain of the states S, one small step per chunk.

Every exponent above is at most 0. If one decay serves all features, $A = (Q K^\top) \odot e^{c_i - c_j}$. With a decay per
feature the exponent is under the sum, and splitting it into $e^{c_i}$ for q and $e^{-c_j}$ for k would overflow. So the
chunk is halved, and halved again (`_Fading`): between a token i of a later half and a token j of the earlier one lies
the edge m of the two, and $e^{c_i - c_j} = e^{c_i - c_m}\, e^{c_m - c_j}$ is a product of two numbers that are at most 1.
Five halvings cover all pairs in a chunk of 32; each is a matrix product again.

A difference such as $c_i - c_j$ is never computed by subtracting: after a few decays of $e^{-300}$ two neighbours would
have lost their digits. It is the sum of the decays in between, `_since` or `_until` an edge, and its gradient is again a
sum in which nothing cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .reference import FEATURES

CHUNK = 32
SEGMENT = 512  # tokens whose features exist at one time


def _since(log_decay: Tensor, transposed: bool = False) -> Tensor:
    """Sum the log decays from the start of a stretch to each of its tokens, this one included; ``(..., C, W)``."""
    ones = log_decay.new_ones(log_decay.shape[-2], log_decay.shape[-2])
    return (ones.triu() if transposed else ones.tril()).expand(*log_decay.shape[:-2], -1, -1) @ log_decay


def _until(log_decay: Tensor, transposed: bool = False) -> Tensor:
    """Sum the log decays that come after each token of a stretch, up to its end; ``(..., C, W)``."""
    ones = log_decay.new_ones(log_decay.shape[-2], log_decay.shape[-2])
    return (ones.tril(-1) if transposed else ones.triu(1)).expand(*log_decay.shape[:-2], -1, -1) @ log_decay


def _pairs(x: Tensor, half: int) -> Tensor:
    """View a contiguous tensor of chunks as pairs of halves, ``(pairs, 2, half, features)``; what is written shows in x."""
    return x.view(-1, 2, half, x.shape[-1])


def _halves(q: Tensor, k: Tensor, log_decay: Tensor, half: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut chunks ``(R, N, C, F)`` into pairs of an earlier and a later half.

    Return the decays from the edge to the tokens of the later halves and from those of the earlier halves to the edge,
    the faded queries of the later halves and the faded keys of the earlier ones, each ``(pairs, half, F)``.
    """
    earlier, later = _pairs(log_decay, half).unbind(1)
    since, until = _since(later).exp_(), _until(earlier).exp_()
    return since, until, _pairs(q, half)[:, 1] * since, _pairs(k, half)[:, 0] * until


class _Fading(torch.autograd.Function):
    r"""What the tokens of a chunk read from one another, A v, when every feature fades at its own rate.

    Chunks: q, k, log_decay ``(R, N, C, F)``, v ``(R, N, C, E)``. With $P_{ij} = \langle g_i, v_j\rangle$ the gradients of a
    pair are $\partial q_i = e^{c_i - c_j} P_{ij} k_j$ and $\partial k_j = e^{c_i - c_j} P_{ij} q_i$. The exponent of the later
    half always comes with $q_i$, so its gradient is $q_i \odot \partial q_i$; that of the earlier half $k_j \odot \partial k_j$.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        q, k, v, log_decay = (x.contiguous() for x in (q, k, v, log_decay))
        ctx.save_for_backward(q, k, v, log_decay)
        o = (q * k).sum(-1, keepdim=True) * v  # a token reads itself without decay
        half = q.shape[2] // 2
        while half >= 1:
            _, _, queries, keys = _halves(q, k, log_decay, half)
            _pairs(o, half)[:, 1] += queries @ keys.mT @ _pairs(v, half)[:, 0]
            half //= 2
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, ...]:
        q, k, v, log_decay = ctx.saved_tensors
        g = g.contiguous()
        own = torch.linalg.vecdot(g, v)[..., None]
        dq, dk, dv, dl = own * k, own * q, (q * k).sum(-1, keepdim=True) * g, torch.zeros_like(log_decay)
        half = q.shape[2] // 2
        while half >= 1:
            since, until, queries, keys = _halves(q, k, log_decay, half)
            later_g, earlier_v = _pairs(g, half)[:, 1], _pairs(v, half)[:, 0]
            P = later_g @ earlier_v.mT
            to_queries, to_keys = P @ keys, P.mT @ queries
            _pairs(dv, half)[:, 0] += keys @ queries.mT @ later_g
            _pairs(dl, half)[:, 1] += _since(to_queries * queries, transposed=True)
            _pairs(dl, half)[:, 0] += _until(to_keys * keys, transposed=True)
            _pairs(dq, half)[:, 1] += to_queries.mul_(since)
            _pairs(dk, half)[:, 0] += to_keys.mul_(until)
            half //= 2
        return dq, dk, dv, dl


def _between(log_decay: Tensor) -> Tensor:
    """Decays between all pairs of tokens of a chunk, ``(R, N, C, 1)`` to ``(R, N, C, C)``: row i, column j, 0 for j > i."""
    C = log_decay.shape[2]
    future = torch.ones(C, C, dtype=torch.bool, device=log_decay.device).triu(1)
    sums = log_decay.expand(-1, -1, -1, C).tril(-1).cumsum(2)  # column j adds up from token j + 1 on
    return sums.masked_fill(future, -torch.inf).exp()


def _segment(q: Tensor, k: Tensor, v: Tensor, S: Tensor, log_decay: Tensor, features: str | None):
    """Output and final state of a stretch of tokens, as the equations at the top of this file say."""
    T, W = v.shape[1], log_decay.shape[-1]
    C = min(CHUNK, 1 << (T - 1).bit_length())
    padding = (0, 0, 0, -T % C)  # tokens of value 0 that do not decay leave the state as it is
    q, k, v, log_decay = (torch.nn.functional.pad(x, padding).unflatten(1, (-1, C)) for x in (q, k, v, log_decay))
    q, k = FEATURES[features](q), FEATURES[features](k)
    if W > 1:
        o = _Fading.apply(q, k, v, log_decay)
    elif W == 1:
        o = (q @ k.mT * _between(log_decay)) @ v
    else:
        o = (q @ k.mT).tril() @ v
    if W:
        q, k = q * _since(log_decay).exp(), k * _until(log_decay).exp()
        kept = log_decay.sum(2).exp()[..., None].unbind(1)

    starts, gains = [], (k.mT @ v).unbind(1)
    for n, gain in enumerate(gains):
        starts.append(S)
        S = S * kept[n] + gain if W else S + gain
    o = o + q @ torch.stack(starts, dim=1)
    return o.flatten(1, 2)[:, :T], S


def linear_attention_parallel(
    q: Tensor, k: Tensor, v: Tensor, S: Tensor, log_decay: Tensor, features: str | None
) -> tuple[Tensor, Tensor]:
    """Chunked form; flattened rows as in `linear_attention_reference`.

    The features of a segment are computed when it is its turn, and once more in the backward pass: what is kept in
    between are the inputs and one state per segment.
    """
    outputs = []
    for part in zip(*(x.split(SEGMENT, dim=1) for x in (q, k, v, log_decay)), strict=True):
        o, S = checkpoint(_segment, *part[:3], S, part[3], features, use_reentrant=False, preserve_rng_state=False)
        outputs.append(o)
    return torch.cat(outputs, dim=1), S
