r"""Leaky integrate-and-fire neurons: a recurrence with a threshold in it (chapter 09).

$$h_t = v_{t-1} + \frac{x_t - (v_{t-1} - v_{\text{reset}})}{\tau},\qquad s_t = [\,h_t \ge v_{\text{th}}\,],\qquad
  v_t = (1 - s_t)\, h_t + s_t\, v_{\text{reset}} .$$

The voltage v leaks towards $v_{\text{reset}}$ and is driven by x; where it reaches the threshold, the neuron spikes and
starts again. Read the folder in this order: ``reference.py`` (the definition, with its surrogate gradient),
``parallel.py`` (the lean loop, and a backward pass without a loop), ``triton.py`` (GPU).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype, check_same, check_shape, check_values, choose
from .parallel import lif_parallel
from .reference import fire, lif_reference

__all__ = ["lif", "lif_step"]

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def lif(
    x: Tensor,
    tau: float = 2.0,
    v_th: float = 1.0,
    v_reset: float = 0.0,
    alpha: float = 4.0,
    v0: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Run one spiking neuron per row of x over the last axis.

    Args:
        x: input currents, ``(B, C, N)``, time last.
        tau: time constant in steps, at least 1; 1 forgets the voltage at every step.
        v_th: threshold; a voltage exactly at it spikes.
        v_reset: voltage after a spike, to which the voltage also leaks.
        alpha: steepness of the surrogate derivative.
        v0: the voltage before the first step, ``(B, C)``; None is v_reset.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``.

    Returns:
        Spikes, 0 or 1, of x's shape and dtype, and the voltage ``(B, C)`` after the last step, in float32 where x is
        float16 or bfloat16. Feeding it as the v0 of the next piece continues exactly where this one stopped.

    The voltage is kept in float32 and every operation is rounded as it is written above, so that all implementations
    give the same spikes bit for bit. (A voltage that is off by one rounding can spike a step early, and then nothing
    after it agrees.)

    The derivative of the threshold is zero or infinite; training puts a surrogate in its place, that of a steep sigmoid:
    $\partial s_t / \partial h_t := \alpha\, \sigma(z)(1 - \sigma(z))$ with $z = \alpha (h_t - v_{\text{th}})$. In the reset,
    s is a constant. With $g^s_t = \partial L/\partial s_t$ and, at the end, $g^v_N = \partial L/\partial v_N$, from the
    last step to the first,
    $$g^h_t = g^s_t\, \frac{\partial s_t}{\partial h_t} + (1 - s_t)\, g^v_t,\qquad
      \partial x_t = \frac{g^h_t}{\tau},\qquad g^v_{t-1} = \Big(1 - \frac1\tau\Big) g^h_t .$$
    Inputs of any stride are accepted; a copy with time outermost is made where the kernel needs one.

    Raises:
        ValueError: wrong shape, dtype, device, tau, alpha or backend, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("x", x, "B C N", sizes)
    v0 = _start(x, v0, tau, alpha, v_reset, sizes)
    chosen = choose(backend, x, dtypes=TRITON_DTYPES, turing=_triton_agrees)
    if x.numel() == 0:
        chosen = "reference"
    if chosen == "triton":
        from .triton import lif_triton as run
    else:
        run = lif_reference if chosen == "reference" else lif_parallel
    B, C, N = x.shape
    spikes, v = run(x.reshape(B * C, N), v0.reshape(B * C), float(tau), float(v_th), float(v_reset), float(alpha))
    return spikes.view(B, C, N), v.view(B, C)


def lif_step(
    x: Tensor,
    v: Tensor | None = None,
    tau: float = 2.0,
    v_th: float = 1.0,
    v_reset: float = 0.0,
    alpha: float = 4.0,
) -> tuple[Tensor, Tensor]:
    """One step for streaming: x ``(B, C)`` and the voltage v ``(B, C)``; return the spikes and the new voltage.

    Raises:
        ValueError: wrong shape, dtype, device, tau or alpha, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("x", x, "B C", sizes)
    v = _start(x, v, tau, alpha, v_reset, sizes, name="v")
    spikes, v = fire(x.to(v.dtype), v, v.new_full((), tau), v_th, v_reset, alpha)
    return spikes.to(x.dtype), v


def _start(
    x: Tensor,
    v0: Tensor | None,
    tau: float,
    alpha: float,
    v_reset: float,
    sizes: dict[str, int],
    name: str = "v0",
) -> Tensor:
    """Check what both functions take beyond the shape of x; return the first voltage in the dtype to compute in."""
    if not x.is_floating_point():
        raise ValueError(f"expected x of a floating-point dtype, got {x.dtype}")
    if not tau >= 1:
        raise ValueError(f"expected tau of at least 1, got {tau}")
    if not alpha > 0:
        raise ValueError(f"expected alpha above 0, got {alpha}")
    check_values(x=x, **{name: v0})
    dtype = accumulate_dtype(x.dtype)
    if v0 is None:
        return x.new_full((sizes["B"], sizes["C"]), v_reset, dtype=dtype)
    check_shape(name, v0, "B C", sizes)
    check_same(("x", x), (name, v0), dtype=False)
    return v0.to(dtype)


@functools.cache
def _triton_agrees() -> bool:
    """Run the Triton kernel once against the parallel form: the admission test for GPUs older than Triton promises."""
    x = 2 * torch.rand(2, 40, 100, device="cuda")
    try:
        return torch.equal(lif(x, 3.0, backend="triton")[0], lif(x, 3.0, backend="parallel")[0])
    except Exception:  # a compiler error on an unsupported chip is an answer too
        return False
