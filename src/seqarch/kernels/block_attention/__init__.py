r"""Softmax attention that sees what it is told to see: the past, a window, its own chunk, its own segment, a tree.

$$s_{ij} = c\,\langle q_i, k_j\rangle + b_{ij},\qquad
  o_i = \frac{\sum_{j \in V(i)} e^{s_{ij}} v_j}{\sum_{j \in V(i)} e^{s_{ij}}},\qquad
  \mathrm{lse}_i = \log \sum_{j \in V(i)} e^{s_{ij}} .$$

The kind of attention is the set V(i) of keys that query i sees, and nothing else.

Read the folder in this order: ``reference.py`` (the definition), ``parallel.py`` (tiles, and the gradient by hand),
``triton.py`` (GPU, forward) and ``triton_backward.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import automatic, check_same, check_shape, check_values, choose
from .parallel import block_attention_parallel, maps_to_sdpa
from .reference import Pattern, block_attention_reference

__all__ = ["block_attention"]

KINDS = ("full", "causal", "window", "chunk", "prefix", "varlen", "mask")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 128  # columns of q and k that one program of the Triton kernels can hold


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: str = "causal",
    window: int | None = None,
    n_global: int = 0,
    chunk: int | None = None,
    prefix_len: int | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = True,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Average for every query the values of the keys that it sees, weighted by the softmax of their scores.

    The last query stands at the last key: query i is at position $p = i + S - T$. With T < S the first S - T keys are
    a cache, and the same call with T = 1 is one step of decoding. The kinds, and the keys j that a query at p sees:

    ========== ==========================================================================================
    full       all
    causal     $j \le p$
    window     $p - \text{window} < j \le p$; with ``causal=False`` all with $|p - j| \le \text{window} / 2$
    chunk      those of its own chunk, $\lfloor j / \text{chunk} \rfloor = \lfloor p / \text{chunk} \rfloor$
    prefix     $j \le p$ or $j < \text{prefix\_len}$
    varlen     those of its own segment: segment n is ``cu_seqlens[n] <= j < cu_seqlens[n + 1]``
    mask       the cache, and key S - N + n where ``mask[i, n]``
    ========== ==========================================================================================

    Args:
        q: queries, ``(B, H, T, d)``.
        k: keys, ``(B, G, S, d)``, of q's dtype. H is a multiple of G: head h of q reads head h // (H / G) of k and v.
        v: values, ``(B, G, S, E)``, of q's dtype.
        kind: one of the table.
        window: for ``"window"``: how many keys a query sees, itself included; with ``causal=False`` an even number.
        n_global: for ``"window"``: the first n_global keys are seen by every query, and the first n_global positions
            see every key.
        chunk: for ``"chunk"``: its length.
        prefix_len: for ``"prefix"``: how many keys all queries see.
        cu_seqlens: for ``"varlen"``: ``(n + 1,)`` int, not decreasing, where n segments packed into one sequence begin
            and the last one ends. T = S. Positions outside all segments see nothing and are never seen.
        mask: for ``"mask"``: ``(T, N)`` or ``(B, T, N)`` bool, N <= S, about the last N keys; the keys before are seen.
            A tree of N drafted tokens after a cache passes T = N and the table of ancestors.
        key_mask: ``(B, S)`` bool, for every kind, False at keys that nobody sees (padding). Nothing of these, not even
            NaN, reaches an output or a gradient.
        causal: for ``"window"``, ``"chunk"`` and ``"varlen"``: whether in addition $j \le p$.
        bias: added to the scores, ``(T, S)`` or ``(H, T, S)``; for ``"chunk"`` ``(chunk, chunk)`` or
            ``(H, chunk, chunk)``, counted from the start of the chunk. Of q's dtype; -inf hides a key.
        scale: c; None is $1 / \sqrt d$.
        return_lse: whether to return lse too.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``. Where PyTorch's
            ``scaled_dot_product_attention`` computes the same without a table of T x S scores (kinds full, mask, and
            causal with T = S; without bias, key_mask and lse; E = d), ``"auto"`` and ``"parallel"`` call it.

    Returns:
        o ``(B, H, T, E)`` of q's dtype, and with ``return_lse`` lse ``(B, H, T)`` in float32 (float64 for float64).
        A query that sees no key gets o = 0 and lse = -inf. From o and lse, attention over two disjoint sets of keys
        can be merged: $o = e^{\mathrm{lse}_1 - \mathrm{lse}} o_1 + e^{\mathrm{lse}_2 - \mathrm{lse}} o_2$.

    Gradients flow to q, k, v and bias, from o and from lse. With $P_{ij} = e^{s_{ij} - \mathrm{lse}_i}$,
    $g = \partial L/\partial o$ and $\gamma = \partial L/\partial\,\mathrm{lse}$,
    $$\partial v_j = \sum_i P_{ij} g_i,\quad
      \partial s_{ij} = P_{ij}\,(\langle g_i, v_j - o_i\rangle + \gamma_i),\quad
      \partial q_i = c \sum_j \partial s_{ij} k_j,\quad \partial k_j = c \sum_i \partial s_{ij} q_i .$$
    Tiles of P are computed again in the backward pass instead of being kept. Inputs of any stride are accepted; a
    contiguous copy is made where the kernel needs one.

    Raises:
        ValueError: wrong shape, dtype, device, kind, option or backend, with what was expected and what was given.
    """
    sizes = _check_tensors(q, k, v, key_mask)
    pattern = _pattern(sizes, q, kind, window, n_global, chunk, prefix_len, cu_seqlens, mask, key_mask, causal)
    if bias is not None:
        _check_bias(bias, q, sizes, pattern)
    if key_mask is None:
        check_values(q=q, k=k, v=v, bias=bias)
    else:
        check_values(q=q, bias=bias)  # k and v may hold anything where they are masked
    scale = sizes["d"] ** -0.5 if scale is None else float(scale)

    chosen = choose(backend, q, k, v, dtypes=TRITON_DTYPES, limit=_why_not_triton(q))
    if 0 in sizes.values() or (automatic(backend) and maps_to_sdpa(q, k, v, bias, pattern, return_lse)):
        chosen = "parallel"
    if chosen == "triton":
        from .triton import block_attention_triton

        o, lse = block_attention_triton(q, k, v, bias, pattern, scale)
    else:
        k, v = (_without_hidden(x, pattern) for x in (k, v))
        if chosen == "reference":
            o, lse = block_attention_reference(q, k, v, bias, pattern, scale)
        else:
            o, lse = block_attention_parallel(q, k, v, bias, pattern, scale, return_lse)
    return (o, lse) if return_lse else o


def _why_not_triton(q: Tensor) -> str | None:
    """Why the Triton kernels cannot take queries of this width on this device, or None when they can."""
    if q.shape[-1] > WIDEST:
        return f"it takes heads of at most {WIDEST} columns, got d = {q.shape[-1]}"
    if q.is_cuda and q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device) < (8, 0):
        return (
            f"in {str(q.dtype).removeprefix('torch.')} it needs compute capability 8.0: its tiles do not fit older ones"
        )
    return None


def _without_hidden(x: Tensor, pattern: Pattern) -> Tensor:
    """Keys or values with 0 where nobody sees them: 0 times NaN would be NaN."""
    hidden = None if pattern.key_mask is None else ~pattern.key_mask[:, None, :, None]
    if pattern.kind == "varlen":
        j, edges = torch.arange(x.shape[2], device=x.device), pattern.cu_seqlens
        outside = ((j < edges[0]) | (j >= edges[-1]))[:, None]
        hidden = outside if hidden is None else hidden | outside
    return x if hidden is None else x.masked_fill(hidden, 0.0)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> dict[str, int]:
    """Check what all kinds have in common; return the sizes by name."""
    sizes: dict[str, int] = {}
    check_shape("q", q, "B H T d", sizes)
    check_shape("k", k, "B G S d", sizes)
    check_shape("v", v, "B G S E", sizes)
    check_same(("q", q), ("k", k), ("v", v))
    if q.is_complex():
        raise ValueError(f"expected q of a real dtype, got {q.dtype}")
    if 0 in (sizes["H"], sizes["G"], sizes["d"], sizes["E"]):
        raise ValueError(f"expected q, k and v with heads and columns, got {tuple(q.shape)} and {tuple(v.shape)}")
    if sizes["H"] % sizes["G"]:
        raise ValueError(f"expected H of q to be a multiple of G of k, got H = {sizes['H']} and G = {sizes['G']}")
    if key_mask is not None:
        check_shape("key_mask", key_mask, "B S", sizes)
        _check_bool("key_mask", key_mask, q)
    return sizes


def _check_bool(name: str, mask: Tensor, q: Tensor) -> None:
    check_same(("q", q), (name, mask), dtype=False)
    if mask.dtype != torch.bool:
        raise ValueError(f"expected {name} of dtype torch.bool, True where a key is seen, got {mask.dtype}")


def _check_bias(bias: Tensor, q: Tensor, sizes: dict[str, int], pattern: Pattern) -> None:
    per_head = isinstance(bias, Tensor) and bias.ndim == 3
    if pattern.kind == "chunk":
        check_shape("bias", bias, "H chunk chunk" if per_head else "chunk chunk", {**sizes, "chunk": pattern.width})
    else:
        check_shape("bias", bias, "H T S" if per_head else "T S", sizes)
    check_same(("q", q), ("bias", bias))


def _pattern(
    sizes: dict[str, int], q: Tensor, kind: str, window: int | None, n_global: int, chunk: int | None,
    prefix_len: int | None, cu_seqlens: Tensor | None, mask: Tensor | None, key_mask: Tensor | None, causal: bool,
) -> Pattern:  # fmt: skip
    """Check the options of the kind, and that none was given that belongs to another."""
    if kind not in KINDS:
        raise ValueError(f"expected kind to be one of {', '.join(KINDS)}, got {kind!r}")
    options = {"window": window, "chunk": chunk, "prefix": prefix_len, "varlen": cu_seqlens, "mask": mask}
    names = {"prefix": "prefix_len", "varlen": "cu_seqlens"}
    for owner, value in options.items():
        name = names.get(owner, owner)
        if value is not None and owner != kind:
            raise ValueError(f'expected {name} only with kind="{owner}", got it with kind="{kind}"')
        if value is None and owner == kind:
            raise ValueError(f'expected {name} with kind="{kind}", got None')
    if n_global and kind != "window":
        raise ValueError(f'expected n_global only with kind="window", got {n_global} with kind="{kind}"')
    if n_global < 0:
        raise ValueError(f"expected n_global of at least 0, got {n_global}")
    width = {"window": window, "chunk": chunk, "prefix": prefix_len}.get(kind, 0)
    if width < (kind in ("window", "chunk")):
        raise ValueError(f"expected {names.get(kind, kind)} of at least {int(kind != 'prefix')}, got {width}")
    if kind == "window" and not causal and width % 2:
        raise ValueError(f"expected an even window with causal=False, half of it on each side, got {width}")
    if kind == "varlen":
        check_shape("cu_seqlens", cu_seqlens, "n", {})
        check_same(("q", q), ("cu_seqlens", cu_seqlens), dtype=False)
        if cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) == 0:
            raise ValueError(f"expected cu_seqlens of n + 1 integers, got {len(cu_seqlens)} of {cu_seqlens.dtype}")
        if sizes["T"] != sizes["S"]:
            raise ValueError(f'expected T = S with kind="varlen", got T = {sizes["T"]} and S = {sizes["S"]}')
    if kind == "mask":
        check_shape("mask", mask, "B T N" if isinstance(mask, Tensor) and mask.ndim == 3 else "T N", {**sizes})
        _check_bool("mask", mask, q)
        if mask.shape[-1] > sizes["S"]:
            raise ValueError(f"expected mask of shape (T, N) with N of at most S = {sizes['S']}, got {mask.shape[-1]}")
        mask = mask if mask.ndim == 3 else mask[None]
    banded = kind in ("window", "chunk", "varlen")
    return Pattern(kind, width, n_global, causal if banded else kind == "causal", cu_seqlens, mask, key_mask)
