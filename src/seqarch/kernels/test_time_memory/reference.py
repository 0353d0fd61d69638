"""The definition of the linear test-time memory: a loop over tokens. Everything else is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor

from .window import with_tail


def memory_reference(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, step: Tensor, momentum: Tensor, weight: Tensor,
    W: Tensor, S: Tensor, tail: tuple[Tensor, Tensor, Tensor], window: int, chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Walk along T one token at a time; autograd gives the gradients.

    Rows are flattened: q and k ``(R, T, K)``, v ``(R, T, V)``, gates ``(R, T)``, W and S ``(R, V, K)``; the tail holds k, v
    and weight of the ``window - 1`` tokens before the first. All of one dtype.
    """
    # unbind, not k[:, t]: the backward of each slice would fill a zero tensor of the whole length, O(T^2) in all
    keys, values, weights = (x.unbind(1) for x in with_tail(tail, k, v, weight))
    queries, keeps, steps, momenta = (x.unbind(1) for x in (q, keep, step, momentum))
    outputs, start = [], W
    for t in range(len(queries)):
        if t % chunk == 0:
            start = W  # all gradients of a chunk are taken where it begins
        gradient = torch.zeros_like(W)
        for i in range(t, t + window):
            error = (start @ keys[i][..., None])[..., 0] - values[i]
            gradient = gradient + weights[i][:, None, None] * error[..., :, None] * keys[i][..., None, :]
        S = momenta[t][:, None, None] * S - steps[t][:, None, None] * gradient
        W = keeps[t][:, None, None] * W + S
        outputs.append((W @ queries[t][..., None])[..., 0])
    return (torch.stack(outputs, dim=1) if outputs else v.clone()), W, S
