"""Newton-Schulz against the singular value decomposition that it does without (which gives exactly U Vᵀ)."""

import torch

from seqarch.kernels.newton_schulz import cost, newton_schulz

from ..case import Case, ours


def case(P: int, m: int, n: int) -> Case:
    def make(device, dtype):
        return (torch.randn(P, m, n, device=device, dtype=dtype),)

    def svd(G):
        U, _, Vh = torch.linalg.svd(G.float(), full_matrices=False)
        return (U @ Vh).to(G.dtype)

    implementations = ours(newton_schulz, ("reference", "parallel"))
    shape = dict(P=P, m=m, n=n)
    return Case(
        "newton_schulz", shape, make, implementations, cost.bytes, cost.flops, {"svd": svd}, exact=False, steps=5
    )


CASES = {"cpu": [case(128, 32, 64), case(1, 512, 512)], "cuda": [case(1, 2048, 2048), case(2048, 64, 128)]}
