"""What all Triton kernels share: in which type and precision `tl.dot` multiplies. Imported only when Triton is used."""

from __future__ import annotations

import torch
import triton.language as tl

from . import _dispatch

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def dot_options(dtype: torch.dtype) -> dict:
    """Return the constants DOT (type of the operands) and PRECISION for kernels whose matrices are stored in `dtype`.

    Products of float32 matrices are exact to float32, unless the reader has allowed PyTorch's own products the faster
    TF32 (``torch.set_float32_matmul_precision("high")``).
    """
    operands = TYPES[dtype]
    if operands is tl.bfloat16 and _dispatch._triton_interpreted:
        operands = tl.float32  # the interpreter multiplies the bits of bfloat16 numbers as if they were integers
    exact = torch.get_float32_matmul_precision() == "highest"
    return {"DOT": operands, "PRECISION": "ieee" if exact else "tf32"}
