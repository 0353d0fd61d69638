r"""The Vandermonde sum as a matrix product: two tables of powers instead of one exponential per sample.

Write the sample index as $l = cB + j$ with $0 \le j < B$. Then

$$e^{w l} = e^{w c B}\, e^{w j},\qquad
  K_{cB + j} = 2\,\mathrm{Re} \sum_n \left(v_n e^{w_n c B}\right) e^{w_n j} ,$$

a product of a ``(C, S)`` matrix with an ``(S, B)`` one. With $B \approx \sqrt L$ the tables hold about $2 S \sqrt L$
exponentials instead of $S L$. So there is time to compute them in double precision, where an angle $\mathrm{Im}(w)\, l$
of many turns keeps its digits, and only afterwards to round. Autograd differentiates the products and the tables.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tables(w: Tensor, C: int, B: int) -> tuple[Tensor, Tensor]:
    """Return the powers $e^{w c B}$ ``(R, S, C)`` and $e^{w j}$ ``(R, S, B)`` in double precision."""
    wide = w.to(torch.complex128)[..., None]
    far = torch.arange(C, dtype=torch.float64, device=w.device) * B
    near = torch.arange(B, dtype=torch.float64, device=w.device)
    return torch.exp(wide * far), torch.exp(wide * near)


def planes(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Real and imaginary part, rounded to `dtype`; powers too small for a normal number become 0.

    Processors multiply subnormal numbers about a hundred times more slowly, and a decayed oscillation is full of them.
    The modulus decides, not each part: the imaginary part of a real power is 0, and its gradient is not.
    """
    x = torch.where(x.abs() < torch.finfo(dtype).tiny, 0.0, x)
    return x.real.to(dtype), x.imag.to(dtype)


def vandermonde_parallel(v: Tensor, w: Tensor, L: int) -> Tensor:
    """Products of two tables; shapes as in `vandermonde`."""
    dtype = v.real.dtype
    B = max(1, round(L**0.5))
    C = -(-L // B)
    far, near = tables(w, C, B)
    far, far_i = planes(2 * v.to(torch.complex128)[..., None] * far, dtype)
    near, near_i = planes(near, dtype)
    left = torch.cat([far, -far_i], dim=1)  # (R, 2 S, C)
    right = torch.cat([near, near_i], dim=1)  # (R, 2 S, B)
    return (left.transpose(1, 2) @ right).flatten(1)[:, :L]
