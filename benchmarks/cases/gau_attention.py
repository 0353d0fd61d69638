"""Group-local plus global attention against the plain PyTorch of its authors, which keeps every matrix of scores."""

import functools

import torch
import torch.nn.functional as F

from seqarch.kernels.gau_attention import cost, gau_attention

from ..case import Case, ours


def case(B: int, T: int, K: int, E: int, group: int = 256) -> Case:
    def make(device, dtype):
        quad = (group**0.5 * torch.randn(2, B, T, K, device=device)).to(dtype)
        linear = torch.randn(2, B, T, K, device=device, dtype=dtype)
        return [x.clone() for x in (*quad, *linear)] + [torch.randn(B, T, E, device=device, dtype=dtype)]

    def plain(quad_q, quad_k, lin_q, lin_k, v):
        q, k, values = (F.pad(x, (0, 0, 0, -T % group)).unflatten(1, (-1, group)) for x in (quad_q, quad_k, v))
        local = torch.relu(q @ k.mT / group) ** 2 @ values
        return local.flatten(1, 2)[:, :T] + lin_q @ (lin_k.mT @ v / T)

    shape = dict(B=B, T=T, K=K, E=E, group=group)
    run = ours(gau_attention, group=group)
    return Case("gau_attention", shape, make, run, cost.bytes, cost.flops, {"plain PyTorch": plain})


CASES = {
    "cpu": [case(1, 4096, 32, 64, 64), case(1, 4096, 128, 512), case(1, 65536, 32, 64, 64)],
    "cuda": [case(8, 4096, 128, 1024), case(1, 65536, 128, 1024)],
}


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with."""
    for causal in (False, True):
        for K, E in ((32, 64), (64, 64), (128, 256)):
            run = functools.partial(gau_attention, group=256, causal=causal)
            yield run, (*(x(1, 300, K) for _ in range(4)), x(1, 300, E))
