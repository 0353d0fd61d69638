r"""The Transformer baseline of the book: causal self-attention with a key-value cache, and the pre-norm block.

$$\mathrm{head}_t = \sum_{j \le t} \mathrm{softmax}_j\!\left(\frac{\langle q_t, k_j\rangle}{\sqrt e}\right) v_j .$$

`CausalSelfAttention` reads a whole sequence at once (``forward``) or one token at a time (``step``). `Block` works with
any mixer that has the same two methods, so that two architectures can differ in the mixer and in nothing else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Block", "CausalSelfAttention", "FeedForward"]

Cache = tuple[Tensor, Tensor]


class CausalSelfAttention(nn.Module):
    """Multi-head causal softmax attention, without biases, positions or dropout.

    Args:
        d: width of the tokens.
        heads: number of heads H; d must be a multiple of it, each head is e = d / H wide.
    """

    def __init__(self, d: int, heads: int):
        super().__init__()
        if d % heads:
            raise ValueError(f"expected d to be a multiple of heads, got d = {d} and heads = {heads}")
        self.heads = heads
        self.query = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, d, bias=False)
        self.value = nn.Linear(d, d, bias=False)
        self.out = nn.Linear(d, d, bias=False)

    def _split(self, x: Tensor) -> Tensor:
        """``(B, T, d)`` to ``(B, H, T, e)``."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, d)`` to ``(B, T, d)``; output t depends on inputs 1..t only."""
        q, k, v = (self._split(f(x)) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def step(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Absorb one token ``(B, d)``: return its output ``(B, d)`` and the longer cache.

        The cache is ``(keys, values)``, each ``(B, H, t, e)`` after t tokens; None before the first.
        """
        q, k, v = (self._split(f(x[:, None])) for f in (self.query, self.key, self.value))
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(1)), (k, v)


class FeedForward(nn.Sequential):
    """The position-wise network Linear, GELU, Linear: ``(..., d)`` to ``(..., d)``; `hidden` is 4 d unless given."""

    def __init__(self, d: int, hidden: int | None = None):
        hidden = 4 * d if hidden is None else hidden
        super().__init__(nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, d))


class Block(nn.Module):
    """A pre-norm residual block: ``x + mixer(norm(x))``, then ``x + feed_forward(norm(x))``.

    Args:
        mixer: maps ``(B, T, d)`` to ``(B, T, d)``; for streaming it also has ``step(x, state) -> (y, state)``.
        d: width of the tokens.
        hidden: width of the feed-forward layer, 4 d unless given.
    """

    def __init__(self, mixer: nn.Module, d: int, hidden: int | None = None):
        super().__init__()
        self.mixer_norm, self.mixer = nn.LayerNorm(d), mixer
        self.feed_norm, self.feed_forward = nn.LayerNorm(d), FeedForward(d, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, d)`` to ``(B, T, d)``."""
        x = x + self.mixer(self.mixer_norm(x))
        return x + self.feed_forward(self.feed_norm(x))

    def step(self, x: Tensor, state=None) -> tuple[Tensor, object]:
        """Absorb one token ``(B, d)``: return its output and the mixer's new state (None before the first token)."""
        y, state = self.mixer.step(self.mixer_norm(x), state)
        x = x + y
        return x + self.feed_forward(self.feed_norm(x)), state
