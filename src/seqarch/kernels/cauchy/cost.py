"""What the Cauchy sum must move and compute at least: the roofline of the benchmark and of the book's figures."""

from __future__ import annotations


def bytes(R: int, S: int, L: int, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory; `itemsize` is that of a real number, and the rows share their points.

    Forward: read v and w, write y, all complex. Backward: read v, w and the gradient of y, write two gradients.
    """
    return itemsize * (2 * R * (S * (4 if backward else 2) + L) + L)


def flops(R: int, S: int, L: int, backward: bool = False) -> int:
    """Operations of the real forms, a division counted as one: 16 per point and pole, 46 in the backward pass.

    Forward: 4 for the denominator, 3 for its square, a division, 2 for the inverse, 6 for the product with the
    numerator and the sum. Backward: twice, for the pole and for its conjugate, 8 for the inverse, 3 for its square and
    12 for the two sums.
    """
    return (46 if backward else 16) * R * S * L
