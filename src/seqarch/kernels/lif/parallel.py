r"""The spiking neuron in lean PyTorch: a loop forward, and none backward.

Forward there is no way round the loop. A linear step is a map that composes with the next into one of the same kind;
a step with a threshold does not: two thresholds in a row cut the line of voltages into up to four pieces, T of them
into up to $2^T$. What can be saved is everything around the arithmetic. The loop runs outside autograd on buffers
allocated beforehand, time-major, ``(N, R)``, so that a step is one contiguous piece of memory; and the comparison that
gives the spikes is made once, after the loop, for all steps together.

Backward the spikes are known, and with them every branch that was taken. What is left of the equations in `lif`,

$$g^h_t = g^s_t\, \frac{\partial s_t}{\partial h_t} + (1 - s_t) \Big(1 - \frac1\tau\Big)\, g^h_{t+1},$$

is a linear scan with gates $(1 - s_t)(1 - 1/\tau)$, and runs in chunks as `linear_scan` does. A spike is a gate of 0: no
gradient crosses it.

Kept for the backward pass are the spikes, one byte each, and the slopes $\partial s_t / \partial h_t$ in x's dtype. (Slopes,
not voltages: a voltage rounded to half precision would be off by more, once alpha and the exponential are done with it.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..linear_scan.parallel import scan_chunks
from .reference import surrogate

BLOCK = 2**17  # elements in one piece of the time axis: the backward pass stays in a CPU's cache


def integrate(x: Tensor, v: Tensor, tau: float, v_th: float, v_reset: float) -> Tensor:
    """Replace currents x ``(N, R)`` by the voltages h before the reset; return the last voltage after it ``(R,)``."""
    # tensors without axes: a plain number would be wrapped anew in every call, which takes longer than the call
    tau, v_th, v_reset = (v.new_full((), number) for number in (tau, v_th, v_reset))
    v, drive, quiet = v.clone(), torch.empty_like(v), torch.empty(v.shape, dtype=torch.bool, device=v.device)
    for row in x.unbind(0):
        torch.sub(v, v_reset, out=drive)
        torch.sub(row, drive, out=drive)
        torch.addcdiv(v, drive, tau, out=row)  # h
        torch.lt(row, v_th, out=quiet)
        torch.where(quiet, row, v_reset, out=v)
    return v


class _LIF(torch.autograd.Function):
    """The loop, and the linear scan that is its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, v0: Tensor, tau: float, v_th: float, v_reset: float, alpha: float):
        h = torch.empty(x.T.shape, dtype=v0.dtype, device=x.device).copy_(x.T)
        v = integrate(h, v0, tau, v_th, v_reset)
        fired = h >= v_th
        ctx.save_for_backward(surrogate(h.sub_(v_th), alpha).to(x.dtype), fired)
        ctx.keep, ctx.tau = 1 - 1 / tau, tau
        return fired.to(x.dtype).T.contiguous(), v

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_spikes: Tensor, grad_v: Tensor):
        slopes, fired = ctx.saved_tensors
        grad_spikes, grad_x = grad_spikes.T.contiguous(), torch.empty_like(slopes)
        N, R = slopes.shape
        steps = max(16, BLOCK // R)
        for start in reversed(range(0, N, steps)):
            part = slice(start, start + steps)
            quiet = torch.where(fired[part], 0.0, torch.ones_like(grad_v))
            direct = slopes[part].to(grad_v.dtype) * grad_spikes[part]
            direct[-1].addcmul_(quiet[-1], grad_v)  # what comes from the steps after this piece
            grad_h = torch.empty_like(direct)
            scan_chunks((ctx.keep * quiet)[None], direct[None], torch.zeros_like(grad_v)[None], True, out=grad_h[None])
            grad_x[part] = grad_h / ctx.tau
            grad_v = ctx.keep * grad_h[0]
        return grad_x.T.contiguous(), grad_v, None, None, None, None


def lif_parallel(x: Tensor, v: Tensor, tau: float, v_th: float, v_reset: float, alpha: float) -> tuple[Tensor, Tensor]:
    """The lean loop with its hand-written gradient; flattened rows as in `lif_reference`."""
    return _LIF.apply(x, v, tau, v_th, v_reset, alpha)
