"""Turning a step-by-step predictor into sequences: greedy search and beam search.

Both take the same `step_fn(tokens, state) -> (scores, state)`: given the last symbol of N partial sequences, ``(N,)``,
and whatever the model remembers about them, it returns one score for each symbol, ``(N, V)``, and the new memory.

* *Scores* are logits or log-probabilities (they are normalised here; normalising twice changes nothing). A symbol that
  must not come next gets ``-inf``: that is all it takes to decode under constraints.
* *State* is None, a tensor, or tuples, lists and dicts of tensors. Every tensor has the N sequences on its first axis,
  because beam search drops some partial sequences and copies others, and must do the same to what is remembered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._nested import map_tensors, tensors_of

__all__ = ["Hypothesis", "beam_search", "greedy_search"]

StepFunction = Callable[[Tensor, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Hypothesis:
    """A decoded sequence.

    Attributes:
        tokens: the symbols, without the start symbol and without the end symbol.
        log_prob: the sum of the log-probabilities of all symbols, the end symbol included.
        score: what hypotheses are ranked by: log_prob / length ** length_penalty, the end symbol counted in length.
        finished: whether the end symbol was reached within max_len steps.
    """

    tokens: tuple[int, ...]
    log_prob: float
    score: float
    finished: bool


def _start(bos: int | Tensor, state: Any) -> Tensor:
    """The first symbols, ``(B,)``; the batch size comes from bos or else from the first tensor of the state."""
    tensors = tensors_of(state)
    if isinstance(bos, Tensor):
        if bos.ndim != 1:
            raise ValueError(f"expected bos to be an integer or a tensor of shape (B,), got shape {tuple(bos.shape)}")
        start = bos.long()
    else:
        start = torch.full(
            (len(tensors[0]) if tensors else 1,), int(bos), device=tensors[0].device if tensors else None
        )
    for t in tensors:
        if t.ndim == 0 or len(t) != len(start):
            raise ValueError(
                f"expected every tensor of state to have the batch of {len(start)} sequences on its first axis, "
                f"got shape {tuple(t.shape)}"
            )
    return start


def _log_probs(scores: Tensor, sequences: int) -> Tensor:
    """Normalise scores ``(N, V)``; a row of -inf alone (no symbol allowed) stays -inf instead of turning into NaN."""
    if scores.ndim != 2 or len(scores) != sequences:
        raise ValueError(
            f"expected scores from step_fn of shape (N, V) with N = {sequences}, got {tuple(scores.shape)}"
        )
    blocked = torch.isneginf(scores).all(-1, keepdim=True)
    return scores.float().log_softmax(-1).masked_fill(blocked, float("-inf"))


def _check(width: int, max_len: int) -> None:
    if width < 1:
        raise ValueError(f"expected width to be at least 1, got {width}")
    if max_len < 1:
        raise ValueError(f"expected max_len to be at least 1, got {max_len}")


@torch.no_grad()
def greedy_search(
    step_fn: StepFunction,
    state: Any,
    bos: int | Tensor,
    eos: int | None,
    max_len: int,
    *,
    length_penalty: float = 1.0,
) -> list[Hypothesis]:
    """Take the most probable symbol at every step until `eos`, for a whole batch at once.

    Args:
        step_fn: ``(tokens (B,), state) -> (scores (B, V), state)``, see the head of this file.
        state: the state before the first step, batch first; None for a model without one.
        bos: the start symbol, or one for each sequence, ``(B,)``.
        eos: the end symbol; None when there is none and every sequence has max_len symbols.
        max_len: the largest number of symbols, the end symbol included.
        length_penalty: exponent of the length in `Hypothesis.score`; it does not change what is decoded.

    Returns:
        One `Hypothesis` for each sequence of the batch.
    """
    _check(1, max_len)
    token = _start(bos, state)
    symbols, gains = [], []
    alive = torch.ones_like(token, dtype=torch.bool)
    for _ in range(max_len):
        scores, state = step_fn(token, state)
        gain, token = _log_probs(scores, len(token)).max(-1)
        symbols.append(token)
        gains.append(gain)
        if eos is not None:
            alive = alive & (token != eos)
            if not alive.any():
                break
    results = []
    for tokens, log_probs in zip(torch.stack(symbols, 1).tolist(), torch.stack(gains, 1).double().cpu(), strict=True):
        finished = eos in tokens
        length = tokens.index(eos) + 1 if finished else len(tokens)
        log_prob = log_probs[:length].sum().item()
        results.append(
            Hypothesis(tuple(tokens[: length - finished]), log_prob, log_prob / length**length_penalty, finished)
        )
    return results


@torch.no_grad()
def beam_search(
    step_fn: StepFunction,
    state: Any,
    bos: int | Tensor,
    eos: int | None,
    width: int,
    max_len: int,
    *,
    length_penalty: float = 1.0,
) -> list[list[Hypothesis]]:
    """Keep the `width` most probable partial sequences at every step, for a whole batch at once.

    Every partial sequence is extended by every symbol; the `width` best extensions are kept. One that ends in `eos`
    leaves the beam as finished. The search for a sequence stops when `width` hypotheses are finished, or after
    `max_len` steps. With ``width=1`` the result is that of `greedy_search`.

    Args:
        step_fn: ``(tokens (N,), state) -> (scores (N, V), state)`` with N = B * width, see the head of this file.
        state: the state before the first step for B sequences, batch first; it is repeated `width` times here.
        bos: the start symbol, or one for each sequence, ``(B,)``.
        eos: the end symbol; None when there is none and every sequence has max_len symbols.
        width: how many partial sequences are kept.
        max_len: the largest number of symbols, the end symbol included.
        length_penalty: hypotheses are ranked by log_prob / length ** length_penalty; 0 ranks by log_prob.

    Returns:
        For each sequence of the batch its hypotheses, best first, finished ones before unfinished ones; at most `width`.
    """
    _check(width, max_len)
    start = _start(bos, state)
    B, K = len(start), width
    token = start.repeat_interleave(K)
    state = map_tensors(lambda t: t.repeat_interleave(K, dim=0), state)
    first_row = torch.arange(B, device=start.device)[:, None] * K
    # At the start all K partial sequences of a batch row are the same one: count it once.
    total = torch.full((B, K), float("-inf"), dtype=torch.double, device=start.device)
    total[:, 0] = 0.0
    prefix = torch.empty(B, K, 0, dtype=torch.long, device=start.device)
    done: list[list[Hypothesis]] = [[] for _ in range(B)]

    def finish(b: int, tokens: list[int], log_prob: float, length: int, finished: bool) -> None:
        done[b].append(Hypothesis(tuple(tokens), log_prob, log_prob / length**length_penalty, finished))

    for step in range(1, max_len + 1):
        scores, state = step_fn(token, state)
        log_probs = _log_probs(scores, B * K)
        V = log_probs.shape[-1]
        extended = (total[:, :, None] + log_probs.view(B, K, V)).view(B, K * V)
        # 2K candidates hold at least K that do not end: each of the K prefixes has one extension by eos.
        best, index = extended.topk(min(2 * K, K * V), dim=-1)
        parent, symbol = index // V, index % V
        ends = symbol == eos if eos is not None else torch.zeros_like(symbol, dtype=torch.bool)
        for b, k in torch.nonzero(ends[:, :K] & torch.isfinite(best[:, :K])).tolist():
            if len(done[b]) < K:
                finish(b, prefix[b, parent[b, k]].tolist(), best[b, k].item(), step, True)
        # the K best extensions that go on; sorting by `ends` keeps the order of probability within each group
        keep = ends.int().argsort(dim=-1, stable=True)[:, :K]
        if keep.shape[1] < K:  # fewer symbols than the beam is wide
            keep = torch.nn.functional.pad(keep, (0, K - keep.shape[1]))
            spare = torch.arange(K, device=keep.device) >= index.shape[1]
        else:
            spare = torch.zeros(K, dtype=torch.bool, device=keep.device)
        total = best.gather(1, keep).masked_fill(ends.gather(1, keep) | spare, float("-inf"))
        parent, symbol = parent.gather(1, keep), symbol.gather(1, keep)
        prefix = torch.cat([prefix.gather(1, parent[:, :, None].expand(-1, -1, step - 1)), symbol[:, :, None]], dim=2)
        full = torch.tensor([len(hypotheses) >= K for hypotheses in done], device=total.device)
        total = total.masked_fill(full[:, None], float("-inf"))
        if torch.isneginf(total).all():
            break
        rows = (first_row + parent).flatten()
        state = map_tensors(lambda t, rows=rows: t.index_select(0, rows), state)
        token = symbol.flatten()

    for b, k in torch.nonzero(torch.isfinite(total)).tolist():
        if len(done[b]) < K:
            finish(b, prefix[b, k].tolist(), total[b, k].item(), prefix.shape[2], False)
    return [sorted(hypotheses, key=lambda h: (not h.finished, -h.score)) for hypotheses in done]
