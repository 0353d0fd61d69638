"""The recurrence of Mamba-2 against the kernels of mamba-ssm and of flash-linear-attention."""

import torch

from seqarch.kernels.ssd import cost, ssd

from ..case import ABSENT, Case, Run, installed, ours


def case(B: int, T: int, H: int, P: int, G: int, N: int) -> Case:
    def make(device, dtype):
        x = torch.randn(B, T, H, P, device=device, dtype=dtype)
        dt = 0.1 * torch.rand(B, T, H, device=device)
        A = -1 - 15 * torch.rand(H, device=device)
        write, read = torch.randn(2, B, T, G, N, device=device, dtype=dtype)
        return x, dt, A, write.clone(), read.clone()

    peers: dict[str, Run | str] = {"mamba-ssm": ABSENT, "fla simple_gla": ABSENT}
    if installed("mamba_ssm"):

        def mamba(x, dt, A, write, read):
            from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

            return mamba_chunk_scan_combined(x, dt, A, write, read, chunk_size=64)

        peers["mamba-ssm"] = mamba
    if installed("fla"):

        def simple_gla(x, dt, A, write, read):
            from fla.ops.simple_gla import chunk_simple_gla

            write, read = (z.repeat_interleave(H // G, dim=2) for z in (write, read))
            return chunk_simple_gla(read, write, (dt[..., None] * x).to(x.dtype), dt * A, scale=1.0)[0]

        peers["fla simple_gla"] = simple_gla
    shape = dict(B=B, T=T, H=H, P=P, G=G, N=N)
    return Case("ssd", shape, make, ours(ssd), cost.bytes, cost.flops, peers)


CASES = {
    "cpu": [case(2, 4096, 4, 16, 1, 16), case(1, 4096, 8, 64, 1, 128), case(1, 65536, 4, 16, 1, 16)],
    "cuda": [case(8, 4096, 32, 64, 1, 128), case(1, 65536, 32, 64, 1, 128)],
}


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with."""
    for P, N in ((16, 16), (64, 64), (64, 128)):
        yield (
            ssd,
            (x(1, 100, 2, P), *(x(*s, dtype=torch.float32) for s in ((1, 100, 2), (2,))), *(x(1, 100, 1, N),) * 2),
        )
