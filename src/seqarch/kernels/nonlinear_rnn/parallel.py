r"""Newton's method on the whole trajectory, in PyTorch without a loop over time.

Take the L states as one unknown. The recurrence asks that all residuals $r_l = f(h_{l-1}, w_l) - h_l$ vanish. A Newton
step linearises them: with $J_l = \partial f/\partial h$ at $(h_{l-1}, w_l)$ the corrections obey

$$\delta_l = J_l\, \delta_{l-1} + r_l,\qquad \delta_0 = 0,\qquad h_l \leftarrow h_l + \delta_l ,$$

which is a *linear* recurrence: `linear_scan` for ParaGRU, whose J is a number per channel, `block2_scan` for ParaLSTM, whose
J is a 2 x 2 matrix per channel. The start is $h_l = f(0, w_l)$. After k steps at least the first k + 1 states are exact,
and cells that contract need only two or three steps for all of them.

Three choices make it dependable:

* *tiles*: the sequence is solved tile by tile, each from the last iterate of the one before. Errors cannot travel
  far, and what a tile needs stays in the cache;
* *projection*: a true state is a weighted mean of the state before and a tanh, so it cannot leave $[-m, m]$ with
  $m = \max(1, |h_0|)$. Every iterate is put back there. A correction that overflowed to NaN is dropped;
* *no gradient through the iterations*. With $g_l = \partial L / \partial h_l$ the adjoint is the reverse scan
  $\mu_l = J_l^\top (g_l + \mu_{l+1})$, and the gradients of w and a are one vector-Jacobian product of f at the solution
  with the cotangents $g_l + \mu_{l+1}$. Nothing of the iterations is stored.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..block2_scan.parallel import scan_planes
from ..linear_scan.parallel import scan_chunks
from .reference import gru_cell, lstm_cell

TILE = 2**16  # numbers per tensor in a tile: a few such tensors fit the cache of a core
SHORTEST = 64  # steps in a tile at least


def _tiles(w: Tensor) -> Iterator[slice]:
    """Cut the time axis of w ``(B, L, 3, D)``."""
    B, L, _, D = w.shape
    length = max(SHORTEST, TILE // (B * D))
    return (slice(start, min(start + length, L)) for start in range(0, L, length))


def _shift(states: Tensor, start: Tensor) -> Tensor:
    """The state before every step: ``(..., L, D)`` moved one step on, with `start` ``(..., D)`` before the first."""
    return torch.cat([start.unsqueeze(-2), states[..., :-1, :]], dim=-2)


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """The largest |x - y| of every sequence, ``(..., L, D)`` -> ``(...)``; infinite where a difference is NaN."""
    return torch.nan_to_num((x - y).abs(), nan=torch.inf, posinf=torch.inf).amax((-2, -1))


def _apply(states: Tensor, change: Tensor, bound: Tensor | None) -> Tensor:
    """The corrected states; with a bound, put back into [-bound, bound], and unchanged where the correction is NaN."""
    if bound is None:
        return states.add_(change)
    states.add_(torch.nan_to_num_(change, nan=0.0))
    return torch.clamp(states, -bound, bound, out=states)


def gru_jacobian(w: Tensor, a: Tensor, h: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The next state, its derivative by h, and the gates z, r, c; shapes as in `gru_cell`."""
    w_z, w_r, w_c = w.unbind(-2)
    z, r = torch.addcmul(w_z, a[0], h).sigmoid_(), torch.addcmul(w_r, a[1], h).sigmoid_()
    gated = h * r
    c = torch.addcmul(w_c, a[2], gated).tanh_()
    J = (1 - z).add_((c - h).mul_(a[0]).mul_(z - z * z))  # through the gate z
    J.addcmul_(torch.addcmul(r, a[1], gated - gated * r).mul_(a[2]), z - z * c * c)  # through the candidate c
    return torch.lerp(h, c, z), J, (z, r, c)


def lstm_jacobian(
    w: Tensor, a: Tensor, p: Tensor, c: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """The next c and h, their derivatives ``(2, 2, ...)`` by (c, h), and the gates f, o, z; shapes as in `lstm_cell`."""
    w_f, w_o, w_z = w.unbind(-2)
    f, z = torch.addcmul(w_f, a[0], h).addcmul_(p[0], c).sigmoid_(), torch.addcmul(w_z, a[2], h).tanh_()
    new = torch.lerp(z, c, f)
    o = torch.addcmul(w_o, a[1], h).addcmul_(p[1], new).sigmoid_()
    t = torch.tanh(new)
    by_f, by_o = (c - z).mul_(f - f * f), t * (o - o * o)  # by the pre-activations of f (of c') and o (of h')
    J = torch.empty(2, 2, *c.shape, dtype=c.dtype, device=c.device)
    torch.addcmul(f, by_f, p[0], out=J[0, 0])
    torch.mul(by_f, a[0], out=J[0, 1]).add_(((1 - f) * a[2]).mul_(1 - z * z))
    through = torch.addcmul(o - o * t * t, by_o, p[1])  # of h' by c': directly, and through the output gate
    torch.mul(through, J[0, 0], out=J[1, 0])
    torch.addcmul(by_o * a[1], through, J[0, 1], out=J[1, 1])
    return new, o * t, J, (f, o, z)


def _gru_tile(w: Tensor, a: Tensor, start: Tensor, iters: int, project: bool) -> Tensor:
    """Solve one tile: w ``(B, C, 3, D)``, start ``(B, D)`` -> all states ``(B, C, D)``."""
    zero = torch.zeros_like(start)
    states = gru_cell(w, a, _shift(w.new_zeros(w[..., 0, :].shape), start))
    bound = start.abs().clamp_(min=1)[:, None] if project else None
    change = torch.empty_like(states)
    for _ in range(iters):
        new, J, _ = gru_jacobian(w, a, _shift(states, start))
        scan_chunks(J, new.sub_(states), zero, False, out=change)
        states = _apply(states, change, bound)
    return states


def _lstm_tile(w: Tensor, a: Tensor, p: Tensor, start: Tensor, iters: int, project: bool) -> Tensor:
    """Solve one tile: w ``(B, C, 3, D)``, start ``(2, B, D)`` -> all states (c, h) ``(2, B, C, D)``."""
    zero = torch.zeros_like(start)
    states = torch.stack(lstm_cell(w, a, p, *_shift(w.new_zeros(2, *w[..., 0, :].shape), start)))
    bound = start.abs().clamp_(min=1).unsqueeze(-2) if project else None
    change = torch.empty_like(states)
    for _ in range(iters):
        c, h, J, _ = lstm_jacobian(w, a, p, *_shift(states, start))
        residual = torch.stack([c, h]).sub_(states)
        scan_planes(J, residual, zero, False, out=change)
        states = _apply(states, change, bound)
    return states


class _ParaGRU(torch.autograd.Function):
    """States by Newton or, where iters is None, by a loop; the gradient by a reverse scan at the solution."""

    @staticmethod
    def forward(ctx, w: Tensor, a: Tensor, h0: Tensor, iters: int | None, project: bool, check: bool):
        wide, state = w.to(h0.dtype), h0
        states = h0.new_empty(len(w), w.shape[1], w.shape[3])
        residual = h0.new_zeros(len(w))
        if iters is None:
            for t, step in enumerate(wide.unbind(1)):
                state = states[:, t] = gru_cell(step, a, state)
        else:
            for part in _tiles(w):
                tile = states[:, part] = _gru_tile(wide[:, part], a, state, iters, project)
                if check:
                    after = gru_cell(wide[:, part], a, _shift(tile, state))
                    residual = torch.maximum(residual, _distance(after, tile))
                state = tile[:, -1]
        h = states.to(w.dtype)
        ctx.save_for_backward(w, a, h0, h)
        ctx.mark_non_differentiable(residual)
        return h, state.clone(), residual

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h: Tensor, grad_last: Tensor, _):
        w, a, h0, h = ctx.saved_tensors
        before = _shift(h.to(h0.dtype), h0)
        _, J, (z, r, c) = gru_jacobian(w.to(h0.dtype), a, before)
        grad_h, mu = grad_h.to(h0.dtype), torch.empty_like(J)
        scan_chunks(J, J * grad_h, grad_last, True, out=mu)
        lam = grad_h + torch.cat([mu[:, 1:], grad_last[:, None]], dim=1)

        by_z = lam * (c - before) * (z - z * z)  # the cotangents of the three pre-activations
        by_c = lam * z * (1 - c * c)
        by_r = by_c * a[2] * before * (r - r * r)
        grad_w = torch.stack([by_z, by_r, by_c], dim=2)
        grad_a = torch.stack([(x * before).sum((0, 1)) for x in (by_z, by_r, by_c * r)])
        return grad_w.to(w.dtype), grad_a, mu[:, 0], None, None, None


class _ParaLSTM(torch.autograd.Function):
    """The same for the cell with two states; `start` and the adjoint are ``(2, B, ...)``, c first."""

    @staticmethod
    def forward(
        ctx, w: Tensor, a: Tensor, p: Tensor, c0: Tensor, h0: Tensor, iters: int | None, project: bool, check: bool
    ):
        wide, state = w.to(h0.dtype), torch.stack([c0, h0])
        states = h0.new_empty(2, len(w), w.shape[1], w.shape[3])
        residual = h0.new_zeros(len(w))
        if iters is None:
            for t, step in enumerate(wide.unbind(1)):
                state = states[:, :, t] = torch.stack(lstm_cell(step, a, p, *state))
        else:
            for part in _tiles(w):
                tile = states[:, :, part] = _lstm_tile(wide[:, part], a, p, state, iters, project)
                if check:
                    after = torch.stack(lstm_cell(wide[:, part], a, p, *_shift(tile, state)))
                    residual = torch.maximum(residual, _distance(after, tile).amax(0))
                state = tile[:, :, -1]
        c, h = states.to(w.dtype).unbind(0)
        ctx.save_for_backward(w, a, p, c0, h0, c, h)
        ctx.mark_non_differentiable(residual)
        return h, c, state[0].clone(), state[1].clone(), residual

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h: Tensor, grad_c: Tensor, last_c: Tensor, last_h: Tensor, _):
        w, a, p, c0, h0, c, h = ctx.saved_tensors
        before_c, before = _shift(c.to(h0.dtype), c0), _shift(h.to(h0.dtype), h0)
        new, _, J, (f, o, z) = lstm_jacobian(w.to(h0.dtype), a, p, before_c, before)
        g, last = torch.stack([grad_c, grad_h]).to(h0.dtype), torch.stack([last_c, last_h])
        mu = torch.empty_like(g)
        scan_planes(J.transpose(0, 1), torch.addcmul(J[0] * g[0], J[1], g[1]), last, True, out=mu)
        lam_c, lam_h = g + torch.cat([mu[:, :, 1:], last.unsqueeze(2)], dim=2)

        t = torch.tanh(new)
        by_o = lam_h * t * (o - o * o)  # the cotangents of the three pre-activations
        cell = lam_c + lam_h * o * (1 - t * t) + by_o * p[1]  # and of the new cell
        by_f = cell * (before_c - z) * (f - f * f)
        by_z = cell * (1 - f) * (1 - z * z)
        grad_w = torch.stack([by_f, by_o, by_z], dim=2)
        grad_a = torch.stack([(x * before).sum((0, 1)) for x in (by_f, by_o, by_z)])
        grad_p = torch.stack([(by_f * before_c).sum((0, 1)), (by_o * new).sum((0, 1))])
        return grad_w.to(w.dtype), grad_a, grad_p, mu[0, :, 0], mu[1, :, 0], None, None, None


def para_gru_parallel(
    w: Tensor, a: Tensor, h0: Tensor, iters: int | None, project: bool, check: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """States, last state and residual ``(B,)`` (0 unless `check`); shapes as in `para_gru`, iters None: the plain loop."""
    return _ParaGRU.apply(w, a, h0, iters, project, check)


def para_lstm_parallel(
    w: Tensor, a: Tensor, p: Tensor, c0: Tensor, h0: Tensor, iters: int | None, project: bool, check: bool
) -> tuple[Tensor, ...]:
    """h, c, the last c, the last h and the residual; shapes as in `para_lstm`, the rest as in `para_gru_parallel`."""
    return _ParaLSTM.apply(w, a, p, c0, h0, iters, project, check)
