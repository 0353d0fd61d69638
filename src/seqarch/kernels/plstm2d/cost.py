"""What the recurrence on a grid must move and compute at least: the roofline of the benchmark and of the book's figures."""

from __future__ import annotations


def bytes(N: int, X: int, Y: int, K: int, V: int, gate_rows: int, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory: read q, k, v and nine gates, write o; `gate_rows` is N, or 1 where the batch shares them.

    Backward reads all of these but o, and the gradient of o, and writes the gradients of q, k, v and the gates.
    """
    vectors, gates = N * X * Y * (2 * K + V), 9 * gate_rows * X * Y
    return ((2 if backward else 1) * (vectors + gates) + N * X * Y * V) * itemsize


def flops(N: int, X: int, Y: int, K: int, V: int, gate_rows: int, backward: bool = False) -> int:
    """Operations of the sequential definition, per entry of the K x V states of a cell.

    Forward: the source, two edges of three terms, three terms and a sum over K read: 18. Backward: 38, the states
    themselves computed once more.
    """
    return N * X * Y * (38 if backward else 18) * K * V


def edge_floats(N: int, X: int, Y: int, K: int, V: int, tile: int) -> int:
    """Numbers kept for the backward pass beside the inputs: the states on the edges between tiles."""
    return N * -(-X // tile) * -(-Y // tile) * 2 * tile * K * V
