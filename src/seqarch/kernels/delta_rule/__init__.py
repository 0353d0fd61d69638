r"""The delta rule: an associative memory that corrects itself, plain or with forgetting (chapters 17 and 18).

The state is a matrix S that maps keys to values. Every token first lets S decay, then looks up what S holds under its
key, and writes the difference to what it should hold:

$$S'_t = \alpha_t S_{t-1},\qquad e_t = v_t - S'^{\top}_t k_t,\qquad S_t = S'_t + \beta_t\, k_t e_t^\top,\qquad
  o_t = S_t^\top q_t .$$

Read the folder in this order: ``reference.py`` (the definition), ``parallel.py`` (chunks), ``triton.py`` (GPU).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype, check_same, check_shape, check_values, choose
from .parallel import delta_rule_parallel
from .reference import absorb, delta_rule_reference

__all__ = ["delta_rule", "delta_rule_step"]

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_TRITON_KEY = 128


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Write each value under its key by the delta rule, and read the memory with each query after the write.

    A write is one step of gradient descent, of size $\beta_t$, on $\tfrac12 \lVert S^\top k_t - v_t \rVert^2$:
    $$S_t = \alpha_t (I - \beta_t k_t k_t^\top) S_{t-1} + \beta_t k_t v_t^\top,\qquad o_t = S_t^\top q_t,\qquad
      \alpha_t = e^{\text{log\_decay}_t} .$$

    Args:
        q, k: queries and keys, ``(B, H, T, K)``. Nothing is normalised or scaled here. With keys of norm 1 and
            $0 \le \beta \le 2$ a step never enlarges the state; longer keys can make it grow without bound.
        v: values, ``(B, H, T, V)``, of the same dtype.
        beta: step sizes, ``(B, H, T)``: 0 leaves the memory alone, 1 replaces what a unit key held, 2 reflects it.
        log_decay: logarithms of the decays, at most 0, ``(B, H, T)``; -inf forgets everything. None keeps
            everything: the ungated delta rule.
        state: S before the first token, ``(B, H, K, V)``; None is zero.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"`` (K at most 128).

    Returns:
        ``o`` of v's shape and dtype, and the state after the last token, ``(B, H, K, V)`` in float32 (float64 where the
        inputs are). Feeding it as the state of the next piece continues exactly where this one stopped.

    Gradients flow to all inputs, from o and from the final state. Inputs of any stride are accepted; a contiguous copy
    is made where the kernel needs one.

    Raises:
        ValueError: wrong shape, dtype, device or backend, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("q", q, "B H T K", sizes)
    check_shape("k", k, "B H T K", sizes)
    check_shape("v", v, "B H T V", sizes)
    S = _check(q, k, v, {"beta": beta, "log_decay": log_decay}, "B H T", state, sizes)
    (B, H, T, K), V = q.shape, v.shape[-1]
    limit = f"it takes keys of size up to {MAX_TRITON_KEY}, got {K}" if K > MAX_TRITON_KEY else None
    chosen = choose(backend, q, dtypes=TRITON_DTYPES, limit=limit)
    if B * H * T * K * V == 0:
        chosen = "reference"
    stored, dtype = v.dtype, S.dtype
    gates = [None if x is None else x.to(dtype).reshape(B * H, T) for x in (beta, log_decay)]
    if chosen == "triton":
        from .triton import delta_rule_triton as scan
    else:
        scan = delta_rule_reference if chosen == "reference" else delta_rule_parallel
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    rows = q.reshape(B * H, T, K), k.reshape(B * H, T, K), v.reshape(B * H, T, V)
    o, S = scan(*rows, *gates, S.reshape(B * H, K, V))
    return o.to(stored).view(B, H, T, V), S.view(B, H, K, V)


def delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token, for streaming: q, k ``(B, H, K)``, v ``(B, H, V)``, beta and log_decay ``(B, H)``.

    Returns:
        o ``(B, H, V)`` in v's dtype, and the new state, laid out as in `delta_rule`.

    Raises:
        ValueError: wrong shape, dtype or device, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("q", q, "B H K", sizes)
    check_shape("k", k, "B H K", sizes)
    check_shape("v", v, "B H V", sizes)
    S = _check(q, k, v, {"beta": beta, "log_decay": log_decay}, "B H", state, sizes)
    alpha = None if log_decay is None else log_decay.to(S.dtype).exp()
    o, S = absorb(*(x.to(S.dtype) for x in (q, k, v, beta)), alpha, S)
    return o.to(v.dtype), S


def _check(
    q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor | None], shape: str, state: Tensor | None, sizes: dict
) -> Tensor:
    """Check what both functions take beyond the shapes of q, k and v; return the state to start from."""
    check_same(("v", v), ("q", q), ("k", k))
    if not v.is_floating_point():
        raise ValueError(f"expected v of a floating-point dtype, got {v.dtype}")
    given = {name: gate for name, gate in gates.items() if gate is not None}
    for name, gate in given.items():
        check_shape(name, gate, shape, sizes)
    if state is not None:
        check_shape("state", state, "B H K V", sizes)
        given["state"] = state
    check_same(("v", v), *given.items(), dtype=False)
    for name, tensor in given.items():
        if not tensor.is_floating_point():
            raise ValueError(f"expected {name} of a floating-point dtype, got {tensor.dtype}")
    check_values(q=q, k=k, v=v, **given)
    dtype = accumulate_dtype(v.dtype)
    if state is not None:
        return state.to(dtype)
    return v.new_zeros(*(sizes[n] for n in ("B", "H", "K", "V")), dtype=dtype)
