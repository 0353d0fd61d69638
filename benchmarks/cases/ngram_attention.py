"""N-gram attention against the same average by a dense matrix of matches."""

import functools

import torch
import torch.nn.functional as F

from seqarch.kernels.ngram_attention import cost, ngram_attention

from ..case import Case, first


def case(B: int, T: int, d: int, n: int) -> Case:
    def make(device, dtype):
        return torch.randint(0, 18, (B, T), device=device), torch.randn(B, T, d, device=device, dtype=dtype)

    def dense(ids, h):
        """The whole (B, T, T) matrix: what the definition looks like in a few lines of PyTorch."""
        match = A = ids[:, :, None] == F.pad(ids, (1, 0), value=-1)[:, None, :-1]
        for r in range(1, n):  # the tokens r places earlier must be equal too
            A = A & F.pad(match, (r, 0, r, 0))[:, :T, :T]
        A = A.tril(-1).to(h.dtype)
        return A @ h / A.sum(-1, keepdim=True).clamp(min=1)

    def run(backend):
        return lambda ids, h: first(ngram_attention(ids, h, n, backend=backend))

    ours = {backend: run(backend) for backend in ("reference", "parallel", "triton")}
    return Case(
        "ngram_attention", dict(B=B, T=T, d=d, n=n), make, ours, cost.bytes, cost.flops, {"dense matrix": dense}
    )


CASES = {
    "cpu": [case(2, 4096, 32, 2)],
    "cuda": [case(8, 4096, 1024, 3), case(1, 32768, 1024, 3)],
}


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with."""
    ids = torch.zeros(1, 70, dtype=torch.int64)
    for d in (16, 64):
        yield functools.partial(ngram_attention, ids, n=2), (x(1, 70, d),)
