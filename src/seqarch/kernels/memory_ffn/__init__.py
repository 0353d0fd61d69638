r"""Fetched parametric memories: each sequence runs through feed-forward blocks picked from a bank (chapter 20).

$$y_b = \sum_{j=1}^{k} w_{bj}\; V_{m}\,\big(\operatorname{silu}(A_m x_b) \odot (B_m x_b)\big),\qquad m = \text{idx}_{bj},$$

with $A_m$, $B_m$ and $V_m$ the blocks m of ``bank_gate``, ``bank_in`` and ``bank_out``. Without a gate the inside is
$\operatorname{silu}(B_m x_b)$. Stacking the rows of several blocks gives one wider block, so adding the memory to a
feed-forward layer widens that layer by r columns for every block fetched.

Read the folder in this order: ``reference.py`` (the definition), ``parallel.py`` (batched products), ``triton.py`` (GPU).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import check_same, check_shape, check_values, choose, debugging
from .parallel import memory_ffn_parallel
from .reference import memory_ffn_reference

__all__ = ["memory_ffn"]

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def memory_ffn(
    x: Tensor,
    bank_in: Tensor,
    bank_gate: Tensor | None,
    bank_out: Tensor,
    idx: Tensor,
    w: Tensor | None = None,
    *,
    sparse_grad: bool = True,
    backend: str = "auto",
) -> Tensor:
    r"""Run every sequence of a batch through its own blocks of the bank, and add their outputs.

    Args:
        x: sequences, ``(B, L, d)``.
        bank_in: the input matrices of all M blocks, ``(M, r, d)``.
        bank_gate: their gate matrices, ``(M, r, d)``, or None for blocks without a gate.
        bank_out: their output matrices, ``(M, d, r)``.
        idx: the k blocks of each sequence, ``(B, k)``, int64, from 0 to M - 1. A block may be picked by several
            sequences, and several times by one.
        w: the weight of each pick, ``(B, k)``; None is 1.
        sparse_grad: give the banks sparse gradients (torch.sparse_coo) that hold the picked blocks and nothing else,
            as a bank far larger than a batch's share needs. False: dense gradients, zero for blocks not picked.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``.

    Returns:
        ``y``, of x's shape and dtype. Products are accumulated in float32 where x is float16 or bfloat16; what passes
        between two products is rounded to x's dtype.

    Write $p = A x$, $q = B x$, $h = \operatorname{silu}(p) \odot q$ for one pick, and $g = w\, \partial L / \partial y$. Then
    $$\partial V = g\,h^\top,\quad \partial h = V^\top g,\quad \partial q = \partial h \odot \operatorname{silu}(p),\quad
      \partial p = \partial h \odot q \odot \operatorname{silu}'(p),\quad
      \partial A = \partial p\, x^\top,\quad \partial B = \partial q\, x^\top,\quad
      \partial x = A^\top \partial p + B^\top \partial q .$$
    A block's gradient is the sum over all picks of it, in a fixed order. Inputs of any stride are accepted; a contiguous
    copy is made where the kernel needs one.

    Raises:
        ValueError: wrong shape, dtype, device, index or backend, with what was expected and what was given. The values of
            idx are checked on a CPU; on a GPU, where looking at them means waiting, only under ``use(debug=True)``.
    """
    sizes: dict[str, int] = {}
    check_shape("x", x, "B L d", sizes)
    check_shape("bank_in", bank_in, "M r d", sizes)
    check_shape("bank_out", bank_out, "M d r", sizes)
    check_shape("idx", idx, "B k", sizes)
    if not x.is_floating_point():
        raise ValueError(f"expected x of a floating-point dtype, got {x.dtype}")
    banks = [("bank_in", bank_in), ("bank_out", bank_out)]
    if bank_gate is not None:
        check_shape("bank_gate", bank_gate, "M r d", sizes)
        banks.append(("bank_gate", bank_gate))
    check_same(("x", x), *banks)
    if idx.dtype != torch.int64:
        raise ValueError(f"expected idx of dtype torch.int64, got {idx.dtype}")
    check_same(("x", x), ("idx", idx), dtype=False)
    if w is not None:
        check_shape("w", w, "B k", sizes)
        check_same(("x", x), ("w", w), dtype=False)
    check_values(x=x, w=w, **dict(banks))
    if not torch.compiler.is_compiling() and (idx.is_cpu or debugging()):
        _check_range(idx, sizes["M"])

    chosen = choose(backend, x, dtypes=TRITON_DTYPES)
    if x.numel() * idx.numel() * bank_in.numel() == 0:
        chosen = "reference"  # nothing to compute: no tokens, no picks, or blocks without rows
    if chosen == "triton":
        from .triton import memory_ffn_triton as run
    else:
        run = memory_ffn_reference if chosen == "reference" else memory_ffn_parallel
    return run(x, bank_in, bank_gate, bank_out, idx, w, sparse_grad)


def _check_range(idx: Tensor, M: int) -> None:
    wrong = idx[(idx < 0) | (idx >= M)]
    if wrong.numel():
        raise ValueError(f"expected idx from 0 to {M - 1}, the blocks of the bank, got {int(wrong[0])}")
