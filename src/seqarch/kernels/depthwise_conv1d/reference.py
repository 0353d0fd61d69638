"""The definition of the depthwise convolution: a loop over time. Everything else is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._dispatch import accumulate_dtype


def depthwise_conv1d_reference(
    x: Tensor, w: Tensor, bias: Tensor | None, dilation: int, shift: int, steps: int, activation: str | None
) -> Tensor:
    """Compute the outputs of `steps` steps one at a time; autograd gives the gradients.

    Output t is the sum over i of tap i times ``x[:, t + shift - i * dilation]``. The output may have fewer steps than x:
    with a state, x starts with the past, and only what comes after it is computed.
    """
    dtype = accumulate_dtype(x.dtype)
    # unbind, not x[:, t]: the backward of each slice would fill a zero tensor of the whole length, O(T^2) in all
    inputs, taps = x.to(dtype).unbind(1), w.to(dtype).unbind(1)
    outputs = []
    for t in range(steps):
        y = torch.zeros_like(inputs[0]) if bias is None else bias.to(dtype).expand_as(inputs[0])
        for i, tap in enumerate(taps):
            j = t + shift - i * dilation
            if 0 <= j < len(inputs):
                y = y + tap * inputs[j]
        outputs.append(F.silu(y) if activation == "silu" else y)
    return torch.stack(outputs, dim=1).to(x.dtype) if outputs else x[:, :0].clone()
