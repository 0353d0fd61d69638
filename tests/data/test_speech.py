"""Synthetic speech: the same seed says the same, voices and words differ, and the spectrogram finds a tone."""

import math

import pytest
import torch

from seqarch.data.speech import VOICES, espeak_words, logmel

pytest.importorskip("espeakng_loader")
WORDS = ["ah", "ee"]


def test_order_shapes_and_scale():
    data = espeak_words(WORDS, VOICES[:3], 2, 2000, 0.256, seed=0)
    assert data.wave.shape == (12, 512) and data.wave.dtype == torch.float32
    assert data.word.tolist() == [0] * 6 + [1] * 6 and data.voice.tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert 0.01 < data.wave.std() < 0.5 and data.wave.abs().max() <= 1.2


def test_same_seed_same_sound_in_any_order_of_calls():
    first = espeak_words(WORDS, ["en+m3"], 3, 2000, 0.2, seed=0).wave
    espeak_words(["something", "else"], ["en+f2"], 1, 16000, 0.5, seed=4)
    assert torch.equal(first, espeak_words(WORDS, ["en+m3"], 3, 2000, 0.2, seed=0).wave)
    assert not torch.equal(first, espeak_words(WORDS, ["en+m3"], 3, 2000, 0.2, seed=1).wave)


def test_skip_leaves_out_the_beginning():
    whole = espeak_words(WORDS, ["en+m1"], 1, 2000, 0.3, seed=0).wave
    later = espeak_words(WORDS, ["en+m1"], 1, 2000, 0.2, seed=0, skip=40).wave
    torch.testing.assert_close(later, whole[:, 40:440])


def test_high_voices_are_higher():
    data = espeak_words(["ah"], ["en+m1", "en+f2"], 6, 8000, 0.25, seed=0)
    wave = data.wave - data.wave.mean(1, keepdim=True)
    correlation = torch.fft.irfft(torch.fft.rfft(wave, 4096).abs() ** 2)[:, 20:200]  # periods of 40 to 400 Hz
    pitch = 8000 / (20 + correlation.argmax(1)).float()
    assert pitch[data.voice == 1].median() > 1.2 * pitch[data.voice == 0].median()


def test_logmel_puts_a_tone_in_its_band():
    t = torch.arange(4000) / 8000
    tones = torch.stack([torch.sin(2 * math.pi * f * t) for f in (300.0, 1000.0, 3000.0)])
    mel = logmel(tones, 8000, 20, 80, 256)
    assert mel.shape == (3, 51, 20) and torch.isfinite(mel).all()
    edges = 700 * (10 ** (torch.linspace(0, 1, 22) * 2595 * math.log10(1 + 4000 / 700) / 2595) - 1)
    for f, band in zip((300, 1000, 3000), mel[:, 25].argmax(1).tolist(), strict=True):
        assert edges[band] <= f <= edges[band + 2]
    assert logmel(torch.zeros(2, 3, 800), 8000, 10, 80, 128).shape == (2, 3, 11, 10)


def test_errors():
    with pytest.raises(ValueError, match="expected a voice that eSpeak knows, got 'nobody'"):
        espeak_words(WORDS, ["nobody"], 1, 2000, 0.1, seed=0)
    with pytest.raises(ValueError, match="expected words, voices and n_per >= 1"):
        espeak_words([], ["en+m1"], 1, 2000, 0.1, seed=0)
    with pytest.raises(ValueError, match="expected sr >= 1, seconds > 0 and skip >= 0"):
        espeak_words(WORDS, ["en+m1"], 1, 2000, 0.0, seed=0)
    with pytest.raises(ValueError, match="n_fft >= hop"):
        logmel(torch.zeros(100), 8000, 20, 80, 64)
    assert espeak_words(WORDS, ["en+m1"], 1, 2000, 0.1, seed=0).wave.shape == (2, 200)  # it works after an error
