r"""The definition of the spiking neuron: a loop over time. Everything else is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor


class Spike(torch.autograd.Function):
    """[h >= v_th] forward; backward as if it were a sigmoid of steepness alpha."""

    @staticmethod
    def forward(ctx, h: Tensor, v_th: float, alpha: float) -> Tensor:
        """Spikes, 0 or 1, where the voltage h reaches the threshold."""
        ctx.save_for_backward(h)
        ctx.v_th, ctx.alpha = v_th, alpha
        return (h >= v_th).to(h.dtype)

    @staticmethod
    def backward(ctx, g: Tensor):
        """The incoming gradient times the surrogate's slope."""
        (h,) = ctx.saved_tensors
        return g * surrogate(h - ctx.v_th, ctx.alpha), None, None


def surrogate(distance: Tensor, alpha: float) -> Tensor:
    r"""The derivative put in place of the threshold's: $\alpha\,\sigma(z)\,\sigma(-z)$, z = alpha times the distance.

    This is $\alpha\,\sigma(z)(1-\sigma(z))$ without the difference, of which rounding leaves nothing when z is large.
    """
    z = alpha * distance
    return alpha * torch.sigmoid(z) * torch.sigmoid(-z)


def fire(x: Tensor, v: Tensor, tau: Tensor, v_th: float, v_reset: float, alpha: float) -> tuple[Tensor, Tensor]:
    """One step of all neurons; return the spikes and the voltage after the reset.

    tau is a tensor without axes. Divided by a plain number, a GPU would multiply by the rounded inverse instead, and
    voltages close to the threshold would fall on its other side.
    """
    h = v + (x - (v - v_reset)) / tau
    s = Spike.apply(h, v_th, alpha)
    return s, torch.where(s.detach() == 1, v_reset, h)  # no gradient through s here: the reset is a constant


def lif_reference(x: Tensor, v: Tensor, tau: float, v_th: float, v_reset: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Walk along time one step at a time; autograd gives the gradients. Rows are flattened: x ``(R, N)``, v ``(R,)``."""
    spikes, tau = [], v.new_full((), tau)
    # unbind, not x[:, t]: the backward of each slice would fill a zero tensor of the whole length, O(N^2) in all
    for current in x.to(v.dtype).unbind(1):
        s, v = fire(current, v, tau, v_th, v_reset, alpha)
        spikes.append(s)
    return (torch.stack(spikes, dim=1).to(x.dtype) if spikes else x.clone()), v
