r"""The linear recurrence that every parallel-in-time model of the book stands on.

$$h_t = a_t \odot h_{t-1} + b_t,\qquad t = 1,\dots,T.$$

Read the folder in this order: ``reference.py`` (the definition), ``parallel.py`` (chunks), ``triton.py`` (GPU).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype, check_same, check_shape, check_values, choose
from .parallel import linear_scan_parallel
from .reference import linear_scan_reference

__all__ = ["linear_scan", "linear_scan_step"]


def linear_scan(
    a: Tensor, b: Tensor, h0: Tensor | None = None, *, reverse: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    r"""Run $h_t = a_t \odot h_{t-1} + b_t$ over the time axis, for all channels at once.

    Args:
        a: gates, ``(B, T, D)``, or ``(B, T, 1)`` when all channels share one gate; real or complex.
        b: inputs, ``(B, T, D)``, of a's dtype.
        h0: the state before the first step, ``(B, D)``; None is zero.
        reverse: walk from the last step to the first: $h_t = a_t h_{t+1} + b_t$, with h0 *after* the last step.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``.

    Returns:
        ``h`` of b's shape and dtype, and the final state ``hT`` ``(B, D)``: the state after the last step walked,
        in float32 where the inputs are float16 or bfloat16. Feeding hT as the h0 of the next piece continues the
        scan exactly where it stopped.

    Gradients flow to a, b and h0, from h and from hT. With $g_t = \partial L/\partial h_t$,
    $$\lambda_t = g_t + \bar a_{t+1}\lambda_{t+1},\quad \lambda_T = g_T + g_{hT},\qquad
      \partial b_t = \lambda_t,\quad \partial a_t = \lambda_t \bar h_{t-1},\quad \partial h_0 = \bar a_1 \lambda_1 :$$
    the backward pass is the same recurrence, walked the other way. Gates may be zero (the state is forgotten) or of
    modulus one (it is kept): nothing is ever divided by a product of gates. Inputs of any stride are accepted; a
    contiguous copy is made where the kernel needs one.

    Raises:
        ValueError: wrong shape, dtype, device or backend, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("b", b, "B T D", sizes)
    shared = isinstance(a, Tensor) and a.ndim == 3 and a.shape[-1] == 1
    check_shape("a", a, "B T 1" if shared else "B T D", sizes)
    if h0 is not None:
        check_shape("h0", h0, "B D", sizes)
        check_same(("b", b), ("h0", h0), dtype=False)
        if h0.is_complex() != b.is_complex():
            raise ValueError(f"expected h0 {'complex' if b.is_complex() else 'real'} like b, got {h0.dtype}")
    check_same(("b", b), ("a", a))
    check_values(a=a, b=b, h0=h0)

    state_dtype = accumulate_dtype(b.dtype)
    h0 = b.new_zeros(b.shape[0], b.shape[2], dtype=state_dtype) if h0 is None else h0.to(state_dtype)
    chosen = choose(backend, a, b, turing=_triton_agrees)
    if b.numel() == 0:
        chosen = "reference"
    if chosen == "reference":
        return linear_scan_reference(a, b, h0, reverse)
    if chosen == "parallel":
        return linear_scan_parallel(a, b, h0, reverse)
    from .triton import linear_scan_triton

    return linear_scan_triton(a, b, h0, reverse)


def linear_scan_step(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """One step for streaming: the state after ``h`` ``(B, D)``, given a ``(B, D)`` or ``(B, 1)`` and b ``(B, D)``."""
    sizes: dict[str, int] = {}
    check_shape("b", b, "B D", sizes)
    check_shape("h", h, "B D", sizes)
    check_shape("a", a, "B 1" if isinstance(a, Tensor) and a.ndim == 2 and a.shape[-1] == 1 else "B D", sizes)
    return a * h + b


@functools.cache
def _triton_agrees() -> bool:
    """Run the Triton kernel once against the parallel form: the admission test for GPUs older than Triton promises."""
    a, b = torch.rand(2, 2, 300, 40, device="cuda").unbind()
    try:
        h, _ = linear_scan(a, b, backend="triton")
        return torch.allclose(h, linear_scan(a, b, backend="parallel")[0], rtol=1e-4, atol=1e-4)
    except Exception:  # a compiler error on an unsupported chip is an answer too
        return False
