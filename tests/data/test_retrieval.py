"""Retrieval metrics: by hand, with ties, with several targets, and clear errors."""

import pytest
import torch

from seqarch.data.retrieval import retrieval_metrics


def test_by_hand():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    m = retrieval_metrics(scores, torch.tensor([0, 2, 0]), at=(1, 3))
    assert m["r1"] == pytest.approx(1 / 3) and m["r3"] == pytest.approx(2 / 3)
    assert m["median_rank"] == 3 and m["mean_rank"] == pytest.approx((1 + 3 + 4) / 3)
    assert m["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 4) / 3)


def test_a_constant_score_is_chance():
    m = retrieval_metrics(torch.zeros(5, 100), torch.arange(5))
    assert m["r1"] == pytest.approx(0.01) and m["r10"] == pytest.approx(0.10) and m["median_rank"] == 50.5
    assert m["mrr"] == pytest.approx(sum(1 / k for k in range(1, 101)) / 100)
    assert retrieval_metrics(torch.zeros(5, 4), torch.arange(4).repeat(2)[:5])["r10"] == 1


def test_random_ties_in_expectation():
    torch.manual_seed(0)
    scores, target = torch.randint(4, (200, 12)).float(), torch.randint(12, (200,))
    m = retrieval_metrics(scores, target)
    drawn = [retrieval_metrics(scores + 0.5 * torch.rand(200, 12), target) for _ in range(200)]
    for name in ("r1", "r5", "mean_rank", "mrr"):
        assert m[name] == pytest.approx(sum(d[name] for d in drawn) / 200, rel=0.03)


def test_the_best_of_several_targets_counts():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    mask = torch.tensor([[False, True, False, True]])
    assert retrieval_metrics(scores, mask)["mean_rank"] == 2
    assert retrieval_metrics(scores, mask) == retrieval_metrics(scores, torch.tensor([1]))


def test_nan_is_last():
    scores = torch.tensor([[1.0, float("nan"), 0.0]])
    assert retrieval_metrics(scores, torch.tensor([1]))["mean_rank"] == 3


@pytest.mark.parametrize(
    "scores, target, words",
    [
        (torch.zeros(3), torch.zeros(3).long(), r"expected scores of shape \(queries, candidates\), not empty"),
        (torch.zeros(3, 4), torch.zeros(2).long(), r"expected target to be integers of shape \(3,\)"),
        (torch.zeros(3, 4), torch.zeros(3), r"expected target to be integers of shape \(3,\)"),
        (torch.zeros(3, 4), torch.tensor([0, 1, 4]), r"expected targets in 0..3, got 0 to 4"),
        (torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.bool), "expected every query to have a target"),
        (torch.zeros(3, 4), torch.ones(3, 3, dtype=torch.bool), r"expected a mask of shape \(3, 4\), got \(3, 3\)"),
    ],
)
def test_errors(scores, target, words):
    with pytest.raises(ValueError, match=words):
        retrieval_metrics(scores, target)
