r"""The recurrence of Mamba-2: a matrix-valued state that every head forgets at its own, input-dependent rate (chapter 12).

$$h_t = \alpha_t\, h_{t-1} + \Delta_t\, B_t\, x_t^\top, \qquad y_t = h_t^\top C_t + D\, x_t, \qquad \alpha_t = e^{\Delta_t A}.$$

SSD stands for state-space duality: the same numbers are a recurrence and a product with one big masked matrix.
Read the folder in this order: ``reference.py`` (the definition), ``parallel.py`` (chunks), ``triton.py`` (GPU).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype, check_same, check_shape, check_values, choose, debugging
from .parallel import ssd_parallel
from .reference import absorb, ssd_reference, ssd_windowed, to_heads

__all__ = ["ssd", "ssd_step"]

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_CHUNKS = (16, 32, 64)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    *,
    chunk: int = 64,
    window: int | None = None,
    retain: float = 1.0,
    insert: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Run the recurrence over the time axis, for all heads at once.

    With $\alpha_t = \text{retain} \cdot e^{\Delta_t A}$ and $h_0$ = `state`, per head,
    $$h_t = \alpha_t\, h_{t-1} + \text{insert} \cdot \Delta_t\, B_t\, x_t^\top \in \mathbb{R}^{N \times P}, \qquad
      y_t = h_t^\top C_t + D\, x_t .$$

    Args:
        x: inputs, ``(B, T, H, P)``.
        dt: step sizes, at least 0, ``(B, T, H)``; 0 leaves the state as it is. Keep them in float32.
        A: decay rates of the heads, negative, ``(H,)``.
        B, C: write and read vectors, ``(B, T, G, N)``, of x's dtype; H is a multiple of G, and head i belongs to group
            i // (H / G).
        D: factors of the skip connection, ``(H,)``; None is 0.
        state: the state before the first token, ``(B, H, N, P)``; None is zero.
        chunk: tokens per chunk: speed and memory depend on it, the result does not. Triton takes 16, 32 and 64.
        window: let only the last `window` tokens take part in every state. This runs the dual form, with a
            ``(T, T)`` matrix per head, and takes no initial state: a state does not tell its tokens apart.
        retain: extra factor of every decay; below 1 it forgets more.
        insert: extra factor of everything inserted; below 1 it remembers less.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``.

    Returns:
        ``y`` of x's shape and dtype, and the state after the last token, ``(B, H, N, P)``, in float32 (float64 where x
        is). Feeding it as the state of the next piece continues exactly where this one stopped.

    Gradients flow to all tensors, from y and from the final state; the equations are in ``parallel.py``. Nothing is ever
    divided by a decay, so a decay of 0 (a reset) is as good as any other. Inputs of any stride are accepted; a contiguous
    copy is made where the kernel needs one.

    Raises:
        ValueError: wrong shape, dtype, device, option or backend, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("x", x, "B T H P", sizes)
    check_shape("dt", dt, "B T H", sizes)
    check_shape("B", B, "B T G N", sizes)
    check_shape("C", C, "B T G N", sizes)
    dtype = _check(x, dt, A, B, C, D, state, retain, sizes)
    _check_options(chunk, window, state, backend)

    w, a = _insertion_and_decay(dt, A, retain, insert, dtype)
    h = _start(state, x, sizes, dtype)
    limit = None if chunk in TRITON_CHUNKS else f"it takes chunks of {', '.join(map(str, TRITON_CHUNKS))}, got {chunk}"
    chosen = choose(backend, x, dtypes=TRITON_DTYPES, limit=limit)
    if chosen == "triton" and window is None and x.numel() and B.numel():
        from .triton import ssd_triton

        return ssd_triton(x, w, a, B, C, x.new_zeros(sizes["H"], dtype=dtype) if D is None else D.to(dtype), h, chunk)
    inputs = x.to(dtype), w, a, B.to(dtype), C.to(dtype), h
    if window is not None:
        y, h = ssd_windowed(*inputs, window)
    elif chosen == "reference" or x.numel() == 0 or B.numel() == 0:
        y, h = ssd_reference(*inputs)
    else:
        y, h = ssd_parallel(*inputs, chunk)
    return _skip(y, x, D).to(x.dtype), h


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    *,
    retain: float = 1.0,
    insert: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Absorb one token: x ``(B, H, P)``, dt ``(B, H)``, B and C ``(B, G, N)``; return y in x's dtype and the new state.

    A, D, the state and the options are those of `ssd`; the state has the same size after any number of tokens.

    Raises:
        ValueError: wrong shape, dtype, device or option, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("x", x, "B H P", sizes)
    check_shape("dt", dt, "B H", sizes)
    check_shape("B", B, "B G N", sizes)
    check_shape("C", C, "B G N", sizes)
    dtype = _check(x, dt, A, B, C, D, state, retain, sizes)
    w, a = _insertion_and_decay(dt, A, retain, insert, dtype)
    B, C = (to_heads(z.to(dtype), sizes["H"]) for z in (B, C))
    y, h = absorb(x.to(dtype), w, a, B, C, _start(state, x, sizes, dtype))
    return _skip(y, x, D).to(x.dtype), h


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    retain: float,
    sizes: dict[str, int],
) -> torch.dtype:
    """Check what both functions take beyond the shapes that differ; return the dtype of the state."""
    H, G = sizes["H"], sizes["G"]
    if G == 0 or H % G:
        raise ValueError(f"expected H to be a multiple of G, got H = {H}, G = {G}")
    check_shape("A", A, "H", sizes)
    check_same(("x", x), ("B", B), ("C", C))
    others = [("dt", dt), ("A", A)]
    if D is not None:
        check_shape("D", D, "H", sizes)
        others.append(("D", D))
    if state is not None:
        check_shape("state", state, "B H N P", sizes)
        others.append(("state", state))
    check_same(("x", x), *others, dtype=False)
    for name, tensor in (("x", x), *others):
        if not tensor.is_floating_point():
            raise ValueError(f"expected {name} of a floating-point dtype, got {tensor.dtype}")
    if not retain > 0:
        raise ValueError(f"expected retain to be above 0, got {retain}")
    check_values(x=x, dt=dt, A=A, B=B, C=C, D=D, state=state)
    if debugging() and bool((A >= 0).any()):
        raise ValueError(f"expected A to be negative, got a largest value of {A.max().item()}")
    return accumulate_dtype(x.dtype)


def _check_options(chunk: int, window: int | None, state: Tensor | None, backend: str) -> None:
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"expected chunk to be an integer of at least 1, got {chunk!r}")
    if window is None:
        return
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"expected window to be None or an integer of at least 1, got {window!r}")
    if backend in ("parallel", "triton"):
        raise ValueError(
            f'expected backend "auto" or "reference" with a window, got {backend!r}: the chunked form has no window'
        )
    if state is not None:
        raise ValueError("expected no state with a window, got one: a state does not tell its tokens apart")


def _insertion_and_decay(
    dt: Tensor, A: Tensor, retain: float, insert: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The factor of what a token inserts, and the log of its decay."""
    dt = dt.to(dtype)
    return insert * dt, dt * A.to(dtype) + math.log(retain)


def _start(state: Tensor | None, x: Tensor, sizes: dict[str, int], dtype: torch.dtype) -> Tensor:
    if state is not None:
        return state.to(dtype)
    return x.new_zeros([sizes[n] for n in ("B", "H", "N", "P")], dtype=dtype)


def _skip(y: Tensor, x: Tensor, D: Tensor | None) -> Tensor:
    return y if D is None else y + D.to(y.dtype)[:, None] * x
