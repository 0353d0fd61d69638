"""What the scan must move and compute at least: the roofline of the benchmark and of the book's figures."""

from __future__ import annotations


def bytes(B: int, H: int, L: int, N: int, M: int, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory: inputs, outputs and the system once; backward reads the gradient and writes gradients."""
    system = H * (N * N + N + M * N + M)
    sequences = B * H * L * (2 + M if backward else 1 + M)
    return itemsize * ((2 if backward else 1) * system + sequences)


def flops(B: int, H: int, L: int, N: int, M: int, backward: bool = False) -> int:
    """Operations of the sequential definition: per step 2 N² for the state and 2 N M to read it out, twice backward."""
    return (2 if backward else 1) * B * H * L * (2 * N * N + 2 * N + 2 * N * M + 2 * M)
