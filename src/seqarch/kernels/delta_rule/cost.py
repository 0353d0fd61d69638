"""What the delta rule must move and compute at least: the roofline of the benchmark and of the book's figures."""

from __future__ import annotations

CHUNK = 64


def bytes(B: int, H: int, T: int, K: int, V: int, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory; `itemsize` is that of q, k and v, gates and states are float32.

    Forward: read q, k, v and two gates, write o and, for the gradient, one state per chunk of 64 tokens. Backward: read
    all of these and the gradient of o, write the gradients of q, k, v and of the gates.
    """
    token = 2 * (K + V) * itemsize + 2 * 4
    states = -(-T // CHUNK) * K * V * 4
    if backward:
        token = (4 * K + 3 * V) * itemsize + 4 * 4
    return B * H * (T * token + states)


def flops(B: int, H: int, T: int, K: int, V: int, backward: bool = False) -> int:
    """Operations of the sequential definition: per token and head the memory is decayed, read twice and written once."""
    return B * H * T * (14 if backward else 7) * K * V


def state_floats(B: int, H: int, K: int, V: int) -> int:
    """Numbers in the streaming state: one matrix per head, whatever the length."""
    return B * H * K * V
