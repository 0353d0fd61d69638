"""Time every kernel and its peers on one device and print one table.

All implementations of a shape run in this process on the same tensors, in turn (a, b, c, a, b, c, ...), so that drifts
of the clock hit them alike. Each is first compared with the float64 reference; a wrong one is named, not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import seqarch

from .cases import CASES, Case

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
MAX_LOOP_STEPS = 8192  # the reference loop is not waited for beyond this length


def main() -> int:
    """Parse arguments, measure, print, and optionally store."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help="kernels, such as linear_scan (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--repeats", type=int, help="timed runs of each (default: 100 on a GPU, 7 on a CPU)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device for --device cuda, got none")
    known = sorted({c.kernel for c in CASES[arguments.device]})
    unknown = set(arguments.names) - set(known)
    if unknown:
        parser.error(f"expected names among {', '.join(known)}, got {', '.join(sorted(unknown))}")

    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.set_num_threads(arguments.threads)
    seqarch.seed_everything(0)
    repeats = arguments.repeats or (100 if device.type == "cuda" else 7)
    bandwidth = copy_bandwidth(device)
    report = {
        "machine": machine(device, arguments.threads),
        "dtype": arguments.dtype,
        "copy_GB/s": bandwidth / 1e9,
    }
    print(" · ".join(f"{k} {v}" for k, v in report["machine"].items()))
    print(f"{arguments.dtype}, copy bandwidth measured in this run: {bandwidth / 1e9:.1f} GB/s, {repeats} repeats\n")
    rows = []
    for case in [c for c in CASES[arguments.device] if not arguments.names or c.kernel in arguments.names]:
        rows += measure(case, device, dtype, repeats, bandwidth)
        print_case(rows[-1]["case"], [r for r in rows if r["case"] == rows[-1]["case"]])
    if arguments.json:
        temporary = arguments.json.with_suffix(".part")
        temporary.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(arguments.json)
    return 0


def machine(device: torch.device, threads: int) -> dict[str, str]:
    """What a reader of the numbers must know."""
    facts = {"torch": torch.__version__, "python": platform.python_version(), "threads": str(threads)}
    if device.type == "cuda":
        import triton

        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        }
    else:
        info = Path("/proc/cpuinfo")
        names = (
            [x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x]
            if info.exists()
            else []
        )
        facts["cpu"] = names[0] if names else platform.processor()
    return facts


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a plain copy of 256 MB reads and writes on this device: the ceiling of what follows."""
    source = torch.rand(2**26, device=device)
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source), device) for _ in range(12)][2:]
    return 2 * source.nbytes / statistics.median(times)


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


def measure(case: Case, device: torch.device, dtype: torch.dtype, repeats: int, bandwidth: float) -> list[dict]:
    """Check, warm up and time all implementations of a case; one row per implementation."""
    inputs = [x.requires_grad_() for x in case.make(device, dtype)]
    name = f"{case.kernel} ({', '.join(f'{k} {v}' for k, v in case.shape.items())})"
    want = case.ours["parallel"](*[x.double() for x in inputs]).detach()
    loop_steps = case.shape.get("T", 0)
    runs, rows = {}, []
    for label, run in {**case.ours, **case.peers}.items():
        note = ""
        if isinstance(run, str):
            note = run
        elif label == "triton" and device.type == "cpu":
            note = "needs a GPU"
        elif label == "reference" and loop_steps > MAX_LOOP_STEPS:
            note = "loop too long to wait for"
        else:
            error = wrongness(run, inputs, want) if label in case.ours or case.exact else 0.0
            note = f"WRONG: off by {error:.1e}" if error > TOLERANCE[dtype] else ""
        rows.append({"case": name, "implementation": label, "note": note})
        if not note:
            runs[label] = run
    grads = torch.randn_like(want).to(dtype if case.kernel != "additive_scores" else inputs[0].dtype)

    def both(run):
        torch.autograd.grad(run(*inputs), inputs, grads, allow_unused=True)

    def forward(run):
        with torch.no_grad():
            run(*inputs)

    shape = tuple(case.shape.values())
    for phase, step in (("forward", forward), ("both", both)):
        times = round_robin({k: (lambda r=r, step=step: step(r)) for k, r in runs.items()}, device, repeats, name)
        moved = case.bytes(*shape, itemsize=dtype.itemsize)
        if phase == "both":
            moved += case.bytes(*shape, itemsize=dtype.itemsize, backward=True)
        for row in rows:
            if row["implementation"] in times:
                t = sorted(times[row["implementation"]])
                median = statistics.median(t)
                row[phase] = {
                    "median_ms": 1e3 * median,
                    "p20_ms": 1e3 * t[len(t) // 5],
                    "p80_ms": 1e3 * t[(4 * len(t)) // 5],
                    "fraction_of_copy": moved / median / bandwidth,
                }
    return rows


def wrongness(run: Callable, inputs: Sequence[Tensor], want: Tensor) -> float:
    """Relative error of the forward pass against the float64 result."""
    with torch.no_grad():
        return ((run(*inputs).double() - want).abs().max() / (want.abs().max() + 1e-6)).item()


def round_robin(runs: dict[str, Callable], device: torch.device, repeats: int, name: str) -> dict[str, list[float]]:
    """Time all runs in turn; on a GPU the cache is flushed before each."""
    flush = torch.empty(2**28, dtype=torch.int8, device=device) if device.type == "cuda" else None
    for run in runs.values():
        for _ in range(25 if flush is not None else 1):
            run()
    times: dict[str, list[float]] = {label: [] for label in runs}
    for _ in tqdm(range(repeats), desc=name, leave=False, disable=not sys.stderr.isatty()):
        for label, run in runs.items():
            if flush is not None:
                flush.zero_()
            times[label].append(timed(run, device))
    return times


def print_case(name: str, rows: list[dict]) -> None:
    """One block of the table."""
    print(name)
    print(
        f"  {'':28}{'forward ms':>12}{'fwd+bwd ms':>12}{'(20..80 %)':>18}{'x loop':>9}{'x best peer':>13}{'of copy':>9}"
    )
    ours = ("reference", "parallel", "triton")
    timed_rows = {r["implementation"]: r["both"]["median_ms"] for r in rows if "both" in r}
    peers = [t for k, t in timed_rows.items() if k not in ours]
    for row in rows:
        label = row["implementation"] + (" (loop)" if row["implementation"] == "reference" else "")
        if "both" not in row:
            print(f"  {label:28}{row['note']}")
            continue
        both, forward = row["both"], row["forward"]
        loop = f"{timed_rows['reference'] / both['median_ms']:.1f}" if "reference" in timed_rows else "-"
        peer = f"{min(peers) / both['median_ms']:.2f}" if peers and row["implementation"] in ours else "-"
        spread = f"{both['p20_ms']:.1f}..{both['p80_ms']:.1f}"
        print(
            f"  {label:28}{forward['median_ms']:12.2f}{both['median_ms']:12.2f}{spread:>18}{loop:>9}{peer:>13}"
            f"{both['fraction_of_copy']:9.0%}"
        )
    print()


if __name__ == "__main__":
    sys.exit(main())
