"""Tridiagonal systems in blocks against Thomas' loop and against the dense solver."""

import torch

from seqarch.kernels.tridiag import cost, tridiag

from ..case import Case, ours


def case(B: int, N: int, K: int, dense: bool) -> Case:
    """B systems of N rows with K right-hand sides; the dense matrix takes memory in N² and is left out of long cases."""

    def make(device, dtype):
        dl, du = torch.randn(2, B, N - 1, device=device, dtype=dtype).unbind()
        return (
            dl,
            4 + torch.rand(B, N, device=device, dtype=dtype),
            du,
            torch.randn(B, N, K, device=device, dtype=dtype),
        )

    def solve(dl, d, du, rhs):
        return torch.linalg.solve(torch.diag_embed(d) + torch.diag_embed(dl, -1) + torch.diag_embed(du, 1), rhs)

    peers = {"torch.linalg.solve": solve if dense else "too large at this length"}
    mine = ours(tridiag, ("reference", "parallel"))
    return Case("tridiag", dict(B=B, N=N, K=K), make, mine, cost.bytes, cost.flops, peers, steps=N)


CASES = {
    "cpu": [case(8, 64, 64, True), case(4, 4096, 8, False)],
    "cuda": [case(256, 64, 64, True), case(8, 4096, 64, False)],
}
