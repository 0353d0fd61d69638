"""FrameEncoder: frames are independent, folding equals looping, and clear errors."""

import pytest
import torch

from seqarch.layers.frames import FrameEncoder


@pytest.mark.parametrize("channels, size", [(1, 16), (3, 16), (1, 20), (2, 33), (1, 4)])
def test_folding_time_into_the_batch_is_looping(channels, size):
    torch.manual_seed(0)
    encoder = FrameEncoder(channels, size, features=7)
    x = torch.randn(2, 5, channels, size, size)
    got = encoder(x)
    assert got.shape == (2, 5, 7)
    torch.testing.assert_close(got, torch.stack([encoder.frame(f) for f in x.unbind(1)], 1), rtol=0, atol=1e-6)


def test_a_frame_does_not_see_its_neighbours():
    encoder, x = FrameEncoder(1, 16), torch.randn(1, 4, 1, 16, 16)
    other = x.clone()
    other[:, 2] = 0
    same = (encoder(x) == encoder(other)).all(-1)[0]
    assert same.tolist() == [True, True, False, True]


def test_dropout_is_for_training_only():
    encoder, x = FrameEncoder(1, 16, dropout=0.5), torch.randn(1, 4, 1, 16, 16)
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))


def test_gradients_reach_every_parameter():
    encoder = FrameEncoder(2, 12, features=9, widths=(4, 5))
    encoder(torch.randn(2, 3, 2, 12, 12)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_errors():
    encoder = FrameEncoder(1, 16)
    with pytest.raises(ValueError, match=r"expected frames of shape \(batch, time, channels, height, width\), got"):
        encoder(torch.zeros(2, 1, 16, 16))
    with pytest.raises(ValueError, match=r"expected frames of 1 channels and 16 x 16 pixels, got \(3, 16, 16\)"):
        encoder(torch.zeros(2, 4, 3, 16, 16))
    with pytest.raises(ValueError, match=r"expected images of shape \(batch, channels, height, width\), got"):
        encoder.frame(torch.zeros(2, 4, 1, 16, 16))
    with pytest.raises(ValueError, match="expected size >= 4 and channels, features and widths of at least 1"):
        FrameEncoder(0, 16)
