"""The gated delta rule against flash-linear-attention, which takes (B, T, H, K) and normalises nothing either."""

import torch

from seqarch.kernels.delta_rule import cost, delta_rule

from ..case import ABSENT, Case, Run, installed, ours


def case(B: int, H: int, T: int, K: int, V: int) -> Case:
    def make(device, dtype):
        q, k = torch.randn(2, B, H, T, K, device=device).unbind()
        k, v = torch.nn.functional.normalize(k, dim=-1), torch.randn(B, H, T, V, device=device)
        beta, decay = torch.rand(2, B, H, T, device=device).unbind()
        return *((x * s).to(dtype) for x, s in ((q, K**-0.5), (k, 1), (v, 1))), beta, -0.2 * decay

    peers: dict[str, Run | str] = {"fla": ABSENT}
    if installed("fla"):

        def fla(q, k, v, beta, log_decay):
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule

            q, k, v, beta, g = (x.transpose(1, 2).contiguous() for x in (q, k, v, beta, log_decay))
            return chunk_gated_delta_rule(q, k, v, g, beta, scale=1.0)[0].transpose(1, 2)

        peers["fla"] = fla
    shape = dict(B=B, H=H, T=T, K=K, V=V)
    return Case("delta_rule", shape, make, ours(delta_rule), cost.bytes, cost.flops, peers)


CASES = {
    "cpu": [case(2, 4, 4096, 32, 32), case(1, 2, 65536, 32, 32)],
    "cuda": [case(8, 16, 4096, 128, 128), case(1, 16, 65536, 128, 128)],
}


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with, gated and not."""
    for K, V in ((16, 16), (64, 64), (128, 128)):
        tokens = x(1, 1, 100, K), x(1, 1, 100, K), x(1, 1, 100, V)
        beta, log_decay = x(1, 1, 100, dtype=torch.float32), x(1, 1, 100, dtype=torch.float32)
        yield delta_rule, (*tokens, beta, log_decay)
        yield delta_rule, (*tokens, beta)
