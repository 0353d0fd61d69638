"""The simulated pulse: its three rates, its rhythm, its reproducibility."""

import pytest
import torch

from seqarch.data.pulse import RATE, pulse_waves


def test_three_rates_of_one_recording():
    data = pulse_waves(5, seed=1)
    assert data.base.shape == (5, 256, 1) and data.dense.shape == (5, 512, 1) and data.sparse.shape == (5, 128, 1)
    assert torch.equal(data.dense[:, ::2], data.base) and torch.equal(data.base[:, ::2], data.sparse)
    assert data.bpm.shape == (5,) and ((data.bpm >= 45) & (data.bpm <= 140)).all()


def test_the_rhythm_is_the_heart_rate():
    data = pulse_waves(50, seed=2, length=2048, noise=0.0)
    signal = data.base[..., 0] - data.base[..., 0].mean(1, keepdim=True)
    spectrum = torch.fft.rfft(signal * torch.hann_window(2048)).abs()
    rate = torch.fft.rfftfreq(2048, 1 / RATE) * 60
    spectrum[:, rate < 40] = 0  # breathing
    spectrum[:, rate > 145] = 0  # overtones
    found = rate[spectrum.argmax(1)]
    assert ((found - data.bpm).abs() < 5).float().mean() > 0.85  # a slow heart has overtones below 145, too


def test_noise_is_drawn_at_the_base_rate():
    noisy, clean = pulse_waves(3, seed=0), pulse_waves(3, seed=0, noise=0.0)
    added = (noisy.dense - clean.dense)[..., 0]
    torch.testing.assert_close(added[:, 1:-1:2], (added[:, :-2:2] + added[:, 2::2]) / 2)
    assert 0.25 < added[:, ::2].std() < 0.35


def test_same_seed_same_people():
    assert torch.equal(pulse_waves(4, seed=7).dense, pulse_waves(4, seed=7).dense)
    assert not torch.equal(pulse_waves(4, seed=7).dense, pulse_waves(4, seed=8).dense)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(count=0), "expected count of at least 1, got 0"),
        (dict(count=1, length=7), "expected length to be an even number of at least 4, got 7"),
        (dict(count=1, noise=-1.0), "expected noise of at least 0, got -1.0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        pulse_waves(**arguments)
