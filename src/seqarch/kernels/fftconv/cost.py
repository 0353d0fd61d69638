"""What the causal convolution must move and compute at least: the roofline of the benchmark and of the book's figures."""

from __future__ import annotations

from math import log2


def bytes(B: int, H: int, L: int, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory, one kernel of L taps a channel.

    Forward: read u and k, write y. Backward: read u, k and the gradient of y, write two gradients.
    """
    return (3 * B + 2 if backward else 2 * B + 1) * H * L * itemsize


def flops(B: int, H: int, L: int, backward: bool = False) -> int:
    """Operations of the transforms of length n = 2 L, 2.5 n log2 n each, and of the products of spectra, 3 n each.

    Forward: transform u and k, multiply, transform back. Backward: transform the gradient, multiply with either
    spectrum, transform both products back.
    """
    n = 2 * L
    transforms, products = (2 * B + 1, 2 * B) if backward else (2 * B + 1, B)
    return int(H * (transforms * 2.5 * n * log2(max(2, n)) + products * 3 * n))
