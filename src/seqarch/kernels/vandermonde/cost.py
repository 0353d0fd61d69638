"""What the Vandermonde sum must move and compute at least: the roofline of the benchmark and of the book's figures."""

from __future__ import annotations


def bytes(R: int, S: int, L: int, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory; `itemsize` is that of a real number.

    Forward: read v and w, write K. Backward: read v, w and the gradient of K, write two gradients.
    """
    return itemsize * R * ((8 if backward else 4) * S + L)


def flops(R: int, S: int, L: int, backward: bool = False) -> int:
    """Operations of the two-table form: 4 per sample and term, 8 in the backward pass; the tables are not counted."""
    return (8 if backward else 4) * R * S * L
