"""The kernels against their peers, in one process, on the same tensors: ``python -m benchmarks``."""
