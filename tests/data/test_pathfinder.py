"""seqarch.data.pathfinder: the answer is what the picture shows, and nothing simpler gives it away."""

import pytest
import torch
from scipy import ndimage

from seqarch.data.pathfinder import pathfinder


def draw(n=300, seed=0, **how):
    return pathfinder(n, torch.Generator().manual_seed(seed), **how)


@pytest.mark.parametrize("size", [32, 40])
def test_layout(size):
    x, y = draw(7, size=size)
    assert x.shape == (7, size, size) and x.dtype == torch.float32 and x.min() == 0 and x.max() == 1
    assert y.shape == (7,) and y.dtype == torch.long
    border = torch.ones(size, size, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert (x[:, border] == 0).all()


def test_the_same_seed_draws_the_same():
    assert all(torch.equal(one, other) for one, other in zip(draw(20), draw(20), strict=True))
    assert not torch.equal(draw(20)[0], draw(20, seed=1)[0])


def dots_and_curves(image):
    """The places of the dots, and for each the number of the curve it sits on, read off the picture alone."""
    thick = ndimage.binary_erosion(image > 0.5, structure=[[0, 1, 0], [1, 1, 1], [0, 1, 0]])
    marks, count = ndimage.label(thick, structure=[[1] * 3] * 3)
    joined = ndimage.binary_dilation(image > 0, structure=[[1] * 3] * 3)  # bridges the gaps between dashes
    curves, n_curves = ndimage.label(joined, structure=[[1] * 3] * 3)
    centres = ndimage.center_of_mass(thick, marks, range(1, count + 1))
    return centres, [curves[round(i), round(j)] for i, j in centres], n_curves


def test_the_answer_is_what_the_picture_shows():
    x, y = draw(300)
    read = [dots_and_curves(image) for image in x.numpy()]
    clear = [k for k, (centres, _, n_curves) in enumerate(read) if len(centres) == 2 and n_curves == 2]
    assert len(clear) > 250  # in a few pictures a dot comes so near to the other curve that they merge here
    for k in clear:
        one, other = read[k][1]
        assert (one == other) == bool(y[k])


def test_neither_pixels_nor_the_distance_of_the_dots_give_it_away():
    x, y = draw(2000, seed=3)
    assert abs(y.float().mean() - 0.5) < 0.05
    distance = [[], []]
    for image, answer in zip(x[:600].numpy(), y, strict=False):
        centres, _, _ = dots_and_curves(image)
        if len(centres) == 2:
            distance[answer].append(sum((a - b) ** 2 for a, b in zip(*centres, strict=True)) ** 0.5)
    means = [sum(values) / len(values) for values in distance]
    assert abs(means[0] - means[1]) < 0.8 and min(means) > 12
    pixels = torch.cat([x.flatten(1), torch.ones(2000, 1)], dim=1).double()
    ridge = pixels[:1500].T @ pixels[:1500] + 30 * torch.eye(1025, dtype=torch.float64)
    weights = torch.linalg.solve(ridge, pixels[:1500].T @ (2.0 * y[:1500] - 1).double())
    assert ((pixels[1500:] @ weights > 0) == y[1500:].bool()).double().mean() < 0.6


@pytest.mark.parametrize("n, size", [(0, 32), (4, 31)])
def test_bad_input_is_named(n, size):
    with pytest.raises(ValueError, match=f"got n={n} and size={size}"):
        draw(n, size=size)
