"""How one case is measured: checked first, then all implementations in turn on the same tensors."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from .case import Case
from .memory import peak_bytes

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
MAX_LOOP_STEPS = 8192  # the reference loop is not waited for beyond this length
PATIENCE = 3.0  # seconds: a slow implementation is repeated less often, but at least 3 times
OURS = ("reference", "parallel", "triton")


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a plain copy of 256 MB reads and writes on this device: the ceiling of what moves memory."""
    source = torch.rand(2**26, device=device)
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source), device) for _ in range(12)][2:]
    return 2 * source.nbytes / statistics.median(times)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one large matrix product in this dtype: the ceiling of what computes."""
    n = 8192 if device.type == "cuda" else 1024
    x = torch.randn(n, n, device=device).to(dtype)
    times = [timed(lambda: x @ x, device) for _ in range(12)][2:]
    return 2 * n**3 / statistics.median(times)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, on the device's own clock."""
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(
    case: Case, device: torch.device, dtype: torch.dtype, repeats: int, ceilings: dict[str, float]
) -> list[dict]:
    """Check, warm up and time all implementations of a case; one row per implementation."""
    inputs = [x.requires_grad_(x.is_floating_point() or x.is_complex()) for x in case.make(device, dtype)]
    wide = [_double(x).requires_grad_(x.requires_grad) for x in inputs]
    want = case.ours["parallel"](*wide)
    grad = torch.randn(want.shape, device=device, dtype=torch.float64).to(want.dtype)
    want_gradients = _gradients(want, wide, grad)
    runs, rows = {}, []
    for label, run in {**case.ours, **case.peers}.items():
        note = ""
        if isinstance(run, str):
            note = run
        elif label == "triton" and device.type == "cpu":
            note = "needs a GPU"
        elif label == "reference" and (case.steps or case.shape.get("T", 0)) > MAX_LOOP_STEPS:
            note = "loop too long to wait for"
        elif label in OURS or case.exact:
            wrong = wrongness(run, inputs, grad, want.detach(), want_gradients)
            note = f"WRONG: off by {wrong:.1e}" if wrong > TOLERANCE[dtype] else ""
        rows.append({"kernel": case.kernel, "shape": case.shape, "implementation": label, "note": note})
        if not note:
            runs[label] = run

    def forward(run):
        with torch.no_grad():
            run(*inputs)

    def both(run):
        output = run(*inputs)
        _gradients(output, inputs, grad)

    sizes = tuple(case.shape.values())
    for phase, step in (("forward", forward), ("both", both)):
        calls = {label: (lambda run=run, step=step: step(run)) for label, run in runs.items()}
        times = round_robin(calls, device, repeats, case.name)
        moved, computed = case.bytes(*sizes, itemsize=dtype.itemsize), case.flops(*sizes)
        if phase == "both":
            moved += case.bytes(*sizes, itemsize=dtype.itemsize, backward=True)
            computed += case.flops(*sizes, backward=True)
        floor = max(moved / ceilings["copy_bytes_per_s"], computed / ceilings["matrix_flop_per_s"])
        for row in rows:
            if row["implementation"] in times:
                t = sorted(times[row["implementation"]])
                median = statistics.median(t)
                row[phase] = {
                    "median_ms": 1e3 * median,
                    "p20_ms": 1e3 * t[len(t) // 5],
                    "p80_ms": 1e3 * t[(4 * len(t)) // 5],
                    "GB_per_s": moved / median / 1e9,
                    "GFLOP_per_s": computed / median / 1e9,
                    "fraction_of_roofline": floor / median,
                }
    for row in rows:
        if row["implementation"] in runs:
            row["peak_MB"] = peak_memory(lambda run=runs[row["implementation"]]: both(run), device) / 1e6
    return rows


def _double(x: Tensor) -> Tensor:
    wide = torch.complex128 if x.is_complex() else torch.float64 if x.is_floating_point() else x.dtype
    return x.detach().to(wide)


def _gradients(output: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    leaves = [x for x in inputs if x.requires_grad]
    return list(torch.autograd.grad(output, leaves, grad.to(output.dtype), allow_unused=True))


def wrongness(run: Callable, inputs: Sequence[Tensor], grad: Tensor, want: Tensor, gradients: list) -> float:
    """The largest relative error of the output and of all gradients against the float64 results."""
    output = run(*inputs)
    pairs = [(output, want), *zip(_gradients(output, inputs, grad), gradients, strict=True)]
    return max(
        ((_double(x) - ref).abs().max() / (ref.abs().max() + 1e-6)).item()
        for x, ref in pairs
        if x is not None and ref is not None
    )


def round_robin(runs: dict[str, Callable], device: torch.device, repeats: int, name: str) -> dict[str, list[float]]:
    """Time all runs in turn; on a GPU the cache is flushed before each."""
    flush = torch.empty(2**28, dtype=torch.int8, device=device) if device.type == "cuda" else None
    left = {}
    for label, run in runs.items():
        for _ in range(25 if flush is not None and label != "reference" else 1):
            run()
        left[label] = min(repeats, max(3, int(PATIENCE / max(timed(run, device), 1e-9))))
    times: dict[str, list[float]] = {label: [] for label in runs}
    for i in tqdm(range(repeats), desc=name, leave=False, disable=not sys.stderr.isatty()):
        for label, run in runs.items():
            if i < left[label]:
                if flush is not None:
                    flush.zero_()
                times[label].append(timed(run, device))
    return times


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that one call holds at its worst moment, beyond its inputs."""
    if device.type == "cpu":
        return peak_bytes(run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before
