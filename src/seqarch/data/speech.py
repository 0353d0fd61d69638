"""Spoken words, from the speech synthesiser eSpeak NG that the package `espeakng-loader` carries."""

from __future__ import annotations

import _ctypes
import ctypes
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from ._packages import require

__all__ = ["VOICES", "Speech", "espeak_words", "logmel"]

VOICES = ("en", "en-us", *(f"en+m{i}" for i in range(1, 8)), *(f"en+f{i}" for i in range(1, 5)))
RATE, PITCH, RANGE = (120, 220), (20, 80), (30, 70)  # words a minute; height and liveliness of the voice, 0 to 100
_SYNCHRONOUS, _RATE, _PITCH, _RANGE = 2, 1, 3, 4  # eSpeak's numbers for an output mode and three parameters
_lock = threading.Lock()  # the library is not thread-safe
_RECEIVE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
_SYNTH = [ctypes.c_char_p, ctypes.c_size_t, *[ctypes.c_uint] * 4, ctypes.c_void_p, ctypes.c_void_p]


@dataclass(frozen=True)
class Speech:
    """Recordings, in the order words, then voices, then repetitions.

    Attributes:
        wave: ``(N, T)`` float32, full scale is 1; short ones are followed by zeros, long ones are cut.
        word: the index of the word, ``(N,)``.
        voice: the index of the voice, ``(N,)``.
    """

    wave: Tensor
    word: Tensor
    voice: Tensor


def espeak_words(
    words: Sequence[str], voices: Sequence[str], n_per: int, sr: int, seconds: float, seed: int, skip: int = 0
) -> Speech:
    """Let every voice say every word `n_per` times, each time at a random speed, pitch and pitch range.

    Args:
        words: what is said, as English spelling.
        voices: names such as ``"en+f2"``; see `VOICES`.
        n_per: renderings of each word by each voice.
        sr: samples a second.
        seconds: the length of every recording.
        seed: of the speeds and pitches.
        skip: samples to leave out at the beginning (silence), counted at `sr`.

    Raises:
        ValueError: no words, no voices, or a voice that eSpeak does not know.
        MissingDataPackage: a package is missing (with the pip line).
    """
    if not words or not voices or n_per < 1:
        raise ValueError(f"expected words, voices and n_per >= 1, got {words!r}, {voices!r} and {n_per}")
    if sr < 1 or seconds <= 0 or skip < 0:
        raise ValueError(f"expected sr >= 1, seconds > 0 and skip >= 0, got {sr}, {seconds} and {skip}")
    resample = require("scipy.signal", "scipy").resample_poly
    g = torch.Generator().manual_seed(seed)
    length = round(seconds * sr)
    waves, labels = [], []
    with _Synthesiser() as say:
        common = gcd(sr, say.rate)
        for w, word in enumerate(words):
            for v, voice in enumerate(voices):
                for _ in range(n_per):
                    manner = [int(torch.randint(low, high + 1, (), generator=g)) for low, high in (RATE, PITCH, RANGE)]
                    sound = resample(say(word, voice, *manner).numpy(), sr // common, say.rate // common)
                    samples = torch.from_numpy(sound).float()[skip : skip + length]
                    waves.append(torch.nn.functional.pad(samples, (0, length - len(samples))))
                    labels.append((w, v))
    word, voice = torch.tensor(labels).unbind(1)
    return Speech(torch.stack(waves), word, voice)


def logmel(wave: Tensor, sr: int, n_mels: int, hop: int, n_fft: int) -> Tensor:
    """Log-mel spectrogram of waves ``(..., T)``: ``(..., frames, n_mels)``, one frame every `hop` samples.

    The power spectrum of windows of `n_fft` samples (Hann, centred, padded with zeros) is summed in `n_mels` triangles,
    equally wide on the mel scale between 0 and sr / 2; the result is ``log(1e-6 + power)``.

    Raises:
        ValueError: sizes below 1, or n_fft shorter than hop.
    """
    if min(sr, n_mels, hop) < 1 or n_fft < hop:
        raise ValueError(f"expected sr, n_mels, hop >= 1 and n_fft >= hop, got {sr}, {n_mels}, {hop} and {n_fft}")
    flat = wave.reshape(-1, wave.shape[-1]).float()
    window = torch.hann_window(n_fft, device=wave.device)
    spectrum = torch.stft(flat, n_fft, hop, window=window, center=True, pad_mode="constant", return_complex=True)
    top = 2595 * torch.log10(torch.tensor(1 + sr / 2 / 700))
    edges = 700 * (10 ** (torch.linspace(0, 1, n_mels + 2) * top / 2595) - 1)
    hertz = torch.linspace(0, sr / 2, n_fft // 2 + 1)
    rising = (hertz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - hertz) / (edges[2:] - edges[1:-1])[:, None]
    bank = torch.minimum(rising, falling).clamp(min=0).to(wave.device)
    mel = torch.log(1e-6 + bank @ spectrum.abs().square())
    return mel.transpose(1, 2).reshape(*wave.shape[:-1], -1, n_mels)


class _Synthesiser:
    """eSpeak, loaded afresh and thrown away afterwards.

    It keeps a state from one utterance to the next (the flutter of the voice, the phase of the wave), so only a library
    that has said nothing yet says the same things twice.
    """

    def __enter__(self) -> _Synthesiser:
        _lock.acquire()
        try:
            loader = require("espeakng_loader", "espeakng-loader")
            self.library = ctypes.CDLL(loader.get_library_path())
            self.rate = self.library.espeak_Initialize(_SYNCHRONOUS, 500, str(loader.get_data_path()).encode(), 0)
            if self.rate <= 0:
                raise RuntimeError(f"expected eSpeak to start, got error {self.rate}")
            self.pieces: list[bytes] = []
            self.callback = _RECEIVE(self._receive)  # the library holds no reference to it: we must
            self.library.espeak_SetSynthCallback(self.callback)
            self.library.espeak_Synth.argtypes = _SYNTH
        except BaseException:
            _lock.release()
            raise
        return self

    def __exit__(self, *_) -> None:
        try:
            self.library.espeak_Terminate()
            close = _ctypes.FreeLibrary if os.name == "nt" else _ctypes.dlclose
            close(self.library._handle)
        finally:
            _lock.release()

    def _receive(self, sound, count, _) -> int:
        if sound and count > 0:
            self.pieces.append(ctypes.string_at(sound, 2 * count))
        return 0

    def __call__(self, text: str, voice: str, speed: int, pitch: int, liveliness: int) -> Tensor:
        """Return one utterance as ``(T,)`` in [-1, 1], at `rate` samples a second."""
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"expected a voice that eSpeak knows, got {voice!r}")
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # the noise in its consonants
        for parameter, value in ((_RATE, speed), (_PITCH, pitch), (_RANGE, liveliness)):
            self.library.espeak_SetParameter(parameter, value, 0)
        self.pieces.clear()
        data = text.encode()
        self.library.espeak_Synth(data, len(data) + 1, 0, 1, 0, 1, None, None)
        return torch.frombuffer(bytearray(b"".join(self.pieces)), dtype=torch.int16).float() / 32768
