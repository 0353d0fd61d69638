r"""The scores of additive attention, which a pointer network reads off as its answer.

$$u_{ij} = \sum_{h=1}^{H} v_h \tanh(q_{ih} + k_{jh}),\qquad i = 1,\dots,M,\quad j = 1,\dots,N.$$

Read the folder in this order: ``reference.py`` (the definition), ``parallel.py`` (blocks of queries and the gradient
by hand), ``triton.py`` (GPU).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._dispatch import check_same, check_shape, check_values, choose
from .parallel import additive_scores_parallel
from .reference import additive_scores_reference

__all__ = ["additive_scores"]

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def additive_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    r"""Score every key for every query by $u_{ij} = v^\top \tanh(q_i + k_j)$, without storing the M x N x H tanh.

    In the notation of the pointer network (Vinyals et al. 2015, equation 3) the caller passes $q_i = W_2 d_i$ and
    $k_j = W_1 e_j$; Bahdanau's attention is the same formula. A softmax over the last axis is left to the caller.

    Args:
        q: queries, ``(B, M, H)``, of a real floating-point dtype.
        k: keys, ``(B, N, H)``, of q's dtype.
        v: weights of the hidden units, ``(H,)``, of q's dtype.
        mask: ``(B, N)`` bool, True where a key may be chosen; the scores of the others are -inf, and nothing of
            them, not even NaN, reaches an output or a gradient. None keeps all.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``.

    Returns:
        scores ``(B, M, N)`` of q's dtype; sums are formed in float32 where the inputs are float16 or bfloat16.

    Gradients flow to q, k and v. With $g = \partial L/\partial u$ and $t_{ijh} = \tanh(q_{ih} + k_{jh})$,
    $$\partial q_{ih} = v_h \sum_j g_{ij}(1 - t_{ijh}^2),\quad \partial k_{jh} = v_h \sum_i g_{ij}(1 - t_{ijh}^2),\quad
      \partial v_h = \sum_{b,i,j} g_{ij}\, t_{ijh};$$
    t is computed again in the backward pass instead of being kept. Inputs of any stride are accepted; a contiguous
    copy is made where the kernel needs one. The gradient itself is not differentiable (no second derivatives) except
    with ``backend="reference"``.

    Raises:
        ValueError: wrong shape, dtype, device or backend, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("q", q, "B M H", sizes)
    check_shape("k", k, "B N H", sizes)
    check_shape("v", v, "H", sizes)
    check_same(("q", q), ("k", k), ("v", v))
    if q.is_complex():
        raise ValueError(f"expected q of a real dtype, got {q.dtype}")
    if mask is not None:
        check_shape("mask", mask, "B N", sizes)
        check_same(("q", q), ("mask", mask), dtype=False)
        if mask.dtype != torch.bool:
            raise ValueError(f"expected mask of dtype torch.bool, True where a key may be chosen, got {mask.dtype}")
    check_values(q=q, v=v)  # k may hold anything where it is masked

    chosen = choose(backend, q, k, v, dtypes=TRITON_DTYPES, turing=_triton_agrees)
    if 0 in sizes.values():
        chosen = "parallel"
    if chosen == "reference":
        return additive_scores_reference(q, k, v, mask)
    if chosen == "parallel":
        return additive_scores_parallel(q, k, v, mask)
    from .triton import additive_scores_triton

    return additive_scores_triton(q, k, v, mask)


@functools.cache
def _triton_agrees() -> bool:
    """Run the Triton kernel once against the parallel form: the admission test for GPUs older than Triton promises."""
    q, k = torch.rand(2, 2, 40, 40, device="cuda").unbind()
    try:
        u = additive_scores(q, k, q[0, 0], backend="triton")
        return torch.allclose(u, additive_scores(q, k, q[0, 0], backend="parallel"), rtol=1e-4, atol=1e-4)
    except Exception:  # a compiler error on an unsupported chip is an answer too
        return False
