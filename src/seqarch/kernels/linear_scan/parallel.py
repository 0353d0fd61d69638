r"""The linear scan in PyTorch without a loop over T: two passes over chunks.

A step is the map $h \mapsto a h + b$, and maps compose: doing $(a_1, b_1)$ and then $(a_2, b_2)$ is the one map
$(a_2 a_1,\; a_2 b_1 + b_2)$. So cut the sequence into N chunks of C steps. All chunks advance together:

1. *summarise*: fold each chunk into one map (C iterations, each over all N chunks);
2. *carry*: walk over the N maps to find the state in which each chunk starts (N iterations on tiny tensors);
3. *expand*: run every chunk from its true start (C iterations).

With $C \approx \sqrt T$ that is about $3\sqrt T$ PyTorch calls instead of T. The work is still O(T), and no product of
gates longer than a chunk is formed, so nothing overflows that the plain loop would not overflow too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._dispatch import accumulate_dtype


def _walk(a: Tensor, b: Tensor, h: Tensor, out: Tensor, reverse: bool) -> Tensor:
    """Fill `out` step by step along dim -2 from state `h`; return the last state. The loop that chunks share."""
    steps = b.shape[-2]
    gates, inputs, states = a.unbind(-2), b.unbind(-2), out.unbind(-2)
    for t in reversed(range(steps)) if reverse else range(steps):
        h = torch.addcmul(inputs[t], gates[t], h, out=states[t])
    return h


def scan_chunks(a: Tensor, b: Tensor, h0: Tensor, reverse: bool, out: Tensor) -> None:
    """Write all states of the scan into `out` ``(B, T, D)``, without autograd; a may be ``(B, T, 1)``."""
    B, T, D = b.shape
    C = max(1, round(T**0.5))
    N = T // C
    if N < 4 or B * D * C > 2**23:  # few steps, or rows so wide that one call per step already fills the machine
        _walk(a, b, h0, out, reverse)
        return
    # The ragged end (fewer than C steps) is walked after the chunks, or before them in reverse.
    main, tail = slice(0, N * C), slice(N * C, T)
    if reverse:
        h0 = _walk(a[:, tail], b[:, tail], h0, out[:, tail], reverse)
    chunks = [x[:, main].unflatten(1, (N, C)) for x in (a, b, out)]
    gates, inputs = chunks[0].unbind(2), chunks[1].unbind(2)

    order = list(reversed(range(C))) if reverse else list(range(C))
    product, local = gates[order[0]].clone(), inputs[order[0]].clone()
    for c in order[1:]:
        product.mul_(gates[c])
        torch.addcmul(inputs[c], gates[c], local, out=local)

    starts = torch.empty_like(local)
    for n in reversed(range(N)) if reverse else range(N):
        starts[:, n] = h0
        h0 = torch.addcmul(local[:, n], product[:, n], h0)

    _walk(*chunks[:2], starts, chunks[2], reverse)
    if not reverse:
        _walk(a[:, tail], b[:, tail], h0, out[:, tail], reverse)


class _LinearScan(torch.autograd.Function):
    """The scan and its gradient, which is a scan the other way (equations in `linear_scan`)."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        dtype = accumulate_dtype(b.dtype)
        states = torch.empty(b.shape, dtype=dtype, device=b.device)
        scan_chunks(a.to(dtype), b.to(dtype), h0, reverse, out=states)
        h, last = states.to(b.dtype), states[:, 0 if reverse else -1].clone()
        ctx.save_for_backward(a, h, h0)
        ctx.reverse = reverse
        return h, last

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h: Tensor, grad_last: Tensor):
        a, h, h0 = ctx.saved_tensors
        dtype = accumulate_dtype(a.dtype)
        gates, grad_h = a.to(dtype).conj().resolve_conj(), grad_h.to(dtype)
        # early: all steps but the last one walked; late: all but the first. A step of late has its predecessor in early.
        early, late = slice(None, -1), slice(1, None)
        first, last = 0, -1
        if ctx.reverse:
            early, late, first, last = late, early, last, first

        lam = torch.empty(h.shape, dtype=dtype, device=h.device)
        lam[:, last] = grad_h[:, last] + grad_last
        scan_chunks(gates[:, late], grad_h[:, early], lam[:, last].clone(), not ctx.reverse, out=lam[:, early])

        grad_a = torch.empty_like(lam)
        torch.mul(lam[:, late], h[:, early].conj(), out=grad_a[:, late])
        grad_a[:, first] = lam[:, first] * h0.conj()
        if a.shape[-1] != h.shape[-1]:
            grad_a = grad_a.sum(-1, keepdim=True)
        return grad_a.to(a.dtype), lam.to(h.dtype), gates[:, first] * lam[:, first], None


def linear_scan_parallel(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Chunked scan with its hand-written gradient; shapes as in `linear_scan`."""
    return _LinearScan.apply(a, b, h0, reverse)
