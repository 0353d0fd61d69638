"""ParaGRU and ParaLSTM: Newton against their own sequential walk, a linear scan (a lower bound) and cuDNN.

The cells of torch.nn are different ones: dense recurrent matrices, of the same width and length, with their own weights.
"""

import functools

import torch

from seqarch.kernels.linear_scan import linear_scan
from seqarch.kernels.nonlinear_rnn import cost, para_gru, para_lstm

from ..case import ABSENT, Case, Run, first, installed, ours


def case(cell: str, B: int, T: int, D: int) -> Case:
    run = para_gru if cell == "gru" else para_lstm

    def make(device, dtype):
        w = torch.randn(B, T, 3, D, device=device, dtype=dtype)
        diagonals = [torch.rand(k, D, device=device, dtype=dtype) - 0.5 for k in (3, 2)]  # |a| <= 1/2: three iterations
        return (w, *diagonals[: 1 if cell == "gru" else 2])

    def sequential(*inputs):
        return first(run(*inputs, iters="sequential"))

    def linear(w, *rest):
        return linear_scan(torch.sigmoid(w[:, :, 0]), w[:, :, 1])[0]

    @functools.cache
    def module(device, dtype):
        kind = torch.nn.LSTM if cell == "lstm" else torch.nn.GRU
        return kind(D, D, batch_first=True).to(device, dtype)

    def torch_nn(w, *rest):
        return module(w.device, w.dtype)(w[:, :, 0])[0]

    peers: dict[str, Run | str] = {
        "ours, sequential": sequential,
        "linear_scan (other function)": linear,
        "torch.nn (dense cell)": torch_nn,
        "pararnn-torch": "other arguments: not measured" if installed("pararnn_torch") else ABSENT,
    }
    return Case(
        f"para_{cell}",
        dict(B=B, T=T, D=D),
        make,
        ours(run),
        functools.partial(cost.bytes, cell=cell),
        functools.partial(cost.flops, cell=cell),
        peers,
        exact=False,
    )


CASES = {
    "cpu": [case(cell, *shape) for cell in ("gru", "lstm") for shape in ((1, 4096, 16), (1, 65536, 16))],
    "cuda": [case(cell, *shape) for cell in ("gru", "lstm") for shape in ((8, 4096, 2048), (1, 65536, 512))],
}


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with."""
    state = torch.float32
    gru = (x(2, 100, 3, 40), x(3, 40, dtype=state), x(2, 40, dtype=state))
    lstm = (x(2, 100, 3, 40), x(3, 40, dtype=state), x(2, 40, dtype=state))
    for options in ({}, {"project": False}, {"return_residual": True}, {"iters": "sequential"}):
        yield functools.partial(para_gru, **options), gru
        yield functools.partial(para_lstm, **options), lstm
