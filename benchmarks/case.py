"""What one measurement is: a kernel at one shape, our implementations of it, and its peers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Run = Callable[..., Tensor]
ABSENT = "not installed"


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
        kernel, shape: names for the table; the values of `shape`, in order, are the arguments of `bytes` and `flops`.
        make: ``make(device, dtype)`` returns the inputs; those of a floating-point dtype get gradients.
        ours: ``{"reference" | "parallel" | "triton": run}``; each run takes the inputs and returns one output. A string
            says why one is absent.
        bytes, flops: of the forward and of the backward pass, from the kernel's cost model.
        peers: the same for other implementations.
        exact: whether the peers compute the very same function (and are checked against the float64 result).
        steps: how many steps the sequential definition takes; None: ``shape["T"]``.
    """

    kernel: str
    shape: dict[str, int]
    make: Callable[[torch.device, torch.dtype], Sequence[Tensor]]
    ours: dict[str, Run | str]
    bytes: Callable[..., int]
    flops: Callable[..., int]
    peers: dict[str, Run | str] = field(default_factory=dict)
    exact: bool = True
    steps: int | None = None

    @property
    def name(self) -> str:
        """The kernel and its shape, for people."""
        return f"{self.kernel} ({', '.join(f'{k} {v}' for k, v in self.shape.items())})"


def ours(kernel: Callable, backends: Sequence[str] = ("reference", "parallel", "triton"), **options) -> dict[str, Run]:
    """The implementations of one public function, each returning its first output."""

    def run(backend: str) -> Run:
        return lambda *inputs: first(kernel(*inputs, backend=backend, **options))

    return {backend: run(backend) for backend in backends}


def first(result) -> Tensor:
    """The first of several outputs."""
    return result[0] if isinstance(result, tuple) else result


def installed(package: str) -> bool:
    """Whether a peer is there, without importing it."""
    return importlib.util.find_spec(package) is not None
