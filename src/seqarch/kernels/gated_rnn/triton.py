"""Launching the kernels of ``triton_kernels.py``, and their place in autograd: one operator a cell and direction."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .._triton import dot_options
from .triton_kernels import _gru_backward, _gru_forward, _lstm_backward, _lstm_forward, _rnn_backward, _rnn_forward

ROWS = 16


def _grid(B: int, H: int, dtype: torch.dtype) -> tuple[tuple[int], dict]:
    tile = max(16, triton.next_power_of_2(H))
    warps = 4 if tile < 64 else 8 if tile < 128 else 16  # so that the blocks of W_h of one step fit the registers
    return (triton.cdiv(B, ROWS),), dict(BR=ROWS, BH=tile, num_warps=warps, num_stages=1, **dot_options(dtype))


def _transposed(w_h: Tensor) -> Tensor:
    """The blocks of w_h ``(kH, H)``, each transposed, so that neighbouring lanes read neighbouring numbers."""
    H = w_h.shape[1]
    return w_h.view(-1, H, H).transpose(1, 2).contiguous()


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _weight_gradient(delta: Tensor, h: Tensor, h0: Tensor, cont: Tensor | None = None) -> Tensor:
    """One product for all steps: delta ``(B, T, kH)``, h ``(B, T, H)`` -> ``(kH, H)``."""
    before = torch.cat([h0[:, None], h[:, :-1].float()], dim=1)
    if cont is not None:
        before = before.masked_fill(~cont[..., None], 0.0)
    return delta.flatten(0, 1).T @ before.flatten(0, 1)


@torch.library.custom_op("seqarch::rnn_scan", mutates_args=())
def _rnn(xp: Tensor, w_h: Tensor, h0: Tensor, relu: bool) -> list[Tensor]:
    B, T, H = xp.shape
    grid, sizes = _grid(B, H, w_h.dtype)
    h, hT = _empty(xp, B, T, H, dtype=xp.dtype), _empty(xp, B, H)
    _rnn_forward[grid](xp.contiguous(), _transposed(w_h), h0.contiguous(), h, hT, B, T, H, RELU=relu, **sizes)
    return [h, hT]


@_rnn.register_fake
def _(xp, w_h, h0, relu):
    return [xp.new_empty(xp.shape), h0.new_empty(h0.shape)]


@torch.library.custom_op("seqarch::rnn_scan_backward", mutates_args=())
def _rnn_grad(w_h: Tensor, h: Tensor, h0: Tensor, grad_h: Tensor, grad_hT: Tensor, relu: bool) -> list[Tensor]:
    B, T, H = h.shape
    grid, sizes = _grid(B, H, w_h.dtype)
    delta, grad_h0 = _empty(h, B, T, H), _empty(h, B, H)
    _rnn_backward[grid](
        w_h.contiguous(),
        h,
        grad_h.contiguous(),
        grad_hT.contiguous(),
        delta,
        grad_h0,
        B,
        T,
        H,
        RELU=relu,
        **sizes,
    )
    return [delta.to(h.dtype), _weight_gradient(delta, h, h0).to(w_h.dtype), grad_h0]


@_rnn_grad.register_fake
def _(w_h, h, h0, grad_h, grad_hT, relu):
    return [h.new_empty(h.shape), w_h.new_empty(w_h.shape), h0.new_empty(h0.shape)]


def _rnn_context(ctx, inputs, output):
    _, w_h, h0, ctx.relu = inputs
    ctx.save_for_backward(w_h, output[0], h0)


def _given(grads: list[Tensor | None], *like: Tensor) -> list[Tensor]:
    """The gradients of outputs, zero where nothing depends on one."""
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, like, strict=False)]


def _rnn_autograd(ctx, grads):
    w_h, h, h0 = ctx.saved_tensors
    return (*_rnn_grad(w_h, h, h0, *_given(grads, h, h0), ctx.relu), None)


_rnn.register_autograd(_rnn_autograd, setup_context=_rnn_context)


def _bytes(cont: Tensor | None, unused: Tensor) -> Tensor:
    """Flags as the kernels read them; without flags any pointer will do, it is never read."""
    return unused if cont is None else cont.contiguous().view(torch.uint8)


@torch.library.custom_op("seqarch::lstm_scan", mutates_args=())
def _lstm(xp: Tensor, w_h: Tensor, h0: Tensor, s0: Tensor, cont: Tensor | None) -> list[Tensor]:
    B, T, H = *xp.shape[:2], h0.shape[1]
    grid, sizes = _grid(B, H, w_h.dtype)
    h, gates, s = _empty(xp, B, T, H, dtype=xp.dtype), _empty(xp, B, T, 4 * H), _empty(xp, B, T, H)
    hT, sT = _empty(xp, B, H), _empty(xp, B, H)
    _lstm_forward[grid](
        xp.contiguous(), _transposed(w_h), h0.contiguous(), s0.contiguous(), _bytes(cont, h), h, gates, s, hT, sT,
        B, T, H, FLAGS=cont is not None, **sizes,
    )  # fmt: skip
    return [h, hT, sT, gates, s]


@_lstm.register_fake
def _(xp, w_h, h0, s0, cont):
    B, T, H = *xp.shape[:2], h0.shape[1]
    kept = [h0.new_empty(B, T, 4 * H), h0.new_empty(B, T, H)]
    return [xp.new_empty(B, T, H), h0.new_empty(B, H), h0.new_empty(B, H), *kept]


@torch.library.custom_op("seqarch::lstm_scan_backward", mutates_args=())
def _lstm_grad(
    w_h: Tensor, h: Tensor, gates: Tensor, s: Tensor, h0: Tensor, s0: Tensor, cont: Tensor | None,
    grad_h: Tensor, grad_hT: Tensor, grad_sT: Tensor,
) -> list[Tensor]:  # fmt: skip
    B, T, H = h.shape
    grid, sizes = _grid(B, H, w_h.dtype)
    delta, grad_h0, grad_s0 = _empty(h, B, T, 4 * H), _empty(h, B, H), _empty(h, B, H)
    _lstm_backward[grid](
        w_h.contiguous(), gates, s, s0.contiguous(), _bytes(cont, h), grad_h.contiguous(), grad_hT.contiguous(),
        grad_sT.contiguous(), delta, grad_h0, grad_s0, B, T, H, FLAGS=cont is not None, **sizes,
    )  # fmt: skip
    return [delta.to(h.dtype), _weight_gradient(delta, h, h0, cont).to(w_h.dtype), grad_h0, grad_s0]


@_lstm_grad.register_fake
def _(w_h, h, gates, s, h0, s0, cont, grad_h, grad_hT, grad_sT):
    return [h.new_empty(*h.shape[:2], 4 * h.shape[2]), *(x.new_empty(x.shape) for x in (w_h, h0, s0))]


def _lstm_context(ctx, inputs, output):
    _, w_h, h0, s0, cont = inputs
    h, _, _, gates, s = output
    ctx.save_for_backward(w_h, h, gates, s, h0, s0, cont)


def _lstm_autograd(ctx, grads):
    w_h, h, gates, s, h0, s0, cont = ctx.saved_tensors
    return (*_lstm_grad(w_h, h, gates, s, h0, s0, cont, *_given(grads, h, h0, s0)), None)


_lstm.register_autograd(_lstm_autograd, setup_context=_lstm_context)


@torch.library.custom_op("seqarch::gru_scan", mutates_args=())
def _gru(xp: Tensor, w_h: Tensor, b_h: Tensor, h0: Tensor) -> list[Tensor]:
    B, T, H = *xp.shape[:2], h0.shape[1]
    grid, sizes = _grid(B, H, w_h.dtype)
    h, gates, q = _empty(xp, B, T, H, dtype=xp.dtype), _empty(xp, B, T, 3 * H), _empty(xp, B, T, H)
    hT = _empty(xp, B, H)
    _gru_forward[grid](
        xp.contiguous(),
        _transposed(w_h),
        b_h.contiguous(),
        h0.contiguous(),
        h,
        gates,
        q,
        hT,
        B,
        T,
        H,
        **sizes,
    )
    return [h, hT, gates, q]


@_gru.register_fake
def _(xp, w_h, b_h, h0):
    B, T, H = *xp.shape[:2], h0.shape[1]
    return [xp.new_empty(B, T, H), h0.new_empty(B, H), h0.new_empty(B, T, 3 * H), h0.new_empty(B, T, H)]


@torch.library.custom_op("seqarch::gru_scan_backward", mutates_args=())
def _gru_grad(
    w_h: Tensor, b_h: Tensor, h: Tensor, gates: Tensor, q: Tensor, h0: Tensor, grad_h: Tensor, grad_hT: Tensor
) -> list[Tensor]:
    B, T, H = h.shape
    grid, sizes = _grid(B, H, w_h.dtype)
    delta, grad_h0 = _empty(h, B, T, 3 * H), _empty(h, B, H)
    _gru_backward[grid](
        w_h.contiguous(), gates, q, h, h0.contiguous(), grad_h.contiguous(), grad_hT.contiguous(), delta, grad_h0,
        B, T, H, **sizes,
    )  # fmt: skip
    delta_q = torch.cat([delta[..., : 2 * H], delta[..., 2 * H :] * gates[..., :H]], dim=-1)
    grad_w, grad_b = _weight_gradient(delta_q, h, h0), delta_q.sum((0, 1))
    return [delta.to(h.dtype), grad_w.to(w_h.dtype), grad_b.to(b_h.dtype), grad_h0]


@_gru_grad.register_fake
def _(w_h, b_h, h, gates, q, h0, grad_h, grad_hT):
    return [h.new_empty(*h.shape[:2], 3 * h.shape[2]), *(x.new_empty(x.shape) for x in (w_h, b_h, h0))]


def _gru_context(ctx, inputs, output):
    _, w_h, b_h, h0 = inputs
    h, _, gates, q = output
    ctx.save_for_backward(w_h, b_h, h, gates, q, h0)


def _gru_autograd(ctx, grads):
    w_h, b_h, h, gates, q, h0 = ctx.saved_tensors
    return tuple(_gru_grad(w_h, b_h, h, gates, q, h0, *_given(grads, h, h0)))


_gru.register_autograd(_gru_autograd, setup_context=_gru_context)


def rnn_scan_triton(xp: Tensor, w_h: Tensor, h0: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Elman recurrence by the kernels above; shapes as in `rnn_scan`."""
    h, hT = _rnn(xp, w_h.to(xp.dtype), h0, activation == "relu")
    return h, hT


def lstm_scan_triton(
    xp: Tensor, w_h: Tensor, h0: Tensor, s0: Tensor, cont: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """LSTM recurrence by the kernels above; shapes as in `lstm_scan`."""
    h, hT, sT, _, _ = _lstm(xp, w_h.to(xp.dtype), h0, s0, cont)
    return h, hT, sT


def gru_scan_triton(xp: Tensor, w_h: Tensor, b_h: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """GRU recurrence by the kernels above; shapes as in `gru_scan`."""
    h, hT, _, _ = _gru(xp, w_h.to(xp.dtype), b_h, h0)
    return h, hT
