r"""The linear recurrence whose state has two components per channel, mixed by a 2 x 2 matrix at every step.

$$\delta_t = J_t\, \delta_{t-1} + r_t,\qquad J_t \in \mathbb R^{2 \times 2},\ r_t \in \mathbb R^2,\qquad t = 1,\dots,T,$$

for every channel by itself. It is what a Newton step of an LSTM solves: the two components are cell and output.

Read the folder in this order: ``reference.py`` (the definition), ``parallel.py`` (chunks), ``triton.py`` (GPU).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype, check_same, check_shape, check_values, choose
from .parallel import block2_scan_parallel
from .reference import block2_scan_reference, block2_step

__all__ = ["block2_scan", "block2_scan_step"]

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def block2_scan(
    J: Tensor, r: Tensor, h0: Tensor | None = None, *, reverse: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    r"""Run $\delta_t = J_t \delta_{t-1} + r_t$ over the time axis, for all channels at once.

    Args:
        J: matrices, ``(B, T, D, 2, 2)``; ``J[b, t, d, i, j]`` takes component j of the old state to component i of the new.
        r: inputs, ``(B, T, D, 2)``, of J's dtype.
        h0: the state before the first step, ``(B, D, 2)``; None is zero.
        reverse: walk from the last step to the first: $\delta_t = J_t \delta_{t+1} + r_t$, with h0 *after* the last step.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``.

    Returns:
        ``delta`` of r's shape and dtype, and the final state ``(B, D, 2)``: the state after the last step walked, in
        float32 where the inputs are float16 or bfloat16. Feeding it as the h0 of the next piece continues the scan
        exactly where it stopped.

    Gradients flow to J, r and h0, from delta and from the final state. With $g_t = \partial L/\partial\delta_t$,
    $$\lambda_t = g_t + J_{t+1}^\top \lambda_{t+1},\quad \lambda_T = g_T + g_{\text{final}},\qquad
      \partial r_t = \lambda_t,\quad \partial J_t = \lambda_t\, \delta_{t-1}^\top,\quad
      \partial h_0 = J_1^\top \lambda_1 :$$
    the same recurrence with transposed matrices, walked the other way. The matrices need no inverse, and nothing is
    divided by them. Inputs of any stride are accepted; a contiguous copy is made where the kernel needs one.

    Raises:
        ValueError: wrong shape, dtype, device or backend, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("r", r, "B T D 2", sizes)
    check_shape("J", J, "B T D 2 2", sizes)
    if h0 is not None:
        check_shape("h0", h0, "B D 2", sizes)
        check_same(("r", r), ("h0", h0), dtype=False)
    if not r.is_floating_point():
        raise ValueError(f"expected r of a floating-point dtype, got {r.dtype}")
    check_same(("r", r), ("J", J))
    check_values(J=J, r=r, h0=h0)

    state_dtype = accumulate_dtype(r.dtype)
    h0 = r.new_zeros(r.shape[0], *r.shape[2:], dtype=state_dtype) if h0 is None else h0.to(state_dtype)
    chosen = choose(backend, J, r, dtypes=TRITON_DTYPES, turing=_triton_agrees)
    if r.numel() == 0:
        chosen = "reference"
    if chosen == "reference":
        return block2_scan_reference(J, r, h0, reverse)
    if chosen == "parallel":
        return block2_scan_parallel(J, r, h0, reverse)
    from .triton import block2_scan_triton

    return block2_scan_triton(J, r, h0, reverse)


def block2_scan_step(J: Tensor, r: Tensor, h: Tensor) -> Tensor:
    """One step for streaming: the state after ``h`` ``(B, D, 2)``, given J ``(B, D, 2, 2)`` and r ``(B, D, 2)``."""
    sizes: dict[str, int] = {}
    check_shape("r", r, "B D 2", sizes)
    check_shape("h", h, "B D 2", sizes)
    check_shape("J", J, "B D 2 2", sizes)
    return block2_step(J, r, h)


@functools.cache
def _triton_agrees() -> bool:
    """Run the Triton kernel once against the parallel form: the admission test for GPUs older than Triton promises."""
    r = torch.randn(2, 300, 20, 2, device="cuda")
    J = torch.rand(2, 300, 20, 2, 2, device="cuda") / 2  # rows sum to at most 1: nothing grows
    try:
        h, _ = block2_scan(J, r, backend="triton")
        return torch.allclose(h, block2_scan(J, r, backend="parallel")[0], rtol=1e-4, atol=1e-4)
    except Exception:  # a compiler error on an unsupported chip is an answer too
        return False
