"""What the Krylov matrix must move and compute at least: the roofline of the benchmark and of the book's figures."""

from __future__ import annotations


def bytes(H: int, N: int, L: int, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory: read matrix and vector, write L columns; backward reads them and writes two gradients."""
    matrix = N * N + N
    return H * itemsize * ((2 if backward else 1) * matrix + (2 if backward else 1) * N * L)


def flops(H: int, N: int, L: int, backward: bool = False) -> int:
    """Operations of the sequential definition: 2 N² a column, twice that in the backward pass."""
    return (4 if backward else 2) * H * N * N * max(0, L - 1)
