"""The kernels compile for GPUs that are not here, fit their shared memory, and hardly spill."""

import json
import subprocess
import sys

import pytest

from ..notebooks import ROOT

SHARED = {75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may use: T4, A100, H100
KERNELS = {
    p.parent.name for p in (ROOT / "src" / "seqarch" / "kernels").glob("*/*.py") if "@triton.jit" in p.read_text()
}


@pytest.mark.parametrize("capability", SHARED)
def test_compiles_and_fits(capability, record_property):
    command = [sys.executable, "-m", "benchmarks.codegen", str(capability), "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    assert {name.split(".")[0] for name in found} == KERNELS
    too_large = {n: e["shared"] for n, e in found.items() if e["shared"] > SHARED[capability]}
    assert not too_large, f"shared memory beyond {SHARED[capability]} bytes"
    for name, entry in found.items():
        record_property(f"sm_{capability} {name} bytes of stack", entry["stack"])
