"""The Krylov matrix by doubling against the loop."""

import torch

from seqarch.kernels.krylov import cost, krylov

from ..case import Case, Run, ours


def case(H: int, N: int, L: int) -> Case:
    """H systems of N states, L powers; the matrices are rotations, so that no column vanishes."""

    def make(device, dtype):
        A = torch.linalg.qr(torch.randn(H, N, N, device=device, dtype=torch.float64))[0]
        return A.to(dtype), torch.randn(H, N, device=device, dtype=dtype)

    def bound(run: Run) -> Run:
        return lambda A, B: run(A, B, L)

    mine = {backend: bound(run) for backend, run in ours(krylov, ("reference", "parallel")).items()}
    return Case("krylov", dict(H=H, N=N, L=L), make, mine, cost.bytes, cost.flops, steps=L)


CASES = {"cpu": [case(8, 32, 4096), case(1, 32, 65536)], "cuda": [case(256, 64, 4096), case(16, 64, 65536)]}
