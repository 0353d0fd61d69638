"""seqarch.data.keywords: sizes, the split by voices, and features that never hear the future."""

import pytest
import torch

from seqarch.data.keywords import UNSEEN, VOICES, WORDS, keywords

pytest.importorskip("espeakng_loader")
SMALL = dict(words=("yes", "no"), n_per=2)


def test_layout():
    data = keywords(**SMALL)
    assert data.train_x.shape == (2 * 9 * 2, 64, 32) and data.test_x.shape == (2 * 4 * 2, 64, 32)
    assert data.train_x.dtype == torch.float32 and data.train_y.dtype == torch.long
    assert data.train_y.bincount().tolist() == [18, 18] and data.test_y.bincount().tolist() == [8, 8]
    assert torch.isfinite(data.train_x).all()
    assert abs(data.train_x.mean()) < 1e-3 and abs(data.train_x.std() - 1) < 1e-3


def test_the_quick_size_of_the_chapter():
    assert len(WORDS) * (len(VOICES) - len(UNSEEN)) * 8 == 720 and len(WORDS) * len(UNSEEN) * 8 == 320


def test_no_voice_is_in_both_parts():
    data = keywords(**SMALL)
    heard = {data.voices[i] for i in data.train_voice}
    assert heard.isdisjoint(UNSEEN) and {data.voices[i] for i in data.test_voice} == set(UNSEEN)


def test_the_same_seed_gives_the_same_clips():
    again = keywords.__wrapped__(**SMALL)
    assert torch.equal(keywords(**SMALL).train_x, again.train_x)
    assert not torch.equal(keywords.__wrapped__(**SMALL, seed=1).train_x, again.train_x)


def test_words_begin_in_the_first_fifth():
    data = keywords(**SMALL)
    loud = data.train_x.mean(-1)
    assert (loud[:, :40].amax(1) > loud[:, 55:].amax(1)).double().mean() > 0.9


def test_a_frame_ends_where_the_next_hop_begins(monkeypatch):
    """An impulse at sample n first shows in frame n // hop, never in one before it."""
    import seqarch.data.keywords as module

    real, at = module.espeak_words, 5 * 128 + 17

    def impulse(*args):
        speech = real(*args)
        wave = torch.zeros_like(speech.wave)
        wave[:, at] = 1.0
        return type(speech)(wave, speech.word, speech.voice)

    monkeypatch.setattr(module, "espeak_words", impulse)
    monkeypatch.setattr(torch, "rand", lambda *size, generator=None: torch.zeros(size))  # no noise, no delay
    x = keywords.__wrapped__(("yes",), 1).train_x[0]
    quiet = (x - x[0]).abs().amax(-1) < 1e-6
    assert quiet[:5].all() and not quiet[5] and quiet[7:].all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(frames=0), "expected sizes of at least 1 and n_fft >= hop, got"),
        (dict(n_fft=64), "expected sizes of at least 1 and n_fft >= hop, got"),
        (dict(n_per=0), "expected words, voices and n_per >= 1"),
    ],
)
def test_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        keywords(**wrong)
