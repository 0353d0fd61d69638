"""What the linear scan must move and compute at least: the roofline of the benchmark and of the book's figures."""

from __future__ import annotations


def bytes(B: int, T: int, D: int, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory: read a and b, write h; backward reads a, h and the gradient, writes two gradients."""
    return (5 if backward else 3) * B * T * D * itemsize


def flops(B: int, T: int, D: int, backward: bool = False) -> int:
    """Multiplications and additions of the sequential definition: 2 per element, 3 in the backward pass."""
    return (3 if backward else 2) * B * T * D
