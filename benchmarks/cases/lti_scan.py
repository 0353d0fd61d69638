"""Dense linear systems in chunks against the loop, and against a convolution with the whole impulse response."""

import torch

from seqarch.kernels.fftconv import fftconv
from seqarch.kernels.krylov import krylov
from seqarch.kernels.lti_scan import cost, lti_scan

from ..case import Case, ours


def case(B: int, H: int, L: int, N: int, M: int) -> Case:
    """H systems of N states and M outputs, on L steps; a little damped."""

    def make(device, dtype):
        A = 0.999 * torch.linalg.qr(torch.randn(H, N, N, device=device, dtype=torch.float64))[0]
        b, C = torch.randn(H, N, device=device), torch.randn(H, M, N, device=device)
        D, u = torch.randn(H, M, device=device), torch.randn(B, H, L, device=device)
        return [x.to(dtype) for x in (A, b / N**0.5, C / N**0.5, D, u)]

    def convolution(A, b, C, D, u):
        """The same outputs from the impulse response of the whole length: memory H N L."""
        return fftconv(u, (C @ krylov(A, b, L)).transpose(0, 1), D.T)

    shape = dict(B=B, H=H, L=L, N=N, M=M)
    mine = ours(lti_scan, ("reference", "parallel"))
    return Case("lti_scan", shape, make, mine, cost.bytes, cost.flops, {"krylov + fftconv": convolution}, steps=L)


CASES = {
    "cpu": [case(4, 8, 4096, 32, 1), case(1, 2, 65536, 32, 1)],
    "cuda": [case(8, 256, 4096, 64, 1), case(1, 64, 65536, 64, 1)],
}
