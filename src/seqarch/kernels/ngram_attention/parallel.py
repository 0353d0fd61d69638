r"""N-gram attention in PyTorch with memory linear in T: sort the n-grams, then add up inside groups of equal ones.

Numbering. Two n-grams are equal when their first n - 1 tokens and their last token are. So equal n-grams are given equal
numbers one token at a time: the pair (number of the shorter n-gram, last token) is sorted and equal pairs share a number.
These numbers do the work of a hash, and never collide.

Grouping. Let $p_0 < p_1 < \dots$ be the positions where one particular n-gram ends. Its followers are
$h_{p_0+1}, h_{p_1+1}, \dots$, and position $i = p_k$ reads those with $p_m + 1 < i$: the first k of them, but the first
k - 1 where the n-gram ended at $i - 1$ as well (its follower is i itself). With running sums inside the group,
$$S_k = \sum_{m \le k} h_{p_m + 1}, \qquad o_i = S_{c-1} / c, \qquad c = k - [p_{k-1} = p_k - 1].$$

Adding. A stable sort by number puts every group in one piece, in order of time. Doubling forms the running sums:
after the step of width w, $S_k$ holds its last 2w terms. A member of rank k is added in an order that only k decides, so
nothing that happens in other groups or later in time can change a single bit of it.

Selecting, shifting and adding are linear: autograd turns them round without keeping any vectors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch import accumulate_dtype


def number(keys: Tensor) -> Tensor:
    """Number the distinct keys of every row in sorted order: 0 <= result < T; shape ``(B, T)`` in and out."""
    ordered, order = torch.sort(keys, dim=1)
    changes = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0))
    return torch.empty_like(order).scatter_(1, order, changes.cumsum(1))


def number_ngrams(ids: Tensor, n: int) -> Tensor:
    """Equal numbers for equal n-grams of a row; entry e is the n-gram that ends at position n - 1 + e."""
    tokens = numbers = number(ids.long())
    T = ids.shape[1]
    for r in range(1, n):
        numbers = number(numbers[:, :-1] * T + tokens[:, r:])
    return numbers


def running_sums(x: Tensor, rank: Tensor) -> Tensor:
    """Sum x ``(B, M, d)`` over the members of a group up to each one; rank ``(B, M)`` counts within the group from 0."""
    width = 1
    while width < x.shape[1]:
        earlier = F.pad(x[:, :-width], (0, 0, width, 0))
        x = x + torch.where((rank >= width)[..., None], earlier, 0)
        width *= 2
    return x


def ngram_attention_parallel(ids: Tensor, h: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Sort, sum and put back; shapes as in `ngram_attention`."""
    (B, T, d), dtype = h.shape, accumulate_dtype(h.dtype)
    if n >= T:
        return 0 * h, ids.new_zeros(B, T, dtype=torch.int32)
    numbers, order = torch.sort(number_ngrams(ids, n), dim=1, stable=True)
    M = numbers.shape[1]
    place = torch.arange(M, device=h.device).expand(B, M)
    new = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
    rank = place - torch.where(new, place, 0).cummax(1).values
    adjacent = F.pad(order[:, 1:] == order[:, :-1] + 1, (1, 0)) & ~new  # the n-gram also ended one position earlier
    count = rank - adjacent.long()

    def rows(x: Tensor, index: Tensor) -> Tensor:
        return x.gather(1, index[..., None].expand(B, M, d))

    followers = F.pad(h.to(dtype)[:, n:], (0, 0, 0, 1))  # of the n-gram at the very end: none
    sums = running_sums(rows(followers, order), rank)
    last = (place - rank + count - 1).clamp(min=0)  # the last member that is read
    means = torch.where((count > 0)[..., None], rows(sums, last), 0) / count.clamp(min=1)[..., None]
    back = torch.empty_like(order).scatter_(1, order, place)
    out = F.pad(rows(means, back), (0, 0, n - 1, 0)).to(h.dtype)
    return out, F.pad(count.gather(1, back), (n - 1, 0)).int()
