"""What the tridiagonal solve must move and compute at least: the roofline of the benchmark and of the book's figures."""

from __future__ import annotations


def bytes(B: int, N: int, K: int, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory, for B systems: read three diagonals and rhs, write s; backward reads and writes both."""
    diagonals = 3 * N - 2
    return B * itemsize * ((2 * diagonals if backward else diagonals) + (3 if backward else 2) * N * K)


def flops(B: int, N: int, K: int, backward: bool = False) -> int:
    """Operations of Thomas' algorithm: 3 a row and 5 a row and column; backward solves once more and adds 6 of them."""
    return B * N * (3 + (11 if backward else 5) * K)
