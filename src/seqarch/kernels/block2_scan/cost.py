"""What the 2 x 2 block scan must move and compute at least: the roofline of the benchmark and of the book's figures."""

from __future__ import annotations


def bytes(B: int, T: int, D: int, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory, in numbers of two components per channel.

    Forward: read J (4) and r (2), write the state (2). Backward: read J, the state and the gradient, write the gradients
    of J and r.
    """
    return (14 if backward else 8) * B * T * D * itemsize


def flops(B: int, T: int, D: int, backward: bool = False) -> int:
    """Operations of the sequential definition: 4 products and 4 sums a step; backward 4 products more for J's gradient."""
    return (12 if backward else 8) * B * T * D
