"""Compile every Triton kernel as it is launched, for chips that are not here: ``python -m benchmarks.codegen 75 [names]``.

Runs the public functions, forward and backward, on CPU tensors with Triton's launch replaced: instead of running, each
kernel is compiled for the given compute capability with the arguments, block sizes and options of that launch. Prints
a table, or with ``--json`` one JSON object: for every kernel the largest shared memory in bytes, the registers of a
thread, and the bytes a thread keeps in its stack frame, which is where registers are spilled to.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported: its compiler is wanted, not its interpreter

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.cases import modules
from benchmarks.store import RESULTS, write
from seqarch.kernels import _dispatch

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
    torch.bool: "i1", torch.int8: "i8", torch.uint8: "u8",
}  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def signature_of(value) -> str:
    """The type that Triton gives to one argument of a launch."""
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "i1" if isinstance(value, bool) else "i32" if isinstance(value, int) else "fp32"


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of one thread, as the assembler allotted them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(found[1]), int(found[2])


def compiler_for(capability: int, found: dict):
    """A stand-in for JITFunction.run that compiles and launches nothing; each variant is compiled once."""
    seen = set()

    def run(self, *args, grid=None, warmup=False, **kwargs):
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        fixed = {p.name for p in self.params if p.is_constexpr}
        signature = {
            n: "constexpr" if n in fixed or given[n] is None else signature_of(given[n]) for n in self.arg_names
        }
        constants = {n: given[n] for n, kind in signature.items() if kind == "constexpr"}
        name = f"{self.fn.__module__.split('.')[2]}.{self.fn.__name__}"
        variant = str((name, signature, constants, options))
        if variant in seen:
            return
        seen.add(variant)
        source = ASTSource(self, signature, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        registers, stack = resources(compiled.asm["cubin"])
        entry = found.setdefault(name, {"shared": 0, "registers": 0, "stack": 0, "variants": 0})
        entry["shared"] = max(entry["shared"], compiled.metadata.shared)
        entry["registers"] = max(entry["registers"], registers)
        entry["stack"] = max(entry["stack"], stack)
        entry["variants"] += 1

    return run


def compile_all(capability: int, names: list[str]) -> dict[str, dict[str, int]]:
    """Compile the launches of the named kernels (all, if none is named) and return what each one needs."""
    found: dict[str, dict[str, int]] = {}
    JITFunction.run = compiler_for(capability, found)
    _dispatch._why_not_triton = lambda *args: None  # the tensors are on the CPU, and nothing will be launched
    for dtype in (torch.float32, torch.float16 if capability < 80 else torch.bfloat16):

        def leaf(*shape, dtype=dtype):
            return torch.randn(*shape, dtype=dtype, requires_grad=True)

        for name, module in modules().items():
            if (names and name not in names) or not hasattr(module, "launches"):
                continue
            for kernel, inputs in module.launches(leaf, dtype, capability):
                result = kernel(*inputs, backend="triton")
                output = result[0] if isinstance(result, tuple) else result
                leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
                torch.autograd.grad(output, leaves, torch.zeros_like(output), allow_unused=True)
    return found


def main() -> None:
    """Compile for the capability given and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__)
    parser.add_argument("capability", type=int, help="75 (T4), 80 (A100), 90 (H100, H200)")
    parser.add_argument("names", nargs="*", help="kernels, such as linear_scan (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--store", action="store_true", help="write it where the book reads it")
    arguments = parser.parse_args()
    known = modules()
    if unknown := set(arguments.names) - set(known):
        parser.error(f"expected names among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if arguments.store and arguments.names:
        parser.error(f"expected no names with --store, which stores all kernels, got {', '.join(arguments.names)}")
    found = compile_all(arguments.capability, arguments.names)
    if arguments.store:
        report = {"triton": triton.__version__, "kernels": found}
        write(RESULTS / f"sm_{arguments.capability}.json", report)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{f'sm_{arguments.capability}':44}{'registers':>10}{'stack B':>9}{'shared B':>10}{'variants':>10}")
    for name, e in found.items():
        print(f"{name:44}{e['registers']:10}{e['stack']:9}{e['shared']:10}{e['variants']:10}")


if __name__ == "__main__":
    sys.exit(main())
