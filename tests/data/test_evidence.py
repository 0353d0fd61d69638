"""seqarch.data.evidence: where the evidence lies, and that it lies nowhere else."""

import pytest
import torch

from seqarch.data.evidence import CLASSES, far_evidence


def draw(batch=4000, length=120, seed=0, **how):
    return far_evidence(batch, length, torch.Generator().manual_seed(seed), **how)


def test_layout():
    x, y = draw(16, 50)
    assert x.shape == (16, 50, 1) and x.dtype == torch.float32
    assert y.shape == (16,) and y.dtype == torch.long and CLASSES == 8


def test_the_first_quarter_spells_the_class_and_the_rest_is_silent():
    x, y = draw(strength=0.7)
    means = torch.stack([x[y == c, :, 0].mean(0) for c in range(8)])  # (classes, steps)
    for c in range(8):
        for j in range(3):
            sign = 1 if c >> j & 1 else -1
            assert abs(means[c, 10 * j : 10 * (j + 1)].mean() - 0.7 * sign) < 0.05
    assert means[:, 30:].mean(1).abs().max() < 0.02
    assert abs(x[:, 30:].std() - 1) < 0.01


def test_classes_are_uniform():
    _, y = draw(8000, 12)
    assert y.min() == 0 and y.max() == 7
    assert (y.bincount() / 8000 - 1 / 8).abs().max() < 0.02


def test_a_length_that_twelve_does_not_divide():
    x, y = draw(4000, 23, strength=50.0)
    assert (x[:, :3].abs() > 30).all() and (x[:, 3:].abs() < 10).all()


def test_a_matched_filter_reads_it_and_the_last_quarter_knows_nothing():
    x, y = draw(2000, 504, seed=1)
    bits = (x[:, :126, 0].unflatten(1, (3, 42)).mean(-1) > 0).long()
    assert ((bits * torch.tensor([1, 2, 4])).sum(1) == y).double().mean() > 0.99
    late = (x[:, -126:, 0].unflatten(1, (3, 42)).mean(-1) > 0).long()
    assert ((late * torch.tensor([1, 2, 4])).sum(1) == y).double().mean() < 0.2


def test_the_generator_decides():
    assert torch.equal(draw(4, 30, 5)[0], draw(4, 30, 5)[0])
    assert not torch.equal(draw(4, 30, 5)[0], draw(4, 30, 6)[0])


@pytest.mark.parametrize(("batch", "length"), [(0, 50), (3, 11)])
def test_errors(batch, length):
    with pytest.raises(
        ValueError, match=f"expected batch >= 1 and length >= 12, got batch={batch} and length={length}"
    ):
        draw(batch, length)
