"""What linear attention must move and compute at least: the roofline of the benchmark and of the book's figures."""

from __future__ import annotations


def bytes(B: int, H: int, T: int, D: int, E: int, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory: read q, k, v, write o; backward reads q, k, v and the gradient, writes three gradients.

    D is the width at which q and k are stored. A feature map inside the kernel adds nothing.
    """
    return B * H * T * ((4 * D + 3 * E) if backward else (2 * D + 2 * E)) * itemsize


def flops(B: int, H: int, T: int, F: int, E: int, backward: bool = False) -> int:
    """Operations of the sequential definition with F features: 4 F E per token to write and to read, backward three times."""
    return B * H * T * 4 * F * E * (3 if backward else 1)


def state_floats(B: int, H: int, F: int, E: int, normalize: bool = False) -> int:
    """Numbers in the streaming state, whatever the length: F (E + 1) per head with the sum of weights, as in Based."""
    return B * H * F * (E + normalize)
