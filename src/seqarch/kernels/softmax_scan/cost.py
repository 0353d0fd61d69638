"""What the softmax scan must move and compute at least: the roofline of the benchmark and of the book's figures."""

from __future__ import annotations


def bytes(B: int, H: int, T: int, E: int, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory; `itemsize` is that of v, scores and statistics are float32.

    Forward: read s and v, write o and two statistics a token. Backward: read s, v, o, the gradient and the statistics,
    write the gradients of s and v.
    """
    wide, narrow = (4, 4) if backward else (2, 3)
    return B * H * T * (wide * E * itemsize + narrow * 4)


def flops(B: int, H: int, T: int, E: int, backward: bool = False) -> int:
    """Operations of the sequential definition: per token and head 4 E for the numerator and its division, and a few."""
    return B * H * T * ((8 if backward else 4) * E + 8)


def state_floats(B: int, H: int, E: int) -> int:
    """Numbers in the streaming state: a maximum, a denominator and E numerators per head, whatever the length."""
    return B * H * (E + 2)
