"""The Vandermonde sum of S4D's convolution kernel against one exponential per sample and term."""

import torch

from seqarch.kernels.vandermonde import cost, vandermonde

from ..case import Case, Run, ours


def case(R: int, S: int, L: int) -> Case:
    """R channels, S conjugate pairs, L samples."""

    def make(device, dtype):
        step = 10 ** (-3 + 2 * torch.rand(R, 1))
        w = step * torch.complex(torch.full((R, S), -0.5), torch.pi * torch.arange(S).expand(R, S))
        return torch.randn(R, S, dtype=torch.complex64).to(device), w.to(device)

    def broadcast(v, w):
        # the textbook line: in float32 the angle of a late sample has lost its digits
        powers = torch.exp(w[..., None] * torch.arange(L, device=w.device))
        return 2 * torch.einsum("rs,rsl->rl", v, powers).real

    def bound(run: Run) -> Run:
        return lambda v, w: run(v, w, L)

    mine = {backend: bound(run) for backend, run in ours(vandermonde).items()}
    peers = {"broadcast": broadcast}
    return Case("vandermonde", dict(R=R, S=S, L=L), make, mine, cost.bytes, cost.flops, peers, steps=S)


CASES = {"cpu": [case(32, 32, 4096), case(1, 32, 65536)], "cuda": [case(512, 32, 8192), case(16, 32, 65536)]}


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with."""
    if dtype is torch.float32:  # complex numbers are pairs of float32, whatever else is half
        for L in (100, 3000):
            yield vandermonde, (x(2, 20, dtype=torch.complex64), x(2, 20, dtype=torch.complex64), L)
