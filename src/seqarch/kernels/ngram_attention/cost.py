"""What n-gram attention must move and compute at least: the roofline of the benchmark and of the book's figures."""

from __future__ import annotations


def bytes(B: int, T: int, d: int, n: int, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory: 8-byte tokens, 4-byte counts, vectors in and out; the same in the backward pass."""
    return B * T * (2 * d * itemsize + 8 + 4)


def flops(B: int, T: int, d: int, n: int, backward: bool = False) -> int:
    """Operations of the GPU's tiles: for every pair j < i a multiplication and an addition per column, n comparisons."""
    return B * (T * (T - 1) // 2) * (2 * d + n)


def sorted_flops(B: int, T: int, d: int) -> int:
    """Additions of the sorted form: one per column in each of the log2 T doubling steps."""
    return B * T * d * max(0, T - 1).bit_length()
