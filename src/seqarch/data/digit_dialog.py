"""DigitDial: ten questions and answers about a picture of tinted digits, by someone who cannot see it.

Two simulated people talk. The `Questioner` reads a caption and asks; all it ever learns about the picture is what the
answers say. The `Answerer` sees the picture. Both keep a *focus*, the object that was talked about last, which "it" means.
"""

from __future__ import annotations

import random
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .moving_digits import GLYPH, NAMES, handwriting

COLOURS = ("red", "green", "blue", "yellow")
RGB = torch.tensor([[1.0, 0.15, 0.15], [0.15, 0.9, 0.15], [0.25, 0.35, 1.0], [0.95, 0.9, 0.1]])
STYLES = ("thick", "thin")
KINDS = ("count", "exist", "where", "colour", "style", "neighbour", "which", "compare")
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
COUNTS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = {
    2: ("top-left", "top-right", "bottom-left", "bottom-right"),
    3: (
        "top-left", "top-middle", "top-right", "middle-left", "center", "middle-right", "bottom-left", "bottom-middle",
        "bottom-right",
    ),
}  # fmt: skip
PRONOUN, PARAPHRASE, DISTINCT = 0.7, 0.15, 0.7
# How often each type is tried, without a focus and with one.
WEIGHTS = {
    False: dict(count=0.4, exist=0.3, where=0.2, colour=3.0, style=1.2, neighbour=0.4, which=0.4, compare=0.0),
    True: dict(count=0.3, exist=0.2, where=0.8, colour=3.0, style=1.5, neighbour=0.5, which=0.4, compare=0.2),
}
SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")

_PLACE = "|".join(dict.fromkeys(place for places in PLACES.values() for place in places))
_THING = rf"(it|the (?:{'|'.join(NAMES)})|the (?:{_PLACE}) digit)"
_GRAMMAR = {
    "count": re.compile(rf"how many ({'|'.join(COLOURS + STYLES)}) digits are there \?"),
    "exist": re.compile(rf"is there an? ({'|'.join(NAMES)}) \?"),
    "where": re.compile(rf"where is {_THING} \?"),
    "colour": re.compile(rf"what color is {_THING} \?"),
    "style": re.compile(rf"is {_THING} thick or thin \?"),
    "neighbour": re.compile(rf"what is ({'|'.join(SIDES)}) {_THING} \?"),
    "which": re.compile(rf"what (?:digit )?is {_THING} \?"),
    "compare": re.compile(rf"does (it) have the same color as {_THING} \?"),
}


def a(noun: str) -> str:
    """Return the noun with its article."""
    return f"an {noun}" if noun.startswith("eight") else f"a {noun}"


@dataclass(frozen=True)
class Scene:
    """What the picture shows: digit, colour and style of every cell, from left to right and top to bottom."""

    digit: tuple[int, ...]
    colour: tuple[int, ...]
    style: tuple[int, ...]

    @property
    def grid(self) -> int:
        """Cells along one side."""
        return round(len(self.digit) ** 0.5)

    def neighbour(self, cell: int, side: str) -> int | None:
        """The cell on that side (`SIDES`), None at the edge."""
        row, column = divmod(cell, self.grid)
        row, column = row + SIDES[side][0], column + SIDES[side][1]
        return row * self.grid + column if 0 <= row < self.grid and 0 <= column < self.grid else None

    def named(self, cell: int, attribute: str) -> str:
        """The cell in words, such as "a red five": the digit with its ``"colour"`` or its ``"style"``."""
        adjective = COLOURS[self.colour[cell]] if attribute == "colour" else STYLES[self.style[cell]]
        return f"a {adjective} {NAMES[self.digit[cell]]}"

    def having(self, word: str) -> list[int]:
        """The cells of which a colour, a style or a digit is true."""
        for names, values in ((COLOURS, self.colour), (STYLES, self.style), (NAMES, self.digit)):
            if word in names:
                return [cell for cell, value in enumerate(values) if value == names.index(word)]
        raise ValueError(f"expected a colour, a style or a digit, got {word!r}")


class Questioner:
    """Asks about a picture that it never sees: it is told the caption and the answers, and nothing else.

    It asks about an object by "it" with probability 0.7 where one is in focus; else by its place, or by a digit that it
    knows to occur once. It asks the same about the same object only once, but like people, it may ask for what it was told
    in passing, and it draws no conclusions: it may well ask what is above a digit of the top row.
    """

    def __init__(self, caption: str, rng: random.Random):
        self.rng, self.asked = rng, set()
        *_, others, _, _ = caption.split()
        grid = round((2 + COUNTS.index(others)) ** 0.5)
        # The objects that can be named, and the digits among them; each holds the questions that were asked about it.
        self.objects: dict[str, set] = {f"the {place} digit": set() for place in PLACES[grid]}
        self.objects |= {f"the {digit}": set() for digit in re.findall(rf"({'|'.join(NAMES)})(?= and| with)", caption)}
        self.focus: set | None = None
        self._pending: tuple = ()

    def ask(self) -> str:
        """Return the next question."""
        weights = WEIGHTS[self.focus is not None]
        while True:
            kind = self.rng.choices(KINDS, [weights[k] for k in KINDS])[0]
            question = self._try(kind)
            if question is not None and question not in self.asked:
                break
        if " it " not in question:  # "it" means something else each time
            self.asked.add(question)
        return question

    def _try(self, kind: str) -> str | None:
        """A question of that type, or None where there is none to ask."""
        rng, detail = self.rng, None
        if kind in ("count", "exist"):
            word = rng.choice(COLOURS + STYLES if kind == "count" else NAMES)
            self._pending = kind, None, word
            if kind == "count":
                return f"how many {word} digits are there ?"
            return None if f"the {word}" in self.objects else f"is there {a(word)} ?"
        if self.focus is not None and rng.random() < PRONOUN:
            thing, words = self.focus, "it"
        else:
            words = rng.choice([*self.objects])
            thing = self.objects[words]
        if kind == "neighbour":
            detail = rng.choice([*SIDES])
            question = f"what is {detail} {words} ?"
        elif kind == "compare" and words == "it":
            other = rng.choice([name for name in self.objects if self.objects[name] is not thing])
            detail, question = other, f"does it have the same color as {other} ?"
        elif kind == "compare" or (kind == "where" and words.endswith(" digit")):
            return None
        elif kind == "which":
            if words != "it" and not words.endswith(" digit"):
                return None
            question = "what digit is it ?" if words == "it" else f"what is {words} ?"
        else:
            text = {"where": "where is {} ?", "colour": "what color is {} ?", "style": "is {} thick or thin ?"}
            question = text[kind].format(words)
        self._pending = kind, thing, detail
        return None if (kind, detail) in thing else question

    def hear(self, answer: str) -> None:
        """Take in the answer to the last question."""
        kind, thing, detail = self._pending
        words = answer.split()
        self.focus = thing
        if kind == "count":
            self.focus = {("count", None)} if "one" in words else None
        elif kind == "exist":
            self.focus = None
            if words[0] == "yes" and "two" not in words:
                self.focus = self.objects[f"the {detail}"] = {("which", None)}
        elif kind == "neighbour" and "nothing" not in words:
            thing.add((kind, detail))
            self.focus = self.objects.get(f"the {words[-1]}", set())
        else:
            thing.add((kind, detail))


def word_kind(adjective: str) -> str:
    """``"colour"`` or ``"style"``."""
    return "colour" if adjective in COLOURS else "style"


@dataclass(frozen=True)
class Reply:
    """What can be said in answer to a question.

    Attributes:
        forms: the true answers, the usual wording first; their probabilities are in `weights`.
        kind: the type of the question, one of `KINDS`.
        pronoun: whether it says "it".
        focus: the cell that is in focus afterwards, None for none.
    """

    forms: tuple[str, ...]
    weights: tuple[float, ...]
    kind: str
    pronoun: bool
    focus: int | None


class Answerer:
    """Sees the picture, follows the conversation, and tells the truth."""

    def __init__(self, scene: Scene):
        self.scene, self.focus = scene, None

    def reply(self, question: str, answer: str | None = None) -> Reply:
        """Return what can be answered, and move the focus.

        Args:
            question: a question of the grammar, in which "it" is what is in focus.
            answer: what was answered; if given, it must be one of the true answers.

        Raises:
            ValueError: not a question of the grammar, "it" without a focus, or a digit that does not occur once.
        """
        kind, found = parse_question(question)
        scene, both = self.scene, (1 - PARAPHRASE / 2, PARAPHRASE / 2)
        if kind == "count":
            cells = scene.having(found[0])
            verb = "is" if len(cells) == 1 else "are"
            forms, focus = (COUNTS[len(cells)], f"there {verb} {COUNTS[len(cells)]}"), only(cells)
        elif kind == "exist":
            cells = scene.having(found[0])
            forms = ("yes there is", "yes") if cells else ("no there is not", "no")
            forms, focus = (("yes two", "yes there are two") if len(cells) > 1 else forms), only(cells)
        else:
            focus = cell = self._cell(found[1] if kind == "neighbour" else found[0])
            if kind == "where":
                place = PLACES[scene.grid][cell]
                forms = place, f"it is {place}"
            elif kind == "colour":
                forms = COLOURS[scene.colour[cell]], f"it is {COLOURS[scene.colour[cell]]}"
            elif kind == "style":
                forms = STYLES[scene.style[cell]], f"it is {STYLES[scene.style[cell]]}"
            elif kind == "which":
                forms = a(NAMES[scene.digit[cell]]), f"it is {a(NAMES[scene.digit[cell]])}"
            elif kind == "compare":
                same = scene.colour[cell] == scene.colour[self._cell(found[1])]
                forms = ("yes it does", "yes") if same else ("no it does not", "no")
            else:
                other = scene.neighbour(cell, found[0])
                if other is None:
                    forms = "nothing", "there is nothing"
                else:
                    forms, both, focus = (scene.named(other, "colour"), scene.named(other, "style")), (0.5, 0.5), other
        if answer is not None and answer not in forms:
            raise ValueError(f"expected one of the true answers {forms} to {question!r}, got {answer!r}")
        self.focus = focus
        return Reply(forms, both, kind, "it" in found, focus)

    def _cell(self, words: str) -> int:
        if words == "it":
            if self.focus is None:
                raise ValueError("expected a question without 'it', since nothing is in focus")
            return self.focus
        words = words.removeprefix("the ")
        if words.endswith(" digit"):
            return PLACES[self.scene.grid].index(words.removesuffix(" digit"))
        cells = self.scene.having(words)
        if len(cells) != 1:
            raise ValueError(f"expected a digit that occurs once, got {words!r}, which occurs {len(cells)} times")
        return cells[0]


def only(cells: list[int]) -> int | None:
    """The one cell of a list of one."""
    return cells[0] if len(cells) == 1 else None


def parse_question(question: str) -> tuple[str, tuple[str, ...]]:
    """Return the type of a question (`KINDS`) and its variable words.

    Raises:
        ValueError: not a question of the grammar.
    """
    for kind, pattern in _GRAMMAR.items():
        if found := pattern.fullmatch(question):
            return kind, found.groups()
    raise ValueError(f"expected a question of DigitDial, got {question!r}")


def caption_of(scene: Scene, rng: random.Random) -> str:
    """Name two digits that occur once, each with its colour or its style, and count the rest."""
    single = [cell for cell, digit in enumerate(scene.digit) if scene.digit.count(digit) == 1]
    one, two = (scene.named(cell, rng.choice(("colour", "style"))) for cell in rng.sample(single, 2))
    return f"{one} and {two} with {COUNTS[len(scene.digit) - 2]} other digits"


def talk(scene: Scene, rounds: int, rng: random.Random) -> tuple[str, list[tuple[str, str, Reply, int]]]:
    """Let the two talk. Returns the caption and, for each round, question, answer, reply and source.

    The source of a question with "it" is the number of the fact that brought its focus up (0 is the caption, j is round
    j), and -1 for a question without "it".
    """
    caption = caption_of(scene, rng)
    questioner, answerer = Questioner(caption, rng), Answerer(scene)
    turns, source, focus = [], -1, None
    for t in range(1, rounds + 1):
        question = questioner.ask()
        reply = answerer.reply(question)
        answer = rng.choices(reply.forms, reply.weights)[0]
        questioner.hear(answer)
        turns.append((question, answer, reply, source if reply.pronoun else -1))
        if reply.focus is None or reply.focus != focus:
            source, focus = t, reply.focus
    return caption, turns


@dataclass(frozen=True)
class DigitDialogs:
    """Dialogs about pictures.

    Attributes:
        images: ``(N, 3, S, S)`` in [0, 1]: a grid of digits, tinted on black.
        scenes: what each picture shows.
        glyphs: which image of ``handwriting(split)`` stands in each cell, ``(N, cells)``.
        captions: N sentences.
        questions, answers, kinds: N lists of R strings; kinds are those of `KINDS`.
        pronoun: whether the question says "it", ``(N, R)``: it cannot be understood without the history.
        source: the fact that brought up what "it" is, ``(N, R)``: 0 the caption, j round j; -1 without "it".
    """

    images: Tensor
    scenes: list[Scene]
    glyphs: Tensor
    captions: list[str]
    questions: list[list[str]]
    answers: list[list[str]]
    kinds: list[list[str]]
    pronoun: Tensor
    source: Tensor

    def __len__(self) -> int:
        """Return the number of dialogs."""
        return len(self.scenes)


def thickness(split: str) -> Tensor:
    """Style of every image of ``handwriting(split)``: 0 (thick) where it has more ink than the median of its digit.

    The medians are those of the training images. ``(N,)`` integers.
    """
    images, labels = handwriting("train")
    ink = images.sum((1, 2))
    median = torch.stack([ink[labels == d].median() for d in range(10)])
    images, labels = handwriting(split)
    return (images.sum((1, 2)) <= median[labels]).long()


def tinted(glyphs: Tensor, colour: Tensor) -> Tensor:
    """Colour digits: images ``(..., 8, 8)`` and colours ``(...,)`` -> ``(..., 3, 8, 8)``."""
    return glyphs[..., None, :, :] * RGB[colour][..., None, None]


def digit_dialogs(
    dialogs: int, split: str = "train", seed: int = 0, *, grid: int = 2, rounds: int = 10
) -> DigitDialogs:
    """Return simulated dialogs about pictures of ``grid * grid`` digits.

    The digits of a picture are distinct with probability 0.7; else one of them occurs twice. Colours are drawn for each
    cell on its own, and so is the handwriting, which decides the style.

    Args:
        dialogs: how many.
        split: ``"train"``, ``"validation"`` or ``"test"``: whose handwriting.
        seed: of everything that is drawn.
        grid: digits along one side, 2 or 3.
        rounds: questions per dialog.

    Raises:
        ValueError: an unknown split, no dialogs or rounds, another grid, or more rounds than there are questions.
    """
    if dialogs < 1 or not 1 <= rounds <= 12 or grid not in PLACES:
        raise ValueError(f"expected dialogs >= 1, rounds in 1..12 and grid 2 or 3, got {dialogs}, {rounds} and {grid}")
    images, labels = handwriting(split)
    style = thickness(split).tolist()
    by_digit = [(labels == d).nonzero()[:, 0].tolist() for d in range(10)]
    rng = random.Random(f"{split} {seed}")
    cells, scenes, glyphs, talks = grid * grid, [], [], []
    for _ in range(dialogs):
        digit = rng.sample(range(10), cells)
        if rng.random() > DISTINCT:
            one, two = rng.sample(range(cells), 2)
            digit[one] = digit[two]
        chosen = [rng.choice(by_digit[d]) for d in digit]
        colour = tuple(rng.randrange(len(COLOURS)) for _ in digit)
        scenes.append(Scene(tuple(digit), colour, tuple(style[i] for i in chosen)))
        glyphs.append(chosen)
        talks.append(talk(scenes[-1], rounds, rng))
    glyphs = torch.tensor(glyphs)
    pictures = tinted(images[glyphs], torch.tensor([s.colour for s in scenes]))  # (N, cells, 3, 8, 8)
    pictures = pictures.unflatten(1, (grid, grid)).permute(0, 3, 1, 4, 2, 5).reshape(dialogs, 3, grid * GLYPH, -1)
    column = [[[turn[k] for turn in turns] for _, turns in talks] for k in range(4)]
    return DigitDialogs(
        images=pictures,
        scenes=scenes,
        glyphs=glyphs,
        captions=[caption for caption, _ in talks],
        questions=column[0],
        answers=column[1],
        kinds=[[reply.kind for reply in row] for row in column[2]],
        pronoun=torch.tensor([[reply.pronoun for reply in row] for row in column[2]]),
        source=torch.tensor(column[3]),
    )


class DialogWords:
    """A vocabulary: `SPECIALS` (0 is padding), then the words that occur at least `least` times, in alphabetical order."""

    def __init__(self, sentences: Iterable[str], least: int = 5):
        counts = Counter(word for sentence in sentences for word in sentence.split())
        self.list = [*SPECIALS, *sorted(word for word, n in counts.items() if n >= least)]
        self.index = {word: i for i, word in enumerate(self.list)}
        if len(self.list) == len(SPECIALS):
            raise ValueError(f"expected a word that occurs at least {least} times, got none")

    def __len__(self) -> int:
        """Return the number of words, specials included."""
        return len(self.list)

    def encode(self, sentence: str) -> list[int]:
        """Return the words of a sentence as numbers; unknown ones become ``<unk>``, with a warning that lists them."""
        unknown = [word for word in sentence.split() if word not in self.index]
        if unknown:
            warnings.warn(f"unknown words become <unk>: {', '.join(unknown)}", stacklevel=2)
        return [self.index.get(word, SPECIALS.index("<unk>")) for word in sentence.split()]

    def text(self, ids: Iterable[int]) -> str:
        """Return numbers as a sentence, without padding and start, up to the end symbol if there is one."""
        words = []
        for i in ids:
            if self.list[int(i)] == "<end>":
                break
            if self.list[int(i)] not in ("<pad>", "<start>"):
                words.append(self.list[int(i)])
        return " ".join(words)


def candidate_sets(
    human: Tensor, plausible: Tensor, popular: Tensor, pool: int, size: int = 50, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Fill candidate sets: the human answer, plausible ones, popular ones, and random ones up to `size`.

    Args:
        human: the number of each question's own answer, ``(Q,)``.
        plausible: answers to similar questions, ``(Q, P)``; popular: the most frequent answers, ``(K,)``.
        pool: how many answers there are; random ones are drawn from 0..pool-1.
        size: answers in a set.
        seed: of the random answers and of the order.

    Returns:
        The sets ``(Q, size)``, without duplicates and in random order, and the position of the human answer ``(Q,)``.

    Raises:
        ValueError: fewer answers than a set holds, or a set too small for the human, plausible and popular ones.
    """
    if size > pool or size < 1 + plausible.shape[1] + len(popular):
        raise ValueError(
            f"expected size between {1 + plausible.shape[1] + len(popular)} (human, plausible, popular) and {pool} (all "
            f"answers), got {size}"
        )
    generator = torch.Generator().manual_seed(seed)
    key = 3 + torch.rand(len(human), pool, generator=generator)  # the smallest keys are taken
    key[:, popular] = 2.0
    key.scatter_(1, plausible, 1.0)
    key.scatter_(1, human[:, None], 0.0)
    chosen = key.argsort(1)[:, :size]
    order = torch.rand(chosen.shape, generator=generator).argsort(1)
    candidates = chosen.gather(1, order)
    return candidates, (candidates == human[:, None]).long().argmax(1)


def find_human(candidates: Tensor, human: Sequence | Tensor) -> Tensor:
    """Return where the human answers ``(N, R)`` stand in their candidate sets ``(N, R, C)``: positions ``(N, R)``.

    Raises:
        ValueError: a set without its human answer, naming dialog and round (counted from 1).
    """
    found = candidates == torch.as_tensor(human)[..., None]
    missing = (~found.any(-1)).nonzero().tolist()
    if missing:
        dialog, round_ = missing[0]
        raise ValueError(
            f"expected the human answer among the candidates, got a set without it in dialog {dialog}, round {round_ + 1}"
        )
    return found.long().argmax(-1)
