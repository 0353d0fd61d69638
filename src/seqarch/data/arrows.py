"""Does the arrow point at the circle? A task of directions on grids of any size (chapter 15)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["arrow_grid", "arrow_pointing"]


def _place(n: int, side: float, radius: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres of arrow and circle, each ``(n, 2)`` in [0, side]; at least 2 radii apart on both axes, if there is room."""
    arrow = side * torch.rand(n, 2, generator=generator)
    shift = 2 * radius[:, None] + (side - 4 * radius[:, None]) * torch.rand(n, 2, generator=generator)
    return arrow, (arrow + shift) % side


def _direction(arrow: Tensor, circle: Tensor, radius: Tensor, generator: torch.Generator) -> Tensor:
    """A direction ``(n,)`` for every arrow: half of them hit the circle with a margin, half of them miss it."""
    n, ahead = len(arrow), circle - arrow
    distance, bearing = ahead.norm(dim=1), torch.atan2(ahead[:, 1], ahead[:, 0])
    points = torch.rand(n, generator=generator) < 0.5
    within = torch.asin((torch.where(points, radius / 1.2, radius * 1.2) / distance).clamp_max(1))
    u = 2 * torch.rand(n, generator=generator) - 1
    outside = u.sign() * (within + (math.pi - within) * u.abs())
    return bearing + torch.where(points, within * u, outside)


def _hits(arrow: Tensor, circle: Tensor, radius: Tensor, direction: Tensor) -> Tensor:
    ahead = circle - arrow
    off = direction - torch.atan2(ahead[:, 1], ahead[:, 0])
    off = torch.atan2(off.sin(), off.cos()).abs()
    return off < torch.asin((radius / ahead.norm(dim=1)).clamp_max(1))


def arrow_grid(n: int, g: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An arrow in the centre of a cell and a circle around some cells, on g x g cells.

    Args:
        n: samples.
        g: cells per side, at least 6.
        generator: seeded source of randomness.

    Returns:
        features ``(n, g, g, 4)`` over the first and the second axis: is the arrow here, cosine and sine of its direction
        (the angle from the first axis to the second; 0 elsewhere), is the centre of the cell inside the circle; and
        whether the line ahead of the arrow meets the circle, ``(n,)``, 0 or 1.
    """
    if n < 1 or g < 6:
        raise ValueError(f"expected n of at least 1 and g of at least 6, got n={n} and g={g}")
    radius = 1.0 + 0.8 * torch.rand(n, generator=generator)
    arrow, circle = _place(n, g - 2.0, radius, generator)
    cell = (arrow + 1).floor().clamp(0, g - 1)
    arrow, circle = cell + 0.5, circle + 1  # the arrow stands in the centre of its cell
    direction = _direction(arrow, circle, radius, generator)
    x, y = torch.meshgrid(torch.arange(g) + 0.5, torch.arange(g) + 0.5, indexing="ij")
    inside = (x - circle[:, 0, None, None]) ** 2 + (y - circle[:, 1, None, None]) ** 2 < radius[:, None, None] ** 2
    features = torch.zeros(n, g, g, 4)
    features[..., 3] = inside
    i, j = cell.long().unbind(1)
    features[torch.arange(n), i, j, :3] = torch.stack([torch.ones(n), direction.cos(), direction.sin()], dim=1)
    return features, _hits(arrow, circle, radius, direction).long()


def arrow_pointing(n: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same as a drawing: black ink on a white canvas of size x size pixels.

    Args:
        n: samples.
        size: pixels per side, at least 180.
        generator: seeded source of randomness.

    Returns:
        images ``(n, size, size)`` over the first and the second axis, 1 is white; and the answers ``(n,)``, 0 or 1.
    """
    if n < 1 or size < 180:
        raise ValueError(f"expected n of at least 1 and size of at least 180, got n={n} and size={size}")
    radius = 15 + 15 * torch.rand(n, generator=generator)
    arrow, circle = (centre + 30 for centre in _place(n, size - 60.0, radius, generator))
    direction = _direction(arrow, circle, radius, generator)
    length = torch.randint(15, 31, (n,), generator=generator).float()
    width = torch.randint(2, 5, (n,), generator=generator).float()
    pixels = torch.stack(torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij"), dim=-1)

    def ray(angle: Tensor) -> Tensor:
        return torch.stack([angle.cos(), angle.sin()], dim=1)

    tip, tail = arrow + ray(direction) * length[:, None] / 2, arrow - ray(direction) * length[:, None] / 2
    strokes = [(tail, tip)]
    strokes += [(tip, tip - ray(direction + turn) * length[:, None] / 2.5) for turn in (0.5, -0.5)]
    images = torch.ones(n, size, size)
    for i in range(n):
        far = ((pixels - circle[i]).norm(dim=-1) - radius[i]).abs() - width[i] / 2  # the circle's outline
        for start, end in strokes:
            along = end[i] - start[i]
            t = (((pixels - start[i]) @ along) / (along @ along)).clamp(0, 1)
            far = torch.minimum(far, (pixels - start[i] - t[..., None] * along).norm(dim=-1) - width[i] / 2)
        images[i] = (far + 0.5).clamp(0, 1)  # ink within the stroke, a pixel's width of grey at its edge
    return images, _hits(arrow, circle, radius, direction).long()
