r"""Gated single-head attention as in MossFormer: quadratic inside a group of tokens, linear between groups (chapter 30).

$$o_t = \sum_{s \in \text{group of } t} \mathrm{relu}\!\left(\frac{\langle q_t, k_s\rangle}{G}\right)^{\!2} v_s
  + \frac1T \sum_{s=1}^{T} \langle q'_t, k'_s\rangle\, v_s .$$

The weights are squared and not normalised: there is no softmax, so no running maximum and no denominator.

Read the folder in this order: ``reference.py`` (the definition), ``parallel.py`` (groups as matrices), ``triton.py`` (GPU).
"""

from __future__ import annotations

from torch import Tensor

from .._dispatch import check_same, check_shape, check_values, choose
from .parallel import gau_attention_parallel
from .reference import gau_attention_reference

__all__ = ["gau_attention"]

WIDEST = 128  # columns of queries and keys that one program of the Triton kernels can hold


def gau_attention(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    group: int = 256,
    causal: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    r"""Add up the values of a token's group with squared positive scores, and those of all tokens with plain scores.

    Token t belongs to group $\lfloor t / G \rfloor$, counted from 0; the last group may be shorter. Write $q, k$ for
    `quad_q` and `quad_k`, $q', k'$ for `lin_q` and `lin_k`. With ``causal=False`` the output is the equation at the top
    of this folder. With ``causal=True`` a token sees itself and what is before it in its group, and the linear part sees
    the *earlier groups* only, as a matrix that grows from group to group and is divided by G, the same for any T:
    $$o_t = \sum_{s \le t,\ \text{same group}} \mathrm{relu}\!\left(\frac{\langle q_t, k_s\rangle}{G}\right)^{\!2} v_s
      + \frac1G \sum_{s \in \text{earlier groups}} \langle q'_t, k'_s\rangle\, v_s .$$

    Args:
        quad_q, quad_k: queries and keys of the part inside a group, ``(B, T, K)``.
        lin_q, lin_k: queries and keys of the linear part, ``(B, T, K)``.
        v: values, ``(B, T, E)``. All five have one dtype.
        group: G, tokens per group.
        causal: whether later tokens are hidden.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``.

    Returns:
        ``o`` of v's shape and dtype. Values side by side, ``[v, u]``, give both outputs of chapter 30 in one call.

    Gradients flow to all five tensors. Inside a group, with $P_{ts} = \mathrm{relu}(\langle q_t, k_s\rangle / G)$ and
    $g = \partial L/\partial o$,
    $$Z_{ts} = \tfrac2G P_{ts} \langle g_t, v_s\rangle,\quad
      \partial q_t = \sum_s Z_{ts} k_s,\quad \partial k_s = \sum_t Z_{ts} q_t,\quad
      \partial v_s = \sum_t P_{ts}^2 g_t + N k'_s,\quad \partial q'_t = M g_t,\quad \partial k'_s = N^\top v_s$$
    with the matrices $M = \frac1T \sum_s k'_s v_s^\top$ and, transposed where k' meets it,
    $N = \frac1T \sum_t g_t\, {q'_t}^\top$; with ``causal=True`` M sums over earlier and N over later groups, divided by G.
    Inputs of any stride are accepted; a contiguous copy is made where the kernel needs one.

    Raises:
        ValueError: wrong shape, dtype, device, group or backend, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    named = {"quad_q": quad_q, "quad_k": quad_k, "lin_q": lin_q, "lin_k": lin_k}
    for name, tensor in named.items():
        check_shape(name, tensor, "B T K", sizes)
    check_shape("v", v, "B T E", sizes)
    check_same(("v", v), *named.items())
    if v.is_complex():
        raise ValueError(f"expected v of a real dtype, got {v.dtype}")
    if not isinstance(group, int) or group < 1:
        raise ValueError(f"expected group to be an integer of at least 1, got {group!r}")
    check_values(**named, v=v)

    K = sizes["K"]
    limit = f"it takes queries of at most {WIDEST} columns, got K = {K}" if K > WIDEST else None
    chosen = choose(backend, *named.values(), v, limit=limit)
    if 0 in sizes.values() or chosen == "reference":
        run = gau_attention_reference
    elif chosen == "parallel":
        run = gau_attention_parallel
    else:
        from .triton import gau_attention_triton as run
    return run(quad_q, quad_k, lin_q, lin_k, v, group, causal)
