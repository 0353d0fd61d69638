"""What the depthwise convolution must move and compute at least: the roofline of the benchmark and of the figures."""

from __future__ import annotations


def bytes(B: int, T: int, D: int, k: int, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory: read x, write y; backward reads x and the gradient, writes one. The taps are few."""
    return (3 if backward else 2) * B * T * D * itemsize


def flops(B: int, T: int, D: int, k: int, backward: bool = False) -> int:
    """Multiplications and additions of the definition: 2 for a tap and output, twice as many in the backward pass."""
    return (4 if backward else 2) * B * T * D * k


def state_floats(B: int, D: int, k: int, dilation: int = 1) -> int:
    """Numbers in the streaming state: the inputs that some tap will still ask for."""
    return B * (k - 1) * dilation * D
