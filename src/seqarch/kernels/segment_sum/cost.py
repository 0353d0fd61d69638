"""What the segment sum must move and compute at least: the roofline of the benchmark and of the book's figures."""

from __future__ import annotations


def bytes(M: int, D: int, n: int, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory: the rows, the sums and the 8-byte indices, once each; the same for the gather back."""
    return (M + n) * D * itemsize + 8 * M


def flops(M: int, D: int, n: int, backward: bool = False) -> int:
    """Additions: one per element of the rows; the backward pass copies and adds nothing."""
    return 0 if backward else M * D
