r"""Memories that learn while they read: Titans and the Omega rule (chapters 17 and 18).

The linear memory is a matrix W that maps keys to values. Every token takes a step of gradient descent with momentum on what W
gets wrong, and lets W decay:

$$S_t = \theta_t S_{t-1} - \eta_t \sum_{i=t-c+1}^{t} \gamma_i\, (W^\star k_i - v_i)\, k_i^\top,\qquad
  W_t = \alpha_t W_{t-1} + S_t,\qquad y_t = W_t q_t ,$$

where $W^\star$ is the memory at the start of the chunk that t belongs to. Chunks of one token give the gradient where the
memory stands; longer chunks are a *different model*, with staler gradients, that computes in parallel.

The two papers give the gates different letters. Here, with the letters above, which are those of chapter 18:

| here (`omega_linear`) | chapter 17 (`titans_linear`) | meaning |
| --- | --- | --- |
| alpha | 1 - alpha | what is kept of the memory |
| eta | theta | size of the step |
| theta | eta | what is kept of the momentum |
| gamma, window c | 1, 1 | weight of a token in the gradient, and how many tokens are in it |

`titans_mlp` does the same with a memory of two layers. Read the folder in this order: ``reference.py`` (the definition),
``parallel.py`` (chunks), ``mlp.py`` (two layers), ``triton.py`` (GPU).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype, check_same, check_shape, check_values, choose
from .mlp import Pair, mlp_parallel, mlp_reference
from .parallel import memory_parallel
from .reference import memory_reference
from .window import Tail, next_tail

__all__ = ["omega_linear", "titans_linear", "titans_mlp"]

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_TRITON_KEY = 128  # columns of W and S that a program keeps in registers


def titans_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor,
    W0: Tensor | None = None,
    S0: Tensor | None = None,
    *,
    chunk: int = 16,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Memorise by gradient descent with momentum and weight decay, and read after every token (chapter 17).

    $$S_t = \eta_t S_{t-1} - \theta_t\, (W^\star k_t - v_t)\, k_t^\top,\qquad W_t = (1 - \alpha_t) W_{t-1} + S_t,\qquad
      y_t = W_t q_t .$$

    Args:
        q, k: queries and keys, ``(B, H, T, K)``.
        v: values, ``(B, H, T, V)``, of the same dtype.
        theta: sizes of the step, ``(B, H, T)``, at least 0. With theta above $2 / \lVert k \rVert^2$ a step overshoots, and
            the steps of a chunk add up: similar keys need theta times chunk in that range.
        eta: what is kept of the momentum, ``(B, H, T)``, 0 to 1.
        alpha: what is forgotten of the memory, ``(B, H, T)``, 0 to 1; both ends are allowed.
        W0: the memory before the first token, ``(B, H, V, K)``; None is zero.
        S0: the momentum before the first token, like W0.
        chunk: for how many tokens $W^\star$ stays the same. Chunks are counted from the first token of this call.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``.

    Returns:
        ``y`` ``(B, H, T, V)`` in v's dtype, and W and S after the last token, in float32 (float64 where the inputs are).
        Feeding them as W0 and S0 of the next piece continues exactly where this one stopped, if it stopped at the end
        of a chunk.

    With eta = alpha = 0 and chunk = 1 this is `delta_rule`, W being its state transposed. Gradients flow to all inputs,
    from all outputs. Inputs of any stride are accepted.

    Raises:
        ValueError: wrong shape, dtype, device, chunk or backend, with what was expected and what was given.
    """
    gates = {"theta": theta, "eta": eta, "alpha": alpha}
    sizes = _check({"q": q, "k": k}, v, gates, {"W0": W0, "S0": S0}, 1, chunk)
    dtype = accumulate_dtype(v.dtype)
    theta, eta, alpha = (x.to(dtype) for x in (theta, eta, alpha))
    none = [v.new_zeros(sizes["B"], sizes["H"], 0, *size, dtype=dtype) for size in ((sizes["K"],), (sizes["V"],), ())]
    y, W, S, _ = _run(q, k, v, 1 - alpha, theta, eta, torch.ones_like(theta), W0, S0, none, sizes, 1, chunk, backend)
    return y, W, S


def omega_linear(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    W0: Tensor | None = None,
    S0: Tensor | None = None,
    *,
    window: int,
    chunk: int = 16,
    tail: Tail | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tail]:
    r"""Memorise a window of tokens at every step instead of the last one (the Omega rule, chapter 18).

    The equations are at the top of this module; polynomial features of queries and keys are made outside.

    Args:
        phi_q, phi_k: features of queries and keys, ``(B, H, T, D)``.
        v: values, ``(B, H, T, V)``, of the same dtype.
        alpha: what is kept of the memory, ``(B, H, T)``, 0 to 1.
        eta: sizes of the step, ``(B, H, T)``, at least 0. The gradient is a sum of up to `window` terms.
        theta: what is kept of the momentum, ``(B, H, T)``, 0 to 1.
        gamma: weights of the tokens in the gradients that contain them, ``(B, H, T)``, 0 to 1.
        W0, S0: the memory and the momentum before the first token, ``(B, H, V, D)``; None is zero.
        window: how many tokens the gradient contains, the current one included; at most `chunk`.
        chunk: for how many tokens the gradient is taken at the same memory. Chunks are counted from the first token of
            this call.
        tail: phi_k ``(B, H, window - 1, D)``, v ``(B, H, window - 1, V)`` and gamma ``(B, H, window - 1)`` of the tokens
            before the first; None: there were none.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``.

    Returns:
        ``y`` ``(B, H, T, V)`` in v's dtype; W and S after the last token, in float32 (float64 where the inputs are); and
        the tail for the next piece. Feeding the three continues exactly where this call stopped, if it stopped at the
        end of a chunk.

    With window = 1 and gamma = 1 this is `titans_linear`. Gradients flow to all inputs, from all outputs, through the
    tail too. Inputs of any stride are accepted.

    Raises:
        ValueError: wrong shape, dtype, device, window, chunk or backend, with what was expected and what was given.
    """
    gates = {"alpha": alpha, "eta": eta, "theta": theta, "gamma": gamma}
    sizes = _check({"phi_q": phi_q, "phi_k": phi_k}, v, gates, {"W0": W0, "S0": S0}, window, chunk)
    B, H, D, V = (sizes[n] for n in ("B", "H", "D", "V"))
    dtype = accumulate_dtype(v.dtype)
    if tail is None:
        tail = tuple(v.new_zeros(B, H, window - 1, *size, dtype=dtype) for size in ((D,), (V,), ()))
    else:
        _check_tail(tail, v, sizes, window)
    alpha, eta, theta, gamma = (x.to(dtype) for x in (alpha, eta, theta, gamma))
    return _run(phi_q, phi_k, v, alpha, eta, theta, gamma, W0, S0, tail, sizes, window, chunk, backend)


def titans_mlp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor,
    W0: Pair,
    S0: Pair | None = None,
    *,
    chunk: int = 16,
    backend: str = "auto",
) -> tuple[Tensor, Pair, Pair]:
    r"""Memorise in a network of two layers, $M(k) = k + W_2\,\mathrm{silu}(W_1 k)$, as `titans_linear` does in a matrix.

    Args:
        q, k, v: queries, keys and values, ``(B, H, T, e)``, of one dtype; the residual asks for equal sizes.
        theta, eta, alpha: step, momentum and forgetting, ``(B, H, T)``, as in `titans_linear`. The landscape is not a
            parabola: steps that are safe there may diverge here.
        W0: the two matrices before the first token, ``(B, H, m, e)`` and ``(B, H, e, m)``. Zeros would never learn, as each
            gradient contains the other matrix.
        S0: their momenta, of the same shapes; None is zero.
        chunk: for how many tokens the gradient is taken at the same memory, counted from the first token of this call.
        backend: ``"auto"``, ``"reference"`` or ``"parallel"``. There is no Triton kernel.

    Returns:
        ``y`` ``(B, H, T, e)`` in v's dtype, and W and S after the last token, in float32 (float64 where the inputs are).
        Feeding them to the next piece continues exactly where this one stopped, if it stopped at the end of a chunk.

    Gradients flow to all inputs, from all outputs. Inputs of any stride are accepted.

    Raises:
        ValueError: wrong shape, dtype, device, chunk or backend, with what was expected and what was given.
    """
    sizes = _check({"q": q, "k": k}, v, {"theta": theta, "eta": eta, "alpha": alpha}, {}, 1, chunk)
    if sizes["K"] != sizes["V"]:
        raise ValueError(f"expected v of the size of k, {sizes['K']}, got {sizes['V']}")
    dtype = accumulate_dtype(v.dtype)
    W = _check_pair("W0", W0, v, sizes)
    S = [torch.zeros_like(w) for w in W] if S0 is None else _check_pair("S0", S0, v, sizes)
    chosen = choose(backend, v, limit="titans_mlp has no Triton kernel: it consists of matrix products")
    mlp = mlp_reference if chosen == "reference" or v.numel() == 0 else mlp_parallel
    tokens = [x.to(dtype).flatten(0, 1) for x in (q, k, v, theta, eta, alpha)]
    y, W, S = mlp(*tokens, *(tuple(x.to(dtype).flatten(0, 1) for x in pair) for pair in (W, S)), chunk)
    W, S = (tuple(x.unflatten(0, v.shape[:2]) for x in pair) for pair in (W, S))
    return y.to(v.dtype).view(v.shape), W, S


def _check_pair(name: str, pair: Pair, v: Tensor, sizes: dict[str, int]) -> Pair:
    """Check the two matrices of a memory with a hidden layer."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        length = f" of length {len(pair)}" if hasattr(pair, "__len__") else ""
        raise ValueError(f"expected {name} to be a pair of matrices, got {type(pair).__name__}{length}")
    for layer, (tensor, shape) in enumerate(zip(pair, ("B H m V", "B H V m"), strict=True), start=1):
        check_shape(f"{name} of layer {layer}", tensor, shape, sizes)
        check_same(("v", v), (f"{name} of layer {layer}", tensor), dtype=False)
    check_values(**{f"{name} {i}": tensor for i, tensor in enumerate(pair, start=1)})
    return pair


def _check(keys: dict, v: Tensor, gates: dict, states: dict, window: int, chunk: int) -> dict[str, int]:
    """Check what both functions take, and return the sizes; the key columns are K, or D where they are features."""
    sizes: dict[str, int] = {}
    D = "K" if "k" in keys else "D"
    for name, tensor in keys.items():
        check_shape(name, tensor, f"B H T {D}", sizes)
    check_shape("v", v, "B H T V", sizes)
    check_same(("v", v), *keys.items())
    given = gates | {name: state for name, state in states.items() if state is not None}
    for name, tensor in given.items():
        check_shape(name, tensor, "B H T" if name in gates else f"B H V {D}", sizes)
    check_same(("v", v), *given.items(), dtype=False)
    for name, tensor in {"v": v, **given}.items():
        if not tensor.is_floating_point():
            raise ValueError(f"expected {name} of a floating-point dtype, got {tensor.dtype}")
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"expected chunk to be an integer of at least 1, got {chunk!r}")
    if not isinstance(window, int) or not 1 <= window <= chunk:
        raise ValueError(f"expected window to be an integer from 1 to chunk = {chunk}, got {window!r}")
    check_values(v=v, **keys, **given)
    return sizes


def _check_tail(tail: Tail, v: Tensor, sizes: dict[str, int], window: int) -> None:
    if not isinstance(tail, tuple | list) or len(tail) != 3:
        length = f" of length {len(tail)}" if hasattr(tail, "__len__") else ""
        raise ValueError(f"expected tail to be a triple (phi_k, v, gamma), got {type(tail).__name__}{length}")
    for name, tensor, shape in zip(("phi_k", "v", "gamma"), tail, ("B H c-1 D", "B H c-1 V", "B H c-1"), strict=True):
        check_shape(f"tail {name}", tensor, shape, sizes | {"c-1": window - 1})
        check_same(("v", v), (f"tail {name}", tensor), dtype=False)
    check_values(tail_phi_k=tail[0], tail_v=tail[1], tail_gamma=tail[2])


def _run(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, step: Tensor, momentum: Tensor, weight: Tensor,
    W: Tensor | None, S: Tensor | None, tail: Tail, sizes: dict[str, int], window: int, chunk: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tail]:  # fmt: skip
    """Flatten batch and heads into rows, compute in the accumulation dtype, and put everything back."""
    B, H, T, V = v.shape
    K, dtype = q.shape[-1], weight.dtype
    limit = f"it takes keys of size up to {MAX_TRITON_KEY}, got {K}" if K > MAX_TRITON_KEY else None
    chosen = choose(backend, v, dtypes=TRITON_DTYPES, limit=limit)
    if B * H * T * K * V == 0:
        chosen = "reference"
    W, S = (v.new_zeros(B, H, V, K, dtype=dtype) if x is None else x.to(dtype) for x in (W, S))
    tokens = [x.to(dtype).flatten(0, 1) for x in (q, k, v, keep, step, momentum, weight)]
    tail = tuple(x.to(dtype).flatten(0, 1) for x in tail)
    if chosen == "triton":
        from .triton import memory_triton

        memory = functools.partial(memory_triton, exact=v.dtype == torch.float32)
    else:
        memory = memory_reference if chosen == "reference" else memory_parallel
    y, W, S = memory(*tokens, W.flatten(0, 1), S.flatten(0, 1), tail, window, chunk)
    tail = next_tail(tail, tokens[1], tokens[2], tokens[-1])
    W, S, *tail = (x.unflatten(0, (B, H)) for x in (W, S, *tail))
    return y.to(v.dtype).view(B, H, T, V), W, S, tuple(tail)
