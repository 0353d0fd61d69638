"""What is measured: for each kernel its shapes, our implementations, and the peers that happen to be installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from seqarch.kernels import additive_scores, gru_scan, linear_scan, lstm_scan, softmax_scan
from seqarch.kernels.additive_attention import cost as additive_cost
from seqarch.kernels.gated_rnn import cost as gated_cost
from seqarch.kernels.linear_scan import cost as linear_cost
from seqarch.kernels.softmax_scan import cost as softmax_cost

Run = Callable[..., Tensor]
ABSENT = "not installed"


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
        kernel, shape: names for the table.
        make: ``make(device, dtype)`` returns the inputs; all of them get gradients.
        ours: ``{"reference" | "parallel" | "triton": run}``; each run takes the inputs and returns one output.
        peers: the same for other implementations; a string says why one is absent.
        bytes, flops: of the forward and of the backward pass, from the kernel's cost model.
        exact: whether the peers compute the very same function (and are checked against the float64 reference).
    """

    kernel: str
    shape: dict[str, int]
    make: Callable[[torch.device, torch.dtype], Sequence[Tensor]]
    ours: dict[str, Run]
    bytes: Callable[..., int]
    flops: Callable[..., int]
    peers: dict[str, Run | str] = field(default_factory=dict)
    exact: bool = True


def _ours(kernel: Callable, **options) -> dict[str, Run]:
    def run(backend: str) -> Run:
        return lambda *inputs: _first(kernel(*inputs, backend=backend, **options))

    return {backend: run(backend) for backend in ("reference", "parallel", "triton")}


def _first(result) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def linear_scan_case(B: int, T: int, D: int) -> Case:
    """The elementwise scan; accelerated-scan takes (B, D, T) and lengths that are powers of two."""

    def make(device, dtype):
        return torch.rand(B, T, D, device=device, dtype=dtype), torch.randn(B, T, D, device=device, dtype=dtype)

    peers: dict[str, Run | str] = {"accelerated-scan": ABSENT}
    if _installed("accelerated_scan"):

        def accelerated(a, b):
            from accelerated_scan.triton import scan

            return scan(a.transpose(1, 2).contiguous(), b.transpose(1, 2).contiguous()).transpose(1, 2)

        peers["accelerated-scan"] = accelerated
    return Case(
        "linear_scan",
        dict(B=B, T=T, D=D),
        make,
        _ours(linear_scan),
        linear_cost.bytes,
        linear_cost.flops,
        peers,
    )


def softmax_scan_case(B: int, H: int, T: int, E: int) -> Case:
    """Prefix attention of one query; the peer is a running sum of exponentials, by torch.logcumsumexp."""

    def make(device, dtype):
        return torch.randn(B, H, T, device=device), torch.randn(B, H, T, E, device=device, dtype=dtype)

    def logcumsumexp(s, v):
        # safe only while all scores lie close together: weights are not rescaled as the maximum moves
        weights = (s - s.amax(-1, keepdim=True)).exp().unsqueeze(-1)
        return (weights * v).cumsum(-2) / weights.cumsum(-2)

    return Case(
        "softmax_scan", dict(B=B, H=H, T=T, E=E), make, _ours(softmax_scan), softmax_cost.bytes, softmax_cost.flops,
        {"cumsum (unsafe)": logcumsumexp},
    )  # fmt: skip


def additive_case(B: int, M: int, N: int, H: int) -> Case:
    """Additive scores; the peer is the one-line broadcast."""

    def make(device, dtype):
        shapes = (B, M, H), (B, N, H), (H,)
        return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]

    def broadcast(q, k, v):
        return torch.tanh(q[:, :, None] + k[:, None]) @ v

    return Case(
        "additive_scores", dict(B=B, M=M, N=N, H=H), make, _ours(additive_scores), additive_cost.bytes,
        additive_cost.flops, {"broadcast": broadcast},
    )  # fmt: skip


def gated_case(cell: str, B: int, T: int, H: int) -> Case:
    """The dense LSTM and GRU against torch.nn (cuDNN on a GPU), the input projection done outside for ours."""
    blocks = {"lstm": 4, "gru": 3}[cell]

    def make(device, dtype):
        scale = H**-0.5
        xp = torch.randn(B, T, blocks * H, device=device, dtype=dtype)
        w_h = scale * torch.randn(blocks * H, H, device=device, dtype=dtype)
        return (xp, w_h) if cell == "lstm" else (xp, w_h, torch.zeros(blocks * H, device=device, dtype=dtype))

    modules: dict = {}

    def torch_nn(xp, w_h, *rest):
        key = (xp.device, xp.dtype)
        if key not in modules:
            kind = torch.nn.LSTM if cell == "lstm" else torch.nn.GRU
            modules[key] = kind(H, H, batch_first=True).to(*key)
        return modules[key](xp[..., :H])[0]

    kernel = lstm_scan if cell == "lstm" else gru_scan
    return Case(
        f"{cell}_scan", dict(B=B, T=T, H=H), make, _ours(kernel),
        lambda *shape, **k: gated_cost.bytes(*shape, cell=cell, **k),
        lambda *shape, **k: gated_cost.flops(*shape, cell=cell, **k),
        {"torch.nn (its own weights)": torch_nn}, exact=False,
    )  # fmt: skip


CASES = {
    "cpu": [
        linear_scan_case(8, 4096, 256),
        linear_scan_case(1, 65536, 64),
        softmax_scan_case(8, 4, 4096, 32),
        softmax_scan_case(1, 1, 65536, 32),
        additive_case(8, 512, 512, 128),
        gated_case("lstm", 32, 256, 128),
        gated_case("gru", 32, 256, 128),
    ],
    "cuda": [
        linear_scan_case(8, 4096, 2048),
        linear_scan_case(1, 65536, 1024),
        softmax_scan_case(8, 16, 4096, 64),
        softmax_scan_case(1, 16, 65536, 64),
        additive_case(8, 512, 512, 128),
        additive_case(32, 1024, 1024, 256),
        gated_case("lstm", 64, 1024, 128),
        gated_case("gru", 64, 1024, 128),
    ],
}
