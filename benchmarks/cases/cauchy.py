"""The Cauchy sum of S4's convolution kernel against one batched matrix product, and against KeOps where it is installed."""

import torch

from seqarch.kernels.cauchy import cauchy, cost

from ..case import ABSENT, Case, Run, installed, ours


def case(R: int, S: int, L: int) -> Case:
    """R channels, S conjugate pairs of poles, the L nodes of a kernel of 2 (L - 1) steps."""

    def make(device, dtype):
        nodes = 2 * torch.tan(torch.pi * torch.arange(L, dtype=torch.float64) / (2 * L))
        step = 10 ** (-3 + 2 * torch.rand(R, 1))
        w = step * torch.complex(torch.full((R, S), -0.5), torch.pi * torch.arange(S).expand(R, S))
        v = torch.randn(R, S, dtype=torch.complex64)
        return v.to(device), nodes.to(device, torch.float32), w.to(device)

    def broadcast(v, nodes, w):
        z = torch.complex(torch.zeros_like(nodes), nodes)
        inverse = 1 / (z - w[..., None]), 1 / (z - w[..., None].conj())
        return torch.einsum("rs,rsl->rl", v, inverse[0]) + torch.einsum("rs,rsl->rl", v.conj(), inverse[1])

    def keops(v, nodes, w):
        from pykeops.torch import Genred

        v, w = torch.cat([v, v.conj()], dim=1), torch.cat([w, w.conj()], dim=1)
        z = torch.complex(torch.zeros_like(nodes), nodes).expand(R, -1)
        total = Genred("ComplexMult(v, ComplexReciprocal(z - w))", ["v = Vj(2)", "z = Vi(2)", "w = Vj(2)"], axis=1)
        return torch.view_as_complex(total(*(torch.view_as_real(x).contiguous() for x in (v, z, w))))

    peers: dict[str, Run | str] = {"broadcast": broadcast, "pykeops": keops if installed("pykeops") else ABSENT}
    return Case("cauchy", dict(R=R, S=S, L=L), make, ours(cauchy), cost.bytes, cost.flops, peers, steps=S)


CASES = {"cpu": [case(32, 32, 2049), case(4, 32, 32769)], "cuda": [case(512, 32, 8193), case(16, 32, 65537)]}


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with."""
    if dtype is torch.float32:  # complex numbers are pairs of float32, whatever else is half
        v, w = (x(2, 20, dtype=torch.complex64) for _ in range(2))
        for points in (torch.randn(300), torch.randn(2, 300)):
            yield cauchy, (v, points, w)
