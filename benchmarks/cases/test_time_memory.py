"""The test-time memories: Titans, linear and with a hidden layer, and the Omega rule. No packaged peer is known."""

from functools import partial

import torch

from seqarch.kernels.test_time_memory import cost, omega_linear, titans_linear, titans_mlp

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


def mlp(B: int, H: int, T: int, e: int, m: int) -> Case:
    def make(device, dtype):
        q, k, v = torch.randn(3, B, H, T, e, device=device).unbind()
        theta, eta, alpha = torch.rand(3, B, H, T, device=device).unbind()
        W = torch.randn(B, H, m, e, device=device) / e**0.5, torch.randn(B, H, e, m, device=device) / m**0.5
        k = torch.nn.functional.normalize(k, dim=-1)
        return *(x.to(dtype) for x in (q, k, v)), 0.02 * theta, eta, alpha, *W

    def kernel(*x, backend="auto"):
        y, W, S = titans_mlp(*x[:6], x[6:], backend=backend)
        return y, *W, *S

    shape = dict(B=B, H=H, T=T, e=e, m=m)
    return Case("titans_mlp", shape, make, ours(kernel, ("reference", "parallel")), cost.mlp_bytes, cost.mlp_flops)


CASES = {
    "cpu": [
        mlp(2, 2, 4096, 32, 64),
        case(2, 2, 4096, 32, 32),
        case(2, 2, 4096, 32, 32, window=4),
        case(1, 1, 65536, 32, 32),
    ],
    "cuda": [
        mlp(8, 16, 4096, 64, 128),
        case(8, 16, 4096, 64, 64),
        case(8, 16, 4096, 64, 64, window=4),
        case(1, 16, 65536, 64, 64),
    ],
}


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with."""
    for K in (64, 128):
        gates = [x(1, 2, 100, dtype=torch.float32) for _ in range(4)]
        tokens = x(1, 2, 100, K), x(1, 2, 100, K), x(1, 2, 100, 64)
        yield titans_linear, (*tokens, *gates[:3])
        yield partial(omega_linear, window=4, chunk=64), (*tokens, *gates)
