"""Spoken keywords as spectrograms: ten words, thirteen synthetic voices, four of which only the test set has heard."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .speech import VOICES, espeak_words, logmel

__all__ = ["UNSEEN", "VOICES", "WORDS", "Keywords", "keywords"]

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNSEEN = ("en+m2", "en+m5", "en+f1", "en+f3")


@dataclass(frozen=True)
class Keywords:
    """Log-mel spectrograms ``(n, frames, mels)``, the index of the word ``(n,)`` and of the voice ``(n,)``.

    All values are standardised by the mean and the deviation of the training clips.
    """

    train_x: Tensor
    train_y: Tensor
    train_voice: Tensor
    test_x: Tensor
    test_y: Tensor
    test_voice: Tensor
    words: tuple[str, ...]
    voices: tuple[str, ...]


@functools.lru_cache(maxsize=2)
def keywords(
    words: tuple[str, ...] = WORDS,
    n_per: int = 8,
    seed: int = 0,
    *,
    frames: int = 64,
    mels: int = 32,
    sr: int = 8000,
    hop: int = 128,
    n_fft: int = 256,
) -> Keywords:
    """Let 13 voices say every word `n_per` times, at random speeds and pitches: 720 training and 320 test clips.

    Each clip is ``frames * hop`` samples long. The word begins uniformly in its first fifth, and white noise is added
    whose deviation is uniform between 0 and 0.02 of full scale. Frame t of the spectrogram is computed from the n_fft
    samples that end with sample ``(t + 1) * hop``, so that it hears nothing later.

    Args:
        words: what is said.
        n_per: how often each voice says each word.
        seed: of everything drawn at random.
        frames, mels: size of a spectrogram.
        sr, hop, n_fft: samples a second, samples from frame to frame, samples in a window.

    Raises:
        ValueError: no words, or sizes below 1.
        MissingDataPackage: a package is missing (with the pip line).
    """
    if min(frames, mels, sr, hop) < 1 or n_fft < hop:
        raise ValueError(f"expected sizes of at least 1 and n_fft >= hop, got {(frames, mels, sr, hop, n_fft)}")
    samples = frames * hop
    speech = espeak_words(words, VOICES, n_per, sr, samples / sr, seed)
    g = torch.Generator().manual_seed(seed)
    start = (torch.rand(len(speech.wave), 1, generator=g) * samples / 5).long()
    position = torch.arange(samples) - start
    wave = torch.where(position >= 0, speech.wave.gather(1, position.clamp_min(0)), 0.0)
    level = 0.02 * torch.rand(len(wave), 1, generator=g)
    wave = wave + level * torch.randn(wave.shape, generator=g)
    # logmel centres its windows; half a window of silence in front turns "centred" into "ending here"
    x = logmel(F.pad(wave, (n_fft - n_fft // 2, 0)), sr, mels, hop, n_fft)[:, 1 : frames + 1]
    unseen = torch.tensor([voice in UNSEEN for voice in VOICES])[speech.voice]
    x = (x - x[~unseen].mean()) / x[~unseen].std()
    train, test = ((x[chosen].contiguous(), speech.word[chosen], speech.voice[chosen]) for chosen in (~unseen, unseen))
    return Keywords(*train, *test, tuple(words), VOICES)
