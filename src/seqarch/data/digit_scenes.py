"""Two handwritten digits on one canvas, and captions that say which is where.

As in `moving_digits`, the images of the digits are split: a test scene shows unseen handwriting.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .moving_digits import GLYPH, NAMES, handwriting, paste

SIZES = ("small", "big")
RELATIONS = ("left of", "right of", "above", "below")
BIG = 12
JITTER = 2  # pixels
_OBJECT = f"a (small|big) ({'|'.join(NAMES)})"
_RELATION = f"({'|'.join(RELATIONS)})"
_GRAMMAR = (re.compile(f"{_OBJECT} is {_RELATION} {_OBJECT}"), re.compile(f"{_RELATION} {_OBJECT} there is {_OBJECT}"))

Facts = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class DigitScenes:
    """Captioned scenes.

    Attributes:
        images: ``(N, 1, S, S)``, ink is 1 and paper 0, with noise.
        facts: ``(N, 5)`` integers: size and digit of the first object, the relation (`RELATIONS`), size and digit of the
            second.
        captions: for each image two sentences that say the same.
    """

    images: Tensor
    facts: Tensor
    captions: list[tuple[str, str]]

    def __len__(self) -> int:
        """Return the number of scenes."""
        return len(self.images)


def digit_scenes(
    scenes: int, split: str = "train", seed: int = 0, *, size: int = 20, noise: float = 0.1
) -> DigitScenes:
    """Return scenes of two digits, one of them enlarged in two scenes out of three (to 12 pixels from 8).

    The first object is left of, right of, above or below the second, so that the two do not overlap; across that axis each
    is up to 2 pixels off the middle. Which of the two is named first is random.

    Args:
        scenes: how many.
        split: ``"train"``, ``"validation"`` or ``"test"``: whose handwriting.
        seed: of everything that is drawn.
        size: side of the canvas.
        noise: standard deviation of the pixel noise.

    Raises:
        ValueError: an unknown split, no scenes, or a canvas on which a big and a small digit do not fit side by side.
    """
    if scenes < 1 or size < BIG + GLYPH:
        raise ValueError(f"expected scenes >= 1 and size >= {BIG + GLYPH}, got {scenes} and {size}")
    images, labels = handwriting(split)
    g = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(images), (scenes, 2), generator=g)
    relation = torch.randint(4, (scenes,), generator=g)
    big = torch.randint(3, (scenes,), generator=g)[:, None] == torch.tensor([0, 1])
    side = torch.where(big, BIG, GLYPH)
    enlarged = F.interpolate(images[:, None], size=(BIG, BIG), mode="bilinear", align_corners=False)[:, 0]
    # Along the axis of the relation the objects share the room that is left; across it each is anywhere.
    room = size - side.sum(1)
    cut = (torch.rand(scenes, 2, generator=g) * (room[:, None] + 1)).long().sort(1).values
    before = (relation % 2 == 0)[:, None]  # the first object is the left or upper one
    order = torch.where(before, side, side.flip(1))  # sides, left or upper one first
    along = torch.stack([cut[:, 0], cut[:, 1] + order[:, 0]], dim=1)
    along = torch.where(before, along, along.flip(1))
    across = (size - side) // 2 + torch.randint(-JITTER, JITTER + 1, (scenes, 2), generator=g)
    horizontal = (relation < 2)[:, None]
    position = torch.stack([torch.where(horizontal, along, across), torch.where(horizontal, across, along)], dim=2)
    canvas = torch.zeros(scenes, size, size)
    for k in (0, 1):
        for glyphs, rows in ((enlarged, big[:, k]), (images, ~big[:, k])):
            canvas[rows] = paste(canvas[rows], glyphs[chosen[rows, k]], position[rows, k])
    canvas += noise * torch.randn(canvas.shape, generator=g)
    digit = labels[chosen]
    facts = torch.stack([big[:, 0].long(), digit[:, 0], relation, big[:, 1].long(), digit[:, 1]], dim=1)
    return DigitScenes(canvas[:, None], facts, [caption(*row) for row in facts.tolist()])


def caption(size1: int, digit1: int, relation: int, size2: int, digit2: int) -> tuple[str, str]:
    """Return the two sentences for a scene.

    Raises:
        ValueError: an index that does not exist.
    """
    indices = (size1, digit1, relation, size2, digit2)
    if not all(0 <= i < n for i, n in zip(indices, (2, 10, 4, 2, 10), strict=True)):
        raise ValueError(f"expected sizes in 0..1, digits in 0..9 and a relation in 0..3, got {indices}")
    one, two = f"a {SIZES[size1]} {NAMES[digit1]}", f"a {SIZES[size2]} {NAMES[digit2]}"
    return f"{one} is {RELATIONS[relation]} {two}", f"{RELATIONS[relation]} {two} there is {one}"


def parse_caption(sentence: str) -> Facts | None:
    """Return the five facts that a sentence of the grammar states; None where it is not a sentence of the grammar."""
    if found := _GRAMMAR[0].fullmatch(sentence):
        size1, digit1, relation, size2, digit2 = found.groups()
    elif found := _GRAMMAR[1].fullmatch(sentence):
        relation, size2, digit2, size1, digit1 = found.groups()
    else:
        return None
    return (
        SIZES.index(size1), NAMES.index(digit1), RELATIONS.index(relation), SIZES.index(size2), NAMES.index(digit2),
    )  # fmt: skip


def same_scene(a: Facts | None, b: Facts | None) -> bool:
    """Whether two statements describe the same scene: "a above b" is "b below a"."""
    if a is None or b is None:
        return False
    a, b = tuple(a), tuple(b)
    return a == b or a == (b[3], b[4], b[2] ^ 1, b[0], b[1])
