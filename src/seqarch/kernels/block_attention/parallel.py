r"""Attention in PyTorch, a tile of queries x keys at a time, with the gradient written by hand. No T x S matrix is kept.

**Forward.** A block of queries walks over the tiles of keys that it may see and keeps three running quantities, the
largest score m, the denominator $\ell$ and the numerator a. A tile with scores $s_{ij}$ changes them to

$$m' = \max(m, \max_j s_{ij}),\qquad \ell' = e^{m - m'}\ell + \sum_j e^{s_{ij} - m'},\qquad
  a' = e^{m - m'} a + \sum_j e^{s_{ij} - m'} v_j .$$

At the end $o = a / \ell$ and $\mathrm{lse} = m + \log \ell$. Every exponent is at most 0, so nothing can overflow.

**Backward.** lse is all that is needed to form a tile of weights again, $P_{ij} = e^{s_{ij} - \mathrm{lse}_i}$. With
$g_i = \partial L/\partial o_i$, $\gamma_i = \partial L/\partial\,\mathrm{lse}_i$ and
$\delta_i = \langle g_i, o_i\rangle - \gamma_i$,

$$\partial v_j = \sum_i P_{ij} g_i,\qquad \partial s_{ij} = P_{ij}\,(\langle g_i, v_j\rangle - \delta_i),\qquad
  \partial q_i = c \sum_j \partial s_{ij} k_j,\qquad \partial k_j = c \sum_i \partial s_{ij} q_i,$$

with the scale c; the gradient of the bias is $\partial s$ itself.

**Which tiles?** In every kind the keys that a query sees are an interval, next to at most a few global keys at the
beginning: `intervals` says which. Chunks need not even that: a chunk is a short sequence of its own, so all chunks of a
batch become one larger batch. Where PyTorch's own attention computes the very same thing, it is called instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._dispatch import accumulate_dtype
from .reference import Pattern

ROWS, KEYS = 128, 512  # queries and keys of a tile
TILE = 2**22  # numbers in one tile of all heads and sequences: 16 MB in float32


def intervals(pattern: Pattern, T: int, S: int, device: torch.device) -> Tensor:
    """For every query the keys of its band and the leading keys that it sees besides, ``(3, T)``: first, stop, near.

    Query i sees key j when first <= j < stop or j < near, and a mask, if there is one, agrees. First and stop never
    fall from one query to the next, except after global queries, which see everything: `band` leaves those out.
    """
    first, stop = band(pattern, T, S, device)
    p = torch.arange(S - T, S, device=device)
    near = torch.full_like(p, min(pattern.n_global, S))
    if pattern.causal:
        near = torch.minimum(near, (p + 1).clamp(min=0))
    else:
        everywhere = (p >= 0) & (p < pattern.n_global)
        first, stop = torch.where(everywhere, 0, first), torch.where(everywhere, S, stop)
    return torch.stack([first, stop, near])


def band(pattern: Pattern, T: int, S: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and stop of the interval of keys of every query, ``(T,)`` each, without what is global."""
    kind, width = pattern.kind, pattern.width
    p = torch.arange(S - T, S, device=device)  # positions, counted so that the last query stands at the last key
    first, stop = torch.zeros_like(p), torch.full_like(p, S)
    if kind == "causal":
        stop = p + 1
    elif kind == "window":
        left, right = (width - 1, 0) if pattern.causal else (width // 2, width // 2)
        first, stop = p - left, p + right + 1
    elif kind == "chunk":
        first = torch.div(p, width, rounding_mode="floor") * width
        stop = p + 1 if pattern.causal else first + width
    elif kind == "prefix":
        stop = (p + 1).clamp(min=width)
    elif kind == "varlen":
        edges = pattern.cu_seqlens.long()
        n = torch.searchsorted(edges, p, right=True)
        inside = (n > 0) & (n < len(edges))
        n = n.clamp(1, max(1, len(edges) - 1))
        first = torch.where(inside, edges[n - 1], p)
        stop = torch.where(inside, p + 1 if pattern.causal else edges[n.clamp(max=len(edges) - 1)], p)
    return first.clamp(0, S), stop.clamp(0, S)


class _Tiles:
    """The walk over one problem: its blocks of queries, the keys that a block sees, and the scores of a tile.

    Every head of k serves G heads of q, which are rows of one matrix product. So with R = B x heads of k, q is
    ``(R, G, T, d)``, already scaled, and k is ``(R, S, d)``.
    """

    def __init__(self, q: Tensor, k: Tensor, bias: Tensor | None, pattern: Pattern, scale: float):
        (self.B, H, self.T, d), (_, self.heads, self.S, _), dtype = q.shape, k.shape, accumulate_dtype(q.dtype)
        self.G = H // self.heads
        self.q = (q.to(dtype) * scale).reshape(self.B * self.heads, self.G, self.T, d)
        self.k = k.to(dtype).reshape(self.B * self.heads, self.S, d)
        self.bias = bias if bias is None else _by_group(bias.to(dtype), self.G)
        self.pattern = pattern
        # the walk needs the limits as numbers: made on the CPU, and waited for only where cu_seqlens lies on a GPU
        place = torch.device("cpu") if pattern.cu_seqlens is None else q.device
        limits = intervals(pattern, self.T, self.S, place)
        self.limits, self.rows = limits.cpu(), limits.to(q.device)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Yield (sequences, queries): as many sequences at a time as a tile may hold."""
        numbers = self.heads * self.G * min(self.T, ROWS) * min(self.S, KEYS)
        group = max(1, TILE // max(1, numbers))
        for b in range(0, self.B, group):
            for t in range(0, self.T, ROWS):
                yield slice(b, min(b + group, self.B)), slice(t, min(t + ROWS, self.T))

    def keys(self, block: slice) -> list[slice]:
        """The tiles of keys that a block of queries must visit: the global ones, then the band."""
        first, stop, near = self.limits[:, block]
        ranges = (0, int(near.max())), (max(int(first.min()), int(near.max())), int(stop.max()))
        return [slice(j, min(j + KEYS, end)) for start, end in ranges for j in range(start, end, KEYS)]

    def flat(self, batch: slice) -> slice:
        """The rows of q and k that belong to some sequences of the batch."""
        return slice(batch.start * self.heads, batch.stop * self.heads)

    def queries(self, x: Tensor, batch: slice, block: slice) -> Tensor:
        """A block of a tensor shaped like q, the G heads below each other: ``(rows, G x queries, width)``."""
        return x[self.flat(batch), :, block].flatten(1, 2)

    def scores(self, batch: slice, block: slice, keys: slice) -> Tensor:
        """The tile of scores ``(rows, G x queries, keys)``, -inf where a query does not see a key."""
        s = torch.bmm(self.queries(self.q, batch, block), self.k[self.flat(batch), keys].mT)
        tile = s.view(-1, self.heads, self.G, block.stop - block.start, keys.stop - keys.start)
        if self.bias is not None:
            tile.add_(self.bias[..., block, keys])
        for hidden in self._hidden(batch, block, keys):
            tile.masked_fill_(hidden, -torch.inf)
        return s

    def _hidden(self, batch: slice, block: slice, keys: slice) -> Iterator[Tensor]:
        """What a tile must not show, as masks that broadcast to (sequences, heads of k, G, queries, keys)."""
        first, stop, _ = self.limits[:, block]
        if int(first.max()) > keys.start or int(stop.min()) < keys.stop:
            j = torch.arange(keys.start, keys.stop, device=self.rows.device)
            first, stop, near = self.rows[:, block, None]
            yield ((j < first) | (j >= stop)) & (j >= near)
        mask, key_mask = self.pattern.mask, self.pattern.key_mask
        if mask is not None:
            cache = self.S - mask.shape[-1]  # keys before the mask are seen by all
            if keys.stop > cache:
                part = mask[batch if len(mask) > 1 else slice(0, 1), block]
                part = ~part[..., max(0, keys.start - cache) : keys.stop - cache]
                yield F.pad(part, (max(0, cache - keys.start), 0), value=False)[:, None, None]
        if key_mask is not None:
            yield ~key_mask[batch, None, None, None, keys]


def _by_group(bias: Tensor, G: int) -> Tensor:
    """A bias ``(T, S)`` or ``(H, T, S)`` as (heads of k or 1, G or 1, T, S)."""
    return bias[None, None] if bias.ndim == 2 else bias.unflatten(0, (-1, G))


def _safe(m: Tensor) -> Tensor:
    """Replace a maximum of -inf (nothing seen) by +inf, so that exp(-inf - m) is 0 and never nan."""
    return torch.where(m == -torch.inf, torch.inf, m)


class _Attention(torch.autograd.Function):
    """Forward and backward of the equations at the top of this file."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, pattern: Pattern, scale: float):
        tiles, dtype, E = _Tiles(q, k, bias, pattern, scale), accumulate_dtype(q.dtype), v.shape[-1]
        values = v.to(dtype).reshape(*tiles.k.shape[:2], E)
        o, lse = tiles.q.new_empty(*tiles.q.shape[:3], E), tiles.q.new_empty(tiles.q.shape[:3])
        for batch, block in tiles.blocks():
            rows = tiles.flat(batch)
            shape = rows.stop - rows.start, tiles.G * (block.stop - block.start), 1
            top, total, sums = o.new_full(shape, -torch.inf), o.new_zeros(shape), o.new_zeros(*shape[:2], E)
            for keys in tiles.keys(block):
                s = tiles.scores(batch, block, keys)
                new = torch.maximum(top, s.amax(-1, keepdim=True))
                weights = s.sub_(_safe(new)).exp_()
                kept = torch.exp(top - _safe(new))
                total = total.mul_(kept).add_(weights.sum(-1, keepdim=True))
                sums = torch.baddbmm(sums.mul_(kept), weights, values[rows, keys])
                top = new
            some = total > 0
            total = torch.where(some, total, 1.0)
            o[rows, :, block] = (sums / total).view(-1, tiles.G, block.stop - block.start, E)
            lse[rows, :, block] = torch.where(some, top + total.log(), -torch.inf).view(*o[rows, :, block].shape[:3])
        ctx.save_for_backward(q, k, v, bias, o, lse)
        ctx.pattern, ctx.scale = pattern, scale
        return o.view(*q.shape[:3], E).to(q.dtype), lse.view(q.shape[:3]).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor, grad_lse: Tensor):
        q, k, v, bias, o, lse = ctx.saved_tensors
        tiles, E = _Tiles(q, k, bias, ctx.pattern, ctx.scale), v.shape[-1]
        values = v.to(o.dtype).reshape(*tiles.k.shape[:2], E)
        g = g.to(o.dtype).reshape(o.shape)
        delta = (torch.linalg.vecdot(g, o) - grad_lse.to(o.dtype).reshape(lse.shape))[..., None]
        top = _safe(lse)[..., None]
        dq, dk, dv = torch.empty_like(tiles.q), torch.zeros_like(tiles.k), torch.zeros_like(values)
        dbias = None if bias is None else torch.zeros_like(tiles.bias)
        for batch, block in tiles.blocks():
            rows = tiles.flat(batch)
            queries, outer, shift, lows = (tiles.queries(x, batch, block) for x in (tiles.q, g, delta, top))
            change = torch.zeros_like(queries)
            for keys in tiles.keys(block):
                weights = tiles.scores(batch, block, keys).sub_(lows).exp_()
                dv[rows, keys] += weights.mT @ outer
                ds = torch.bmm(outer, values[rows, keys].mT).sub_(shift).mul_(weights)
                change = torch.baddbmm(change, ds, tiles.k[rows, keys])
                dk[rows, keys] += ds.mT @ queries
                if dbias is not None:
                    part = ds.view(-1, tiles.heads, tiles.G, block.stop - block.start, keys.stop - keys.start)
                    dbias[..., block, keys] += part.sum(0).sum_to_size(dbias[..., block, keys].shape)
            dq[rows, :, block] = change.view(dq[rows, :, block].shape)
        if dbias is not None:
            dbias = dbias.reshape(bias.shape).to(bias.dtype)
        dq, dk, dv = dq.mul_(ctx.scale).view(q.shape), dk.view(k.shape), dv.view(v.shape)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias, None, None


def _chunk_by_chunk(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, pattern: Pattern, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention inside chunks, as attention over all of them at once: each chunk is a short sequence of its own."""
    B, T, S = len(q), q.shape[2], k.shape[2]
    start = (S - T) // pattern.width * pattern.width  # the chunk of the first query starts here
    size = min(pattern.width, S - start)
    n = -(-(S - start) // size)
    left, right = S - T - start, start + n * size - S  # what is missing to whole chunks

    def fold(x: Tensor, before: int) -> Tensor:
        x = F.pad(x, (0, 0, before, right)).unflatten(2, (n, size))
        return x.transpose(1, 2).flatten(0, 1)  # (B, n, heads, size, width) to (B n, heads, size, width)

    def unfold(x: Tensor) -> Tensor:
        x = x.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3)
        return x[:, :, left : left + T]

    keep = pattern.key_mask
    if keep is None and (start < 0 or (right and not pattern.causal)):
        keep = torch.ones(B, S, dtype=torch.bool, device=q.device)
    if keep is not None:
        keep = F.pad(keep, (-start, right), value=False).view(B * n, size)
    inside = Pattern("causal" if pattern.causal else "full", key_mask=keep)
    bias = bias if bias is None else bias[..., :size, :size]
    q, k, v = fold(q, left), fold(k, -start), fold(v, -start)
    o, lse = block_attention_parallel(q, k, v, bias, inside, scale, with_lse)
    return unfold(o), lse if lse is None else unfold(lse)


def maps_to_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, pattern: Pattern, with_lse: bool) -> bool:
    """Whether PyTorch's own attention computes the very same thing without a table of T x S scores."""
    (T, d), S = q.shape[2:], k.shape[2]
    if pattern.kind == "causal" and T != S:
        return False  # is_causal aligns the first query with the first key
    plain = bias is None and pattern.key_mask is None and not with_lse and v.shape[-1] == d
    return plain and pattern.kind in ("full", "causal", "mask") and q.numel() > 0 and k.numel() > 0


def sdpa(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float) -> Tensor:
    """PyTorch's attention. A query that sees nothing sees everything there, and its output is set to 0 here."""
    options = dict(scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    mask = pattern.mask
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=pattern.kind == "causal", **options)
    mask = F.pad(mask[:, None], (k.shape[2] - mask.shape[-1], 0), value=True)
    blind = ~mask.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask | blind, **options).masked_fill(blind, 0.0)


def block_attention_parallel(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, pattern: Pattern, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Tiles with the hand-written gradient, or PyTorch's attention where it computes the same; o and lse, or o and None."""
    if pattern.kind == "chunk" and q.numel() > 0 and k.numel() > 0:
        return _chunk_by_chunk(q, k, v, bias, pattern, scale, with_lse)
    if maps_to_sdpa(q, k, v, bias, pattern, with_lse):
        return sdpa(q, k, v, pattern, scale), None
    return _Attention.apply(q, k, v, bias, pattern, scale)
