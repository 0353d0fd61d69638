"""Time every kernel and its peers on one device and print one table: ``python -m benchmarks``.

All implementations of a shape run in this process on the same tensors, in turn (a, b, c, a, b, c, ...), so that drifts
of the clock hit them alike. Each is first compared with the float64 result; a wrong one is named, not timed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import seqarch

from .cases import modules
from .measure import OURS, copy_bandwidth, matrix_rate, measure
from .store import RESULTS, write


def main() -> int:
    """Parse arguments, measure, print, and optionally store."""
    known = modules()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help="kernels, such as linear_scan (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--repeats", type=int, help="timed runs of each (default: 100 on a GPU, 7 on a CPU)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--store", action="store_true", help=f"write them where the book reads them, {RESULTS.name}/")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device for --device cuda, got none")
    if unknown := set(arguments.names) - set(known):
        parser.error(f"expected names among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if arguments.store and arguments.names:
        parser.error(f"expected no names with --store, which stores a whole run, got {', '.join(arguments.names)}")

    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.set_num_threads(arguments.threads)
    seqarch.seed_everything(0)
    repeats = arguments.repeats or (100 if device.type == "cuda" else 7)
    ceilings = {"copy_bytes_per_s": copy_bandwidth(device), "matrix_flop_per_s": matrix_rate(device, dtype)}
    report = {"machine": machine(device, arguments.threads), "dtype": arguments.dtype, **ceilings}
    print(" · ".join(f"{k} {v}" for k, v in report["machine"].items()))
    print(
        f"{arguments.dtype}, {repeats} repeats; measured in this run: copy {ceilings['copy_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"matrix product {ceilings['matrix_flop_per_s'] / 1e9:.0f} GFLOP/s\n"
    )
    rows = []
    for name in arguments.names or known:
        for case in known[name].CASES[arguments.device]:
            rows.append(measure(case, device, dtype, repeats, ceilings))
            print_case(case.name, rows[-1])
    for path in filter(None, (arguments.json, RESULTS / f"{device.type}.json" if arguments.store else None)):
        write(path, {**report, "rows": sum(rows, [])})
    return 0


def machine(device: torch.device, threads: int) -> dict[str, str]:
    """What a reader of the numbers must know."""
    facts = {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        import triton

        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": triton.__version__}
        command = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
        try:
            facts["driver, clocks"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            facts["driver, clocks"] = "unknown"
        return facts
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return facts | {"cpu": names[0] if names else platform.processor(), "threads": str(threads)}


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def print_case(name: str, rows: list[dict]) -> None:
    """One block of the table."""
    print(name)
    print(
        f"  {'':28}{'forward ms':>11}{'fwd+bwd ms':>11}{'(20..80 %)':>17}{'x loop':>8}{'x peer':>8}"
        f"{'GB/s':>8}{'GFLOP/s':>9}{'roofline':>9}{'peak MB':>9}"
    )
    times = {r["implementation"]: r["both"]["median_ms"] for r in rows if "both" in r}
    peers = [t for k, t in times.items() if k not in OURS]
    for row in rows:
        label = row["implementation"] + (" (loop)" if row["implementation"] == "reference" else "")
        if "both" not in row:
            print(f"  {label:28}{row['note']}")
            continue
        both = row["both"]
        loop = f"{times['reference'] / both['median_ms']:.1f}" if "reference" in times else "-"
        peer = f"{min(peers) / both['median_ms']:.2f}" if peers and row["implementation"] in OURS else "-"
        spread = f"{both['p20_ms']:.1f}..{both['p80_ms']:.1f}"
        print(
            f"  {label:28}{row['forward']['median_ms']:11.2f}{both['median_ms']:11.2f}{spread:>17}{loop:>8}{peer:>8}"
            f"{both['GB_per_s']:8.1f}{both['GFLOP_per_s']:9.1f}{both['fraction_of_roofline']:9.0%}{row['peak_MB']:9.1f}"
        )
    print()


if __name__ == "__main__":
    sys.exit(main())
