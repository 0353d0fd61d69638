"""The row-wise scan that tests use gives what Triton's interpreter gives."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from . import conftest


@triton.jit
def _affine(a1, b1, a2, b2):
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _scan_tile(x, y, out, N: tl.constexpr, M: tl.constexpr, AXIS: tl.constexpr):
    at = tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :]
    _, h = tl.associative_scan((tl.load(x + at), tl.load(y + at)), AXIS, _affine)
    tl.store(out + at, h)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here, not in the interpreter")
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_equal_scalars(monkeypatch, axis):
    x, y = torch.rand(2, 8, 4).unbind()
    ours, theirs = torch.empty(8, 4), torch.empty(8, 4)
    _scan_tile[(1,)](x, y, ours, N=8, M=4, AXIS=axis)
    monkeypatch.setattr(interpreter.ScanOps, "generic_scan", conftest.own_scan)
    _scan_tile[(1,)](x, y, theirs, N=8, M=4, AXIS=axis)
    np.testing.assert_array_equal(ours, theirs)
