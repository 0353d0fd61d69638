r"""Attention to what came after earlier occurrences of the last n tokens: a hard-wired n-gram head (chapter 16).

With positions counted from 0 and tokens $x$,
$$A_{ij} = 1 \text{ if } n \le j < i \text{ and } x_{i-r} = x_{j-1-r} \text{ for } r = 0, \dots, n-1, \text{ else } 0,$$
$$c_i = \sum_j A_{ij}, \qquad o_i = \frac{1}{\max(1, c_i)} \sum_j A_{ij}\, h_j .$$

It is the n-gram *before* j that must equal the last n tokens: $h_j$ then tells what came next.
Read the folder in this order: ``reference.py`` (the definition), ``parallel.py`` (sorting), ``triton.py`` (GPU).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import check_shape, check_values, choose
from .parallel import ngram_attention_parallel
from .reference import Memory, ngram_attention_reference, ngram_step

__all__ = ["ngram_attention", "ngram_attention_step"]

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def ngram_attention(ids: Tensor, h: Tensor, n: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    r"""Average h over the positions that follow an earlier occurrence of the last n tokens.

    Args:
        ids: tokens, ``(B, T)``, of an integer dtype; any value, a separator is a token like the others.
        h: vectors to read, ``(B, T, d)``, of a real floating-point dtype.
        n: how many tokens must agree, at least 1; with n = 1 this is an induction head.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``.

    Returns:
        out: the averages, ``(B, T, d)``, of h's dtype; 0 where nothing matches. Sums are formed in float32 where h is
            of half precision.
        count: how many positions matched, ``(B, T)``, int32.

    Gradients flow to h: $\partial h_j = \sum_i A_{ij}\, \partial o_i / \max(1, c_i)$; the tokens have none. Inputs of any
    stride are accepted; a contiguous copy is made where the kernel needs one. h must be finite: on a GPU, where the sum
    is a product with a matrix of zeros and ones, 0 times NaN is NaN.

    Raises:
        ValueError: wrong shape, dtype, device, n or backend, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("ids", ids, "B T", sizes)
    check_shape("h", h, "B T d", sizes)
    _check(ids, h, n)
    chosen = choose(backend, h, dtypes=TRITON_DTYPES)
    if h.numel() == 0:
        chosen = "reference"
    n = min(n, max(1, sizes["T"]))  # nothing matches then; a larger n would only make the loops longer
    if chosen == "reference":
        return ngram_attention_reference(ids, h, n)
    if chosen == "parallel":
        return ngram_attention_parallel(ids, h, n)
    from .triton import ngram_attention_triton

    return ngram_attention_triton(ids.long(), h, n)


def ngram_attention_step(
    ids: Tensor, h: Tensor, n: int, state: list[Memory] | None = None
) -> tuple[Tensor, Tensor, list[Memory]]:
    """Take in one token, ids ``(B,)`` with its vector h ``(B, d)``; return its out, its count and the memory.

    The memory holds, per sequence, the last n tokens and a dictionary from every n-gram seen so far to the number and
    the sum of the vectors that followed it; it is changed in place. None starts with empty ones.

    Raises:
        ValueError: wrong shape, dtype, device, n or length of the state, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("ids", ids, "B", sizes)
    check_shape("h", h, "B d", sizes)
    _check(ids, h, n)
    if state is None:
        state = [Memory() for _ in range(sizes["B"])]
    if len(state) != sizes["B"]:
        raise ValueError(f"expected a state of B = {sizes['B']} memories, got {len(state)}")
    out, count = ngram_step(ids, h, n, state)
    return out, count, state


def _check(ids: Tensor, h: Tensor, n: int) -> None:
    """Check what both functions take beyond the shapes."""
    if ids.dtype not in INTEGERS:
        raise ValueError(f"expected ids of an integer dtype, got {ids.dtype}")
    if not h.is_floating_point():
        raise ValueError(f"expected h of a floating-point dtype, got {h.dtype}")
    if ids.device != h.device:
        raise ValueError(f"expected ids on {h.device} like h, got {ids.device}")
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"expected n to be an integer of at least 1, got {n!r}")
    check_values(h=h)
