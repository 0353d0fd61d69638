"""The definition of the Newton-Schulz iteration: matrix by matrix, step by step, as it is written."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz_reference(G: Tensor, steps: int, eps: float) -> Tensor:
    """Iterate on one matrix after the other; autograd gives the gradient. G ``(..., m, n)``."""
    a, b, c = COEFFICIENTS
    results = []
    for X in G.to(accumulate_dtype(G.dtype)).reshape(-1, *G.shape[-2:]).unbind(0):
        X = X / (norm(X) + eps)
        for _ in range(steps):
            M = X @ X.T
            X = a * X + (b * M + c * M @ M) @ X
        results.append(X)
    return torch.stack(results).view(G.shape).to(G.dtype)


def norm(X: Tensor) -> Tensor:
    """Frobenius norm of every matrix, ``(..., 1, 1)``, with gradient 0 rather than nan at the matrix of zeros."""
    return torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
