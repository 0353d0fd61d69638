"""What the linear test-time memory must move and compute at least: for the benchmark and the book's figures."""

from __future__ import annotations


def bytes(B: int, H: int, T: int, K: int, V: int, chunk: int = 16, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory; `itemsize` is that of q, k and v, the three gates and the states are float32.

    Forward: read q, k, v and the gates, write y and, for the gradient, both states of every chunk. Backward: read all of
    these and the gradient of y, write the gradients of q, k, v and of the gates.
    """
    token = 2 * (K + V) * itemsize + 3 * 4
    states = -(-T // chunk) * 2 * K * V * 4
    if backward:
        token = (4 * K + 3 * V) * itemsize + 6 * 4
    return B * H * (T * token + states)


def flops(B: int, H: int, T: int, K: int, V: int, chunk: int = 16, backward: bool = False) -> int:
    """Operations of the chunked form: per token four products with a K x V matrix, three with a chunk, and the table A."""
    token = 8 * K * V + chunk * (2 * K + 2 * V + 2 * chunk)
    return B * H * T * token * (3 if backward else 1)


def state_floats(B: int, H: int, K: int, V: int) -> int:
    """Numbers in the streaming state: the memory and its momentum, whatever the length."""
    return 2 * B * H * K * V


def mlp_bytes(
    B: int, H: int, T: int, e: int, m: int, chunk: int = 16, itemsize: int = 4, backward: bool = False
) -> int:
    """The same for `titans_mlp`, whose two matrices have e times m numbers each."""
    return bytes(B, H, T, e, e, chunk, itemsize, backward) + B * H * -(-T // chunk) * (4 * e * m - 2 * e * e) * 4


def mlp_flops(B: int, H: int, T: int, e: int, m: int, chunk: int = 16, backward: bool = False) -> int:
    """Per token nine products with an e x m matrix, four of the width e or m with a chunk, and the table A."""
    token = 18 * e * m + 4 * chunk * (e + m) + 2 * chunk * chunk
    return B * H * T * token * (3 if backward else 1)
