r"""The causal convolution by the fast Fourier transform: O(L log L) instead of O(L²).

The transform turns a *circular* convolution of length n into a product of spectra. Of the plain convolution of L inputs
with K taps the first L outputs are wanted; they are free of wrap-around as soon as $n \ge L + K - 1$. So both are padded
with zeros to such a length, transformed, multiplied, and transformed back:

$$y = \mathrm{irfft}\left(\mathrm{rfft}(u) \odot \mathrm{rfft}(k)\right)_{0 \dots L-1} .$$

Autograd differentiates this as it stands; the gradients are correlations, computed by transforms too.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fast_length(least: int) -> int:
    """Return a length of at least `least` that the transform likes: a power of two, or 5/8 or 3/4 of one."""
    power = max(8, 1 << (least - 1).bit_length())
    return min(n for n in (power * 5 // 8, power * 3 // 4, power) if n >= least)


def fftconv_parallel(u: Tensor, k: Tensor) -> Tensor:
    """Convolve by transforms of padded signals; shapes as in `fftconv_reference`."""
    L = u.shape[-1]
    n = fast_length(L + k.shape[-1] - 1)
    spectrum = torch.fft.rfft(u, n=n) * torch.fft.rfft(k, n=n)
    return torch.fft.irfft(spectrum, n=n)[..., :L]
