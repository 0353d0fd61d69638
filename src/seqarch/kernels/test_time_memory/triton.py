r"""The linear test-time memory on a GPU: only the walk from chunk to chunk is a kernel of its own.

Of the equations in ``parallel.py`` the tables of decays and the outputs are batched matrix products, which the library
multiplies well for all chunks together. What is left is sequential: with the residuals of chunk n,

$$E_n = K_n W_n^\top - V_n,\qquad W_{n+1} = \beta W_n + a S_n - (A_{C\cdot} \odot E_n)^\top K_n,\qquad
  S_{n+1} = h S_n - (R_{C\cdot} \odot E_n)^\top K_n ,$$

and a loop in Python would launch ten small operations for each. Here a program owns one row (batch x head) and a block of
rows of W, which never meet: it keeps them in registers from the first chunk to the last, and writes down W_n, S_n and
E_n for the outputs. Tokens of a chunk come in tiles of 16. Residuals are formed transposed, $E^\top = W K^\top - V^\top$,
from keys that are loaded transposed, so that no product has to be turned around in registers.

The backward pass walks from the last chunk to the first with the gradients of W and S, $\bar W$ and $\bar S$:

$$\bar E_n \mathrel{-}= A_{C\cdot} \odot K_n \bar W_{n+1}^\top + R_{C\cdot} \odot K_n \bar S_{n+1}^\top,\qquad
  \bar W_n \mathrel{+}= \beta \bar W_{n+1} + \bar E_n^\top K_n,\qquad
  \bar S_n \mathrel{+}= a \bar W_{n+1} + h \bar S_{n+1} .$$

The gradients of keys, values and gates follow from these for all chunks at once, again as batched products.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import dot_options
from .parallel import memory_parallel
from .window import Tail

TILE = {"BV": 16, "BT": 16}  # rows of W that a program owns, and tokens of a chunk that it treats together


@triton.jit
def _load(x, rows, columns, height, width):
    """Load x[rows, columns] of a row-major matrix, 0 outside; where rows run across, what is loaded is the transpose."""
    return tl.load(x + rows * width + columns, mask=(rows < height) & (columns < width), other=0.0)


@triton.jit
def _walk(
    keys, values, to_W, to_S, carry, W_first, S_first, Ws, Ss, errors, N, w, K, V,
    BV: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    v, c = tl.program_id(1) * BV + tl.arange(0, BV), tl.arange(0, BK)
    live, at = (v < V)[:, None] & (c < K)[None, :], v[:, None] * K + c[None, :]
    W = tl.load(W_first + row * V * K + at, mask=live, other=0.0)
    S = tl.load(S_first + row * V * K + at, mask=live, other=0.0)
    for n in range(N):
        tl.store(Ws + (row * (N + 1) + n) * V * K + at, W, mask=live)
        tl.store(Ss + (row * (N + 1) + n) * V * K + at, S, mask=live)
        chunk = row * N + n
        into_W, into_S = tl.zeros((BV, BK), tl.float32), tl.zeros((BV, BK), tl.float32)
        for start in range(0, w, BT):
            i = start + tl.arange(0, BT)
            key = _load(keys + chunk * w * K, i[:, None], c[None, :], w, K)
            key_across = _load(keys + chunk * w * K, i[None, :], c[:, None], w, K)
            E = tl.dot(W, key_across, input_precision=PRECISION)
            E -= _load(values + chunk * w * V, i[None, :], v[:, None], w, V)
            tl.store(errors + chunk * w * V + i[None, :] * V + v[:, None], E, mask=(i < w)[None, :] & (v < V)[:, None])
            for_W = tl.load(to_W + chunk * w + i, mask=i < w, other=0.0)
            for_S = tl.load(to_S + chunk * w + i, mask=i < w, other=0.0)
            into_W = tl.dot(E * for_W[None, :], key, into_W, input_precision=PRECISION)
            into_S = tl.dot(E * for_S[None, :], key, into_S, input_precision=PRECISION)
        beta, a, h = tl.load(carry + 3 * chunk), tl.load(carry + 3 * chunk + 1), tl.load(carry + 3 * chunk + 2)
        W = beta * W + a * S - into_W
        S = h * S - into_S
    tl.store(Ws + (row * (N + 1) + N) * V * K + at, W, mask=live)
    tl.store(Ss + (row * (N + 1) + N) * V * K + at, S, mask=live)


@triton.jit
def _walk_back(
    keys, to_W, to_S, carry, grad_Ws, grad_Ss, grad_errors, all_Ws, all_Ss, all_errors, N, w, K, V,
    BV: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradients that come from outside to those that include everything later."""
    row = tl.program_id(0).to(tl.int64)
    v, c = tl.program_id(1) * BV + tl.arange(0, BV), tl.arange(0, BK)
    live, at = (v < V)[:, None] & (c < K)[None, :], v[:, None] * K + c[None, :]
    last = (row * (N + 1) + N) * V * K + at
    W, S = tl.load(grad_Ws + last, mask=live, other=0.0), tl.load(grad_Ss + last, mask=live, other=0.0)
    tl.store(all_Ws + last, W, mask=live)
    tl.store(all_Ss + last, S, mask=live)
    for back in range(N):
        n = N - 1 - back
        chunk = row * N + n
        into_W = tl.zeros((BV, BK), tl.float32)
        for start in range(0, w, BT):
            i = start + tl.arange(0, BT)
            key = _load(keys + chunk * w * K, i[:, None], c[None, :], w, K)
            key_across = _load(keys + chunk * w * K, i[None, :], c[:, None], w, K)
            for_W = tl.load(to_W + chunk * w + i, mask=i < w, other=0.0)
            for_S = tl.load(to_S + chunk * w + i, mask=i < w, other=0.0)
            E = _load(grad_errors + chunk * w * V, i[None, :], v[:, None], w, V)
            E -= for_W[None, :] * tl.dot(W, key_across, input_precision=PRECISION)
            E -= for_S[None, :] * tl.dot(S, key_across, input_precision=PRECISION)
            tl.store(
                all_errors + chunk * w * V + i[None, :] * V + v[:, None], E, mask=(i < w)[None, :] & (v < V)[:, None]
            )
            into_W = tl.dot(E, key, into_W, input_precision=PRECISION)
        beta, a, h = tl.load(carry + 3 * chunk), tl.load(carry + 3 * chunk + 1), tl.load(carry + 3 * chunk + 2)
        here = (row * (N + 1) + n) * V * K + at
        S = a * W + h * S + tl.load(grad_Ss + here, mask=live, other=0.0)
        W = beta * W + into_W + tl.load(grad_Ws + here, mask=live, other=0.0)
        tl.store(all_Ws + here, W, mask=live)
        tl.store(all_Ss + here, S, mask=live)


def _launch(kernel, keys: Tensor, values: Tensor, arguments: list[Tensor], exact: bool) -> None:
    """Start one program for every row and block of value columns. Not `exact`: products may use TF32."""
    precision = dot_options(torch.float32)["PRECISION"] if exact else "tf32"
    (R, N, w, K), V = keys.shape, values.shape[-1]
    grid = (R, triton.cdiv(V, TILE["BV"]))
    kernel[grid](
        *arguments, N, w, K, V, **TILE, BK=max(16, triton.next_power_of_2(K)), PRECISION=precision, num_warps=8
    )


@torch.library.custom_op("seqarch::memory_walk", mutates_args=())
def _memory_walk(
    keys: Tensor, values: Tensor, to_W: Tensor, to_S: Tensor, carry: Tensor, W: Tensor, S: Tensor, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """States before every chunk and after the last one ``(R, N + 1, V, K)``, and residuals like the values."""
    (R, N, _, K), V = keys.shape, values.shape[-1]
    tensors = [x.contiguous() for x in (keys, values, to_W, to_S, carry, W, S)]
    Ws, Ss = (keys.new_empty(R, N + 1, V, K) for _ in range(2))
    errors = torch.empty_like(tensors[1])
    _launch(_walk, keys, values, [*tensors, Ws, Ss, errors], exact)
    return Ws, Ss, errors


@_memory_walk.register_fake
def _(keys, values, to_W, to_S, carry, W, S, exact):
    (R, N, w, K), V = keys.shape, values.shape[-1]
    return keys.new_empty(R, N + 1, V, K), keys.new_empty(R, N + 1, V, K), keys.new_empty(R, N, w, V)


@torch.library.custom_op("seqarch::memory_walk_backward", mutates_args=())
def _memory_walk_backward(
    keys: Tensor, to_W: Tensor, to_S: Tensor, carry: Tensor, Ws: Tensor, Ss: Tensor, errors: Tensor, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """From gradients of the three results of the walk, each on its own, to those that include everything later."""
    tensors = [x.contiguous() for x in (keys, to_W, to_S, carry, Ws, Ss, errors)]
    results = [torch.empty_like(x) for x in tensors[4:]]
    _launch(_walk_back, keys, errors, [*tensors, *results], exact)
    return tuple(results)


@_memory_walk_backward.register_fake
def _(keys, to_W, to_S, carry, Ws, Ss, errors, exact):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (Ws, Ss, errors))


def _setup_context(ctx, inputs, output):
    keys, _, to_W, to_S, carry, _, _, ctx.exact = inputs
    ctx.save_for_backward(keys, to_W, to_S, carry, *output)


def _backward(ctx, *grads):
    keys, to_W, to_S, carry, Ws, Ss, E = ctx.saved_tensors
    all_W, all_S, grad_E = _memory_walk_backward(keys, to_W, to_S, carry, *grads, ctx.exact)
    W, S, next_W, next_S = Ws[:, :-1], Ss[:, :-1], all_W[:, 1:], all_S[:, 1:]
    grad_keys = grad_E @ W - (to_W[..., None] * E) @ next_W - (to_S[..., None] * E) @ next_S
    grad_to_W, grad_to_S = (-(E * (keys @ x.mT)).sum(-1) for x in (next_W, next_S))
    products = [(x * y).sum((-2, -1)) for x, y in ((W, next_W), (S, next_W), (S, next_S))]
    return grad_keys, -grad_E, grad_to_W, grad_to_S, torch.stack(products, dim=-1), all_W[:, 0], all_S[:, 0], None


_memory_walk.register_autograd(_backward, setup_context=_setup_context)


def memory_triton(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, step: Tensor, momentum: Tensor, weight: Tensor,
    W: Tensor, S: Tensor, tail: Tail, window: int, chunk: int, exact: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The chunked form with the walk above; rows in float32 as in `memory_parallel`.

    Not `exact`, for inputs that came in half precision: products may use TF32, which is finer than those inputs.
    """
    walk = functools.partial(_memory_walk, exact=exact)
    return memory_parallel(q, k, v, keep, step, momentum, weight, W, S, tail, window, chunk, walk)
