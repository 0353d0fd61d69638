"""DigitDial: two people of whom one sees, a grammar, a vocabulary, and candidate sets."""

import inspect
import random

import pytest
import torch

from seqarch.data.digit_dialog import (
    KINDS,
    NAMES,
    PLACES,
    Answerer,
    DialogWords,
    Questioner,
    Scene,
    candidate_sets,
    digit_dialogs,
    find_human,
    parse_question,
    thickness,
)
from seqarch.data.moving_digits import handwriting

SCENE = Scene(digit=(7, 2, 2, 5), colour=(0, 1, 1, 3), style=(0, 1, 0, 1))


class TestDialogs:
    def test_shapes_and_seeds(self):
        a, b = digit_dialogs(30, seed=3), digit_dialogs(30, seed=3)
        assert a.images.shape == (30, 3, 16, 16) and a.pronoun.shape == a.source.shape == (30, 10) and len(a) == 30
        assert a.questions == b.questions and a.answers == b.answers and torch.equal(a.images, b.images)
        assert a.questions != digit_dialogs(30, seed=4).questions
        assert a.images.min() >= 0 and a.images.max() <= 1
        large = digit_dialogs(5, grid=3)
        assert large.images.shape == (5, 3, 24, 24) and large.glyphs.shape == (5, 9)
        assert all("seven other digits" in caption for caption in large.captions)

    def test_a_picture_shows_the_handwriting_and_the_scene(self):
        for split in ("train", "test"):
            dialogs = digit_dialogs(20, split)
            images, labels = handwriting(split)
            style = thickness(split)
            for i, scene in enumerate(dialogs.scenes):
                for cell in range(4):
                    row, column = divmod(cell, 2)
                    glyph = images[dialogs.glyphs[i, cell]]
                    part = dialogs.images[i, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                    channel = (0, 1, 2, 0)[scene.colour[cell]]
                    assert torch.allclose(part[channel] / part[channel].max(), glyph / glyph.max(), atol=1e-5)
                    assert labels[dialogs.glyphs[i, cell]] == scene.digit[cell]
                    assert style[dialogs.glyphs[i, cell]] == scene.style[cell]

    def test_every_answer_is_true_and_every_name_unique(self):
        dialogs = digit_dialogs(150, "validation", seed=1)
        seen = set()
        for i, scene in enumerate(dialogs.scenes):
            answerer = Answerer(scene)
            for t, (question, answer) in enumerate(zip(dialogs.questions[i], dialogs.answers[i], strict=True)):
                reply = answerer.reply(question, answer)  # raises where it is not true, or "it" is nothing
                assert reply.kind == dialogs.kinds[i][t] and reply.pronoun == dialogs.pronoun[i, t]
                seen.add(reply.kind)
        assert seen == set(KINDS)

    def test_digits_are_distinct_in_seven_of_ten_pictures(self):
        scenes = digit_dialogs(1500, seed=2, rounds=1).scenes
        distinct = sum(len(set(s.digit)) == 4 for s in scenes) / 1500
        assert 0.66 < distinct < 0.74 and all(len(set(s.digit)) >= 3 for s in scenes)

    def test_the_source_names_the_fact_that_brought_it_up(self):
        dialogs = digit_dialogs(200, seed=5)
        t = torch.arange(1, 11).expand_as(dialogs.source)
        assert ((dialogs.source >= 0) == dialogs.pronoun).all()
        assert (dialogs.source[dialogs.pronoun] < t[dialogs.pronoun]).all()
        assert (dialogs.source[dialogs.pronoun] >= 1).all() and not dialogs.pronoun[:, 0].any()
        for i in range(200):
            answerer, focus = Answerer(dialogs.scenes[i]), [None]
            for question in dialogs.questions[i]:
                focus.append(answerer.reply(question).focus)
            for j in range(10):
                if dialogs.pronoun[i, j]:
                    s = dialogs.source[i, j].item()
                    assert len(set(focus[s : j + 1])) == 1 and focus[s - 1] != focus[s]

    @pytest.mark.parametrize("bad", [dict(dialogs=0), dict(rounds=0), dict(rounds=13), dict(grid=4)])
    def test_errors(self, bad):
        with pytest.raises(ValueError, match="expected dialogs >= 1, rounds in 1..12 and grid 2 or 3, got"):
            digit_dialogs(**({"dialogs": 5} | bad))
        with pytest.raises(ValueError, match="expected split to be one of"):
            digit_dialogs(5, "dev")


class TestPeople:
    def test_the_questioner_never_receives_the_picture(self):
        arguments = [
            set(inspect.signature(f).parameters) for f in (Questioner.__init__, Questioner.ask, Questioner.hear)
        ]
        assert arguments == [{"self", "caption", "rng"}, {"self"}, {"self", "answer"}]

    def test_its_questions_follow_from_the_words_alone(self):
        """The same caption and answers give the same questions, whatever is in the picture."""
        caption = "a red seven and a thick two with two other digits"
        for seed in range(20):
            asked = []
            for _ in range(2):
                questioner = Questioner(caption, random.Random(seed))
                asked.append([])
                for answer in ("nothing", "one", "red", "yes there is", "a thin four", "top-left"):
                    asked[-1].append(questioner.ask())
                    questioner.hear(answer)
            assert asked[0] == asked[1]

    def test_it_says_it_only_with_a_focus(self):
        for seed in range(100):
            question = Questioner("a red seven and a thick two with two other digits", random.Random(seed)).ask()
            assert " it " not in question
            parse_question(question)

    @pytest.mark.parametrize(
        "question, first, focus",
        [
            ("how many green digits are there ?", "two", None),
            ("how many red digits are there ?", "one", 0),
            ("how many blue digits are there ?", "none", None),
            ("is there a five ?", "yes there is", 3),
            ("is there a two ?", "yes two", None),
            ("is there an eight ?", "no there is not", None),
            ("where is the five ?", "bottom-right", 3),
            ("what color is the top-right digit ?", "green", 1),
            ("is the seven thick or thin ?", "thick", 0),
            ("what is right of the seven ?", "a green two", 1),
            ("what is above the seven ?", "nothing", 0),
            ("what is the bottom-left digit ?", "a two", 2),
        ],
    )
    def test_answers(self, question, first, focus):
        reply = Answerer(SCENE).reply(question)
        assert reply.forms[0] == first and reply.focus == focus and sum(reply.weights) == pytest.approx(1)

    def test_it_is_what_was_talked_about_last(self):
        answerer = Answerer(SCENE)
        answerer.reply("what is right of the seven ?")
        assert answerer.reply("what color is it ?").forms == ("green", "it is green")
        assert answerer.reply("what is below it ?").forms == ("a yellow five", "a thin five")
        assert answerer.reply("does it have the same color as the seven ?").forms[0] == "no it does not"
        assert answerer.reply("what digit is it ?").forms[0] == "a five"

    def test_errors(self):
        answerer = Answerer(SCENE)
        with pytest.raises(ValueError, match="expected a question without 'it', since nothing is in focus"):
            answerer.reply("where is it ?")
        with pytest.raises(ValueError, match="expected a digit that occurs once, got 'two', which occurs 2 times"):
            answerer.reply("where is the two ?")
        with pytest.raises(ValueError, match="expected a question of DigitDial, got 'who is it"):
            answerer.reply("who is it ?")
        with pytest.raises(ValueError, match="expected one of the true answers .* got 'blue'"):
            answerer.reply("what color is the seven ?", "blue")
        with pytest.raises(ValueError, match="expected a colour, a style or a digit, got 'pink'"):
            SCENE.having("pink")

    def test_neighbours(self):
        assert [SCENE.neighbour(0, s) for s in ("left of", "right of", "above", "below")] == [None, 1, None, 2]
        large = Scene(tuple(range(9)), (0,) * 9, (0,) * 9)
        assert [large.neighbour(4, s) for s in ("left of", "right of", "above", "below")] == [3, 5, 1, 7]
        assert len(PLACES[3]) == 9 and len(NAMES) == 10


class TestWords:
    def test_rare_words_are_left_out_and_unknown_ones_warned_about(self):
        words = DialogWords(["red"] * 5 + ["blue"] * 4)
        assert words.list == ["<pad>", "<start>", "<end>", "<unk>", "red"] and len(words) == 5
        with pytest.warns(UserWarning, match="unknown words become <unk>: blue, zebra"):
            assert words.encode("red blue zebra") == [4, 3, 3]
        assert words.text([0, 0, 1, 4, 4, 2, 4]) == "red red"

    def test_error(self):
        with pytest.raises(ValueError, match="expected a word that occurs at least 5 times, got none"):
            DialogWords(["red"])


class TestCandidates:
    def make(self, seed=0, Q=40, pool=70):
        g = torch.Generator().manual_seed(1)
        human = torch.randint(pool, (Q,), generator=g)
        plausible = torch.rand(Q, pool, generator=g).argsort(1)[:, :20]
        popular = torch.randperm(pool, generator=g)[:10]
        return human, plausible, popular, *candidate_sets(human, plausible, popular, pool, 40, seed)

    def test_what_a_set_holds(self):
        human, plausible, popular, sets, target = self.make()
        assert sets.shape == (40, 40) and torch.equal(sets.gather(1, target[:, None])[:, 0], human)
        for row, near in zip(sets.tolist(), plausible.tolist(), strict=True):
            assert len(set(row)) == 40 and set(near) <= set(row) and set(popular.tolist()) <= set(row)

    def test_the_human_answer_is_anywhere(self):
        target = self.make()[-1]
        assert len(target.unique()) > 15
        assert torch.equal(self.make()[-2], self.make()[-2]) and not torch.equal(self.make(1)[-2], self.make(2)[-2])

    def test_errors(self):
        human, plausible, popular, sets, target = self.make()
        for size in (30, 71):
            with pytest.raises(ValueError, match="expected size between 31 .* and 70 .*, got"):
                candidate_sets(human, plausible, popular, 70, size)
        sets, human = sets.view(4, 10, 40), human.view(4, 10)
        assert torch.equal(find_human(sets, human), target.view(4, 10))
        sets[2, 6, find_human(sets, human)[2, 6]] = -1
        with pytest.raises(ValueError, match="without it in dialog 2, round 7"):
            find_human(sets, human)
