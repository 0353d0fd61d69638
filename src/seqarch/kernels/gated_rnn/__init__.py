r"""The gated recurrences: Elman, LSTM and GRU, sequential by nature.

Each function takes the input projection ready-made (`xp`), because it needs no state and is one matrix product for the
whole sequence, and walks along time with the state:

$$h_t = \phi(x_{p,t} + h_{t-1} W_h^\top)$$

and its gated relatives. Read the folder in this order: ``reference.py`` (the definition: three steps and a loop),
``parallel.py`` (the lean loop with its gradient by hand), ``triton_kernels.py`` and ``triton.py`` (GPU).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype, check_same, check_shape, check_values, choose
from .parallel import gru_scan_parallel, lstm_scan_parallel, rnn_scan_parallel
from .reference import (
    gru_scan_reference,
    gru_step,
    lstm_scan_reference,
    lstm_step,
    rnn_scan_reference,
    rnn_step,
)

__all__ = ["gru_scan", "gru_step", "lstm_scan", "lstm_step", "rnn_scan", "rnn_step"]

MAX_TRITON_HIDDEN = 128
ACTIVATIONS = ("tanh", "relu")


def _prepare(
    xp: Tensor,
    w_h: Tensor,
    blocks: int,
    backend: str,
    states: dict[str, Tensor | None],
    b_h: Tensor | None = None,
) -> tuple[list[Tensor], str]:
    """Check all arguments of a scan with `blocks` gates; return its states in the accumulation dtype, and a backend."""
    packed = "H" if blocks == 1 else f"{blocks}H"
    sizes: dict[str, int] = {}
    check_shape("xp", xp, f"B T {packed}", sizes)
    check_shape("w_h", w_h, f"{packed} H", sizes)
    H = sizes["H"]
    if sizes[packed] != blocks * H:
        raise ValueError(
            f"expected w_h of shape ({packed}, H): {blocks} blocks of H = {H} rows are {blocks * H}, got {tuple(w_h.shape)}"
        )
    given = {name: state for name, state in states.items() if state is not None}
    for name, state in given.items():
        check_shape(name, state, "B H", sizes)
    if b_h is not None:
        check_shape("b_h", b_h, packed, sizes)
        given["b_h"] = b_h
    check_same(("xp", xp), ("w_h", w_h), *given.items(), dtype=False)
    check_values(xp=xp, w_h=w_h, b_h=b_h, **states)

    dtype = accumulate_dtype(xp.dtype)
    starts = [
        xp.new_zeros(sizes["B"], H, dtype=dtype) if state is None else state.to(dtype) for state in states.values()
    ]
    largest, limit = MAX_TRITON_HIDDEN, None
    if xp.is_cuda and torch.cuda.get_device_capability(xp.device) < (8, 0):
        largest //= 2  # a step's operands must fit the 64 KB of shared memory of a T4
    if H > largest:
        limit = f"it takes hidden sizes up to {largest}, got {H}"
    chosen = choose(backend, xp, dtypes=(torch.float32, torch.float16, torch.bfloat16), limit=limit)
    if xp.numel() == 0:
        chosen = "reference"
    return starts, chosen


def _flags(cont: Tensor, xp: Tensor) -> Tensor:
    """Check continuation flags for xp; return them as bool."""
    check_shape("cont", cont, "B T", {"B": xp.shape[0], "T": xp.shape[1]})
    if cont.device != xp.device:
        raise ValueError(f"expected cont on {xp.device} like xp, got {cont.device}")
    if cont.dtype != torch.bool and not ((cont == 0) | (cont == 1)).all():
        raise ValueError("expected cont to hold only 0 (a new sequence) and 1 (the last one goes on), got other values")
    return cont.bool()


def rnn_scan(
    xp: Tensor, w_h: Tensor, h0: Tensor | None = None, activation: str = "tanh", *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    r"""Run the Elman recurrence $h_t = \phi(x_{p,t} + h_{t-1} W_h^\top)$ over the time axis.

    Args:
        xp: the input part of the pre-activations, $x W_x^\top + b$, ``(B, T, H)``.
        w_h: the recurrent weights, ``(H, H)``.
        h0: the state before the first step, ``(B, H)``; None is zero.
        activation: ``"tanh"`` or ``"relu"``.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``.

    Returns:
        ``h``, ``(B, T, H)`` in xp's dtype, and the final state ``hT``, ``(B, H)``, in float32 where xp is float16 or
        bfloat16. Feeding hT as the h0 of the next piece continues exactly where this one stopped.

    The backward pass walks from T to 1 with $\delta_t = (g_t + \delta_{t+1} W_h) \odot \phi'$; $\delta$ is the gradient
    of xp, $\sum_t \delta_t^\top h_{t-1}$ that of w_h. Any strides are accepted; a contiguous copy is made inside.

    Raises:
        ValueError: wrong shape, dtype, device, activation or backend, with what was expected and what was given.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"expected activation to be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    (h0,), chosen = _prepare(xp, w_h, 1, backend, {"h0": h0})
    if chosen == "triton":
        from .triton import rnn_scan_triton

        return rnn_scan_triton(xp, w_h, h0, activation)
    return (rnn_scan_reference if chosen == "reference" else rnn_scan_parallel)(xp, w_h, h0, activation)


def lstm_scan(
    xp: Tensor,
    w_h: Tensor,
    h0: Tensor | None = None,
    s0: Tensor | None = None,
    cont: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    r"""Run the LSTM recurrence over the time axis.

    $$[i, f, g, o] = x_{p,t} + h_{t-1} W_h^\top,\qquad
      s_t = \sigma(f) \odot s_{t-1} + \sigma(i) \odot \tanh(g),\qquad h_t = \sigma(o) \odot \tanh(s_t).$$

    With continuation flags $\delta_t$, the step uses $\delta_t h_{t-1}$ and $\delta_t s_{t-1}$: a 0 starts a new sequence.

    Args:
        xp: the input part of the pre-activations, $x W_x^\top + b$, ``(B, T, 4H)``, blocks in the order i, f, g, o.
        w_h: the recurrent weights, ``(4H, H)``, row blocks in the same order.
        h0: the output before the first step, ``(B, H)``; None is zero.
        s0: the cell state before the first step, ``(B, H)``; None is zero.
        cont: continuation flags, ``(B, T)``, bool or 0 and 1; a 0 empties the state before its step, so that several
            sequences fit one row. None continues everywhere. (Flags that are not bool are checked, which makes a GPU
            wait.) They have no gradient.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``.

    Returns:
        ``h``, ``(B, T, H)`` in xp's dtype, and the final state ``(hT, sT)``, each ``(B, H)``, in float32 where xp is
        float16 or bfloat16.

    Raises:
        ValueError: wrong shape, dtype, device or backend, with what was expected and what was given.
    """
    (h0, s0), chosen = _prepare(xp, w_h, 4, backend, {"h0": h0, "s0": s0})
    if cont is not None:
        cont = _flags(cont, xp)
    if chosen == "triton":
        from .triton import lstm_scan_triton as scan
    else:
        scan = lstm_scan_reference if chosen == "reference" else lstm_scan_parallel
    h, hT, sT = scan(xp, w_h, h0, s0, cont)
    return h, (hT, sT)


def gru_scan(
    xp: Tensor, w_h: Tensor, b_h: Tensor, h0: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    r"""Run the GRU recurrence over the time axis.

    $$r = \sigma(x_r + q_r),\quad z = \sigma(x_z + q_z),\quad n = \tanh(x_n + r \odot q_n),\quad
      h_t = (1 - z) \odot n + z \odot h_{t-1},\qquad q = h_{t-1} W_h^\top + b_h.$$

    Args:
        xp: the input part of the pre-activations, $x W_x^\top + b_x$, ``(B, T, 3H)``, blocks in the order r, z, n.
        w_h: the recurrent weights, ``(3H, H)``, row blocks in the same order.
        b_h: the bias on the state's side, ``(3H,)``; r multiplies its n block and not that of b_x.
        h0: the state before the first step, ``(B, H)``; None is zero.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``.

    Returns:
        ``h``, ``(B, T, H)`` in xp's dtype, and the final state ``hT``, ``(B, H)``, in float32 where xp is float16 or
        bfloat16.

    Raises:
        ValueError: wrong shape, dtype, device or backend, with what was expected and what was given.
    """
    (h0,), chosen = _prepare(xp, w_h, 3, backend, {"h0": h0}, b_h)
    if chosen == "triton":
        from .triton import gru_scan_triton

        return gru_scan_triton(xp, w_h, b_h, h0)
    return (gru_scan_reference if chosen == "reference" else gru_scan_parallel)(xp, w_h, b_h, h0)
