r"""Depthwise convolution along time: every channel has its own few taps, and channels do not mix.

$$y_t = b + \sum_{i=0}^{k-1} w_i \odot x_{t + s - i\delta},\qquad x_j = 0 \text{ outside the sequence.}$$

The taps lie $\delta$ steps apart (the dilation). With shift $s = 0$ the sum looks back only, and tap 0 is the current step:
the *causal* convolution of language models. With $s = \delta(k-1)/2$ it looks equally far both ways: the *centred* one.

Read the folder in this order: ``reference.py`` (the definition), ``parallel.py`` (shift and add), ``triton.py`` (GPU).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._dispatch import check_same, check_shape, check_values, choose
from .parallel import depthwise_conv1d_parallel
from .reference import depthwise_conv1d_reference

__all__ = ["depthwise_conv1d", "depthwise_conv1d_step"]

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = (None, "silu")


def depthwise_conv1d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    dilation: int = 1,
    causal: bool = True,
    state: Tensor | None = None,
    *,
    activation: str | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Convolve each channel of a sequence with its own taps.

    Args:
        x: the sequence, ``(B, T, D)``.
        w: the taps, ``(D, k)``; causal: ``w[:, i]`` multiplies the input i * dilation steps ago. (This is the order of
            a convolution. torch.nn.Conv1d computes a correlation, whose weights run the other way.)
        bias: ``(D,)``; None is zero.
        dilation: steps between taps, at least 1.
        causal: look back only; False centres the taps on the current step, for which k must be odd.
        state: the last (k - 1) * dilation inputs before x, oldest first, ``(B, (k-1)*dilation, D)``; None is zeros.
            Only with ``causal=True``.
        activation: None, or ``"silu"`` for $y \sigma(y)$, fused into the kernel.
        return_state: also return the state after the last step.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``.

    Returns:
        ``y`` of x's shape and dtype (sums are kept in float32 where x is float16 or bfloat16), or ``(y, state)`` with
        ``return_state``. Feeding that state with the next piece continues as if the pieces were one sequence.

    Gradients flow to x, w, bias and state. With $g_t = \partial L / \partial y_t$ (after the activation's own derivative),
    $$\partial x_j = \sum_i w_i \odot g_{j - s + i\delta},\qquad
      \partial w_i = \sum_t g_t \odot x_{t + s - i\delta},\qquad \partial b = \sum_t g_t :$$
    the gradient of x is the same operation with shift and dilation negated. Inputs of any stride are accepted; a
    contiguous copy is made where the kernel needs one.

    Raises:
        ValueError: wrong shape, dtype, device, dilation, activation or backend, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("x", x, "B T D", sizes)
    reach = _check(x, w, bias, state, dilation, activation, sizes)
    if not causal:
        if sizes["k"] % 2 == 0:
            raise ValueError(f"expected an odd number of taps k with causal=False, got {sizes['k']}")
        if state is not None or return_state:
            raise ValueError("expected neither state nor return_state with causal=False, got one: it looks ahead")
    check_values(x=x, w=w, bias=bias, state=state)

    steps, shift = x.shape[1], 0 if causal else reach // 2
    chosen = choose(backend, x, dtypes=TRITON_DTYPES, turing=_triton_agrees)
    if state is not None:  # the state is the sequence's own past: put it in front, and start right after it
        x, shift = torch.cat([state.to(x.dtype), x], dim=1), reach
    if chosen == "triton" and x.shape[0] * steps * x.shape[2] > 0:
        from .triton import depthwise_conv1d_triton as convolve
    else:
        convolve = depthwise_conv1d_parallel if chosen == "parallel" else depthwise_conv1d_reference
    y = convolve(x, w, bias, dilation, shift, steps, activation)
    return (y, _last(x, reach)) if return_state else y


def depthwise_conv1d_step(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    dilation: int = 1,
    state: Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of the causal convolution, for streaming: x ``(B, D)``; return y ``(B, D)`` and the new state.

    The state holds the last (k - 1) * dilation inputs, oldest first, ``(B, (k-1)*dilation, D)``; None is zeros.

    Raises:
        ValueError: wrong shape, dtype, device, dilation or activation, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("x", x, "B D", sizes)
    reach = _check(x, w, bias, state, dilation, activation, sizes)
    past = x.new_zeros(sizes["B"], reach, sizes["D"]) if state is None else state.to(x.dtype)
    window = torch.cat([past, x[:, None]], dim=1)
    y = depthwise_conv1d_reference(window, w, bias, dilation, reach, 1, activation)
    return y[:, 0], window[:, 1:]


def _check(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    dilation: int,
    activation: str | None,
    sizes: dict[str, int],
) -> int:
    """Check what both functions take beyond the shape of x; return how many steps the taps reach back."""
    check_shape("w", w, "D k", sizes)
    if sizes["k"] == 0:
        raise ValueError(f"expected w with at least one tap, got {tuple(w.shape)}")
    if not isinstance(dilation, int) or dilation < 1:
        raise ValueError(f"expected dilation to be an integer of at least 1, got {dilation!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"expected activation to be None or 'silu', got {activation!r}")
    reach = (sizes["k"] - 1) * dilation
    given = [("w", w)]
    if bias is not None:
        check_shape("bias", bias, "D", sizes)
        given.append(("bias", bias))
    if state is not None:
        check_shape("state", state, "B (k-1)*dilation D", sizes | {"(k-1)*dilation": reach})
        given.append(("state", state))
    if not x.is_floating_point():
        raise ValueError(f"expected x of a floating-point dtype, got {x.dtype}")
    check_same(("x", x), *given, dtype=False)
    return reach


def _last(x: Tensor, count: int) -> Tensor:
    """The last `count` steps of x, with zeros in front where it is shorter."""
    missing = max(0, count - x.shape[1])
    return torch.nn.functional.pad(x, (0, 0, missing, 0))[:, x.shape[1] + missing - count :].clone()


@functools.cache
def _triton_agrees() -> bool:
    """Run the Triton kernel once against the parallel form: the admission test for GPUs older than Triton promises."""
    x, w = torch.rand(2, 300, 40, device="cuda"), torch.rand(40, 4, device="cuda")
    try:
        y = depthwise_conv1d(x, w, dilation=2, backend="triton")
        return torch.allclose(y, depthwise_conv1d(x, w, dilation=2, backend="parallel"), rtol=1e-4, atol=1e-4)
    except Exception:  # a compiler error on an unsupported chip is an answer too
        return False
