"""Arrows and circles: the geometry behind the answers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.data.arrows import arrow_grid, arrow_pointing


@settings(max_examples=15, deadline=None)
@given(g=st.integers(8, 40), seed=st.integers(0, 9999))
def test_grids_hold_one_arrow_and_a_circle(g, seed):
    x, y = arrow_grid(30, g, torch.Generator().manual_seed(seed))
    assert x.shape == (30, g, g, 4) and set(y.tolist()) <= {0, 1}
    here, direction, circle = x[..., 0], x[..., 1:3], x[..., 3]
    assert (here.sum((1, 2)) == 1).all() and (circle.sum((1, 2)) >= 1).all()
    torch.testing.assert_close(direction.norm(dim=-1), here)


def test_the_answer_is_whether_the_ray_meets_the_circle():
    x, y = arrow_grid(400, 16, torch.Generator().manual_seed(0))
    right = 0
    for features, answer in zip(x, y.tolist(), strict=True):
        i, j = features[..., 0].nonzero()[0].tolist()
        c, s = features[i, j, 1:3].tolist()
        cells = features[..., 3].nonzero().double() + 0.5 - torch.tensor([i + 0.5, j + 0.5])
        ahead, aside = (cells @ torch.tensor([c, s]).double()), (cells @ torch.tensor([-s, c]).double()).abs()
        right += int(((ahead > 0) & (aside < 0.75)).any()) == answer  # as well as cells can tell
    assert right / 400 > 0.9
    assert 0.4 < y.double().mean() < 0.6


def test_drawings_show_black_on_white_and_keep_the_answer():
    images, y = arrow_pointing(40, 192, torch.Generator().manual_seed(0))
    assert images.shape == (40, 192, 192) and images.min() >= 0 and images.max() == 1
    ink = (1 - images).sum((1, 2))
    assert (ink > 2 * math.pi * 15 * 2 * 0.9).all() and (ink < 192 * 192 * 0.1).all()
    assert 0.2 < y.double().mean() < 0.8


def test_errors_and_seeds():
    a, b = (arrow_grid(5, 8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    with pytest.raises(ValueError, match="g of at least 6, got n=3 and g=4"):
        arrow_grid(3, 4, torch.Generator())
    with pytest.raises(ValueError, match="size of at least 180"):
        arrow_pointing(3, 64, torch.Generator())
