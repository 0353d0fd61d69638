"""What mixing must move and compute at least: the roofline of the benchmark and of the book's figures."""

from __future__ import annotations


def bytes(R: int, K: int, d: int, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory: read c (of `itemsize`) and t, write e, s and w; t, s and w are float32.

    Backward: read c, t, w and the gradients of e and s, write those of c and t.
    """
    if backward:
        return R * ((2 * K * d + d) * itemsize + (3 * K + 1) * 4)
    return R * ((K * d + d) * itemsize + (2 * K + 1) * 4)


def flops(R: int, K: int, d: int, backward: bool = False) -> int:
    """Operations of the definition: 2 per number of c, 3 in the backward pass, and a few per candidate."""
    return R * K * ((3 if backward else 2) * d + 6)


def compositions(n: int) -> int:
    """How often the network composes two parts in the inside pass over n words: splits of all spans."""
    return n * (n * n - 1) // 6
