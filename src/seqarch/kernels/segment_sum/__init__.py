r"""Sums of rows that share an index: nodes of a cluster, edges of a node, tokens of a chunk (chapter 31).

$$s_i = \sum_{j \,:\, \text{index}_j = i} x_j, \qquad i = 0, \dots, n - 1.$$

Read the folder in this order: ``reference.py`` (the definition), ``parallel.py`` (PyTorch's own sums), ``triton.py`` (GPU).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._dispatch import check_shape, check_values, choose, debugging
from .parallel import segment_sum_parallel
from .reference import segment_sum_reference

__all__ = ["segment_sum"]

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def segment_sum(values: Tensor, index: Tensor, n: int, *, backend: str = "auto") -> Tensor:
    r"""Sum the rows of each segment. The same inputs give the same bits, on a GPU too.

    Args:
        values: the rows, ``(M, D)``, of a real floating-point dtype; half precision is added up in float32.
        index: the segment of each row, ``(M,)``, integers from 0 to n - 1, sorted or not.
        n: how many segments there are; those without a row get 0.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``.

    Returns:
        The sums, ``(n, D)``, of values' dtype.

    Gradients flow to values: every row gets the gradient of its segment, $\partial x_j = \partial s_{\text{index}_j}$, a
    gather. Inputs of any stride are accepted; a contiguous copy is made where the kernel needs one. Whether the indices
    are in range is checked only under ``use(debug=True)``, since it would wait for the GPU; out of range the result is
    undefined.

    Raises:
        ValueError: wrong shape, dtype, device, n or backend, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("values", values, "M D", sizes)
    check_shape("index", index, "M", sizes)
    if not values.is_floating_point():
        raise ValueError(f"expected values of a floating-point dtype, got {values.dtype}")
    if index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"expected index of dtype torch.int64 or torch.int32, got {index.dtype}")
    if index.device != values.device:
        raise ValueError(f"expected index on {values.device} like values, got {index.device}")
    if not isinstance(n, int) or n < 0 or (n == 0 and sizes["M"] > 0):
        raise ValueError(f"expected n to be an integer of at least {min(1, sizes['M'])}, got {n!r}")
    check_values(values=values)
    if debugging():
        _check_range(index, n)
    chosen = choose(backend, values, dtypes=TRITON_DTYPES, turing=_triton_agrees)
    if values.numel() == 0 or n == 0:
        chosen = "reference"
    index = index.long()
    if chosen == "reference":
        return segment_sum_reference(values, index, n)
    if chosen == "parallel":
        return segment_sum_parallel(values, index, n)
    from .triton import segment_sum_triton

    return segment_sum_triton(values, index, n)


def _check_range(index: Tensor, n: int) -> None:
    wrong = ((index < 0) | (index >= n)).nonzero().flatten()
    if wrong.numel():
        first = int(wrong[0])
        raise ValueError(f"expected index from 0 to {n - 1}, got {int(index[first])} at position {first}")


@functools.cache
def _triton_agrees() -> bool:
    """Run the Triton kernel once against the parallel form: the admission test for GPUs older than Triton promises."""
    values, index = torch.randn(500, 40, device="cuda"), torch.arange(500, device="cuda") // 7
    try:
        sums = segment_sum(values, index, 80, backend="triton")
        return torch.allclose(sums, segment_sum(values, index, 80, backend="parallel"), rtol=1e-4, atol=1e-4)
    except Exception:  # a compiler error on an unsupported chip is an answer too
        return False
