"""The kernels compile for GPUs that are not here, and fit their shared memory."""

import json
import subprocess
import sys

import pytest

from ..notebooks import ROOT

SHARED = {75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may use: T4, A100, H100


@pytest.mark.parametrize("capability", SHARED)
def test_compiles_and_fits(capability, tmp_path):
    command = [sys.executable, "-m", "tests.kernels.codegen", str(capability)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    kernels = {name.split(".")[0] for name in found}
    assert kernels == {"linear_scan", "softmax_scan", "additive_attention", "gated_rnn"}
    too_large = {n: e["shared"] for n, e in found.items() if e["shared"] > SHARED[capability]}
    assert not too_large, f"shared memory beyond {SHARED[capability]} bytes"
