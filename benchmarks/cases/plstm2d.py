"""The recurrence on a grid. Its published implementations (JAX, PyTorch) are not packaged: the loop is the only peer."""

import torch

from seqarch.kernels.plstm2d import GATES, cost, plstm2d

from ..case import Case, ours


def grid(q, k, v, *gates, backend="auto"):
    """`plstm2d` with its gates as separate arguments, in the order of `GATES`."""
    return plstm2d(q, k, v, dict(zip(GATES, gates, strict=True)), backend=backend)


def case(N: int, X: int, Y: int, K: int, V: int, gate_rows: int) -> Case:
    def make(device, dtype):
        q, k = torch.randn(2, N, X, Y, K, device=device, dtype=dtype).unbind()
        v = torch.randn(N, X, Y, V, device=device, dtype=dtype)
        # transitions of at most one half: over any number of paths the sums stay bounded
        gates = torch.rand(len(GATES), gate_rows, X, Y, device=device, dtype=dtype) / 2
        return q / K**0.5, k, v, *gates.unbind()

    shape = dict(N=N, X=X, Y=Y, K=K, V=V, gate_rows=gate_rows)
    return Case("plstm2d", shape, make, ours(grid), cost.bytes, cost.flops, steps=X * Y)


CASES = {
    "cpu": [case(4, 64, 64, 16, 16, 4), case(4, 64, 64, 16, 16, 1), case(1, 256, 256, 4, 4, 1)],
    "cuda": [case(48, 32, 32, 64, 64, 48), case(48, 32, 32, 64, 64, 1), case(12, 256, 256, 64, 64, 12)],
}


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with."""
    for width, gate_rows in ((16, 2), (32, 1), (64, 2)):
        gates = [x(gate_rows, 9, 12) for _ in GATES]
        yield grid, (x(2, 9, 12, width), x(2, 9, 12, width), x(2, 9, 12, width), *gates)
