r"""Two gated recurrences that a GPU can solve in parallel over time: ParaGRU and ParaLSTM (chapter 14).

$$h_l = f(h_{l-1}, w_l),\qquad l = 1,\dots,L,$$

where f is a GRU or an LSTM whose recurrent matrices are diagonal: the channels do not mix inside the cell, so the
Jacobian of a step is one number (GRU) or one 2 x 2 matrix (LSTM) per channel. Newton's method then turns the whole
recurrence into a few linear scans. The input projection $w_l = W x_l + b$ is done before, for all steps at once.

Read the folder in this order: ``reference.py`` (the definition: the cells and a loop), ``parallel.py`` (Newton, and the
gradient without iterations), ``triton.py`` (what both GPU kernels share), ``gru.py`` and ``lstm.py`` (the kernels).
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from .. import _dispatch
from .._dispatch import accumulate_dtype, check_same, check_shape, check_values, choose
from .parallel import para_gru_parallel, para_lstm_parallel
from .reference import gru_cell, lstm_cell, para_gru_reference, para_lstm_reference

__all__ = ["para_gru", "para_gru_step", "para_lstm", "para_lstm_step"]

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CONVERGED = 1e-2  # a larger residual of the last iterate is worth a warning
State = tuple[Tensor, Tensor]


def para_gru(
    w: Tensor,
    a: Tensor,
    h0: Tensor | None = None,
    *,
    iters: int | str = 3,
    project: bool = True,
    return_residual: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    r"""Run ParaGRU over the time axis, for all channels at once.

    $$z = \sigma(a_z h + w_z),\quad r = \sigma(a_r h + w_r),\quad c = \tanh(a_c h r + w_c),\quad h' = (1-z) h + z c.$$

    Args:
        w: projected inputs with their biases, ``(B, L, 3, D)``, in the order z, r, c.
        a: the diagonals of the recurrent matrices, ``(3, D)``, in the same order.
        h0: the state before the first step, ``(B, D)``; None is zero.
        iters: how many Newton steps; three suffice where every $|a| \le 1/2$. With ``"sequential"`` the steps are
            taken one after another: exact for any a, and on a GPU often quicker once B times D is in the thousands.
        project: put every iterate back to where true states are, $|h| \le \max(1, |h_0|)$. The solution is the same;
            without it, iterates of a cell that does not contract can overflow to NaN.
        return_residual: also return how far the last iterate is from solving the recurrence.
        backend: ``"auto"``, ``"reference"`` (always sequential), ``"parallel"`` or ``"triton"``.

    Returns:
        ``h``, ``(B, L, D)`` in w's dtype, and the final state ``hT``, ``(B, D)``, in float32 where w is float16 or
        bfloat16. Feeding hT as the h0 of the next piece continues where this one stopped. With `return_residual` also
        $\max_{l,d} |f(h_{l-1}, w_l) - h_l|$ of every sequence, ``(B,)``, without gradient: 0 for the sequential walk,
        infinite where an iterate is NaN. Under ``use(debug=True)`` a residual above 0.01 is a warning.

    Gradients flow to w, a and h0, from h and hT. They are those of the recurrence at the states found, by one reverse
    scan: no gradient passes through the iterations, and memory does not grow with their number. Inputs of any stride are
    accepted; a contiguous copy is made where the kernel needs one.

    Raises:
        ValueError: wrong shape, dtype, device, iters or backend, with what was expected and what was given.
    """
    sizes = _check(w, a, iters)
    if h0 is not None:
        check_shape("h0", h0, "B D", sizes)
        check_same(("w", w), ("h0", h0), dtype=False)
    check_values(w=w, a=a, h0=h0)
    (h0,), steps, chosen = _prepare(w, [h0], iters, backend, _gru_agrees)
    a = a.to(h0.dtype)
    check = return_residual or _dispatch.debugging()
    if chosen == "reference":
        result = (*para_gru_reference(w, a, h0), h0.new_zeros(len(w)))
    else:
        solve = para_gru_parallel
        if chosen == "triton":
            from .gru import para_gru_triton as solve
        result = solve(w, a, h0, steps, project, check)
    return _finish("para_gru", *result[:2], residual=result[2], iters=iters, wanted=return_residual)


def para_lstm(
    w: Tensor,
    a: Tensor,
    p: Tensor,
    s0: State | None = None,
    *,
    iters: int | str = 3,
    project: bool = True,
    return_residual: bool = False,
    backend: str = "auto",
) -> tuple[Tensor | State, ...]:
    r"""Run ParaLSTM over the time axis, for all channels at once: one gate for forgetting and writing, and peepholes.

    $$f = \sigma(a_f h + p_f c + w_f),\quad z = \tanh(a_z h + w_z),\quad c' = f c + (1-f) z,\quad
      o = \sigma(a_o h + p_o c' + w_o),\quad h' = o \tanh c'.$$

    Args:
        w: projected inputs with their biases, ``(B, L, 3, D)``, in the order f, o, z.
        a: the diagonals of the recurrent matrices, ``(3, D)``, in the same order.
        p: the peepholes $(p_f, p_o)$, ``(2, D)``.
        s0: the state ``(c, h)`` before the first step, each ``(B, D)``; None is zero.
        iters, project, return_residual, backend: as in `para_gru`; states are kept within $|c| \le \max(1, |c_0|)$
            and $|h| \le \max(1, |h_0|)$.

    Returns:
        ``h`` and ``c``, each ``(B, L, D)`` in w's dtype, and the final state ``(cT, hT)``, each ``(B, D)``, in float32
        where w is float16 or bfloat16; with `return_residual` also the residual, ``(B,)``, the larger of both states'.

    Gradients flow to w, a, p and s0, from h, c and the final state, as in `para_gru`.

    Raises:
        ValueError: wrong shape, dtype, device, iters or backend, with what was expected and what was given.
    """
    sizes = _check(w, a, iters)
    check_shape("p", p, "2 D", sizes)
    check_same(("w", w), ("p", p), dtype=False)
    c0, h0 = _state(w, s0, sizes)
    check_values(w=w, a=a, p=p, c0=c0, h0=h0)
    (c0, h0), steps, chosen = _prepare(w, [c0, h0], iters, backend, _lstm_agrees)
    a, p = a.to(h0.dtype), p.to(h0.dtype)
    check = return_residual or _dispatch.debugging()
    if chosen == "reference":
        result = (*para_lstm_reference(w, a, p, c0, h0), h0.new_zeros(len(w)))
    else:
        solve = para_lstm_parallel
        if chosen == "triton":
            from .lstm import para_lstm_triton as solve
        result = solve(w, a, p, c0, h0, steps, project, check)
    h, c, cT, hT, residual = result
    return _finish("para_lstm", h, c, (cT, hT), residual=residual, iters=iters, wanted=return_residual)


def para_gru_step(w: Tensor, a: Tensor, h: Tensor) -> Tensor:
    """One step for streaming: w ``(B, 3, D)``, a ``(3, D)``, h ``(B, D)`` -> the new h, as exact as h is."""
    sizes: dict[str, int] = {}
    check_shape("w", w, "B 3 D", sizes)
    check_shape("a", a, "3 D", sizes)
    check_shape("h", h, "B D", sizes)
    return gru_cell(w.to(h.dtype), a.to(h.dtype), h)


def para_lstm_step(w: Tensor, a: Tensor, p: Tensor, s: State) -> State:
    """One step for streaming: w ``(B, 3, D)``, a ``(3, D)``, p ``(2, D)``, s = (c, h), each ``(B, D)`` -> the new (c, h)."""
    sizes: dict[str, int] = {}
    check_shape("w", w, "B 3 D", sizes)
    check_shape("a", a, "3 D", sizes)
    check_shape("p", p, "2 D", sizes)
    c, h = _state(w, s, sizes)
    return lstm_cell(w.to(h.dtype), a.to(h.dtype), p.to(h.dtype), c, h)


def _check(w: Tensor, a: Tensor, iters: int | str) -> dict[str, int]:
    """Check what both cells take; return the sizes."""
    sizes: dict[str, int] = {}
    check_shape("w", w, "B L 3 D", sizes)
    check_shape("a", a, "3 D", sizes)
    if not w.is_floating_point():
        raise ValueError(f"expected w of a floating-point dtype, got {w.dtype}")
    check_same(("w", w), ("a", a), dtype=False)
    if iters != "sequential" and (not isinstance(iters, int) or iters < 0):
        raise ValueError(f'expected iters to be a number of Newton steps, at least 0, or "sequential", got {iters!r}')
    return sizes


def _state(w: Tensor, s: State | None, sizes: dict[str, int]) -> tuple[Tensor | None, Tensor | None]:
    """Check a state (c, h) of the LSTM and take it apart."""
    if s is None:
        return None, None
    if not isinstance(s, tuple | list) or len(s) != 2:
        length = f" of length {len(s)}" if hasattr(s, "__len__") else ""
        raise ValueError(f"expected the state to be a pair (c, h), got {type(s).__name__}{length}")
    for name, tensor in zip(("c", "h"), s, strict=True):
        check_shape(name, tensor, "B D", sizes)
        check_same(("w", w), (name, tensor), dtype=False)
    return s[0], s[1]


def _prepare(w: Tensor, states: list[Tensor | None], iters: int | str, backend: str, turing) -> tuple:
    """States in the accumulation dtype, the number of Newton steps (None: sequential), and the backend to run."""
    dtype, (B, _, _, D) = accumulate_dtype(w.dtype), w.shape
    starts = [w.new_zeros(B, D, dtype=dtype) if s is None else s.to(dtype) for s in states]
    chosen = choose(backend, w, dtypes=TRITON_DTYPES, turing=turing)
    if w.numel() == 0:
        chosen = "reference"
    return starts, None if iters == "sequential" else iters, chosen


def _finish(name: str, *outputs, residual: Tensor, iters: int | str, wanted: bool) -> tuple:
    """Append the residual if it is wanted; under `use(debug=True)` warn when it is large."""
    if _dispatch.debugging() and residual.numel() and residual.max() > CONVERGED:
        warnings.warn(
            f"{name} has not converged: after {iters} Newton steps the recurrence is off by {residual.max():.1e}; "
            'give more iters, keep |a| <= 0.5, or use iters="sequential"',
            stacklevel=3,
        )
    return (*outputs, residual) if wanted else outputs


def _agrees(cell, *parameters: tuple[int, int]) -> bool:
    """Run a Triton kernel once against the parallel form: the admission test for GPUs older than Triton promises."""
    w = torch.randn(2, 100, 3, 40, device="cuda")
    weights = [torch.rand(shape, device="cuda") - 0.5 for shape in parameters]
    try:
        ours, theirs = (cell(w, *weights, backend=backend)[0] for backend in ("triton", "parallel"))
        return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    except Exception:  # a compiler error on an unsupported chip is an answer too
        return False


@functools.cache
def _gru_agrees() -> bool:
    return _agrees(para_gru, (3, 40))


@functools.cache
def _lstm_agrees() -> bool:
    return _agrees(para_lstm, (3, 40), (2, 40))
