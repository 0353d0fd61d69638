"""Are the two dots joined by a dashed curve? A task of long paths on small images (chapter 08)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pathfinder"]

STEPS = 45  # points of a curve, half a pixel apart
DASH, GAP = 6, 4  # in points
MARGIN, APART = 3.0, 6.0  # least distance from the border, and between the curves, in pixels
ALIKE = 1.0  # pixels by which the distance of the dots may depend on the answer
MOST_BENT = 0.075  # radians per point


def _curves(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Smooth curves that stay inside the image, (m, STEPS, 2) with m at most n."""
    lean = 0.04 * torch.randn(n, 1, generator=generator)
    bend = lean + (0.015 * torch.randn(n, STEPS, generator=generator)).cumsum(1)
    angle = 2 * torch.pi * torch.rand(n, 1, generator=generator) + bend.clamp(-MOST_BENT, MOST_BENT).cumsum(1)
    points = size * torch.rand(n, 1, 2, generator=generator) + torch.stack([angle.cos(), angle.sin()], -1).cumsum(1) / 2
    inside = ((points > MARGIN) & (points < size - MARGIN)).all(-1).all(-1)
    return points[inside]


def _ends(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends of the first curve, (n, 2, 2), and the ends of different curves that are most nearly as far apart."""
    first, second = pairs[:, :, [0, -1]].unbind(1)  # (n, end, 2)
    all_four = torch.stack([first.repeat_interleave(2, dim=1), second.repeat(1, 2, 1)], dim=2)  # (n, 4, dot, 2)
    likeness = (_distance(all_four) - _distance(first)[:, None]).abs().argmin(1)
    return first, all_four[torch.arange(len(pairs)), likeness]


def _distance(dots: Tensor) -> Tensor:
    return (dots[..., 0, :] - dots[..., 1, :]).norm(dim=-1)


def _pairs(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Pairs of curves that keep apart, with ends about equally far apart on one and on both, (n, 2, STEPS, 2)."""
    found, missing = [], n
    while missing > 0:
        curves = _curves(40 * min(missing, 500) + 200, size, generator)  # some at a time, to bound the memory
        pairs = curves[: len(curves) // 2 * 2].unflatten(0, (-1, 2))
        keep = torch.cdist(pairs[:, 0], pairs[:, 1]).amin((1, 2)) > APART
        same, different = _ends(pairs)
        keep &= (_distance(same) - _distance(different)).abs() < ALIKE
        found.append(pairs[keep][:missing])
        missing -= len(found[-1])
    return torch.cat(found)


def _ink(points: Tensor, size: int, radius: float) -> Tensor:
    """Discs around points (n, k, 2) as images (n, size, size) in [0, 1], grey at their edges."""
    at = torch.arange(size) + 0.5
    pixels = torch.stack(torch.meshgrid(at, at, indexing="ij"), dim=-1).view(-1, 2)
    nearest = torch.cdist(pixels.expand(len(points), -1, -1), points).amin(-1)
    return (radius + 0.5 - nearest).clamp(0, 1).view(-1, size, size)


def pathfinder(n: int, generator: torch.Generator, size: int = 32) -> tuple[Tensor, Tensor]:
    """Draw two dashed curves and two dots, which sit on the ends of one curve or on one end of each.

    After the tasks of that name in the Long Range Arena, in a simpler form: two curves, no further clutter. On every
    image the two ends of one curve are about as far apart as some ends of different curves, and the dots stand on either,
    so their distance does not give the answer away.

    Args:
        n: images.
        generator: seeded source of randomness.
        size: pixels per side, at least 32.

    Returns:
        images ``(n, size, size)`` in [0, 1], 1 is ink; and whether one curve joins the dots, ``(n,)``, 0 or 1.

    Raises:
        ValueError: n below 1 or size below 32.
    """
    if n < 1 or size < 32:
        raise ValueError(f"expected n of at least 1 and size of at least 32, got n={n} and size={size}")
    curves, y = _pairs(n, size, generator), torch.randint(2, (n,), generator=generator)
    same, different = _ends(curves)
    dots = torch.where(y[:, None, None] == 1, same, different)
    drawn = curves[:, :, torch.arange(STEPS) % (DASH + GAP) < DASH].flatten(1, 2)
    images = [
        torch.maximum(_ink(lines, size, 0.5), _ink(marks, size, 1.7))
        for lines, marks in zip(drawn.split(256), dots.split(256), strict=True)
    ]
    return torch.cat(images), y
