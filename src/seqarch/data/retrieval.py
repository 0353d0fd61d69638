"""How good a ranking is: recall among the first k, and the rank of what was wanted."""

from __future__ import annotations

import torch
from torch import Tensor


def retrieval_metrics(scores: Tensor, target: Tensor, at: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Return recall and ranks of the targets, when candidates are ranked by falling score.

    Args:
        scores: one row per query, one column per candidate, ``(Q, N)``; a score of NaN counts as the worst.
        target: the right candidate of each query, ``(Q,)`` integers; or, where a query has several, a mask ``(Q, N)`` of
            bool: then the best placed of them counts.
        at: the values of k.

    Returns:
        ``r1``, ``r5``, ``r10`` (for each k the fraction of queries whose target is among the first k), ``median_rank``,
        ``mean_rank`` (the best rank is 1) and ``mrr``, the mean of 1 / rank. Ties are broken at random, in expectation: a
        model that gives every candidate the same score is at chance, and not perfect.

    Raises:
        ValueError: wrong shapes, a target outside 0..N-1, or a query without a target.
    """
    if scores.ndim != 2 or not scores.numel():
        raise ValueError(f"expected scores of shape (queries, candidates), not empty, got {tuple(scores.shape)}")
    scores = scores.detach().double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if target.dtype == torch.bool:
        if target.shape != scores.shape:
            raise ValueError(f"expected a mask of shape {tuple(scores.shape)}, got {tuple(target.shape)}")
        if not target.any(1).all():
            raise ValueError("expected every query to have a target, got a row of the mask without one")
    else:
        if target.shape != scores.shape[:1] or target.is_floating_point():
            raise ValueError(
                f"expected target to be integers of shape {tuple(scores.shape[:1])}, got {target.dtype} of shape "
                f"{tuple(target.shape)}"
            )
        if target.min() < 0 or target.max() >= scores.shape[1]:
            raise ValueError(
                f"expected targets in 0..{scores.shape[1] - 1}, got {int(target.min())} to {int(target.max())}"
            )
        target = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, target[:, None], True)
    best = scores.masked_fill(~target, -torch.inf).amax(1, keepdim=True)
    above = ((scores > best) & ~target).sum(1).double()
    equal = ((scores == best) & ~target).sum(1).double()
    metrics = {f"r{k}": ((k - above) / (equal + 1)).clamp(0, 1).mean().item() for k in at}
    rank = 1 + above + equal / 2
    reciprocal = (torch.digamma(above + equal + 2) - torch.digamma(above + 1)) / (equal + 1)
    return metrics | {
        "median_rank": rank.quantile(0.5).item(),
        "mean_rank": rank.mean().item(),
        "mrr": reciprocal.mean().item(),
    }
