r"""Causal softmax attention with one query per head, as a scan with a constant-size state (chapter 10).

$$o_t = \frac{\sum_{j \le t} e^{s_j} v_j}{\sum_{j \le t} e^{s_j}},\qquad t = 1,\dots,T.$$

Read the folder in this order: ``reference.py`` (the definition), ``parallel.py`` (chunks), ``triton.py`` (GPU).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype, check_same, check_shape, check_values, choose
from .parallel import softmax_scan_parallel
from .reference import absorb, softmax_scan_reference

__all__ = ["softmax_scan", "softmax_scan_step"]

State = tuple[Tensor, Tensor, Tensor]
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def softmax_scan(s: Tensor, v: Tensor, state: State | None = None, *, backend: str = "auto") -> tuple[Tensor, State]:
    r"""Average the values seen so far, weighted by the softmax of their scores, at every position.

    The state after token t is the triple $(m_t, u_t, w_t)$ of the largest score, the denominator and the numerator:
    $$m_t = \max(m_{t-1}, s_t),\quad u_t = u_{t-1} e^{m_{t-1} - m_t} + e^{s_t - m_t},\quad
      w_t = w_{t-1} e^{m_{t-1} - m_t} + e^{s_t - m_t} v_t,\quad o_t = w_t / u_t .$$

    Args:
        s: scores, ``(B, H, T)``. A score of -inf leaves its token out.
        v: values, ``(B, H, T, E)``, E >= 1; its dtype may be lower than that of s.
        state: ``(m, u, w)`` of shapes ``(B, H)``, ``(B, H)``, ``(B, H, E)``; None is the empty one, ``(-inf, 0, 0)``.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``.

    Returns:
        ``o`` of v's shape and dtype, and the state after the last token, in float32 (float64 where an input is).
        Feeding it as the state of the next piece continues the scan exactly where it stopped. Where no token has
        a finite score yet, o is 0.

    Gradients flow to s and v, and to u and w of the incoming state, from o and from u and w of the final one. The
    output does not depend on m, which only keeps the numbers in range, so m is treated as a constant. With
    $g_t = \partial L/\partial o_t$ and $\delta_t = \langle g_t, o_t \rangle$,
    $$\partial v_j = \sum_{t \ge j} e^{s_j - m_t}\, g_t / u_t,\qquad
      \partial s_j = \langle v_j, \partial v_j \rangle - \sum_{t \ge j} e^{s_j - m_t}\, \delta_t / u_t :$$
    a scan of the same kind, walked from the last token to the first. Inputs of any stride are accepted; a contiguous
    copy is made where the kernel needs one.

    Raises:
        ValueError: wrong shape, dtype, device or backend, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("s", s, "B H T", sizes)
    check_shape("v", v, "B H T E", sizes)
    dtype = _check(s, v, state, sizes)
    (B, H, T, E), stored = v.shape, v.dtype
    m, u, w = _start(state, s, sizes, dtype)
    chosen = choose(backend, s, v, dtypes=TRITON_DTYPES)
    if v.numel() == 0:
        chosen = "reference"
    if chosen == "triton":
        from .triton import softmax_scan_triton as scan

        s = s.to(dtype)  # scores and state in float32, v as it is
    else:
        scan = softmax_scan_reference if chosen == "reference" else softmax_scan_parallel
        s, v = s.to(dtype), v.to(dtype)
    o, m, u, w = scan(
        s.reshape(B * H, T), v.reshape(B * H, T, E), m.reshape(B * H), u.reshape(B * H), w.reshape(B * H, E)
    )
    return o.to(stored).view(B, H, T, E), (m.view(B, H), u.view(B, H), w.view(B, H, E))


def softmax_scan_step(s: Tensor, v: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """Absorb one token: s ``(B, H)``, v ``(B, H, E)``; return o ``(B, H, E)`` in v's dtype and the new state.

    The state has the same layout as in `softmax_scan`, and the same size after any number of tokens.

    Raises:
        ValueError: wrong shape, dtype or device, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("s", s, "B H", sizes)
    check_shape("v", v, "B H E", sizes)
    dtype = _check(s, v, state, sizes)
    o, state = absorb(s.to(dtype), v.to(dtype), *_start(state, s, sizes, dtype))
    return o.to(v.dtype), state


def _check(s: Tensor, v: Tensor, state: State | None, sizes: dict[str, int]) -> torch.dtype:
    """Check what both functions take beyond the shapes of s and v; return the dtype to compute in."""
    if sizes["E"] == 0:
        raise ValueError(f"expected v with E of at least 1, got {tuple(v.shape)}")
    for name, tensor in (("s", s), ("v", v)):
        if not tensor.is_floating_point():
            raise ValueError(f"expected {name} of a floating-point dtype, got {tensor.dtype}")
    check_same(("v", v), ("s", s), dtype=False)
    if state is not None:
        if not isinstance(state, tuple | list) or len(state) != 3:
            length = f" of length {len(state)}" if hasattr(state, "__len__") else ""
            raise ValueError(f"expected state to be a triple (m, u, w), got {type(state).__name__}{length}")
        for name, tensor, shape in zip(("m", "u", "w"), state, ("B H", "B H", "B H E"), strict=True):
            check_shape(f"state {name}", tensor, shape, sizes)
            check_same(("v", v), (f"state {name}", tensor), dtype=False)
        check_values(u=state[1], w=state[2])
    check_values(s=s, v=v)
    return accumulate_dtype(torch.promote_types(s.dtype, v.dtype))


def _start(state: State | None, s: Tensor, sizes: dict[str, int], dtype: torch.dtype) -> State:
    if state is not None:
        m, u, w = state
        return m.detach().to(dtype), u.to(dtype), w.to(dtype)
    B, H, E = sizes["B"], sizes["H"], sizes["E"]
    empty = torch.full((B, H), -torch.inf, dtype=dtype, device=s.device)
    return empty, torch.zeros_like(empty), torch.zeros(B, H, E, dtype=dtype, device=s.device)
