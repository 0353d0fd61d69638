"""Sums of rows by segment against index_add_, whose bits change from run to run on a GPU."""

import torch

from seqarch.kernels.segment_sum import cost, segment_sum

from ..case import Case


def case(M: int, D: int, n: int) -> Case:
    def make(device, dtype):
        index = torch.randint(0, n, (M,), generator=torch.Generator().manual_seed(0))
        return torch.randn(M, D, device=device, dtype=dtype), index.to(device)

    def index_add(values, index):
        return torch.zeros_like(values[:n]).index_add(0, index.long(), values)

    def run(backend):
        return lambda values, index: segment_sum(values, index.long(), n, backend=backend)

    ours = {backend: run(backend) for backend in ("reference", "parallel", "triton")}
    shape = dict(M=M, D=D, n=n)
    return Case("segment_sum", shape, make, ours, cost.bytes, cost.flops, {"index_add": index_add}, steps=M)


CASES = {
    "cpu": [case(4096, 64, 512), case(100_000, 64, 12_000)],
    "cuda": [case(1_000_000, 64, 120_000), case(8_000_000, 128, 1_000_000)],
}


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with."""
    for D in (16, 64, 100):
        yield segment_sum, (x(20, D), torch.arange(20) // 3, 8)
