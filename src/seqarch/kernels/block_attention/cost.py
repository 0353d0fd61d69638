"""What attention must move and compute at least: the roofline of the benchmark and of the book's figures."""

from __future__ import annotations


def pairs(T: int, width: int = 0, kind: str = "causal") -> int:
    """How many (query, key) pairs of one head are seen, with T = S; `width` is the window, chunk or prefix.

    Window and chunk are counted as causal ones; of full attention all T x T pairs are seen.
    """
    if kind == "full":
        return T * T
    if kind == "causal":
        return T * (T + 1) // 2
    if kind == "window":
        short = min(T, width)  # the first queries see fewer keys
        return short * (short + 1) // 2 + (T - short) * width
    if kind == "chunk":
        whole, rest = divmod(T, width)
        return whole * pairs(width) + pairs(rest)
    if kind == "prefix":
        short = min(T, width)
        return short * short + pairs(T) - pairs(short)
    raise ValueError(f"expected kind to be one of full, causal, window, chunk, prefix, got {kind!r}")


def bytes(
    B: int, H: int, T: int, d: int, width: int = 0, itemsize: int = 4, backward: bool = False, kind: str = "causal"
) -> int:
    """Bytes that cross memory if everything is touched once, whatever the kind.

    Forward: read q, k and v, write o and the float32 lse. Backward: read these and the gradient, write three gradients.
    """
    return B * H * T * ((8 if backward else 4) * d * itemsize + 4)


def flops(B: int, H: int, T: int, d: int, width: int = 0, backward: bool = False, kind: str = "causal") -> int:
    """Operations of the matrix products on the pairs that are seen: two forward; five backward, one of them again."""
    return (10 if backward else 4) * B * H * d * pairs(T, width, kind)
