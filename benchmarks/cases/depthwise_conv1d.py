"""The depthwise convolution against torch's grouped conv1d and, where it is installed, causal-conv1d."""

from functools import partial

import torch
from torch.nn import functional as F

from seqarch.kernels.depthwise_conv1d import cost, depthwise_conv1d

from ..case import ABSENT, Case, installed, ours


def case(B: int, T: int, D: int, k: int, dilation: int = 1) -> Case:
    def make(device, dtype):
        x = torch.randn(B, T, D, device=device, dtype=dtype)
        return x, torch.randn(D, k, device=device, dtype=dtype), torch.randn(D, device=device, dtype=dtype)

    def conv1d(x, w, bias):
        # a correlation over (B, D, T): the taps turned round, and zeros in front for a past that is not there
        past = F.pad(x.mT, ((k - 1) * dilation, 0))
        return F.conv1d(past, w.flip(1)[:, None], bias, dilation=dilation, groups=D).mT

    peers = {"torch conv1d": conv1d}
    if k <= 4 and dilation == 1:  # all that causal-conv1d computes
        peers["causal-conv1d"] = ABSENT
        if installed("causal_conv1d"):

            def causal_conv1d(x, w, bias):
                from causal_conv1d import causal_conv1d_fn

                return causal_conv1d_fn(x.mT, w.flip(1), bias).mT

            peers["causal-conv1d"] = causal_conv1d
    shape = dict(B=B, T=T, D=D, k=k)
    implementations = ours(depthwise_conv1d, dilation=dilation)
    return Case("depthwise_conv1d", shape, make, implementations, cost.bytes, cost.flops, peers)


CASES = {
    "cpu": [case(8, 4096, 64, 4), case(1, 65536, 64, 4), case(1, 16384, 64, 17, dilation=17)],
    "cuda": [case(8, 4096, 2048, 4), case(1, 131072, 512, 17, dilation=17)],
}


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with."""
    yield depthwise_conv1d, (x(2, 100, 96), x(96, 4))
    yield partial(depthwise_conv1d, activation="silu"), (x(2, 100, 96), x(96, 4), x(96))
