"""What the recurrences must move and compute at least. Their floor is neither: it is latency, T steps in a row."""

from __future__ import annotations

BLOCKS = {"rnn": 1, "lstm": 4, "gru": 3}
STEP_SECONDS = 3e-6  # one dependent step on a large GPU: a small product, the gates, a store


def bytes(B: int, T: int, H: int, cell: str = "lstm", itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory: read xp and write h (and keep the gates); backward reads them and writes as much."""
    k = BLOCKS[cell]
    kept = 0 if cell == "rnn" else (k + 1) * 4  # gates and cell state (or q), float32
    return B * T * H * (itemsize * (k + 1) * (2 if backward else 1) + kept)


def flops(B: int, T: int, H: int, cell: str = "lstm", backward: bool = False) -> int:
    """Multiplications and additions: one product with W_h per step; backward one more, and one for its gradient."""
    return (2 if backward else 1) * 2 * B * T * BLOCKS[cell] * H * H


def seconds(T: int) -> float:
    """The floor: T dependent steps."""
    return T * STEP_SECONDS
