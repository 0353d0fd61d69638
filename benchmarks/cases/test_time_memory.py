"""The linear test-time memories: Titans, and the Omega rule with a window of four tokens. No packaged peer is known."""

from functools import partial

import torch

from seqarch.kernels.test_time_memory import cost, omega_linear, titans_linear

from ..case import Case, ours


def case(B: int, H: int, T: int, K: int, V: int, window: int | None = None) -> Case:
    def make(device, dtype):
        q, k = torch.randn(2, B, H, T, K, device=device).unbind()
        k, v = torch.nn.functional.normalize(k, dim=-1), torch.randn(B, H, T, V, device=device)
        gates = torch.rand(4 if window else 3, B, H, T, device=device)
        steps = 1 if window else 0  # where the sizes of the steps are: they stay small
        gates[steps] *= 0.1
        return *(x.to(dtype) for x in (q, k, v)), *gates.unbind()

    kernel = omega_linear if window else titans_linear
    implementations = ours(kernel, **({"window": window} if window else {}))
    return Case(kernel.__name__, dict(B=B, H=H, T=T, K=K, V=V), make, implementations, cost.bytes, cost.flops)


CASES = {
    "cpu": [case(2, 2, 4096, 32, 32), case(2, 2, 4096, 32, 32, window=4), case(1, 1, 65536, 32, 32)],
    "cuda": [case(8, 16, 4096, 64, 64), case(8, 16, 4096, 64, 64, window=4), case(1, 16, 65536, 64, 64)],
}


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with."""
    for K in (64, 128):
        gates = [x(1, 2, 100, dtype=torch.float32) for _ in range(4)]
        tokens = x(1, 2, 100, K), x(1, 2, 100, K), x(1, 2, 100, 64)
        yield titans_linear, (*tokens, *gates[:3])
        yield partial(omega_linear, window=4, chunk=64), (*tokens, *gates)
