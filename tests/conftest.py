"""Settings that must be in place before torch and triton are imported."""

import os

import torch

torch.set_num_threads(1)  # xdist runs one worker per core
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels run in their interpreter, on CPU tensors

from hypothesis import HealthCheck, settings  # noqa: E402

# Derandomised: a red run stays red, and the same cases run on every machine.
settings.register_profile(
    "book",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("book")
