"""What additive scores must move and compute at least: the roofline of the benchmark and of the book's figures."""

from __future__ import annotations


def bytes(B: int, M: int, N: int, H: int, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory: read q and k, write the scores; backward reads all three and writes dq and dk."""
    vectors, scores = B * (M + N) * H, B * M * N
    return ((2 if backward else 1) * vectors + scores) * itemsize


def flops(B: int, M: int, N: int, H: int, backward: bool = False) -> int:
    """Operations of the definition, a tanh counted as one: 4 per (i, j, h); 8 in the backward pass, 2 of them again."""
    return (8 if backward else 4) * B * M * N * H


def broadcast_bytes(B: int, M: int, N: int, H: int, itemsize: int = 4) -> int:
    """Bytes of the (B, M, N, H) tensor that the one-line form keeps for its backward pass, and the kernel does not."""
    return B * M * N * H * itemsize
