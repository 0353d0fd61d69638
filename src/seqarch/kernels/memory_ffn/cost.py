"""What the fetched memory must move and compute at least: the roofline of the benchmark and of the book's figures."""

from __future__ import annotations


def parameters(d: int, r: int, gated: bool = True) -> int:
    """Numbers in one block."""
    return (3 if gated else 2) * r * d


def bytes(
    B: int, L: int, d: int, r: int, M: int, k: int, itemsize: int = 4, backward: bool = False, gated: bool = True
) -> int:
    """Bytes that cross memory if every block is picked by as few sequences as possible.

    Forward: read x and the picked blocks once, write y. Backward: read x, the gradient and the blocks, write the
    gradients of x and of the blocks.
    """
    tokens, blocks = B * L * d, min(B * k, M) * parameters(d, r, gated)
    return (3 * tokens + 2 * blocks if backward else 2 * tokens + blocks) * itemsize


def flops(B: int, L: int, d: int, r: int, M: int, k: int, backward: bool = False, gated: bool = True) -> int:
    """Operations of the matrix products: 2 for a weight and token, twice as many in the backward pass."""
    return (4 if backward else 2) * B * L * k * parameters(d, r, gated)
