r"""The 2 x 2 block scan in PyTorch without a loop over T: two passes over chunks.

A step is the map $h \mapsto J h + r$, and maps compose: doing $(J_1, r_1)$ and then $(J_2, r_2)$ is the one map
$(J_2 J_1,\; J_2 r_1 + r_2)$. The later matrix stands on the left, and the order matters: 2 x 2 matrices do not commute.
As in ``linear_scan/parallel.py``, the sequence is cut into $N \approx \sqrt T$ chunks that advance together: *summarise*
each chunk to one map, *carry* the state over the N maps, *expand* every chunk from its true start.

Matrix and vector of a chunk's map are folded at once, as the three columns of $X = [P \mid v]$: the next step makes them
$J X + [0 \mid r]$, and the columns of P start as those of the identity.

Inside, the components come first: J is ``(2, 2, B, T, D)`` and r is ``(2, B, T, D)``. The product of all matrices with all
states is then two calls on long planes, one per column of J, instead of very many tiny matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._dispatch import accumulate_dtype


def _walk(J: Tensor, r: Tensor, h: Tensor, out: Tensor, reverse: bool) -> Tensor:
    """Fill `out` step by step along dim -2 from state `h`; return the last state. The loop that chunks share."""
    left, right = J[:, 0].unbind(-2), J[:, 1].unbind(-2)  # the two columns of every matrix
    inputs, states = r.unbind(-2), out.unbind(-2)
    for t in reversed(range(len(states))) if reverse else range(len(states)):
        h = torch.addcmul(inputs[t], left[t], h[0], out=states[t]).addcmul_(right[t], h[1])
    return h


def _summarise(J: Tensor, r: Tensor, reverse: bool) -> Tensor:
    """Fold the steps along dim -2 into one map ``[P | v]``: ``(2, 3, ...)``."""
    left, right, inputs = J[:, 0].unbind(-2), J[:, 1].unbind(-2), r.unbind(-2)
    order = list(reversed(range(len(inputs)))) if reverse else list(range(len(inputs)))
    X = torch.cat([J.select(-2, order[0]), inputs[order[0]][:, None]], dim=1)
    for c in order[1:]:
        X = (left[c][:, None] * X[0]).addcmul_(right[c][:, None], X[1])
        X[:, 2] += inputs[c]
    return X


def scan_planes(J: Tensor, r: Tensor, h0: Tensor, reverse: bool, out: Tensor) -> None:
    """Write all states into `out`, without autograd: J ``(2, 2, B, T, D)``, r and out ``(2, B, T, D)``, h0 ``(2, B, D)``."""
    _, B, T, D = r.shape
    C = max(1, round(T**0.5))
    N = T // C
    if N < 4 or B * D * C > 2**22:  # few steps, or rows so wide that one call per step already fills the machine
        _walk(J, r, h0, out, reverse)
        return
    # The ragged end (fewer than C steps) is walked after the chunks, or before them in reverse.
    main, tail = slice(0, N * C), slice(N * C, T)
    if reverse:
        h0 = _walk(J[..., tail, :], r[..., tail, :], h0, out[..., tail, :], reverse)
    chunks = [x[..., main, :].unflatten(-2, (N, C)) for x in (J, r, out)]
    maps = _summarise(*chunks[:2], reverse)

    starts = torch.empty_like(maps[:, 2])
    for n in reversed(range(N)) if reverse else range(N):
        starts[:, :, n] = h0
        P, v = maps[:, :2, :, n], maps[:, 2, :, n]
        h0 = torch.addcmul(v, P[:, 0], h0[0]).addcmul_(P[:, 1], h0[1])

    _walk(*chunks[:2], starts, chunks[2], reverse)
    if not reverse:
        _walk(J[..., tail, :], r[..., tail, :], h0, out[..., tail, :], reverse)


def _planes(x: Tensor, components: int, dtype: torch.dtype) -> Tensor:
    """Bring the last `components` axes, each of size 2, to the front, in memory too.

    One strided copy per plane, each a long loop; one permuted copy of the whole would be loops of length 2.
    """
    if components == 0:
        return x.to(dtype)
    planes = torch.empty((2,) * components + x.shape[:-components], dtype=dtype, device=x.device)
    for i in range(2):
        planes[i] = _planes(x.select(-components, i), components - 1, dtype)
    return planes


def _pairs(planes: Tensor, dtype: torch.dtype) -> Tensor:
    """The way back for one component: ``(2, ...)`` to a contiguous ``(..., 2)``."""
    pairs = torch.empty(*planes.shape[1:], 2, dtype=dtype, device=planes.device)
    for i in range(2):
        pairs[..., i] = planes[i]
    return pairs


class _Block2Scan(torch.autograd.Function):
    """The scan and its gradient, which is a scan the other way with transposed matrices (equations in `block2_scan`)."""

    @staticmethod
    def forward(ctx, J: Tensor, r: Tensor, h0: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        dtype = accumulate_dtype(r.dtype)
        inputs = _planes(r, 1, dtype)
        states = torch.empty_like(inputs)
        scan_planes(_planes(J, 2, dtype), inputs, _planes(h0, 1, dtype), reverse, out=states)
        h, last = _pairs(states, r.dtype), _pairs(states[:, :, 0 if reverse else -1], dtype)
        ctx.save_for_backward(J, h, h0)
        ctx.reverse = reverse
        return h, last

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h: Tensor, grad_last: Tensor):
        J, h, h0 = ctx.saved_tensors
        dtype = accumulate_dtype(J.dtype)
        transposed, grad_h = _planes(J, 2, dtype).transpose(0, 1), _planes(grad_h, 1, dtype)
        # early: all steps but the last one walked; late: all but the first. A step of late has its predecessor in early.
        early, late = slice(None, -1), slice(1, None)
        first, last = 0, -1
        if ctx.reverse:
            early, late, first, last = late, early, last, first

        lam = torch.empty_like(grad_h)
        lam[:, :, last] = grad_h[:, :, last] + _planes(grad_last, 1, dtype)
        scan_planes(
            transposed[..., late, :], grad_h[:, :, early], lam[:, :, last].clone(), not ctx.reverse,
            out=lam[:, :, early],
        )  # fmt: skip
        start = transposed[:, 0, :, first] * lam[0, :, first] + transposed[:, 1, :, first] * lam[1, :, first]

        grad_J = torch.empty(J.shape, dtype=J.dtype, device=J.device)
        for i in range(2):
            for j in range(2):
                grad_J[:, late, :, i, j] = lam[i, :, late] * h[:, early, :, j]
                grad_J[:, first, :, i, j] = lam[i, :, first] * h0[..., j]
        return grad_J, _pairs(lam, h.dtype), _pairs(start, dtype), None


def block2_scan_parallel(J: Tensor, r: Tensor, h0: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Chunked scan with its hand-written gradient; shapes as in `block2_scan`."""
    return _Block2Scan.apply(J, r, h0, reverse)
