r"""Recurrent layers on the `gated_rnn` kernels: `RNN`, `LSTM` and `GRU`.

They differ from their namesakes in `torch.nn` in four ways, each for the sake of the book:

* batch first everywhere, the state included: ``(B, layers, H)``, so that row b of every tensor belongs to sequence b
  (for two directions the rows are layer 0 forward, layer 0 backward, layer 1 forward, ...);
* one bias where one is enough, and one packed weight matrix per side: `w_x` ``(kH, D)`` and `w_h` ``(kH, H)``, row blocks
  in PyTorch's order (LSTM: i, f, g, o; GRU: r, z, n);
* `forget_bias`: the initial bias of the gate that keeps the memory, so that a fresh layer already remembers;
* `lengths` instead of packed sequences: outputs beyond a sequence's end are zero, the returned state is the one at its
  true last step, and the backward direction starts there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.gated_rnn import gru_scan, gru_step, lstm_scan, lstm_step, rnn_scan, rnn_step

__all__ = ["GRU", "LSTM", "RNN", "length_mask", "reverse_within_length"]

State = Tensor | tuple[Tensor, Tensor]


def length_mask(lengths: Tensor, length: int) -> Tensor:
    """True at the real steps: lengths ``(B,)`` -> ``(B, length)``."""
    return torch.arange(length, device=lengths.device) < lengths[:, None]


def reverse_within_length(x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Reverse each sequence ``(B, T, ...)`` within its own length; the padding stays where it is, at the end."""
    if lengths is None:
        return x.flip(1)
    t = torch.arange(x.shape[1], device=x.device)
    index = torch.where(t < lengths[:, None], lengths[:, None] - 1 - t, t)
    return x[torch.arange(len(x), device=x.device)[:, None], index]


class _Direction(nn.Module):
    """One layer in one direction: input projection, then a scan. The three cells below fill in the rest."""

    blocks: int
    keep: tuple[int, float] | None = None  # the block that holds on to the state

    def __init__(self, input_size: int, hidden_size: int, forget_bias: float):
        super().__init__()
        self.hidden_size = hidden_size
        self.w_x = nn.Parameter(torch.empty(self.blocks * hidden_size, input_size))
        self.w_h = nn.Parameter(torch.empty(self.blocks * hidden_size, hidden_size))
        self.b = nn.Parameter(torch.zeros(self.blocks * hidden_size))
        bound = 1 / math.sqrt(hidden_size)
        nn.init.uniform_(self.w_x, -bound, bound)
        nn.init.uniform_(self.w_h, -bound, bound)
        if self.keep is not None:
            start = self.keep[0] * hidden_size
            self.b.data[start : start + hidden_size] = forget_bias

    def freeze(self, xp: Tensor, real: Tensor) -> Tensor:
        """Make the state stand still on padding, by pre-activations that saturate the gates exactly."""
        return xp

    def scan(
        self, xp: Tensor, state: tuple[Tensor, ...] | None, backend: str, **options
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, ...] | None,
        lengths: Tensor | None,
        backend: str,
        static: Tensor | None = None,
        cont: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        real = None if lengths is None else length_mask(lengths, x.shape[1])[:, :, None]
        if real is not None:  # what stands in the padding must not matter, not even a NaN
            x = x.masked_fill(~real, 0.0)
        xp = F.linear(x, self.w_x, self.b)
        if static is not None:
            xp = xp + static[:, None]
        options = {} if cont is None else {"cont": cont if real is None else (cont != 0) | ~real[..., 0]}
        if real is None:
            return self.scan(xp, state, backend, **options)
        h, state = self.scan(self.freeze(xp, real), state, backend, **options)
        last = h[torch.arange(len(h), device=h.device), lengths - 1]
        return h.masked_fill(~real, 0.0), (last.to(state[0].dtype), *state[1:])


# A gate whose pre-activation is this large is exactly 0 or 1 in every dtype (float16 ends at 65504).
SATURATED = 1e4


class _RNNDirection(_Direction):
    blocks = 1

    def __init__(self, input_size: int, hidden_size: int, forget_bias: float, activation: str):
        super().__init__(input_size, hidden_size, forget_bias)
        self.activation = activation

    def scan(self, xp, state, backend):
        h, hT = rnn_scan(xp, self.w_h, state and state[0], self.activation, backend=backend)
        return h, (hT,)

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rnn_step(F.linear(x, self.w_x, self.b), self.w_h, state[0], self.activation),)


class _LSTMDirection(_Direction):
    blocks = 4
    keep = (1, 1.0)

    def freeze(self, xp, real):
        i, f, g, o = xp.chunk(4, dim=-1)
        return torch.cat([i.where(real, -SATURATED), f.where(real, SATURATED), g, o], dim=-1)

    def scan(self, xp, state, backend, cont=None):
        return lstm_scan(xp, self.w_h, *(state or (None, None)), cont, backend=backend)

    def step(self, x: Tensor, state: tuple[Tensor, ...], static: Tensor | None = None) -> tuple[Tensor, ...]:
        xp = F.linear(x, self.w_x, self.b)
        return lstm_step(xp if static is None else xp + static, self.w_h, *state)


class _GRUDirection(_Direction):
    blocks = 3
    keep = (1, 1.0)

    def __init__(self, input_size: int, hidden_size: int, forget_bias: float):
        super().__init__(input_size, hidden_size, forget_bias)
        self.b_h = nn.Parameter(torch.zeros(3 * hidden_size))

    def scan(self, xp, state, backend):
        h, hT = gru_scan(xp, self.w_h, self.b_h, state and state[0], backend=backend)
        return h, (hT,)

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (gru_step(F.linear(x, self.w_x, self.b), self.w_h, self.b_h, state[0]),)


class _Recurrent(nn.Module):
    """Layers and directions around `_Direction`: what RNN, LSTM and GRU share."""

    parts = 1  # tensors in the state

    def __init__(
        self,
        make: Callable[[int], _Direction],
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bidirectional: bool,
        dropout: float,
        backend: str,
    ):
        super().__init__()
        for name, value in (
            ("input_size", input_size),
            ("hidden_size", hidden_size),
            ("num_layers", num_layers),
        ):
            if value < 1:
                raise ValueError(f"expected {name} to be at least 1, got {value}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bidirectional, self.dropout, self.backend = bidirectional, dropout, backend
        widths = [input_size] + [hidden_size * (2 if bidirectional else 1)] * (num_layers - 1)
        self.layers = nn.ModuleList(make(width) for width in widths)
        self.backward_layers = nn.ModuleList(make(width) for width in widths) if bidirectional else None

    @property
    def output_size(self) -> int:
        """Features of the output: hidden_size, or twice that for two directions."""
        return self.hidden_size * (2 if self.bidirectional else 1)

    def _rows(self, state: State | None, batch: int) -> list[tuple[Tensor, ...] | None]:
        """Split the state ``(B, rows, H)`` into one tuple of ``(B, H)`` for each layer and direction."""
        count = self.num_layers * (2 if self.bidirectional else 1)
        if state is None:
            return [None] * count
        parts = (state,) if self.parts == 1 else tuple(state)
        wanted = (batch, count, self.hidden_size)
        for part in parts:
            if not isinstance(part, Tensor) or tuple(part.shape) != wanted:
                got = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise ValueError(f"expected each tensor of state of shape (B, layers, H) = {wanted}, got {got}")
        if len(parts) != self.parts:
            raise ValueError(f"expected state to hold {self.parts} tensors, got {len(parts)}")
        return list(zip(*(part.unbind(1) for part in parts), strict=True))

    def _join(self, rows: list[tuple[Tensor, ...]]) -> State:
        parts = tuple(torch.stack(part, dim=1) for part in zip(*rows, strict=True))
        return parts[0] if self.parts == 1 else parts

    def forward(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """Run the whole sequence.

        Args:
            x: inputs, ``(B, T, D)``.
            state: the state before the first step, as returned by an earlier call; None is zero.
            lengths: the number of real steps of each sequence, ``(B,)`` integers in 1..T; None means T for all.

        Returns:
            The last layer's outputs ``(B, T, H)`` (``2H`` for two directions) and the final state.

        Raises:
            ValueError: wrong shape of x, state or lengths; T = 0; a length outside 1..T.
        """
        return self._run(x, state, lengths)

    def _run(
        self,
        x: Tensor,
        state: State | None,
        lengths: Tensor | None,
        static: Tensor | None = None,
        cont: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """`forward`, with what an LSTM takes besides; `static` belongs to the first layer, `cont` to all."""
        if x.ndim != 3 or x.shape[-1] != self.input_size:
            raise ValueError(f"expected x of shape (B, T, D) with D = {self.input_size}, got {tuple(x.shape)}")
        B, T, _ = x.shape
        if T == 0:
            raise ValueError(f"expected x with at least one step (T >= 1), got {tuple(x.shape)}")
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=x.device)
            if lengths.shape != (B,) or lengths.is_floating_point():
                raise ValueError(
                    f"expected lengths to be integers of shape (B,) with B = {B}, "
                    f"got {lengths.dtype} of shape {tuple(lengths.shape)}"
                )
            low, high = (int(v) for v in lengths.aminmax()) if B else (1, T)
            if low < 1 or high > T:
                raise ValueError(f"expected lengths between 1 and T = {T}, got values from {low} to {high}")
        rows, final = iter(self._rows(state, B)), []
        for number, layer in enumerate(self.layers):
            if number and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            out, end = layer(x, next(rows), lengths, self.backend, None if number else static, cont)
            final.append(end)
            if self.backward_layers is not None:
                turned = reverse_within_length(x, lengths)
                back, end = self.backward_layers[number](turned, next(rows), lengths, self.backend)
                final.append(end)
                out = torch.cat([out, reverse_within_length(back, lengths)], dim=-1)
            x = out
        return x, self._join(final)

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run one step: x ``(B, D)`` -> the output ``(B, H)`` and the new state. For generating and streaming."""
        return self._step(x, state)

    def _step(self, x: Tensor, state: State | None, static: Tensor | None = None) -> tuple[Tensor, State]:
        if self.bidirectional:
            raise ValueError("expected a one-directional layer: the backward direction needs the end of the sequence")
        if x.ndim != 2 or x.shape[-1] != self.input_size:
            raise ValueError(f"expected x of shape (B, D) with D = {self.input_size}, got {tuple(x.shape)}")
        rows = self._rows(state, len(x))
        final = []
        for number, (layer, row) in enumerate(zip(self.layers, rows, strict=True)):
            if number and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            start = row or (x.new_zeros(len(x), self.hidden_size),) * self.parts
            options = {} if number or static is None else {"static": static}
            final.append(layer.step(x, start, **options))
            x = final[-1][0]
        return x, self._join(final)

    def extra_repr(self) -> str:
        """Show the sizes in the module's repr."""
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, bidirectional={self.bidirectional}"
        )


class RNN(_Recurrent):
    r"""Elman network, $h_t = \phi(x_t W_x^\top + h_{t-1} W_h^\top + b)$.

    Args:
        input_size: D.
        hidden_size: H.
        num_layers: how many layers are stacked.
        bidirectional: add a second direction, from the end to the start; outputs are concatenated.
        dropout: probability of dropping an input of the second and higher layers.
        activation: ``"tanh"`` or ``"relu"``.
        backend: of the kernel, see `seqarch.kernels`.

    The state is one tensor, ``(B, layers, H)``. Matrices start uniform in $\pm 1/\sqrt H$, biases at zero.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bidirectional: bool = False,
        dropout: float = 0.0,
        activation: str = "tanh",
        backend: str = "auto",
    ):
        if activation not in ("tanh", "relu"):
            raise ValueError(f"expected activation to be one of tanh, relu, got {activation!r}")

        def make(width: int) -> _Direction:
            return _RNNDirection(width, hidden_size, 0.0, activation)

        super().__init__(make, input_size, hidden_size, num_layers, bidirectional, dropout, backend)


class LSTM(_Recurrent):
    r"""Long short-term memory: $s_t = f \odot s_{t-1} + i \odot g$, $h_t = o \odot \tanh s_t$.

    Args:
        input_size: D.
        hidden_size: H.
        num_layers: how many layers are stacked.
        bidirectional: add a second direction, from the end to the start; outputs are concatenated.
        forget_bias: initial bias of the forget gate; the larger, the longer a fresh cell remembers.
        dropout: probability of dropping an input of the second and higher layers.
        static_size: features of an input that stays the same for a whole sequence, such as an image to be described.
            It enters the first layer through a matrix of its own, without a bias, once per sequence and not per step.
        backend: of the kernel, see `seqarch.kernels`.

    The state is the pair (h, s), each ``(B, layers, H)``. Matrices start uniform in $\pm 1/\sqrt H$, other biases at zero.
    """

    parts = 2

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bidirectional: bool = False,
        forget_bias: float = 1.0,
        dropout: float = 0.0,
        static_size: int | None = None,
        backend: str = "auto",
    ):
        def make(width: int) -> _Direction:
            return _LSTMDirection(width, hidden_size, forget_bias)

        super().__init__(make, input_size, hidden_size, num_layers, bidirectional, dropout, backend)
        if static_size is not None and (bidirectional or static_size < 1):
            raise ValueError(
                f"expected static_size of at least 1 in a one-directional LSTM, got {static_size} "
                f"with bidirectional={bidirectional}"
            )
        self.static_size = static_size
        self.static = None if static_size is None else nn.Linear(static_size, 4 * hidden_size, bias=False)
        if self.static is not None:
            nn.init.uniform_(self.static.weight, -1 / math.sqrt(hidden_size), 1 / math.sqrt(hidden_size))

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        lengths: Tensor | None = None,
        *,
        cont: Tensor | None = None,
        x_static: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Run the whole sequence.

        Args:
            x, state, lengths: as in the other layers: ``(B, T, D)``, the state before the first step, ``(B,)`` integers.
            cont: continuation flags, ``(B, T)`` of 0 and 1: a 0 empties the state of every layer before its step, so that
                several sequences can stand one after the other in a row. Not with two directions.
            x_static: the input that stays the same, ``(B, static_size)``; needed if and only if static_size was given.

        Returns:
            The last layer's outputs ``(B, T, H)`` (``2H`` for two directions) and the final state.

        Raises:
            ValueError: wrong shape of any of them; T = 0; a length outside 1..T; flags other than 0 and 1.
        """
        if cont is not None and self.bidirectional:
            raise ValueError(
                "expected cont=None in a bidirectional LSTM: backwards, the flags mark ends and not starts"
            )
        return self._run(x, state, lengths, self._static(x_static, x), cont)

    def step(self, x: Tensor, state: State | None = None, x_static: Tensor | None = None) -> tuple[Tensor, State]:
        """Run one step: x ``(B, D)``, x_static ``(B, static_size)`` -> the output ``(B, H)`` and the new state."""
        return self._step(x, state, self._static(x_static, x))

    def _static(self, x_static: Tensor | None, x: Tensor) -> Tensor | None:
        """The static input's part of the pre-activations, ``(B, 4H)``."""
        if self.static is None:
            if x_static is not None:
                raise ValueError("expected x_static=None: this LSTM was made without static_size")
            return None
        wanted = (len(x), self.static_size)
        if not isinstance(x_static, Tensor) or tuple(x_static.shape) != wanted:
            got = tuple(x_static.shape) if isinstance(x_static, Tensor) else x_static
            raise ValueError(f"expected x_static of shape (B, static_size) = {wanted}, got {got}")
        return self.static(x_static)


class GRU(_Recurrent):
    r"""Gated recurrent unit: $h_t = (1 - z) \odot n + z \odot h_{t-1}$.

    Args:
        input_size: D.
        hidden_size: H.
        num_layers: how many layers are stacked.
        bidirectional: add a second direction, from the end to the start; outputs are concatenated.
        forget_bias: initial bias of the update gate z, which keeps the state as an LSTM's forget gate does.
        dropout: probability of dropping an input of the second and higher layers.
        backend: of the kernel, see `seqarch.kernels`.

    The state is one tensor, ``(B, layers, H)``. Matrices start uniform in $\pm 1/\sqrt H$, other biases at zero.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bidirectional: bool = False,
        forget_bias: float = 1.0,
        dropout: float = 0.0,
        backend: str = "auto",
    ):
        def make(width: int) -> _Direction:
            return _GRUDirection(width, hidden_size, forget_bias)

        super().__init__(make, input_size, hidden_size, num_layers, bidirectional, dropout, backend)
