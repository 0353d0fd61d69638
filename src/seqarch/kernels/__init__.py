"""The fast primitives of the book, each as a definition, a PyTorch form for any device, and Triton kernels.

Every public function takes ``backend="auto" | "reference" | "parallel" | "triton"``; see `use` to override the
automatic choice for a block of code.
"""

from ._dispatch import BACKENDS, default_dtype, use
from .additive_attention import additive_scores
from .block2_scan import block2_scan, block2_scan_step
from .block_attention import block_attention
from .cauchy import cauchy
from .chart import gather_children, gather_parents, put_cells, softmax_mix
from .delta_rule import delta_rule, delta_rule_step
from .depthwise_conv1d import depthwise_conv1d, depthwise_conv1d_step
from .fftconv import fftconv
from .gated_rnn import gru_scan, gru_step, lstm_scan, lstm_step, rnn_scan, rnn_step
from .gau_attention import gau_attention
from .krylov import krylov
from .lif import lif, lif_step
from .linear_attention import (
    elu_features,
    linear_attention,
    linear_attention_state,
    linear_attention_step,
    taylor_features,
)
from .linear_scan import linear_scan, linear_scan_step
from .lti_scan import lti_scan, lti_scan_step
from .memory_ffn import memory_ffn
from .newton_schulz import newton_schulz
from .ngram_attention import ngram_attention, ngram_attention_step
from .nonlinear_rnn import para_gru, para_gru_step, para_lstm, para_lstm_step
from .plstm2d import plstm2d, plstm2d_four
from .segment_sum import segment_sum
from .softmax_scan import softmax_scan, softmax_scan_step
from .ssd import ssd, ssd_step
from .test_time_memory import omega_linear, titans_linear, titans_mlp
from .tridiag import tridiag
from .vandermonde import vandermonde

__all__ = [
    "BACKENDS",
    "additive_scores",
    "block2_scan",
    "block2_scan_step",
    "block_attention",
    "cauchy",
    "default_dtype",
    "delta_rule",
    "delta_rule_step",
    "depthwise_conv1d",
    "depthwise_conv1d_step",
    "fftconv",
    "elu_features",
    "gather_children",
    "gather_parents",
    "gau_attention",
    "gru_scan",
    "gru_step",
    "krylov",
    "lif",
    "lif_step",
    "linear_attention",
    "linear_attention_state",
    "linear_attention_step",
    "linear_scan",
    "linear_scan_step",
    "lstm_scan",
    "lstm_step",
    "lti_scan",
    "lti_scan_step",
    "memory_ffn",
    "newton_schulz",
    "ngram_attention",
    "ngram_attention_step",
    "omega_linear",
    "para_gru",
    "para_gru_step",
    "para_lstm",
    "para_lstm_step",
    "plstm2d",
    "plstm2d_four",
    "put_cells",
    "rnn_scan",
    "rnn_step",
    "segment_sum",
    "softmax_mix",
    "softmax_scan",
    "softmax_scan_step",
    "ssd",
    "ssd_step",
    "taylor_features",
    "titans_linear",
    "titans_mlp",
    "tridiag",
    "use",
    "vandermonde",
]
