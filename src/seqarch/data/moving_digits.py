"""Clips of handwritten digits that move: some classes are known by their motion, some by their shape.

The *images* of the digits are split, not the clips: a test clip shows a handwriting that no training clip has shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .digits import digits

GLYPH = 8
SPLITS = ("train", "validation", "test")
# The first eight classes are motions of the digits 0 to 7, the last two are the digits 8 and 9 on a random walk.
CLASSES = (
    "right", "left", "up", "down",
    "right, back", "left, back", "up, back", "down, back",
    "an eight", "a nine",
)  # fmt: skip
ACTIVITIES = CLASSES[:8]
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
_DIRECTION = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])  # (x, y), y points down
SPEEDS = (0.35, 0.5)


@cache
def handwriting(split: str) -> tuple[Tensor, Tensor]:
    """Return the digit images ``(N, 8, 8)`` in [0, 1] of a split and their labels ``(N,)``.

    1,200 images are for training, 200 for validation and 397 for testing; the division is fixed.

    Raises:
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"expected split to be one of {', '.join(SPLITS)}, got {split!r}")
    data = digits(test=397)
    if split == "test":
        return data.test_x, data.test_y
    order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(0))
    chosen = order[:1200] if split == "train" else order[1200:]
    return data.train_x[chosen], data.train_y[chosen]


@dataclass(frozen=True)
class MovingDigits:
    """Labelled clips.

    Attributes:
        frames: ``(N, T, 1, S, S)``, ink is 1 and paper 0, with noise.
        label: the class, ``(N,)`` integers; `CLASSES` has the names.
        digit: which digit is shown, ``(N,)``.
        image: the index of its image in ``handwriting(split)``, ``(N,)``.
        position: column and row of the glyph's upper left corner in every frame, ``(N, T, 2)`` integers.
    """

    frames: Tensor
    label: Tensor
    digit: Tensor
    image: Tensor
    position: Tensor

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.frames)


@dataclass(frozen=True)
class DescribedClips:
    """Clips with a structured description and its sentences.

    Attributes:
        frames: ``(N, T, 1, S, S)``.
        facts: ``(N, 3)`` integers: the activity (`ACTIVITIES`), the digit, the quadrant of the start (`QUADRANTS`).
        sentences: for each clip two sentences that say the same.
    """

    frames: Tensor
    facts: Tensor
    sentences: list[tuple[str, str]]

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.frames)


def moving_digits(
    clips: int,
    split: str = "train",
    seed: int = 0,
    *,
    size: int = 16,
    length: int = 16,
    noise: float = 0.1,
    bystanders: int = 0,
) -> MovingDigits:
    r"""Return clips of one moving digit, the ten classes of `CLASSES` in equal shares (up to rounding), in random order.

    Classes 0 to 3 slide, with displacement $v t$; classes 4 to 7 go out and come back, with $1.4\, v \min(t, T - t)$;
    v is 0.35 or 0.5 pixels a step for 16 steps on a canvas of 16 pixels, and grows and shrinks with both. In classes 8
    and 9 the digit walks at random (normal steps of 0.6 pixels). The whole path is shifted by a uniform random offset
    that keeps the glyph on the canvas; positions are rounded to pixels.

    Args:
        clips: how many.
        split: ``"train"``, ``"validation"`` or ``"test"``: whose handwriting.
        seed: of everything that is drawn.
        size: side S of the canvas.
        length: frames T of a clip.
        noise: standard deviation of the pixel noise.
        bystanders: further digits that stand still somewhere.

    Raises:
        ValueError: an unknown split, no clips, or a canvas or clip too small to move in.
    """
    g = _check(clips, seed, size, length)
    label = torch.arange(clips).remainder(len(CLASSES))[torch.randperm(clips, generator=g)]
    digit = torch.where(label < 8, torch.randint(8, (clips,), generator=g), label)
    path = _path(label, size, length, g)
    spread = path.amax(1) - path.amin(1)
    room = size - GLYPH - spread
    # A walk wider than the canvas is centred, and clipped below.
    start = torch.where(room > 0, torch.rand(clips, 2, generator=g) * room, room / 2) - path.amin(1)
    position = (path + start[:, None]).round().long().clamp(0, size - GLYPH)
    frames, image = _draw(digit, position, split, size, noise, bystanders, g)
    return MovingDigits(frames, label, digit, image, position)


def described_clips(
    clips: int, split: str = "train", seed: int = 0, *, size: int = 16, length: int = 16, noise: float = 0.1
) -> DescribedClips:
    """Return clips with an activity, a digit and a quadrant in which the motion starts, and two sentences each.

    The facts depend on one another. Digit d favours the activities d mod 8 and (d + 3) mod 8 with 40% each; the other
    six share the rest. The direction decides on which side the motion starts (who goes right starts on the left); the
    other half of the quadrant is free. Arguments and errors are those of `moving_digits`.
    """
    g = _check(clips, seed, size, length)
    digit = torch.randint(10, (clips,), generator=g)
    favour = torch.full((10, 8), 0.2 / 6)
    for d in range(10):
        favour[d, [d % 8, (d + 3) % 8]] = 0.4
    activity = torch.multinomial(favour[digit], 1, generator=g)[:, 0]
    path = _path(activity, size, length, g)
    room = (size - GLYPH - (path.amax(1) - path.amin(1))).clamp(min=0)
    along = torch.rand(clips, generator=g)[:, None] * room.clamp(max=size * 3 / 16)
    forward = _DIRECTION[activity % 4].sum(1, keepdim=True) > 0
    start = torch.where(forward, along, room - along) - path.amin(1)
    far = torch.rand(clips, generator=g) < 0.5  # the free half: right or bottom
    width = (size - GLYPH) * 3 / 8
    across = torch.rand(clips, generator=g) * width + torch.where(far, size - GLYPH - width, 0.0)
    other = (_DIRECTION[activity % 4] == 0).nonzero()[:, 1]
    start[torch.arange(clips), other] = across
    position = (path + start[:, None]).round().long().clamp(0, size - GLYPH)
    side = position[:, 0] * 2 > size - GLYPH  # right?, bottom?
    quadrant = side[:, 0].long() + 2 * side[:, 1].long()
    frames, _ = _draw(digit, position, split, size, noise, 0, g)
    facts = torch.stack([activity, digit, quadrant], dim=1)
    return DescribedClips(frames, facts, [describe(*row) for row in facts.tolist()])


def describe(activity: int, digit: int, quadrant: int) -> tuple[str, str]:
    """Return the two sentences for a motion, a digit and the quadrant of its start.

    Raises:
        ValueError: an index that does not exist.
    """
    if not (0 <= activity < len(ACTIVITIES) and 0 <= digit < len(NAMES) and 0 <= quadrant < len(QUADRANTS)):
        raise ValueError(
            f"expected activity in 0..7, digit in 0..9 and quadrant in 0..3, got {activity}, {digit} and {quadrant}"
        )
    name, place = NAMES[digit], QUADRANTS[quadrant]
    way = ACTIVITIES[activity % 4]
    if activity >= 4:
        way += f" then {ACTIVITIES[activity % 4 ^ 1]}"
    return f"a {name} moves {way} from the {place}", f"from the {place} a {name} goes {way}"


def _check(clips: int, seed: int, size: int, length: int) -> torch.Generator:
    if clips < 1 or size < 12 or length < 4:
        raise ValueError(
            f"expected clips >= 1, size >= 12 and length >= 4, got clips={clips}, size={size}, length={length}"
        )
    return torch.Generator().manual_seed(seed)


def _path(label: Tensor, size: int, length: int, g: torch.Generator) -> Tensor:
    """Displacements ``(N, T, 2)`` in pixels, before the path is put on the canvas."""
    n, t = len(label), torch.arange(length, dtype=torch.float32)
    v = torch.tensor(SPEEDS)[torch.randint(len(SPEEDS), (n,), generator=g)] * (size - GLYPH) / 8 * 16 / length
    profile = torch.where(label[:, None] < 4, t, 1.4 * torch.minimum(t, length - t))
    motion = (v[:, None] * profile)[..., None] * _DIRECTION[label % 4][:, None]
    walk = (torch.randn(n, length, 2, generator=g) * 0.6 * (16 / length) ** 0.5).cumsum(1)
    return torch.where((label < 8)[:, None, None], motion, walk)


def _draw(
    digit: Tensor, position: Tensor, split: str, size: int, noise: float, bystanders: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Paint the clips: frames ``(N, T, 1, S, S)`` and the images used ``(N,)``."""
    images, labels = handwriting(split)
    n, length, _ = position.shape
    image = torch.multinomial((labels[None] == digit[:, None]).float(), 1, generator=g)[:, 0]
    frames = paste(torch.zeros(n, length, size, size), images[image][:, None], position)
    for _ in range(bystanders):
        other = torch.randint(len(images), (n,), generator=g)
        place = torch.randint(size - GLYPH + 1, (n, 1, 2), generator=g).expand(n, length, 2)
        frames = paste(frames, images[other][:, None], place)
    frames += noise * torch.randn(frames.shape, generator=g)
    return frames[:, :, None], image


def paste(canvas: Tensor, glyph: Tensor, position: Tensor) -> Tensor:
    """Lay glyphs on canvases, the darker pixel winning.

    Args:
        canvas: ``(..., S, S)``.
        glyph: ``(..., K, K)``, with the same leading sizes or 1.
        position: column and row of the upper left corner, ``(..., 2)`` integers in 0..S-K.

    Returns:
        A new tensor like canvas.

    Raises:
        ValueError: a glyph that would leave the canvas.
    """
    k, size = glyph.shape[-1], canvas.shape[-1]
    if len(position) and (position.min() < 0 or position.max() > size - k):
        raise ValueError(f"expected positions in 0..{size - k}, got {int(position.min())} to {int(position.max())}")
    offset = torch.arange(k)
    rows, columns = position[..., 1, None] + offset, position[..., 0, None] + offset
    index = (rows[..., :, None] * size + columns[..., None, :]).flatten(-2)
    flat = canvas.flatten(-2)
    old = flat.gather(-1, index)
    new = torch.maximum(old, glyph.expand(*canvas.shape[:-2], k, k).flatten(-2))
    return flat.scatter(-1, index, new).unflatten(-1, (size, size))
