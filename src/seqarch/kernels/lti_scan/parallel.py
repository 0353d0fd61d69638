r"""The linear time-invariant scan in PyTorch, a chunk of Q steps at a time: matrix products and a short loop.

Number the steps of a chunk i = 0, ..., Q - 1 and let x be the state before it. Unrolled,

$$y_i = C \bar A^{i+1} x + \sum_{j \le i} K_{i-j} u_j + D u_i,\qquad K_l = C \bar A^l \bar B,\qquad
  x_{\text{after}} = \bar A^Q x + \sum_j \bar A^{Q-1-j} \bar B\, u_j .$$

The system does not change with time, so all chunks share these matrices, and they are formed once, by doubling:

1. *summarise*: the sums over j of all chunks at once, ``(Q, N)`` matrices;
2. *carry*: walk over the chunks with $\bar A^Q$ to find the state before each of them;
3. *expand*: the outputs of all chunks at once, one ``(Q, Q)`` triangular Toeplitz matrix and one ``(N, Q)`` matrix per
   output.

The states are carried from chunk to chunk in double precision, with powers of $\bar A$ formed in double precision: in a
system that neither grows nor decays, the rounding of $\bar A^Q$ would add up over all L/Q chunks.

The work per step is about $Q + 2N + N^2/Q$ multiplications instead of $N^2$, and L/Q steps are left to walk. Autograd
differentiates the products; what it keeps grows linearly with L.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..krylov.parallel import krylov_blocks

CHUNK = 64


def _toeplitz(K: Tensor) -> Tensor:
    """Return T ``(..., Q, Q)`` with ``T[i, j] = K[i - j]`` for j <= i and 0 above, from K ``(..., Q)``."""
    Q = K.shape[-1]
    # window i of the padded and reversed K reads K[i], K[i-1], ..., K[0], 0, ..., 0
    padded = torch.nn.functional.pad(K.flip(-1), (0, Q - 1))
    return padded.unfold(-1, Q, 1).flip(-2)


def lti_scan_parallel(Abar: Tensor, Bbar: Tensor, C: Tensor, D: Tensor, u: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """Chunked scan; shapes as in `lti_scan`, one dtype."""
    (B, H, L), (N, M) = u.shape, (Bbar.shape[-1], C.shape[1])
    Q = min(CHUNK, L)
    chunks = -(-L // Q)
    rest = L - (chunks - 1) * Q  # steps of the last chunk
    inputs = torch.nn.functional.pad(u, (0, chunks * Q - L)).view(B, H, chunks, Q).transpose(0, 1)  # (H, B, chunks, Q)

    impulses = krylov_blocks(Abar, Bbar[..., None], Q)  # (H, N, Q): A^l B
    readouts = krylov_blocks(Abar.mT, (C @ Abar).mT, Q).view(H, N, Q * M)  # column i M + m: C_m A^(i+1)
    response = _toeplitz(C @ impulses)  # (H, M, Q, Q)

    # summarise: the last chunk only as far as it goes
    backwards = impulses.flip(-1).mT  # (H, Q, N): row j is A^(Q-1-j) B
    sums = inputs[:, :, :-1].flatten(1, 2) @ backwards
    sums = sums.view(H, B, chunks - 1, N).double().unbind(2)
    # carry
    wide = Abar.double()
    advance = torch.linalg.matrix_power(wide, Q).mT
    x = x0.transpose(0, 1).double()  # (H, B, N)
    starts = [x]
    for chunk in sums:
        x = torch.baddbmm(chunk, x, advance)
        starts.append(x)
    last = inputs[:, :, -1, :rest] @ backwards[:, Q - rest :]
    xL = torch.baddbmm(last.double(), x, torch.linalg.matrix_power(wide, rest).mT)
    # expand
    before = torch.stack(starts, dim=2).flatten(1, 2).to(u.dtype)  # (H, B chunks, N)
    carried = (before @ readouts).view(H, B, chunks, Q, M)
    within = inputs.flatten(1, 2) @ response.permute(0, 3, 2, 1).reshape(H, Q, Q * M)
    y = (carried + within.view(H, B, chunks, Q, M)).flatten(2, 3)[:, :, :L]  # (H, B, L, M)
    return y.permute(1, 3, 0, 2) + D.T[..., None] * u[:, None], xL.transpose(0, 1).to(u.dtype)
