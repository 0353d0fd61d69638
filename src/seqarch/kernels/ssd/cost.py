"""What the chunked recurrence must move and compute at least: the roofline of the benchmark and of the book's figures."""

from __future__ import annotations

CHUNK = 64  # the default of `ssd`


def bytes(B: int, T: int, H: int, P: int, G: int, N: int, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory; `itemsize` is that of x, B and C; step sizes and states are float32.

    Forward: read x, dt, B and C, write y, write and read one state per chunk. Backward: read x, dt, B, C, the gradient
    and the states, write four gradients, write and read one gradient of a state per chunk.
    """
    states = B * -(-T // CHUNK) * H * N * P * 4
    if backward:
        return B * T * ((3 * H * P + 4 * G * N) * itemsize + 2 * H * 4) + 3 * states
    return B * T * ((2 * H * P + 2 * G * N) * itemsize + H * 4) + 2 * states


def flops(B: int, T: int, H: int, P: int, G: int, N: int, backward: bool = False) -> int:
    """Operations of the matrix products: per head those with the state and with the chunk, per group those of C and B."""
    state, inside, pairs = 2 * N * P, 2 * CHUNK * P, 2 * CHUNK * N
    if backward:
        return B * T * (H * (4 * state + 2 * inside) + G * 3 * pairs)
    return B * T * (H * (2 * state + inside) + G * pairs)


def state_floats(B: int, H: int, P: int, N: int) -> int:
    """Numbers in the streaming state: a matrix per head, whatever the length."""
    return B * H * N * P
