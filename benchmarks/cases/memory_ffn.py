"""The fetched memory against the plain way: copy the blocks, stack them, and multiply by torch.bmm."""

import torch
from torch.nn import functional as F

from seqarch.kernels.memory_ffn import cost, memory_ffn

from ..case import Case, ours


def case(B: int, L: int, d: int, r: int, M: int, k: int) -> Case:
    def make(device, dtype):
        shapes = [((B, L, d), 1.0), ((M, r, d), d**-0.5), ((M, r, d), d**-0.5), ((M, d, r), r**-0.5)]
        tensors = [(scale * torch.randn(shape, device=device)).to(dtype) for shape, scale in shapes]
        return *tensors, torch.randint(0, M, (B, k), device=device)

    def stacked(x, bank_in, bank_gate, bank_out, idx):
        inside, gate = bank_in[idx].flatten(1, 2), bank_gate[idx].flatten(1, 2)
        out = bank_out[idx].transpose(1, 2).flatten(2)
        return torch.bmm(F.silu(torch.bmm(x, gate.mT)) * torch.bmm(x, inside.mT), out.mT)

    shape = dict(B=B, L=L, d=d, r=r, M=M, k=k)
    implementations = ours(memory_ffn, sparse_grad=False)  # dense gradients, as those of the peer
    # no loop over time in the definition: B k blocks, one after the other
    return Case("memory_ffn", shape, make, implementations, cost.bytes, cost.flops, {"torch bmm": stacked}, steps=B * k)


CASES = {
    "cpu": [case(8, 256, 128, 64, 64, 2), case(8, 1, 128, 256, 64, 2)],
    "cuda": [case(16, 2048, 1024, 1024, 64, 1), case(16, 1, 1024, 1024, 64, 4)],
}


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with."""
    idx = torch.tensor([[0, 1], [1, 1]])
    banks = x(3, 70, 96), x(3, 70, 96), x(3, 96, 70)
    yield memory_ffn, (x(2, 100, 96), *banks, idx)
    yield memory_ffn, (x(2, 100, 96), *banks, idx, x(2, 2, dtype=torch.float32))
    yield memory_ffn, (x(2, 100, 96), banks[0], None, banks[2], idx)
