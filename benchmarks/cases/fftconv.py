"""The long convolution by transforms against torch's direct convolution."""

import torch

from seqarch.kernels.fftconv import cost, fftconv

from ..case import Case, ours


def case(B: int, H: int, L: int, direct: bool) -> Case:
    """Kernels as long as the sequence; the direct convolution takes time in L² and is left out of long cases."""

    def make(device, dtype):
        decay = torch.exp(-torch.arange(L, device=device) / (0.1 * L))
        return torch.randn(B, H, L, device=device, dtype=dtype), (torch.randn(H, L, device=device) * decay).to(dtype)

    def conv1d(u, k):
        return torch.nn.functional.conv1d(torch.nn.functional.pad(u, (L - 1, 0)), k.flip(-1)[:, None], groups=H)

    peers = {"torch conv1d": conv1d if direct else "too slow at this length"}
    mine = ours(fftconv, ("reference", "parallel"))
    return Case("fftconv", dict(B=B, H=H, L=L), make, mine, cost.bytes, cost.flops, peers, steps=L)


CASES = {
    "cpu": [case(1, 4, 4096, True), case(4, 16, 65536, False)],
    "cuda": [case(8, 768, 4096, False), case(1, 768, 131072, False)],
}
