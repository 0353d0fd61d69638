r"""The three recurrences in lean PyTorch: what is left of the loop when everything that can leave it has left.

A nonlinear recurrence has no exact parallel scan, so a loop over T remains. But only the matrix product with the state
belongs in it. Three things move out:

* the input projection, which the caller has done for all steps at once (`xp`);
* autograd's bookkeeping: each recurrence is one `torch.autograd.Function` with its backward pass written by hand;
* nearly all of that backward pass. Once the forward pass has run, every gate is known, so the factors between the
  incoming gradient and the pre-activations are computed for all steps in one go, and the loop is left with one product
  with $W_h$ per step. The weight gradient $\sum_t \delta_t^\top h_{t-1}$ is ONE product after the loop: stack the T
  outer products' factors and the sum over t is the inner dimension of a matrix product.

Inside, tensors are time-major, ``(T, B, ...)``, so that a step is one contiguous piece of memory, and every step writes
into buffers allocated beforehand. The forward pass keeps the activated gates in the place where xp was: recomputing
them would need xp, which takes the same room.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _time_major(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A fresh ``(T, B, ...)`` copy of ``(B, T, ...)`` that may be written to."""
    return x.transpose(0, 1).to(dtype, copy=True, memory_format=torch.contiguous_format)


def _with_start(h0: Tensor, steps: int) -> Tensor:
    """A buffer ``(T + 1, B, H)`` for the states, the first of which is h0: row t is then $h_{t-1}$ of step t."""
    states = h0.new_empty(steps + 1, *h0.shape)
    states[0] = h0
    return states


def weight_gradient(delta: Tensor, before: Tensor) -> Tensor:
    r"""$\sum_t \delta_t^\top h_{t-1}$ as one product: delta ``(T, B, kH)``, the states before ``(T, B, H)`` -> ``(kH, H)``."""
    return delta.flatten(0, 1).T @ before.flatten(0, 1)


class _RNN(torch.autograd.Function):
    """The Elman recurrence."""

    @staticmethod
    def forward(ctx, xp: Tensor, w_h: Tensor, h0: Tensor, activation: str):
        a = _time_major(xp, h0.dtype)
        states = _with_start(h0, len(a))
        w, act = w_h.to(h0.dtype).T, torch.tanh_ if activation == "tanh" else torch.relu_
        h = states.unbind(0)
        for t, a_t in enumerate(a.unbind(0)):
            act(torch.addmm(a_t, h[t], w, out=h[t + 1]))
        ctx.save_for_backward(w_h, states)
        ctx.activation, ctx.dtype = activation, xp.dtype
        return states[1:].transpose(0, 1).to(xp.dtype), states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h: Tensor, grad_hT: Tensor):
        w_h, states = ctx.saved_tensors
        after, w = states[1:], w_h.to(states.dtype)
        # da_t = dh_t * phi'(a_t), and phi' is known from h_t alone
        delta = 1 - after.square() if ctx.activation == "tanh" else (after > 0).to(after.dtype)
        grads = grad_h.to(states.dtype).transpose(0, 1).unbind(0)
        dh = grad_hT
        for g_t, delta_t in zip(reversed(grads), reversed(delta.unbind(0)), strict=True):
            delta_t.mul_(dh + g_t)
            dh = delta_t @ w
        return delta.transpose(0, 1).to(ctx.dtype), weight_gradient(delta, states[:-1]).to(w_h.dtype), dh, None


class _LSTM(torch.autograd.Function):
    """The LSTM recurrence, blocks i, f, g, o."""

    @staticmethod
    def forward(ctx, xp: Tensor, w_h: Tensor, h0: Tensor, s0: Tensor, cont: Tensor | None):
        gates = _time_major(xp, h0.dtype)
        H = h0.shape[1]
        h_all, s_all, w = _with_start(h0, len(gates)), _with_start(s0, len(gates)), w_h.to(h0.dtype).T
        h, s = h_all.unbind(0), s_all.unbind(0)
        if cont is None:  # every step starts where the last one ended: the same memory, one row earlier
            h_before, s_before = h_all[:-1], s_all[:-1]
        else:
            cont = cont.T[..., None].to(h0.dtype)
            h_before, s_before = torch.empty_like(h_all[1:]), torch.empty_like(s_all[1:])
        h_in, s_in = h_before.unbind(0), s_before.unbind(0)
        i, f, g, o = (block.unbind(0) for block in gates.split(H, dim=-1))
        i_and_f = gates[..., : 2 * H].unbind(0)
        for t, a_t in enumerate(gates.unbind(0)):
            if cont is not None:
                torch.mul(h[t], cont[t], out=h_in[t])
                torch.mul(s[t], cont[t], out=s_in[t])
            a_t.addmm_(h_in[t], w)
            i_and_f[t].sigmoid_()
            g[t].tanh_()
            o[t].sigmoid_()
            torch.mul(f[t], s_in[t], out=s[t + 1]).addcmul_(i[t], g[t])
            torch.tanh(s[t + 1], out=h[t + 1]).mul_(o[t])
        ctx.save_for_backward(w_h, gates, h_before, s_before, s_all[1:], cont)
        ctx.dtype = xp.dtype
        return h_all[1:].transpose(0, 1).to(xp.dtype), h_all[-1].clone(), s_all[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h: Tensor, grad_hT: Tensor, grad_sT: Tensor):
        w_h, gates, h_before, s_before, s_after, cont = ctx.saved_tensors
        w, H = w_h.to(h_before.dtype), h_before.shape[2]
        delta, to_s = lstm_factors(gates, s_before, s_after)
        keep = gates[..., H : 2 * H] if cont is None else cont * gates[..., H : 2 * H]
        flags = [None] * len(gates) if cont is None else cont.unbind(0)
        delta_s, delta_h = delta.unflatten(-1, (4, H)).split([3, 1], dim=-2)
        steps = zip(
            *(reversed(x.unbind(0)) for x in (grad_h.to(w.dtype).transpose(0, 1), to_s, keep)),
            *(reversed(x.unbind(0)) for x in (delta, delta_s, delta_h.squeeze(-2))),
            reversed(flags),
            strict=True,
        )
        dh, ds = grad_hT.clone(), grad_sT.clone()
        for g_t, to_s_t, keep_t, delta_t, delta_s_t, delta_h_t, cont_t in steps:
            dh += g_t
            ds.addcmul_(dh, to_s_t)
            delta_s_t.mul_(ds[:, None])  # i, f and g act on the cell state
            delta_h_t.mul_(dh)  # o acts on the output
            torch.mm(delta_t, w, out=dh)
            ds *= keep_t
            if cont_t is not None:
                dh *= cont_t
        return delta.transpose(0, 1).to(ctx.dtype), weight_gradient(delta, h_before).to(w_h.dtype), dh, ds, None


def lstm_factors(gates: Tensor, s_before: Tensor, s_after: Tensor) -> tuple[Tensor, Tensor]:
    r"""All local derivatives of all steps: gates ``(T, B, 4H)`` activated, cell states around a step ``(T, B, H)``.

    Returns the factors ``(T, B, 4H)`` that turn ds (blocks i, f, g) and dh (block o) into gradients of the
    pre-activations, and the factor ``(T, B, H)`` that takes dh through $o \odot \tanh s$ to ds.
    """
    i, f, g, o = gates.chunk(4, dim=-1)
    tanh_s = torch.tanh(s_after)
    factors = torch.cat([g * i * (1 - i), s_before * f * (1 - f), i * (1 - g * g), tanh_s * o * (1 - o)], dim=-1)
    return factors, o * (1 - tanh_s * tanh_s)


class _GRU(torch.autograd.Function):
    """The GRU recurrence, blocks r, z, n."""

    @staticmethod
    def forward(ctx, xp: Tensor, w_h: Tensor, b_h: Tensor, h0: Tensor):
        gates = _time_major(xp, h0.dtype)
        H = h0.shape[1]
        w, b = w_h.to(h0.dtype).T, b_h.to(h0.dtype)
        r_and_z, n = gates[..., : 2 * H], gates[..., 2 * H :].unbind(0)
        r_and_z += b[: 2 * H]  # r multiplies only the n part of the state's bias; the rest joins xp at once
        r, z = r_and_z[..., :H].unbind(0), r_and_z[..., H:].unbind(0)
        states, q = _with_start(h0, len(gates)), gates.new_empty(*gates.shape[:2], H)
        h, q_n = states.unbind(0), q.unbind(0)
        for t, rz_t in enumerate(r_and_z.unbind(0)):
            rz_t.addmm_(h[t], w[:, : 2 * H]).sigmoid_()
            torch.addmm(b[2 * H :], h[t], w[:, 2 * H :], out=q_n[t])
            n[t].addcmul_(r[t], q_n[t]).tanh_()
            torch.lerp(n[t], h[t], z[t], out=h[t + 1])  # (1 - z) n + z h
        ctx.save_for_backward(w_h, b_h, gates, q, states)
        ctx.dtype = xp.dtype
        return states[1:].transpose(0, 1).to(xp.dtype), states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h: Tensor, grad_hT: Tensor):
        w_h, b_h, gates, q, states = ctx.saved_tensors
        w, H = w_h.to(states.dtype), states.shape[2]
        delta, r_n = gru_factors(gates, q, states)
        # through the state the n block carries an extra r: two versions of delta, and the loop needs this one
        delta_q = torch.cat([delta[..., : 2 * H], r_n], dim=-1)
        dh_all = torch.empty_like(states[1:])
        steps = zip(
            *(reversed(x.unbind(0)) for x in (grad_h.to(w.dtype).transpose(0, 1), gates[..., H : 2 * H], dh_all)),
            *(reversed(x.unbind(0)) for x in (delta_q, delta_q.unflatten(-1, (3, H)))),
            strict=True,
        )
        dh = grad_hT
        for g_t, z_t, dh_t, flat_t, blocks_t in steps:
            torch.add(dh, g_t, out=dh_t)
            blocks_t.mul_(dh_t[:, None])
            dh = (dh_t * z_t).addmm_(flat_t, w)
        delta.unflatten(-1, (3, H)).mul_(dh_all[:, :, None])
        grad_b = delta_q.sum((0, 1)).to(b_h.dtype)
        return delta.transpose(0, 1).to(ctx.dtype), weight_gradient(delta_q, states[:-1]).to(w_h.dtype), grad_b, dh


def gru_factors(gates: Tensor, q: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    r"""All local derivatives of all steps: gates ``(T, B, 3H)`` activated, q $= h_{t-1} W_n^\top + b_n$ ``(T, B, H)``.

    Returns the factors ``(T, B, 3H)`` from dh to the pre-activations, and r times the last of the three.
    """
    r, z, n = gates.chunk(3, dim=-1)
    d_n = (1 - z) * (1 - n * n)
    d_z = (states[:-1] - n) * z * (1 - z)
    return torch.cat([d_n * q * r * (1 - r), d_z, d_n], dim=-1), d_n * r


def rnn_scan_parallel(xp: Tensor, w_h: Tensor, h0: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Elman recurrence with its hand-written gradient; shapes as in `rnn_scan`."""
    return _RNN.apply(xp, w_h, h0, activation)


def lstm_scan_parallel(
    xp: Tensor, w_h: Tensor, h0: Tensor, s0: Tensor, cont: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """LSTM recurrence with its hand-written gradient; shapes as in `lstm_scan`."""
    return _LSTM.apply(xp, w_h, h0, s0, cont)


def gru_scan_parallel(xp: Tensor, w_h: Tensor, b_h: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """GRU recurrence with its hand-written gradient; shapes as in `gru_scan`."""
    return _GRU.apply(xp, w_h, b_h, h0)
