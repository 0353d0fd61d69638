"""What a parallel nonlinear recurrence must move and compute: the roofline of the benchmark and of the book's figures.

The bytes do not depend on the number of Newton steps: a tile is read once, solved in registers, and written once.
"""

from __future__ import annotations

STATES = {"gru": 1, "lstm": 2}
TILE = 64  # steps that are scanned together
CELL = {"gru": 40, "lstm": 60}  # operations of one cell with its Jacobian, functions counted as 4


def bytes(B: int, T: int, D: int, cell: str = "gru", itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory: read w (3 numbers), write the states; backward reads both and the gradients, writes w's."""
    states = STATES[cell]
    return (6 + 2 * states if backward else 3 + states) * B * T * D * itemsize


def flops(B: int, T: int, D: int, cell: str = "gru", iters: int = 3, backward: bool = False) -> int:
    """Operations: per Newton step the cell, its Jacobian and a scan in log2(TILE) levels; the backward pass needs one."""
    combine = {"gru": 3, "lstm": 20}[cell]  # operations to compose two maps
    scan = combine * (TILE.bit_length() - 1)
    return B * T * D * (CELL[cell] + scan) * (2 if backward else max(iters, 1))
