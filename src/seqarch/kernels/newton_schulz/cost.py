"""What the Newton-Schulz iteration must move and compute at least."""

from __future__ import annotations


def bytes(P: int, m: int, n: int, steps: int = 5, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory for P matrices, if a step reads its matrix once and writes the next one.

    The products of a step are counted as staying in cache. The backward pass reads the matrix and the gradient of every
    step, and writes a gradient.
    """
    return P * m * n * itemsize * (3 if backward else 2) * max(1, steps)


def flops(P: int, m: int, n: int, steps: int = 5, backward: bool = False) -> int:
    """Operations of three matrix products a step, on the smaller side s and the larger one l: 4 s²l + 2 s³.

    The backward pass repeats two of them, and has three products with the large matrix and one square one of its own.
    """
    small, large = min(m, n), max(m, n)
    square, wide = 2 * small**3, 2 * small * small * large
    return P * steps * (2 * square + 4 * wide if backward else square + 2 * wide)
