"""The dense LSTM and GRU against torch.nn (cuDNN on a GPU), the input projection done outside for ours."""

import functools

import torch

from seqarch.kernels.gated_rnn import cost, gru_scan, lstm_scan, rnn_scan

from ..case import Case, ours


def case(cell: str, B: int, T: int, H: int) -> Case:
    blocks = {"lstm": 4, "gru": 3}[cell]

    def make(device, dtype):
        scale = H**-0.5
        xp = torch.randn(B, T, blocks * H, device=device, dtype=dtype)
        w_h = scale * torch.randn(blocks * H, H, device=device, dtype=dtype)
        return (xp, w_h) if cell == "lstm" else (xp, w_h, torch.zeros(blocks * H, device=device, dtype=dtype))

    @functools.cache
    def module(device, dtype):
        kind = torch.nn.LSTM if cell == "lstm" else torch.nn.GRU
        return kind(H, H, batch_first=True).to(device, dtype)

    def torch_nn(xp, w_h, *rest):
        return module(xp.device, xp.dtype)(xp[..., :H])[0]

    return Case(
        f"{cell}_scan",
        dict(B=B, T=T, H=H),
        make,
        ours(lstm_scan if cell == "lstm" else gru_scan),
        functools.partial(cost.bytes, cell=cell),
        functools.partial(cost.flops, cell=cell),
        {"torch.nn (its own weights)": torch_nn},
        exact=False,
    )


CASES = {
    "cpu": [case("lstm", 32, 256, 128), case("gru", 32, 256, 128)],
    "cuda": [case("lstm", 64, 1024, 128), case("gru", 64, 1024, 128)],
}


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with."""
    for H in (16, 64) if capability < 80 else (16, 64, 128):
        yield rnn_scan, (x(20, 9, H), x(H, H))
        yield lstm_scan, (x(20, 9, 4 * H), x(4 * H, H))
        yield functools.partial(lstm_scan, cont=torch.ones(20, 9)), (x(20, 9, 4 * H), x(4 * H, H))
        yield gru_scan, (x(20, 9, 3 * H), x(3 * H, H), x(3 * H))
