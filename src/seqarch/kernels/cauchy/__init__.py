r"""The Cauchy sum with conjugate pairs of poles: the transfer function of a diagonal system (chapter 08).

$$y_l = \sum_{n=1}^{S} \left[\frac{v_n}{z_l - w_n} + \frac{\bar v_n}{z_l - \bar w_n}\right],\qquad z_l = i\,\zeta_l .$$

Read the folder in this order: ``reference.py`` (the definition), ``parallel.py`` (real arithmetic), ``triton.py`` (GPU).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._dispatch import check_same, check_shape, check_values, choose
from .parallel import cauchy_parallel
from .reference import cauchy_reference

__all__ = ["cauchy"]

TRITON_DTYPES = (torch.complex64,)


def cauchy(v: Tensor, z_imag: Tensor, w: Tensor, *, backend: str = "auto") -> Tensor:
    r"""Sum poles and their conjugates, at points of the imaginary axis, for every row.

    Args:
        v: residues, ``(R, S)``, complex.
        z_imag: the points $\zeta$, real, ``(R, L)``, or ``(L,)`` when all rows share them. They are constants: no
            gradient flows to them.
        w: poles, ``(R, S)``, of v's dtype, one of each conjugate pair. A point must not be equal to a pole.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``.

    Returns:
        ``y`` ``(R, L)``, complex, of v's dtype.

    Gradients flow to v and w. With $G_l$ the gradient of $y_l$ (PyTorch's convention for complex numbers) and
    $c_{nl} = \overline{1/(z_l - w_n)}$, $r_{nl} = 1/(z_l - \bar w_n)$,
    $$\partial v_n = \sum_l \left[G_l\, c_{nl} + \bar G_l\, r_{nl}\right],\qquad
      \partial w_n = \bar v_n \sum_l \left[G_l\, c_{nl}^2 + \bar G_l\, r_{nl}^2\right] .$$
    Nothing of size R S L is stored, in either pass. Inputs of any stride are accepted; a contiguous copy is made where
    the kernel needs one.

    Raises:
        ValueError: wrong shape, dtype, device or backend, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("v", v, "R S", sizes)
    check_shape("w", w, "R S", sizes)
    shared = isinstance(z_imag, Tensor) and z_imag.ndim == 1
    check_shape("z_imag", z_imag, "L" if shared else "R L", sizes)
    if v.dtype not in (torch.complex64, torch.complex128):
        raise ValueError(f"expected v of dtype torch.complex64 or torch.complex128, got {v.dtype}")
    check_same(("v", v), ("w", w))
    if not z_imag.is_floating_point():
        raise ValueError(f"expected z_imag of a real floating-point dtype, got {z_imag.dtype}")
    check_same(("v", v), ("z_imag", z_imag), dtype=False)
    check_values(v=v, z_imag=z_imag, w=w)

    z_imag = z_imag.detach().to(v.real.dtype)
    chosen = choose(backend, v, w, dtypes=TRITON_DTYPES, turing=_triton_agrees)
    if v.numel() == 0 or z_imag.numel() == 0 or chosen == "reference":
        return cauchy_reference(v, z_imag, w)
    if chosen == "parallel":
        return cauchy_parallel(v, z_imag, w)
    from .triton import cauchy_triton

    return cauchy_triton(v, z_imag, w)


@functools.cache
def _triton_agrees() -> bool:
    """Run the Triton kernel once against the parallel form: the admission test for GPUs older than Triton promises."""
    v, w = torch.randn(2, 3, 20, dtype=torch.complex64, device="cuda").unbind()
    w = torch.complex(-w.real.abs() - 0.1, w.imag)
    z = torch.linspace(-3, 3, 300, device="cuda")
    try:
        y = cauchy(v, z, w, backend="triton")
        return torch.allclose(y, cauchy(v, z, w, backend="parallel"), rtol=1e-4, atol=1e-4)
    except Exception:  # a compiler error on an unsupported chip is an answer too
        return False
