r"""Causal convolution with a kernel as long as the sequence, by the fast Fourier transform (chapters 07, 08, 09 and 11).

$$y_t = \sum_{j=0}^{\min(t,\,K-1)} k_j\, u_{t-j} + D\,u_t,\qquad t = 0,\dots,L-1 .$$

Read the folder in this order: ``reference.py`` (the definition), ``parallel.py`` (the transform). There is no Triton
kernel: the time goes into the transforms, and the vendors' libraries are hard to beat there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype, check_same, check_shape, check_values, choose
from .parallel import fftconv_parallel
from .reference import fftconv_reference

__all__ = ["fftconv"]

WHY_NO_TRITON = "there is no Triton kernel for fftconv, the FFT of the library is the fast path"


def fftconv(u: Tensor, k: Tensor, D: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    r"""Convolve every channel of u with its own long kernel, or with M kernels.

    Args:
        u: inputs, ``(B, H, L)``; or ``(B, 1, L)``, one channel that all H kernels share.
        k: kernels, ``(H, K)``, or ``(M, H, K)`` for M outputs a channel. K >= 1 may differ from L: taps beyond L are
            never reached, missing taps are 0.
        D: weight of the input itself, ``(H,)``, or ``(M, H)`` with M kernels; None is 0.
        backend: ``"auto"``, ``"reference"`` or ``"parallel"``.

    Returns:
        ``y`` ``(B, H, L)``, or ``(B, M, H, L)`` with M kernels, in u's dtype. The sums are computed in float32 at
        least, whatever the dtype of the inputs.

    Gradients flow to u, k and D. With $g_t = \partial \mathcal L / \partial y_t$,
    $$\partial u_s = \sum_{t \ge s} k_{t-s}\, g_t + D g_s,\qquad \partial k_j = \sum_{B}\sum_{t \ge j} g_t\, u_{t-j} :$$
    the backward pass correlates, the forward pass convolves. The definition is causal. The transform is causal up to
    rounding: a change of $u_s$ moves earlier outputs by about 1e-7 of the largest one, not by exactly 0.

    Raises:
        ValueError: wrong shape, dtype, device or backend, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    many = isinstance(k, Tensor) and k.ndim == 3
    check_shape("k", k, "M H K" if many else "H K", sizes)
    shared = isinstance(u, Tensor) and u.ndim == 3 and u.shape[1] == 1
    check_shape("u", u, "B 1 L" if shared else "B H L", sizes)
    if sizes["K"] == 0:
        raise ValueError(f"expected k with K of at least 1, got {tuple(k.shape)}")
    if D is not None:
        check_shape("D", D, "M H" if many else "H", sizes)
    for name, tensor in (("u", u), ("k", k), ("D", D)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"expected {name} of a real floating-point dtype, got {tensor.dtype}")
    others = [("k", k)] if D is None else [("k", k), ("D", D)]
    check_same(("u", u), *others, dtype=False)
    check_values(u=u, k=k, D=D)

    dtype = accumulate_dtype(torch.promote_types(u.dtype, k.dtype))
    chosen = choose(backend, u, limit=WHY_NO_TRITON)
    convolve = fftconv_reference if chosen == "reference" or u.numel() == 0 else fftconv_parallel
    wide, kernels = u.to(dtype), k.to(dtype)[..., : u.shape[-1]]
    if many:
        wide = wide[:, None]  # (B, 1, H, L) against (M, H, K)
    y = convolve(wide, kernels)
    if D is not None:
        y = y + D.to(dtype)[..., None] * wide
    return y.to(u.dtype)
