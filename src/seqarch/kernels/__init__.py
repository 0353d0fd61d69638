"""The fast primitives of the book, each as a definition, a PyTorch form for any device, and Triton kernels.

Every public function takes ``backend="auto" | "reference" | "parallel" | "triton"``; see `use` to override the
automatic choice for a block of code.
"""

from ._dispatch import BACKENDS, default_dtype, use
from .linear_scan import linear_scan

__all__ = ["BACKENDS", "default_dtype", "linear_scan", "use"]
