r"""Structured state-space layers in their fast form: S4 and its diagonal relative S4D (taught in chapter 08).

Every feature has its own system of N states. Eigenvalues come in conjugate pairs, so S = N / 2 complex numbers are kept
and sums over a system are twice the real part of sums over its half.

* S4: $A = \operatorname{diag}(\lambda) - P P^*$, bilinear rule. The convolution kernel comes from four Cauchy sums and an
  inverse Fourier transform; the read-out that is trained is $\tilde C = C (I - \bar A^L)$ for one *built* length L.
* S4D: $A = \operatorname{diag}(\lambda)$, zero-order hold. The kernel is a Vandermonde sum, of any length.

Both layers map ``(B, L, H)`` to ``(B, L, H)``: convolution, GELU, dropout, and a linear map that mixes the features. Both
also walk, one token at a time, with ``step``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import cauchy, fftconv, vandermonde
from .hippo import nplr

__all__ = ["S4DKernel", "S4DLayer", "S4Kernel", "S4Layer", "parameter_groups"]

SLOW = ("log_neg_re", "im", "P", "B", "log_dt")


def parameter_groups(model: nn.Module, lr: float, slow_lr: float = 1e-3, weight_decay: float = 0.01) -> list[dict]:
    """Groups for an optimiser: what shapes the memory of S4 layers at min(lr, slow_lr) without decay, the rest at lr."""
    slow = [
        getattr(kernel, name)
        for kernel in model.modules()
        if isinstance(kernel, (S4Kernel, S4DKernel))
        for name in SLOW
        if hasattr(kernel, name)
    ]
    known = {id(p) for p in slow}
    rest = [p for p in model.parameters() if id(p) not in known and p.requires_grad]
    slow = [p for p in slow if p.requires_grad]
    groups = [
        dict(params=slow, lr=min(lr, slow_lr), weight_decay=0.0),
        dict(params=rest, lr=lr, weight_decay=weight_decay),
    ]
    return [g for g in groups if g["params"]]


class Recurrence(NamedTuple):
    """What one step needs, computed once from a kernel's parameters; the state is ``(B, H, S)``, complex."""

    decay: Tensor  # (H, S): the state is multiplied by this first,
    back: Tensor  # (H, S): and by this last
    B: Tensor  # (H, S)
    C: Tensor  # (M, H, S)
    P: Tensor | None = None  # (H, S); None for a diagonal system
    backP: Tensor | None = None  # (H, S)
    scale: Tensor | None = None  # (H,)

    def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The state x ``(B, H, S)`` and an input u ``(B, H)`` -> y ``(B, M, H)`` and the new state."""
        v = self.decay * x + self.B * u[..., None]
        if self.P is not None:
            v = v - self.P * _pair_sum(self.P.conj() * x)[..., None]
        x = self.back * v
        if self.P is not None:
            x = x - self.backP * (self.scale * _pair_sum(self.P.conj() * x))[..., None]
        return _pair_sum(self.C * x[:, None]), x


class _Kernel(nn.Module):
    """The parameters that S4 and S4D have in common: eigenvalues, B, C and the logarithm of the step, per feature."""

    def __init__(self, H: int, N: int, dt: tuple[float, float], M: int, lam: Tensor, B: Tensor):
        super().__init__()
        if N < 2 or N % 2:
            raise ValueError(f"expected N to be even and at least 2 (states come in conjugate pairs), got {N}")
        if not 0 < dt[0] <= dt[1]:
            raise ValueError(f"expected steps 0 < dt[0] <= dt[1], got {tuple(dt)}")
        if lam.shape != (N // 2,) or not (lam.real < 0).all():
            raise ValueError(
                f"expected N / 2 = {N // 2} eigenvalues with a negative real part, got {tuple(lam.shape)} "
                f"with a largest real part of {lam.real.max().item():g}"
            )
        self.H, self.N, self.M = H, N, M
        self.log_neg_re = nn.Parameter((-lam.real).log().float().repeat(H, 1))
        self.im = nn.Parameter(lam.imag.float().repeat(H, 1))
        self.B = nn.Parameter(_real(B).repeat(H, 1, 1))
        self.C = nn.Parameter(_real(torch.randn(M, H, N // 2, dtype=torch.complex64)))
        self.log_dt = nn.Parameter(torch.empty(H).uniform_(math.log(dt[0]), math.log(dt[1])))

    def eigenvalues(self) -> Tensor:
        """The half of the eigenvalues that is kept, ``(H, S)``."""
        return torch.complex(-self.log_neg_re.exp(), self.im)


class S4Kernel(_Kernel):
    """Kernels K ``(M, H, L)`` of diagonal-minus-rank-one systems, and their recurrence.

    Args:
        H: features.
        N: states per feature, even.
        L: the longest kernel, the *built* length; `grow` makes it longer later.
        dt: the range of the steps, drawn uniformly on a logarithmic scale.
        M: kernels per feature.
        start: ``(lam, P, B)``, each ``(N / 2,)`` and complex, shared by all features at the start; None is HiPPO-LegS.
    """

    def __init__(
        self,
        H: int,
        N: int,
        L: int,
        dt: tuple[float, float] = (1e-3, 1e-1),
        M: int = 1,
        start: tuple[Tensor, Tensor, Tensor] | None = None,
    ):
        lam, P, B = legs_start(N) if start is None else start
        super().__init__(H, N, dt, M, lam, B)
        if not isinstance(L, int) or L < 1:
            raise ValueError(f"expected a built length L of at least 1, got {L!r}")
        self.P = nn.Parameter(_real(P).repeat(H, 1, 1))
        self.register_buffer("built", torch.tensor(L))
        self._change_C(lambda C, power, eye: C @ (eye - power))

    def forward(self, L: int | None = None) -> Tensor:
        """The first L taps (None: all that were built), ``(M, H, L)``."""
        built = int(self.built)
        L = built if L is None else L
        if L > built:
            raise ValueError(f"expected a length of at most {built}, the built length, got {L}: call grow({L}) first")
        dt, lam = self.log_dt.exp()[:, None], self.eigenvalues()
        P, B, C = (torch.view_as_complex(x) for x in (self.P, self.B, self.C))
        v = torch.cat([C * B, C * P, (P.conj() * B)[None], (P.conj() * P)[None]])
        angle = math.pi / built * torch.arange((built + 1) // 2, dtype=torch.float64, device=dt.device)
        z = (2 * angle.tan()).to(dt.dtype)
        sums = cauchy(v.flatten(0, 1), z, (dt * lam).expand_as(v).flatten(0, 1)).view(*v.shape[:2], -1)
        CB, CP, PB, PP = (dt * sums).split([self.M, self.M, 1, 1])
        spectrum = torch.complex(torch.ones_like(z), z / 2) * (CB - CP * PB / (1 + PP))
        if built % 2 == 0:  # the node at -1, where z is infinite
            last = (dt * (C * B).real).sum(-1, keepdim=True)
            spectrum = torch.cat([spectrum, last.to(spectrum.dtype)], dim=-1)
        return torch.fft.irfft(spectrum, n=built)[..., :L]

    @torch.no_grad()
    def grow(self, L: int) -> None:
        """Double the built length until it is at least L; all taps so far stay what they were."""
        while int(self.built) < L:
            self._change_C(lambda C, power, eye: C @ (eye + power))
            self.built *= 2

    @torch.no_grad()
    def recurrence(self) -> Recurrence:
        """The same system as a recurrence: the true C is recovered from the trained one."""
        rate, lam = 2 / self.log_dt.exp()[:, None], self.eigenvalues()
        P, B = torch.view_as_complex(self.P), torch.view_as_complex(self.B)
        C = self._changed_C(lambda C, power, eye: torch.linalg.solve(eye - power, C, left=False))
        back = 1 / (rate - lam)
        backP = back * P
        scale = 1 / (1 + _pair_sum(P.conj() * backP))
        return Recurrence(rate + lam, back, 2 * B, C.to(B.dtype), P.clone(), backP, scale)

    def _changed_C(self, change) -> Tensor:
        """change(C, Abar^L, I) in double precision; C ``(H, M, N)`` over full systems; the half ``(M, H, S)``."""
        dt = self.log_dt.double().exp()[:, None]
        lam = torch.complex(-self.log_neg_re.double().exp(), self.im.double())
        P, C = (torch.view_as_complex(x.double()) for x in (self.P, self.C))
        lam, P, C = (torch.cat([x, x.conj()], dim=-1) for x in (lam, P, C))
        back = 1 / (2 / dt - lam)
        backP = back * P
        right = torch.diag_embed(2 / dt + lam) - P[..., None] * P.conj()[:, None]
        left = backP[..., None] * (P.conj() * back)[:, None] / (1 + (P.conj() * backP).sum(-1))[:, None, None]
        Abar = (torch.diag_embed(back) - left) @ right
        power, eye = torch.linalg.matrix_power(Abar, int(self.built)), torch.eye(self.N, dtype=C.dtype, device=C.device)
        return change(C.transpose(0, 1), power, eye).transpose(0, 1)[..., : self.N // 2]

    @torch.no_grad()
    def _change_C(self, change) -> None:
        self.C.copy_(torch.view_as_real(self._changed_C(change).contiguous()))


class S4DKernel(_Kernel):
    """Kernels K ``(M, H, L)`` of diagonal systems, for any length, and their recurrence.

    Args:
        H: features.
        N: states per feature, even.
        dt: the range of the steps, drawn uniformly on a logarithmic scale.
        M: kernels per feature.
        start: ``"legs"``, ``"inv"`` or ``"lin"``, or ``(lam, B)``, each ``(N / 2,)`` and complex.
    """

    def __init__(
        self,
        H: int,
        N: int,
        dt: tuple[float, float] = (1e-3, 1e-1),
        M: int = 1,
        start: str | tuple[Tensor, Tensor] = "legs",
    ):
        lam, B = diagonal_start(start, N) if isinstance(start, str) else start
        super().__init__(H, N, dt, M, lam, B)

    def forward(self, L: int) -> Tensor:
        """The first L taps, ``(M, H, L)``."""
        power, Bbar = self._discrete()
        v = torch.view_as_complex(self.C) * Bbar
        return vandermonde(v.flatten(0, 1), power.expand_as(v).flatten(0, 1), L).view(self.M, self.H, L)

    @torch.no_grad()
    def recurrence(self) -> Recurrence:
        """The same system as a recurrence."""
        power, Bbar = self._discrete()
        return Recurrence(power.exp(), torch.ones_like(Bbar), Bbar, torch.view_as_complex(self.C).clone())

    def _discrete(self) -> tuple[Tensor, Tensor]:
        """The exponents of one step and the discrete B, by the zero-order hold: both ``(H, S)``."""
        lam = self.eigenvalues()
        power = self.log_dt.exp()[:, None] * lam
        return power, torch.view_as_complex(self.B) * (power.exp() - 1) / lam


class _Layer(nn.Module):
    """Convolution with a kernel, the input itself, GELU, dropout tied over time, and mixing of the features."""

    def __init__(self, kernel: _Kernel, M: int, dropout: float, bidirectional: bool, glu: bool):
        super().__init__()
        H = kernel.H
        self.kernel, self.bidirectional = kernel, bidirectional
        self.D = nn.Parameter(torch.randn(M, H))
        self.dropout = nn.Dropout1d(dropout)
        self.mix = nn.Sequential(nn.Linear(M * H, 2 * H), nn.GLU()) if glu else nn.Linear(M * H, H)

    def forward(self, u: Tensor) -> Tensor:
        """Map ``(B, L, H)`` to ``(B, L, H)``, causally unless the layer is bidirectional."""
        if u.ndim != 3 or u.shape[-1] != self.kernel.H or not u.is_floating_point():
            raise ValueError(
                f"expected real u of shape (batch, length, features = {self.kernel.H}), got {u.dtype} {tuple(u.shape)}"
            )
        L, K = u.shape[1], self.kernel(u.shape[1])
        if self.bidirectional:
            ahead, behind = K.chunk(2)
            both = F.pad(ahead, (0, L)) + F.pad(behind.flip(-1), (L, 0))
            spectrum = torch.fft.rfft(u.mT[:, None], n=2 * L) * torch.fft.rfft(both)
            y = torch.fft.irfft(spectrum, n=2 * L)[..., :L] + self.D[..., None] * u.mT[:, None]
        else:
            y = fftconv(u.mT, K, self.D)
        y = self.dropout(F.gelu(y).flatten(1, 2))  # (B, M H, L)
        return self.mix(y.mT)

    def step(self, u: Tensor, state: tuple[Recurrence, Tensor] | None = None):
        """Absorb one token ``(B, H)``: return its output ``(B, H)`` and the state (None before the first token)."""
        if self.bidirectional:
            raise ValueError("expected a causal layer, got bidirectional=True: it cannot run as a recurrence")
        if state is None:
            recurrence = self.kernel.recurrence()
            state = recurrence, recurrence.B.new_zeros(len(u), *recurrence.B.shape)
        y, x = state[0].step(state[1], u)
        return self.mix(F.gelu(y + self.D * u[:, None]).flatten(1)), (state[0], x)


class S4Layer(_Layer):
    """S4: ``(B, L, H)`` to ``(B, L, H)``, for L up to the built length; `step` walks any number of tokens.

    Args:
        H: features.
        N: states per feature, even.
        L: the built length; ``layer.kernel.grow(L)`` makes it longer later.
        dt: the range of the steps, drawn uniformly on a logarithmic scale.
        M: outputs per feature before the features are mixed.
        dropout: of whole channels, the same ones at all times.
        bidirectional: a second kernel reads the sequence backwards.
        glu: mix by a gated linear unit.
        start: ``(lam, P, B)`` instead of HiPPO-LegS.

    Raises:
        ValueError: odd N, steps that are not positive, complex input, or a sequence longer than the built length.
    """

    def __init__(
        self,
        H: int,
        N: int = 64,
        L: int = 1024,
        dt: tuple[float, float] = (1e-3, 1e-1),
        M: int = 1,
        dropout: float = 0.0,
        bidirectional: bool = False,
        glu: bool = False,
        start: tuple[Tensor, Tensor, Tensor] | None = None,
    ):
        super().__init__(S4Kernel(H, N, L, dt, 2 * M if bidirectional else M, start), M, dropout, bidirectional, glu)


class S4DLayer(_Layer):
    """S4D: ``(B, L, H)`` to ``(B, L, H)``, for any L; arguments as in `S4Layer`, start as in `S4DKernel`."""

    def __init__(
        self,
        H: int,
        N: int = 64,
        dt: tuple[float, float] = (1e-3, 1e-1),
        M: int = 1,
        dropout: float = 0.0,
        bidirectional: bool = False,
        glu: bool = False,
        start: str | tuple[Tensor, Tensor] = "legs",
    ):
        super().__init__(S4DKernel(H, N, dt, 2 * M if bidirectional else M, start), M, dropout, bidirectional, glu)


def legs_start(N: int) -> tuple[Tensor, Tensor, Tensor]:
    """The upper halves of HiPPO-LegS: lam, P and B, each ``(N / 2,)``."""
    lam, P, B, _ = nplr("legs", N)
    return lam[N // 2 :], P[0, N // 2 :], B[N // 2 :]


def diagonal_start(name: str, N: int) -> tuple[Tensor, Tensor]:
    """The initialisations of S4D: lam and B, each ``(N / 2,)``."""
    n = torch.arange(N // 2, dtype=torch.float64)
    half, one = torch.full_like(n, -0.5), torch.ones(N // 2, dtype=torch.complex128)
    if name == "legs":
        lam, _, B = legs_start(N)
        return lam, B / 2
    if name == "inv":
        return torch.complex(half, N / math.pi * (N / (2 * n + 1) - 1)), one
    if name == "lin":
        return torch.complex(half, math.pi * n), one
    raise ValueError(f"expected start to be one of legs, inv, lin, got {name!r}")


def _real(x: Tensor) -> Tensor:
    """Complex numbers as pairs of float32: what optimisers and checkpoints like."""
    return torch.view_as_real(x.to(torch.complex64).resolve_conj()).clone()


def _pair_sum(x: Tensor) -> Tensor:
    """The sum over full systems, given the terms of one half: twice the real part."""
    return 2 * x.sum(-1).real
