r"""Linear attention on a GPU: chunks of 64 tokens, features and value columns in tiles of 64.

In float32, or with a decay per feature, all of these are 32.

The equations are those of ``parallel.py``; here is how they are laid out.

``_cumulate``   sums of the log decays inside each chunk
``_states``     one program per row (batch x head) and tile of the state; walks the chunks, stores the state before each
``_scores``     one program per chunk: the matrix A of what its tokens read from one another
``_outputs``    one program per chunk and block of value columns: A v, plus what the chunk reads from its state
``_gradients``  one program per chunk: the gradients of the features, and through the map those of q and k

The backward pass is the same sums with the roles exchanged, so it runs the same kernels with BACK=True. The gradient R of
the state is walked from the last chunk to the first; with $P_{ij} = \langle g_i, v_j\rangle$ (made by ``_scores``) and D
the matrix of decays,
$$\partial V = A^\top G + (K \odot e^{c_C - c})\, R,\qquad \partial Q = (P \odot D) K + e^{c} \odot (G S^\top),\qquad
  \partial K = (P \odot D)^\top Q + e^{c_C - c} \odot (V R^\top).$$
The gradient of $\log\alpha_t$ adds up all that decays there on its way, from a token (or the state) before t to a token (or
the state) behind: pairs $A_{ij} P_{ij}$ with j < t <= i, $q_i$ times what it reads from the state for i >= t, $k_j$ times
what it leaves to the state for j < t, and the rowsum of the decayed state with R. Nothing is subtracted: the shorter
form $\sum_{s \ge t} (q_s \odot \partial q_s - k_s \odot \partial k_s)$ loses all digits where little survives.

A feature map is applied when q and k are loaded: F-wide tensors are never in memory. The column of ones that normalises
is not padded to the values, where it would cost a block of its own: its state z and sums ride along in the first block.
Matrices that a product needs transposed are loaded transposed. There are no atomics: two runs agree bit for bit.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import dot_options
from .reference import inverse
from .triton_kernels import _cumulate, _gradients, _outputs, _scores, _states

MAPS = {"": 0, "elu": 1, "taylor": 2}


class _Launch:
    """What all launches of one call share: sizes, block sizes, and where the decays are."""

    def __init__(self, q: Tensor, v: Tensor, F: int, decay: Tensor, features: str, normalize: bool):
        (self.R, self.T, self.D), self.E, self.F, self.W = q.shape, v.shape[-1], F, decay.shape[-1]
        self.decays = 0 if self.W == 0 else 2 if self.W == self.F else 1
        # products of float32 run outside the tensor cores, and a decay per feature needs many tiles at a time
        self.BT = 64 if v.dtype == torch.bfloat16 and self.decays < 2 else 32
        self.N = triton.cdiv(self.T, self.BT)
        self.new = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
        # operands of products: bfloat16 keeps them as they are; float16 could overflow in the states, so its products
        # are TF32, which has as many digits
        half = v.dtype == torch.float16
        self.stored = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
        self.dot = dot_options(v.dtype) if not half else {"DOT": tl.float32, "PRECISION": "tf32"}
        self.map, self.taylor = MAPS[features], features == "taylor"
        self.warps = {"num_warps": 8 if self.BT == 64 else 4}
        self.flags = {"MAP": self.map, "DECAY": self.decays, "SUMS": normalize, "BT": self.BT, **self.warps}
        self.BF, self.BE, self.BD = (min(self.BT, max(16, triton.next_power_of_2(n))) for n in (F, self.E, self.D))
        self.tiles, self.blocks = triton.cdiv(F, self.BF), triton.cdiv(self.E, self.BE)
        self.scales = (self.D**-0.25, (2 * self.D) ** -0.5)
        self.c, self.plane = decay, 0
        if self.W:
            self.c, self.plane = self.new(2, self.R, self.N * self.BT, self.W), self.R * self.N * self.BT * self.W
            width = min(32, triton.next_power_of_2(self.W))
            grid = (self.R * self.N, triton.cdiv(self.W, width))
            _cumulate[grid](decay, self.c, self.T, self.W, self.N, self.plane, BT=self.BT, BW=width)

    def states(self, k, v, ones, S0, z0, others=None, BACK=False):
        """All states ``(R, N + 1, F, E)`` with their column z, the last ones, and with BACK the rowsums for the decays."""
        states, zs = (
            self.new(self.R, self.N + 1, self.F, w, dtype=t) for w, t in ((self.E, self.stored), (1, S0.dtype))
        )
        ST, zT = torch.empty_like(S0), torch.empty_like(z0)
        ends = BACK and self.decays > 0
        end = self.new(self.blocks, self.R, self.N, self.F) if ends else S0
        _states[(self.R, self.tiles, self.blocks)](
            k, v, ones, self.c, S0, z0, states, zs, ST, zT, *(others or (states, zs)), end,
            self.T, self.N, self.D, self.F, self.E, self.W, self.plane, *self.scales,
            BACK=BACK, ENDS=ends, BF=self.BF, BE=self.BE, **self.flags, **self.dot,
        )  # fmt: skip
        return states, zs, ST, zT, end

    def scores(self, q, k, extra, pairs=False):
        """A ``(R, T, BT)``; or with `pairs` P, the products of g and v, to which `extra` is added."""
        A = self.new(self.R, self.T, self.BT, dtype=self.stored)
        taylor = self.taylor and self.decays < 2 and not pairs  # then q and k themselves suffice
        raw = taylor or pairs
        width = self.E if pairs else self.D
        _scores[(self.R * self.N,)](
            q, k, extra, self.c, A, self.T, self.N, width, width if raw else self.F, self.W, self.plane, *self.scales,
            MAP=0 if raw else self.map, DECAY=0 if pairs else self.decays, TAYLOR=taylor,
            EXTRA=pairs and self.flags["SUMS"], BT=self.BT, BF=self.BE if pairs else self.BD if raw else self.BF,
            **self.warps, **self.dot,
        )  # fmt: skip
        return A

    def outputs(self, A, q, v, states, zs, out, den, eps, BACK=False):
        """Fill out, and den if the outputs are normalised."""
        flags = self.flags | {"SUMS": self.flags["SUMS"] and not BACK}
        _outputs[(self.R * self.N, self.blocks)](
            A, q, v, self.c, states, zs, out, den,
            self.T, self.N, self.D, self.F, self.E, self.W, self.plane, eps, *self.scales,
            BACK=BACK, BF=self.BF, BE=self.BE, **flags, **self.dot,
        )  # fmt: skip

    def gradients(self, own, other, A, P, g, extra, states, zs, BACK=False):
        """The gradient of `own`, and its share of that of the decays, ``(R, T, W)``."""
        programs = 1 if self.taylor else self.tiles
        grad = torch.empty_like(own)
        parts = self.new(
            *((1, self.R, self.T, self.F) if self.decays == 2 else (programs + 1, self.R, self.T, self.decays))
        )
        if self.decays == 1 and BACK:
            parts[programs] = 0.0  # pairs inside the chunk are counted once, with q
        _gradients[(self.R * self.N, programs)](
            own, other, A, P, g, extra, self.c, states, zs, grad, parts, parts[-1],
            self.T, self.N, self.D, self.F, self.E, self.W, self.plane, self.F if self.taylor else self.BF, *self.scales,
            BACK=BACK, BF=self.BF, BE=self.BE, BD=self.BD, **self.flags, **self.dot,
        )  # fmt: skip
        return grad, parts.sum(0)


@torch.library.custom_op("seqarch::linear_attention", mutates_args=())
def _linear_attention(
    q: Tensor, k: Tensor, v: Tensor, S0: Tensor, z0: Tensor, decay: Tensor, features: str, normalize: bool, eps: float
) -> list[Tensor]:
    q, k, v, S0, z0, decay = (x.contiguous() for x in (q, k, v, S0, z0, decay))
    launch = _Launch(q, v, S0.shape[1], decay, features, normalize)
    o, den = torch.empty_like(v), launch.new(*v.shape[:2]) if normalize else S0.new_empty(0)
    ones = torch.ones_like(den)
    states, zs, ST, zT, _ = launch.states(k, v, ones, S0, z0)
    launch.outputs(launch.scores(q, k, ones), q, v, states, zs, o, den, eps)
    return [o, ST, zT, den]


@_linear_attention.register_fake
def _(q, k, v, S0, z0, decay, features, normalize, eps):
    o, ST, zT = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v, S0, z0))
    return [o, ST, zT, S0.new_empty(v.shape[:2] if normalize else 0)]


@torch.library.custom_op("seqarch::linear_attention_backward", mutates_args=())
def _linear_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, S0: Tensor, z0: Tensor, decay: Tensor, o: Tensor, den: Tensor,
    grad_o: Tensor, grad_S: Tensor, grad_z: Tensor, features: str, normalize: bool, eps: float,
) -> list[Tensor]:  # fmt: skip
    q, k, v, S0, z0, decay, g, grad_S, grad_z = (
        x.contiguous() for x in (q, k, v, S0, z0, decay, grad_o, grad_S, grad_z)
    )
    launch = _Launch(q, v, S0.shape[1], decay, features, normalize)
    ones, delta = torch.ones_like(den), den
    if normalize:  # from here on g is the gradient of the numerators, and delta that of the sums of weights
        share = inverse(den, eps)
        g = g.float() * share[..., None]
        delta = torch.where(den.abs() < eps, 0.0, -torch.linalg.vecdot(g, o.float()))
        g = g.to(launch.stored)
    A, P = launch.scores(q, k, ones), launch.scores(g, v, delta, pairs=True)
    states, zs, *_ = launch.states(k, v, ones, S0, z0)
    dq, from_q = launch.gradients(q, k, A, P, g, delta, states, zs)
    later, later_z, dS0, dz0, end = launch.states(q, g, delta, grad_S, grad_z, (states, zs), BACK=True)
    dk, from_k = launch.gradients(k, q, A, P, v, ones, later, later_z, BACK=True)
    dv = torch.empty_like(v)
    launch.outputs(A, k, g, later, later_z, dv, den, eps, BACK=True)
    ddecay = torch.empty_like(decay)
    if launch.decays:
        end = end.sum(0) if launch.decays == 2 else end.sum((0, 3))[..., None]
        ddecay = from_q + from_k + end.repeat_interleave(launch.BT, dim=1)[:, : launch.T]
    return [dq, dk, dv, dS0, dz0, ddecay]


@_linear_attention_backward.register_fake
def _(q, k, v, S0, z0, decay, o, den, grad_o, grad_S, grad_z, features, normalize, eps):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, S0, z0, decay)]


def _setup_context(ctx, inputs, output):
    o, _, _, den = output
    ctx.save_for_backward(*inputs[:6], o, den)
    ctx.options = inputs[6:]


def _backward(ctx, grads):
    saved = ctx.saved_tensors
    likes = (saved[6], saved[3], saved[4])  # o, S, z
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, likes, strict=False)]
    return (*_linear_attention_backward(*saved, *grads, *ctx.options), None, None, None)


_linear_attention.register_autograd(_backward, setup_context=_setup_context)


def linear_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, S: Tensor, decay: Tensor, features: str | None, normalize: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Forward and backward by the kernels above; flattened rows as in `linear_attention_reference`, S and decay float32.

    Unlike there, v has no column of ones, and the outputs come divided.
    """
    E = v.shape[-1]
    z = S[..., E] if normalize else S.new_empty(0)
    o, S, z, _ = _linear_attention(q, k, v, S[..., :E], z, decay, features or "", normalize, eps)
    return o, torch.cat([S, z[..., None]], dim=-1) if normalize else S
