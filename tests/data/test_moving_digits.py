"""Moving digits and digit scenes: what they promise, and that no handwriting crosses from training to test."""

import pytest
import torch

from seqarch.data.digit_scenes import RELATIONS, SIZES, caption, digit_scenes, parse_caption, same_scene
from seqarch.data.moving_digits import (
    ACTIVITIES,
    CLASSES,
    NAMES,
    QUADRANTS,
    describe,
    described_clips,
    handwriting,
    moving_digits,
    paste,
)


class TestHandwriting:
    def test_the_images_are_divided_and_none_is_lost(self):
        rows = [handwriting(split)[0].flatten(1) for split in ("train", "validation", "test")]
        assert [len(r) for r in rows] == [1200, 200, 397]
        keys = [{tuple(v) for v in r.tolist()} for r in rows]
        assert not (keys[0] & keys[2] or keys[0] & keys[1] or keys[1] & keys[2])
        assert all(len(handwriting(split)[1].unique()) == 10 for split in ("train", "validation", "test"))

    def test_errors(self):
        with pytest.raises(ValueError, match="expected split to be one of train, validation, test, got 'dev'"):
            moving_digits(10, "dev")


class TestMovingDigits:
    def test_shapes_classes_and_seeds(self):
        a, b = moving_digits(100, seed=3), moving_digits(100, seed=3)
        assert a.frames.shape == (100, 16, 1, 16, 16) and a.position.shape == (100, 16, 2) and len(a) == 100
        assert a.label.bincount().tolist() == [10] * 10 and len(CLASSES) == 10
        assert torch.equal(a.frames, b.frames) and not torch.equal(a.frames, moving_digits(100, seed=4).frames)
        moving = a.label < 8
        assert (a.digit[moving] < 8).all() and torch.equal(a.digit[~moving], a.label[~moving])

    def test_a_clip_shows_the_handwriting_of_its_split(self):
        clips = moving_digits(50, "test", noise=0.0)
        images, labels = handwriting("test")
        assert torch.equal(labels[clips.image], clips.digit)
        for i in (0, 7, 31):
            for t in (0, 5, 15):
                x, y = clips.position[i, t].tolist()
                assert torch.equal(clips.frames[i, t, 0, y : y + 8, x : x + 8], images[clips.image[i]])
                assert clips.frames[i, t].sum() == pytest.approx(images[clips.image[i]].sum().item(), rel=1e-5)

    def test_motions_are_what_they_are_called(self):
        clips = moving_digits(400, seed=1)
        assert clips.position.min() >= 0 and clips.position.max() <= 8
        for i, label in enumerate(clips.label.tolist()):
            if label >= 8:
                continue
            moved = clips.position[i, 8] - clips.position[i, 0]
            along = [(1, 0), (-1, 0), (0, -1), (0, 1)][label % 4]
            assert moved[0] * along[0] + moved[1] * along[1] >= 2
            across = clips.position[i, :, 1 if along[0] else 0]
            assert (across == across[0]).all()
            end = clips.position[i, 15] - clips.position[i, 0]
            if label >= 4:  # out and back: almost home after 15 of 16 steps
                assert end.abs().max() <= 1
            else:
                assert end.abs().sum() >= 5

    def test_appearance_says_nothing_about_the_motion(self):
        clips = moving_digits(2000, seed=2)
        moving = clips.label < 8
        table = torch.zeros(8, 8).index_put_(
            (clips.label[moving], clips.digit[moving]), torch.ones(moving.sum()), accumulate=True
        )
        assert (table / table.sum(1, keepdim=True) - 1 / 8).abs().max() < 0.09

    def test_larger_longer_and_with_bystanders(self):
        clips = moving_digits(20, size=32, length=24, bystanders=1, noise=0.0)
        assert clips.frames.shape == (20, 24, 1, 32, 32) and clips.position.max() <= 24
        alone = moving_digits(20, size=32, length=24, noise=0.0)
        assert (clips.frames.sum((2, 3, 4)) > alone.frames.sum((2, 3, 4)) - 1e-3).float().mean() > 0.5
        assert moving_digits(20, length=8).frames.shape[1] == 8

    @pytest.mark.parametrize("bad", [dict(clips=0), dict(size=9), dict(length=2)])
    def test_errors(self, bad):
        with pytest.raises(ValueError, match="expected clips >= 1, size >= 12 and length >= 4, got"):
            moving_digits(**({"clips": 5} | bad))
        with pytest.raises(ValueError, match="expected clips >= 1, size >= 12 and length >= 4, got"):
            described_clips(**({"clips": 5} | bad))


class TestPaste:
    def test_darker_wins_and_the_rest_stays(self):
        canvas = torch.full((1, 4, 4), 0.5)
        glyph = torch.tensor([[[1.0, 0.0], [0.2, 0.9]]])
        out = paste(canvas, glyph, torch.tensor([[1, 2]]))
        assert out[0, 2].tolist() == pytest.approx([0.5, 1.0, 0.5, 0.5])
        assert out[0, 3].tolist() == pytest.approx([0.5, 0.5, 0.9, 0.5])
        assert (canvas == 0.5).all()

    def test_error(self):
        with pytest.raises(ValueError, match=r"expected positions in 0..2, got 0 to 3"):
            paste(torch.zeros(1, 4, 4), torch.zeros(1, 2, 2), torch.tensor([[0, 3]]))


class TestDescribedClips:
    def test_sentences_belong_to_facts(self):
        clips = described_clips(60, seed=1)
        for facts, pair in zip(clips.facts.tolist(), clips.sentences, strict=True):
            assert pair == describe(*facts) and NAMES[facts[1]] in pair[0] and QUADRANTS[facts[2]] in pair[1]
        everything = [s for a in range(8) for d in range(10) for q in range(4) for s in describe(a, d, q)]
        assert len(set(everything)) == 640 and len(ACTIVITIES) == 8

    def test_every_digit_has_two_favourites(self):
        facts = described_clips(6000, seed=0).facts
        for d in range(10):
            share = facts[facts[:, 1] == d, 0].bincount(minlength=8).sort(descending=True).values
            assert share[:2].sum() / share.sum() > 0.7

    def test_the_quadrant_is_where_it_starts(self):
        clips = described_clips(200, seed=5, noise=0.0)
        first = clips.frames[:, 0, 0]
        ink = first.sum((1, 2))
        x = (first.sum(1) * torch.arange(16)).sum(1) / ink
        y = (first.sum(2) * torch.arange(16)).sum(1) / ink
        right, bottom = clips.facts[:, 2] % 2 == 1, clips.facts[:, 2] >= 2
        assert ((x > 7.5) == right).float().mean() > 0.85 and ((y > 7.5) == bottom).float().mean() > 0.85

    def test_error(self):
        with pytest.raises(ValueError, match="expected activity in 0..7, digit in 0..9 and quadrant in 0..3"):
            describe(8, 0, 0)


class TestDigitScenes:
    def test_shapes_and_seeds(self):
        a = digit_scenes(30, seed=2)
        assert a.images.shape == (30, 1, 20, 20) and a.facts.shape == (30, 5) and len(a) == 30
        assert torch.equal(a.images, digit_scenes(30, seed=2).images)

    def test_captions_parse_back(self):
        scenes = digit_scenes(200, seed=1)
        for facts, pair in zip(scenes.facts.tolist(), scenes.captions, strict=True):
            assert pair == caption(*facts)
            assert all(parse_caption(c) == tuple(facts) for c in pair)
        assert len({w for pair in scenes.captions for c in pair for w in c.split()}) == 20

    def test_the_objects_stand_where_the_caption_says(self):
        for size in (20, 24):
            scenes = digit_scenes(300, seed=3, noise=0.0, size=size)
            for image, facts in zip(scenes.images[:, 0], scenes.facts.tolist(), strict=True):
                ink = image if facts[2] < 2 else image.T  # along the axis of the relation: columns
                columns = (ink.sum(0) > 0).nonzero()[:, 0]
                assert columns[-1] - columns[0] >= 10  # two digits side by side, not one on top of the other
            assert not (scenes.facts[:, 0] & scenes.facts[:, 3]).any()  # at most one is big

    def test_which_object_is_where(self):
        """The big one has more ink: its side is the one that the relation says."""
        scenes = digit_scenes(500, seed=4, noise=0.0)
        right = total = 0
        for image, (big1, _, relation, big2, _) in zip(scenes.images[:, 0], scenes.facts.tolist(), strict=True):
            if big1 == big2:
                continue
            ink = image.sum(0) if relation < 2 else image.sum(1)
            first_before = relation % 2 == 0
            right += (ink[:10].sum() > ink[10:].sum()) == (first_before == bool(big1))
            total += 1
        assert total > 250 and right / total > 0.9

    def test_same_scene_from_both_sides(self):
        assert same_scene((1, 3, 2, 0, 7), (0, 7, 3, 1, 3)) and same_scene((1, 3, 0, 0, 7), (1, 3, 0, 0, 7))
        assert not same_scene((1, 3, 2, 0, 7), (0, 7, 2, 1, 3))
        assert not same_scene(None, (1, 3, 2, 0, 7)) and parse_caption("a big three is a small seven") is None

    def test_errors(self):
        with pytest.raises(ValueError, match="expected scenes >= 1 and size >= 20, got 0 and 20"):
            digit_scenes(0)
        with pytest.raises(ValueError, match="expected sizes in 0..1, digits in 0..9 and a relation in 0..3"):
            caption(0, 3, 4, 0, 2)
        assert len(SIZES) == 2 and len(RELATIONS) == 4
