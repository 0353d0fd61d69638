r"""What the inside and outside passes over a chart of spans need beside the composition network (chapter 23).

A chart holds one vector per span in ``(B, n, n, d)``: the span that starts at word i and has w words is ``e[:, i, w - 1]``.
Spans that would end after word n - 1 do not exist; their entries are never read. All spans of one length depend on
shorter ones only (inside) or on longer ones only (outside), so a pass is a loop over lengths: gather the parts of all
spans of that length, call the network on all of them, and mix the results of one span by the softmax of their scores:

$$w_k = \frac{e^{t_k}}{\sum_j e^{t_j}},\qquad e = \sum_k w_k c_k,\qquad s = \sum_k w_k t_k .$$

Read the folder in this order: ``reference.py`` (the definition), ``parallel.py`` (indices), ``triton.py`` (GPU).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype, check_same, check_shape, check_values, choose
from .parallel import children_index, parents_index, softmax_mix_parallel
from .reference import softmax_mix_reference

__all__ = ["gather_children", "gather_parents", "put_cells", "softmax_mix"]

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_SPLITS = 64  # as many candidates of one row fit the registers of a program


def softmax_mix(
    t: Tensor, c: Tensor, mask: Tensor | None = None, index: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Mix the K candidates of every row by the softmax of their scores.

    Args:
        t: scores, ``(R, K)``. A score of -inf leaves its candidate out.
        c: candidates, ``(R, K, d)``; its dtype may be lower than that of t.
        mask: ``(R, K)`` bool, True where a candidate exists; nothing of the others, not even NaN, reaches an output or
            a gradient. None keeps all.
        index: ``(R, K)`` int64: the candidates lie in a list, t ``(P,)`` and c ``(P, d)``, and row r mixes those with
            the numbers ``index[r]``; a number below 0 leaves a place empty. No candidate may occur twice, as in a
            chart, where every composition belongs to one span. The gathered copy is never stored on a GPU.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``.

    Returns:
        ``e`` ``(R, d)`` of c's dtype; ``s`` ``(R,)`` and ``w`` ``(R, K)`` in float32 (float64 where an input is). A row
        without any candidate gives 0 in all three.

    Gradients flow to t and c from all three outputs. With $g_k = \langle \bar e, c_k \rangle + \bar s\, t_k + \bar w_k$,
    $$\partial t_k = w_k \Big(g_k - \sum_j w_j g_j\Big) + \bar s\, w_k,\qquad \partial c_k = w_k \bar e .$$
    (Only differences of the $g_k$ count, so the code takes the largest score off every $t_k$ first.)
    Inputs of any stride are accepted; a contiguous copy is made where the kernel needs one. The gradient itself is not
    differentiable (no second derivatives) with ``backend="triton"``.

    Raises:
        ValueError: wrong shape, dtype, device or backend, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    if index is None:
        check_shape("t", t, "R K", sizes)
        check_shape("c", c, "R K d", sizes)
    else:
        check_shape("t", t, "P", sizes)
        check_shape("c", c, "P d", sizes)
        check_shape("index", index, "R K", sizes)
        if index.dtype != torch.int64:
            raise ValueError(f"expected index of dtype torch.int64, got {index.dtype}")
        if sizes["P"] == 0 < index.numel():
            shape = tuple(index.shape)
            raise ValueError(f"expected c with at least one candidate for an index of shape {shape}, got none")
    if mask is not None:
        check_shape("mask", mask, "R K", sizes)
        if mask.dtype != torch.bool:
            raise ValueError(f"expected mask of dtype torch.bool, True where a candidate exists, got {mask.dtype}")
    for name, tensor in (("t", t), ("c", c)):
        if not tensor.is_floating_point():
            raise ValueError(f"expected {name} of a floating-point dtype, got {tensor.dtype}")
    others = [(name, x) for name, x in (("t", t), ("mask", mask), ("index", index)) if x is not None]
    check_same(("c", c), *others, dtype=False)
    if mask is None and index is None:
        check_values(t=t, c=c)  # with either of them, what is left out may hold anything

    stored, dtype = c.dtype, accumulate_dtype(torch.promote_types(t.dtype, c.dtype))
    limit = f"it takes K up to {TRITON_SPLITS}, got {sizes['K']}" if sizes["K"] > TRITON_SPLITS else None
    chosen = choose(backend, t, c, dtypes=TRITON_DTYPES, limit=limit, turing=_triton_agrees)
    if 0 in sizes.values():
        chosen = "parallel"
    if chosen == "triton":
        from .triton import softmax_mix_triton

        return softmax_mix_triton(t.to(dtype), c, mask, index)
    mix = softmax_mix_reference if chosen == "reference" else softmax_mix_parallel
    e, s, w = mix(t.to(dtype), c.to(dtype), mask, index)
    return e.to(stored), s, w


def gather_children(e: Tensor, s: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""The parts of all spans of one length, at every split: what the inside pass composes.

    Split m = 1..length - 1 of the span (i, length) has the left part (i, m) and the right part (i + m, length - m).

    Args:
        e: chart of vectors, ``(B, n, n, d)``.
        s: chart of scores, ``(B, n, n)``.
        length: words of the spans to be composed, 1..n.

    Returns:
        ``left`` and ``right`` ``(B, n - length + 1, length - 1, d)``, and the sum of their scores
        ``(B, n - length + 1, length - 1)``. All are copies: writing into the chart afterwards does not change them.

    Raises:
        ValueError: wrong shape, dtype or length, with what was expected and what was given.
    """
    n = _check_chart(e, s, length)
    left, right = children_index(n, length, e.device)
    e, s = e.flatten(1, 2), s.flatten(1, 2)
    return e[:, left], e[:, right], s[:, left] + s[:, right]


def gather_parents(e: Tensor, s: Tensor, b: Tensor, o: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The parents and siblings of all spans of one length: what the outside pass composes.

    The span (i, length) is the left part of n - i - length longer spans, with the siblings (i + length, 1), (i + length, 2),
    ..., and the right part of i longer spans, with the siblings (0, i), (1, i - 1), ...: n - length parents, in this order.

    Args:
        e, s: inside charts of vectors ``(B, n, n, d)`` and scores ``(B, n, n)``.
        b, o: outside charts of the same shapes.
        length: words of the spans whose context is to be composed, 1..n.

    Returns:
        ``parent`` (from b) and ``sibling`` (from e) ``(B, n - length + 1, n - length, d)``; the sum of the parent's
        outside score and the sibling's inside score ``(B, n - length + 1, n - length)``; and whether the span is the
        left part, bool ``(n - length + 1, n - length)``. All are copies.

    Raises:
        ValueError: wrong shape, dtype or length, with what was expected and what was given.
    """
    n = _check_chart(e, s, length)
    _check_chart(b, o, length, ("b", "o"), e)
    parent, sibling, is_left = parents_index(n, length, e.device)
    e, s, b, o = (x.flatten(1, 2) for x in (e, s, b, o))
    return b[:, parent], e[:, sibling], o[:, parent] + s[:, sibling], is_left


def put_cells(chart: Tensor, cells: Tensor, length: int) -> Tensor:
    """Return a chart ``(B, n, n, ...)`` in which the spans of one length are `cells` ``(B, n - length + 1, ...)``.

    The chart given is left as it is, so a tensor that autograd has kept is never overwritten.

    Raises:
        ValueError: wrong shape or length, with what was expected and what was given.
    """
    if not isinstance(chart, Tensor) or chart.ndim < 3 or chart.shape[1] != chart.shape[2]:
        given = tuple(chart.shape) if isinstance(chart, Tensor) else type(chart).__name__
        raise ValueError(f"expected chart of shape (B, n, n, ...), got {given}")
    n = chart.shape[1]
    _check_length(length, n)
    wanted = (chart.shape[0], n - length + 1, *chart.shape[3:])
    if cells.shape != wanted:
        raise ValueError(f"expected cells of shape {wanted} for length {length}, got {tuple(cells.shape)}")
    chart = chart.clone()
    chart[:, : n - length + 1, length - 1] = cells
    return chart


def _check_length(length: int, n: int) -> None:
    if not isinstance(length, int) or not 1 <= length <= n:
        raise ValueError(f"expected length to be an integer from 1 to n = {n}, got {length!r}")


def _check_chart(
    e: Tensor, s: Tensor, length: int, names: tuple[str, str] = ("e", "s"), like: Tensor | None = None
) -> int:
    """Check a chart of vectors and its chart of scores; return the number of words."""
    sizes: dict[str, int] = {}
    if like is not None:
        check_shape("e", like, "B n n d", sizes)
    check_shape(names[0], e, "B n n d", sizes)
    check_shape(names[1], s, "B n n", sizes)
    check_same((names[0], e), (names[1], s), dtype=False)
    _check_length(length, sizes["n"])
    return sizes["n"]


@functools.cache
def _triton_agrees() -> bool:
    """Run the Triton kernel once against the parallel form: the admission test for GPUs older than Triton promises."""
    t, c = torch.randn(9, 7, device="cuda"), torch.randn(9, 7, 40, device="cuda")
    try:
        e, _, _ = softmax_mix(t, c, backend="triton")
        return torch.allclose(e, softmax_mix(t, c, backend="parallel")[0], rtol=1e-4, atol=1e-4)
    except Exception:  # a compiler error on an unsupported chip is an answer too
        return False
