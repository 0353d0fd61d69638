"""The fast primitives of the book, each as a definition, a PyTorch form for any device, and Triton kernels.

Every public function takes ``backend="auto" | "reference" | "parallel" | "triton"``; see `use` to override the
automatic choice for a block of code.
"""

from ._dispatch import BACKENDS, default_dtype, use
from .additive_attention import additive_scores
from .gated_rnn import gru_scan, gru_step, lstm_scan, lstm_step, rnn_scan, rnn_step
from .linear_scan import linear_scan, linear_scan_step
from .softmax_scan import softmax_scan, softmax_scan_step

__all__ = [
    "BACKENDS",
    "additive_scores",
    "default_dtype",
    "gru_scan",
    "gru_step",
    "linear_scan",
    "linear_scan_step",
    "lstm_scan",
    "lstm_step",
    "rnn_scan",
    "rnn_step",
    "softmax_scan",
    "softmax_scan_step",
    "use",
]
