r"""The fetched memory in PyTorch: copy the picked blocks, then one batched product per pick and matrix.

After the copy, pick j of all B sequences is a batch of B feed-forward blocks of one shape: three batched matrix products
for all of them, and a loop over the few picks only. Stacking the picks into one block k r wide would save that loop, but
the output matrices lie the other way round and would have to be copied once more.

The copy is the price: what is fetched is read, written and read again, and one block picked by ten sequences is there
ten times. With L tokens a block does 2 L multiplications for every weight it copies, so from a few dozen tokens on the
products take longer than the copy. The kernels of ``triton.py`` read the blocks where they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._dispatch import accumulate_dtype
from .reference import fetch


def memory_ffn_parallel(
    x: Tensor,
    bank_in: Tensor,
    bank_gate: Tensor | None,
    bank_out: Tensor,
    idx: Tensor,
    w: Tensor | None,
    sparse_grad: bool,
) -> Tensor:
    """All sequences at once, one pick after the other; arguments as in `memory_ffn`."""
    # a GPU multiplies half-precision numbers and sums them in float32; a CPU is quicker, and exacter, in float32 throughout
    wide = accumulate_dtype(x.dtype)
    dtype = wide if x.is_cpu else x.dtype
    tokens = x.to(dtype)
    inside, out = (fetch(bank, idx, sparse_grad, dtype).unbind(1) for bank in (bank_in, bank_out))
    gate = None if bank_gate is None else fetch(bank_gate, idx, sparse_grad, dtype).unbind(1)
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    for j in range(idx.shape[1]):
        q = tokens @ inside[j].mT
        h = F.silu(q) if gate is None else F.silu(tokens @ gate[j].mT) * q
        if w is not None:
            h = h * w[:, j, None, None].to(dtype)
        y = y + h @ out[j].mT
    return y.to(x.dtype)
