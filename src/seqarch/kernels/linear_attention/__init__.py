r"""Linear attention with a constant-size state, plain, decaying or normalised (chapters 13 and 16).

$$S_t = \mathrm{diag}(\alpha_t)\, S_{t-1} + \varphi(k_t)\, v_t^\top,\qquad o_t = S_t^\top \varphi(q_t),\qquad t = 1,\dots,T.$$

Read the folder in this order: ``reference.py`` (the definition), ``parallel.py`` (chunks), ``triton.py`` (GPU).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype, check_same, check_shape, check_values, choose
from .parallel import linear_attention_parallel
from .reference import FEATURES, absorb, elu_features, inverse, linear_attention_reference, taylor_features

__all__ = ["elu_features", "linear_attention", "linear_attention_state", "linear_attention_step", "taylor_features"]

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORGET = -1e4  # e to this power is 0 in double precision too; finite, so that differences of sums are defined


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S0: Tensor | None = None,
    *,
    log_decay: Tensor | None = None,
    features: str | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Read from a memory of all tokens so far, at every position.

    The memory is the matrix $S_t = \mathrm{diag}(\alpha_t)\, S_{t-1} + \varphi(k_t)\, v_t^\top$, and the output
    $o_t = S_t^\top \varphi(q_t)$. With ``normalize=True`` a 1 is appended to every value; the additional column of S
    then sums $\varphi(k)$, the additional output is the sum of all weights, and $o_t$ is divided by it.

    Args:
        q, k: queries and keys, ``(B, H, T, D)``.
        v: values, ``(B, H, T, E)``, of q's dtype.
        S0: the state before the first token, ``(B, H, F, E)``, or ``(B, H, F, E + 1)`` if normalised; None is zero.
            The state of a prompt that is read without order (`linear_attention_state`) makes it prefix attention.
        log_decay: $\log \alpha_t \le 0$, ``(B, H, T)`` for one decay per token, or ``(B, H, T, F)`` for one per feature as
            in GLA; None is no decay. -inf forgets everything before the token. A fixed decay per head, as in
            retention, is an expanded ``(H, 1)``.
        features: the map $\varphi$ from D to F numbers. None: q and k are features already, F = D. ``"elu"``: 1 + elu,
            F = D. ``"taylor"``: second-order Taylor features, F = 1 + D + D^2. The F numbers of a token are formed
            where they are needed, and not stored for the backward pass.
        normalize: divide by the sum of the weights. The features should be positive.
        eps: a sum of weights smaller than this in absolute value is replaced by eps with the same sign; a sum of
            exactly 0 gives output 0.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``.

    Returns:
        ``o`` of v's shape and dtype, and the state S after the last token, in float32 (float64 where q is). Feeding S
        as the S0 of the next piece continues exactly where the first one stopped.

    Gradients flow to q, k, v, S0 and log_decay, from o and from S. With $g_t = \partial L/\partial o_t$, the gradient of the
    state runs backwards, $R_t = \mathrm{diag}(\alpha_{t+1})\, R_{t+1} + \varphi(q_t)\, g_t^\top$ with
    $\partial L/\partial S$ added at t = T, and
    $$\partial \varphi(q_t) = S_t g_t,\quad \partial \varphi(k_t) = R_t v_t,\quad \partial v_t = R_t^\top \varphi(k_t),\quad
      \partial \log\alpha_t = \alpha_t \odot \mathrm{rowsum}(S_{t-1} \odot R_t).$$
    Inputs of any stride are accepted; a contiguous copy is made where the kernel needs one.

    Raises:
        ValueError: wrong shape, dtype, device, feature map or backend, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("q", q, "B H T D", sizes)
    check_shape("k", k, "B H T D", sizes)
    check_shape("v", v, "B H T E", sizes)
    _check(q, k, v, S0, log_decay, features, normalize, sizes, "B H T")
    (B, H, T, E), D, F = v.shape, sizes["D"], sizes["F"]
    dtype = accumulate_dtype(v.dtype)
    S = _start(S0, v, sizes, normalize)
    columns = S.shape[-1]
    decay = _rates(log_decay, q, dtype)
    limit = f"its Taylor features take D up to 64, got {D}" if features == "taylor" and D > 64 else None
    chosen = choose(backend, q, k, v, dtypes=TRITON_DTYPES, limit=limit)
    if v.numel() == 0:
        chosen = "reference"
    R = B * H
    q, k, v, decay, S = (x.reshape(R, *x.shape[2:]) for x in (q, k, v, decay, S))
    if chosen == "triton":
        from .triton import linear_attention_triton

        o, S = linear_attention_triton(q, k, v, S, decay, features, normalize, eps)
    else:
        attend = linear_attention_reference if chosen == "reference" else linear_attention_parallel
        o, S = attend(q.to(dtype), k.to(dtype), _values(v, dtype, normalize), S, decay, features)
        o = _divide(o, normalize, eps).to(v.dtype)
    return o.view(B, H, T, E), S.view(B, H, F, columns)


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor | None = None,
    *,
    log_decay: Tensor | None = None,
    features: str | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Absorb one token: q, k ``(B, H, D)``, v ``(B, H, E)``, log_decay ``(B, H)`` or ``(B, H, F)``; return o and the new S.

    The state has the same layout as in `linear_attention`, and the same size after any number of tokens.

    Raises:
        ValueError: wrong shape, dtype, device or feature map, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("q", q, "B H D", sizes)
    check_shape("k", k, "B H D", sizes)
    check_shape("v", v, "B H E", sizes)
    _check(q, k, v, S, log_decay, features, normalize, sizes, "B H")
    dtype, phi = accumulate_dtype(v.dtype), FEATURES[features]
    decay = _rates(log_decay, q, dtype)
    S = _start(S, v, sizes, normalize)
    o, S = absorb(phi(q.to(dtype)), phi(k.to(dtype)), _values(v, dtype, normalize), S, decay)
    return _divide(o, normalize, eps).to(v.dtype), S


def linear_attention_state(k: Tensor, v: Tensor, *, features: str | None = None, normalize: bool = False) -> Tensor:
    r"""Return the state of a prompt read without order, $\sum_j \varphi(k_j)\, v_j^\top$: the S0 of prefix attention.

    Args:
        k, v: keys ``(B, H, M, D)`` and values ``(B, H, M, E)``. Keys and values of padding must not count: map k by
            `taylor_features` or `elu_features` first and zero the *features*, since the features of 0 are not 0.
        features, normalize: as in `linear_attention`.

    Returns:
        S ``(B, H, F, E)``, or ``(B, H, F, E + 1)`` if normalised, in float32 (float64 where k is).

    Raises:
        ValueError: wrong shape, dtype, device or feature map, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("k", k, "B H M D", sizes)
    check_shape("v", v, "B H M E", sizes)
    _check(k, k, v, None, None, features, normalize, sizes, "B H M")
    dtype = accumulate_dtype(v.dtype)
    return FEATURES[features](k.to(dtype)).mT @ _values(v, dtype, normalize)


def _check(q, k, v, S, log_decay, features, normalize, sizes: dict[str, int], tokens: str) -> None:
    """Check what all functions take beyond the shapes of q, k and v; add F, the number of features, to `sizes`."""
    if features not in FEATURES:
        raise ValueError(f"expected features to be None, 'elu' or 'taylor', got {features!r}")
    for name, tensor, letter in (("q", q, "D"), ("v", v, "E")):
        if sizes[letter] == 0:
            raise ValueError(f"expected {name} with {letter} of at least 1, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"expected {name} of a floating-point dtype, got {tensor.dtype}")
    check_same(("q", q), ("k", k), ("v", v))
    D = sizes["D"]
    sizes["F"] = 1 + D + D * D if features == "taylor" else D
    if S is not None:
        shape = "B H F E+1" if normalize else "B H F E"
        check_shape("S0", S, shape, sizes | {"E+1": sizes["E"] + 1})
        check_same(("q", q), ("S0", S), dtype=False)
    if log_decay is not None:
        each = isinstance(log_decay, Tensor) and log_decay.ndim == len(tokens.split()) + 1
        check_shape("log_decay", log_decay, f"{tokens} F" if each else tokens, sizes)
        check_same(("q", q), ("log_decay", log_decay), dtype=False)
    check_values(q=q, k=k, v=v, S0=S, log_decay=log_decay)


def _start(S: Tensor | None, v: Tensor, sizes: dict[str, int], normalize: bool) -> Tensor:
    """The incoming state in the dtype of sums, zero if there is none."""
    dtype = accumulate_dtype(v.dtype)
    if S is not None:
        return S.to(dtype)
    return v.new_zeros(sizes["B"], sizes["H"], sizes["F"], sizes["E"] + normalize, dtype=dtype)


def _rates(log_decay: Tensor | None, q: Tensor, dtype: torch.dtype) -> Tensor:
    """The log decays with a last axis of F numbers, of one, or of none."""
    if log_decay is None:
        return q.new_empty(*q.shape[:-1], 0, dtype=dtype)
    log_decay = log_decay if log_decay.ndim == q.ndim else log_decay[..., None]
    return log_decay.to(dtype).clamp(min=FORGET)


def _values(v: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """The values, with a 1 appended if the outputs will be normalised."""
    v = v.to(dtype)
    return torch.nn.functional.pad(v, (0, 1), value=1.0) if normalize else v


def _divide(o: Tensor, normalize: bool, eps: float) -> Tensor:
    """Divide the outputs by their last column, the sum of the weights, if they are to be normalised."""
    return o[..., :-1] * inverse(o[..., -1:], eps) if normalize else o
