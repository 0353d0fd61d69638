"""Spiking neurons against snntorch and spikingjelly, where they are installed."""

from functools import partial

import torch

from seqarch.kernels.lif import cost, lif

from ..case import ABSENT, Case, installed, ours


def case(B: int, C: int, N: int) -> Case:
    def make(device, dtype):
        return (torch.rand(B, C, N, device=device, dtype=dtype) * 2,)

    peers = {"snntorch (its own leak)": ABSENT, "spikingjelly": ABSENT}
    if installed("snntorch"):

        def snntorch(x):
            from snntorch import Leaky

            # its membrane is v beta + x: another scale of the input, the same work
            cell, v, spikes = Leaky(beta=0.5, threshold=2.0, reset_mechanism="zero"), None, []
            v = cell.init_leaky()
            for x_t in x.unbind(2):
                s, v = cell(x_t, v)
                spikes.append(s)
            return torch.stack(spikes, dim=2)

        peers["snntorch (its own leak)"] = snntorch
    if installed("spikingjelly"):

        def spikingjelly(x):
            from spikingjelly.activation_based import neuron

            return neuron.LIFNode(tau=2.0, detach_reset=True, step_mode="m")(x.movedim(2, 0)).movedim(0, 2)

        peers["spikingjelly"] = spikingjelly
    shape = dict(B=B, C=C, N=N)
    return Case("lif", shape, make, ours(lif), cost.bytes, cost.flops, peers, exact=False, steps=N)


CASES = {"cpu": [case(8, 32, 4096), case(1, 16, 65536)], "cuda": [case(64, 256, 1024), case(4, 64, 65536)]}


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with."""
    for tau in (2.0, 3.0):  # a power of two, and a division
        yield partial(lif, tau=tau), (x(2, 40, 50),)
