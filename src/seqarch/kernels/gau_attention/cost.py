"""What group-local plus global attention must move and compute: the roofline of the benchmark and of the book's figures."""

from __future__ import annotations


def pairs(T: int, group: int, causal: bool = False) -> int:
    """How many (query, key) pairs are in a group together; if causal, with the key not after the query."""
    whole, rest = divmod(T, group)
    if causal:
        return whole * (group * (group + 1) // 2) + rest * (rest + 1) // 2
    return whole * group**2 + rest**2


def bytes(B: int, T: int, K: int, E: int, group: int = 256, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that cross memory if everything is touched once, whatever the group.

    Forward: read the four queries and keys and v, write o. Backward: read these five and the gradient, write five.
    """
    return B * T * ((8 * K + 3 * E) if backward else (4 * K + 2 * E)) * itemsize


def flops(B: int, T: int, K: int, E: int, group: int = 256, backward: bool = False, causal: bool = False) -> int:
    """Operations of the matrix products. A pair costs 2 K for its score and 2 E for its value, a token 4 K E.

    Backward: three products with K columns a pair (the score again), two with E; five K x E products a token (one again).
    """
    local, linear = (2 * (3 * K + 2 * E), 10 * K * E) if backward else (2 * (K + E), 4 * K * E)
    return B * (pairs(T, group, causal) * local + T * linear)
