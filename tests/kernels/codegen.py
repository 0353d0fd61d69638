"""Compile every Triton kernel as it is launched, for chips that are not here: ``python -m tests.kernels.codegen 75``.

Runs the public functions, forward and backward, on CPU tensors with Triton's launch replaced: instead of running, each
kernel is compiled for the given compute capability with the arguments, block sizes and options of that launch. Prints
one JSON object: for every kernel the largest shared memory in bytes and the spilled registers.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported: its compiler is wanted, not its interpreter

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from seqarch.kernels import _dispatch, additive_scores, gru_scan, linear_scan, lstm_scan, rnn_scan, softmax_scan

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
    torch.bool: "i1", torch.int8: "i8", torch.uint8: "u8",
}  # fmt: skip


def signature_of(value) -> str:
    """The type that Triton gives to one argument of a launch."""
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "i1" if isinstance(value, bool) else "i32" if isinstance(value, int) else "fp32"


def compiler_for(capability: int, found: dict):
    """A stand-in for JITFunction.run that compiles and launches nothing."""

    def run(self, *args, grid=None, warmup=False, **kwargs):
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        fixed = {p.name for p in self.params if p.is_constexpr}
        signature = {
            n: "constexpr" if n in fixed or given[n] is None else signature_of(given[n]) for n in self.arg_names
        }
        constants = {n: given[n] for n, kind in signature.items() if kind == "constexpr"}
        source = ASTSource(self, signature, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        name = f"{self.fn.__module__.split('.')[-2]}.{self.fn.__name__}"
        entry = found.setdefault(name, {"shared": 0, "variants": 0})
        entry["shared"] = max(entry["shared"], compiled.metadata.shared)
        entry["variants"] += 1

    return run


def launches(dtype: torch.dtype, capability: int):
    """Every kernel at the block sizes that it is launched with."""

    def x(*shape, dtype=dtype):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    state = torch.float32
    for T in (100, 3000):  # one segment, many segments
        yield linear_scan, (x(1, T, 96), x(1, T, 96), x(1, 96, dtype=state))
    yield linear_scan, (x(1, 100, 1), x(1, 100, 96))
    if dtype is torch.float32:
        yield linear_scan, (x(1, 3000, 8, dtype=torch.complex64), x(1, 3000, 8, dtype=torch.complex64))
    for E in (16, 64, 128):
        yield softmax_scan, (x(1, 2, 100, dtype=state), x(1, 2, 100, E))
    yield additive_scores, (x(2, 50, 128), x(2, 40, 128), x(128))
    yield additive_scores, (x(2, 50, 128), x(2, 40, 128), x(128), torch.ones(2, 40, dtype=torch.bool))
    for H in (16, 64) if capability < 80 else (16, 64, 128):
        yield rnn_scan, (x(20, 9, H), x(H, H))
        yield lstm_scan, (x(20, 9, 4 * H), x(4 * H, H))
        yield gru_scan, (x(20, 9, 3 * H), x(3 * H, H), x(3 * H))


def main() -> None:
    """Compile for the capability in argv and print what was found."""
    capability, found = int(sys.argv[1]), {}
    JITFunction.run = compiler_for(capability, found)
    _dispatch._why_not_triton = lambda *args: None  # the tensors are on the CPU, and nothing will be launched
    dtypes = (torch.float32, torch.float16) if capability < 80 else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        for kernel, inputs in launches(dtype, capability):
            result = kernel(*inputs, backend="triton")
            output = result[0] if isinstance(result, tuple) else result
            leaves = [t for t in inputs if t.requires_grad]
            torch.autograd.grad(output, leaves, torch.zeros_like(output), allow_unused=True)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
