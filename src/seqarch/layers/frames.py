r"""A small convolutional network that looks at every frame of a clip on its own: $v_t = \phi_V(x_t)$."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["FrameEncoder"]


class FrameEncoder(nn.Module):
    """Two strided convolutions and a linear layer, with the same weights for every frame.

    conv 3x3 (stride 2), ReLU, conv 3x3 (stride 2), ReLU, flatten, linear, ReLU, dropout. Frames are folded into the
    batch, so that all of them are computed at once.

    Args:
        channels: C of the frames.
        size: their side S, at least 4.
        features: width of the output.
        widths: channels of the two convolutions.
        dropout: probability of dropping an output feature while training.

    Raises:
        ValueError: a size that is not at least 4, or no features or channels.
    """

    def __init__(
        self, channels: int, size: int, features: int = 64, *, widths: tuple[int, int] = (16, 32), dropout: float = 0.0
    ):
        super().__init__()
        if size < 4 or min(channels, features, *widths) < 1:
            raise ValueError(
                f"expected size >= 4 and channels, features and widths of at least 1, got size={size}, "
                f"channels={channels}, features={features}, widths={widths}"
            )
        self.channels, self.size, self.features = channels, size, features
        side = (size + 3) // 4  # two convolutions with stride 2 and padding 1
        self.net = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(widths[0], widths[1], 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(),
            nn.Linear(widths[1] * side * side, features), nn.ReLU(),
            nn.Dropout(dropout),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Map frames ``(B, T, C, S, S)`` to features ``(B, T, features)``.

        Raises:
            ValueError: frames that are not 5-D, or of another number of channels or size.
        """
        if x.ndim != 5:
            raise ValueError(f"expected frames of shape (batch, time, channels, height, width), got {tuple(x.shape)}")
        if tuple(x.shape[2:]) != (self.channels, self.size, self.size):
            raise ValueError(
                f"expected frames of {self.channels} channels and {self.size} x {self.size} pixels, got "
                f"{tuple(x.shape[2:])}"
            )
        return self.net(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def frame(self, x: Tensor) -> Tensor:
        """Map single images ``(B, C, S, S)`` to features ``(B, features)``."""
        if x.ndim != 4:
            raise ValueError(f"expected images of shape (batch, channels, height, width), got {tuple(x.shape)}")
        return self(x[:, None])[:, 0]
