r"""Events in continuous time, from a process whose likelihood is known exactly (chapter 10).

A Hawkes process excites itself: every event at time $t_i$ raises the rate of further events, and the rise decays,

$$\lambda(t) = \mu + \sum_{t_i < t} \alpha\, e^{-\beta (t - t_i)} .$$

With $\alpha < \beta$ each event causes $\alpha/\beta < 1$ others on average: bursts that die out. Because $\lambda$ is known,
so is the best negative log-likelihood that any model can reach on this data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["EventSequences", "hawkes_sequences", "poisson_nll"]


@dataclass(frozen=True)
class EventSequences:
    """Sequences of events, each a waiting time and one of two marks.

    Attributes:
        gaps: time since the previous event (the first: since time 0), ``(sequences, events)`` float32.
        marks: 0 or 1, ``(sequences, events)`` int64.
        nll: the true $-\\log p$ of each event given all before it, in nats, ``(sequences, events)`` float32. Its mean
            is the floor: no model has a lower expected negative log-likelihood.
    """

    gaps: Tensor
    marks: Tensor
    nll: Tensor


def hawkes_sequences(
    sequences: int,
    events: int = 50,
    *,
    mu: float = 0.2,
    alpha: float = 0.8,
    beta: float = 1.0,
    stay: float = 0.8,
    seed: int = 0,
) -> EventSequences:
    r"""Draw event sequences from a Hawkes process with an exponential kernel by Ogata's thinning.

    Between events the rate only falls, so its present value is an upper bound: propose a waiting time at that bound,
    accept it with probability $\lambda(\text{then})/\text{bound}$, else move on and try again.

    Args:
        sequences: how many sequences.
        events: events per sequence.
        mu: base rate, events per unit of time.
        alpha: jump of the rate at an event.
        beta: decay of the jump per unit of time; alpha < beta.
        stay: probability that an event has the mark of the one before it (the first mark is a fair coin).
        seed: the same seed gives the same sequences.

    Raises:
        ValueError: a size below 1, or rates outside the stable range.
    """
    if sequences < 1 or events < 1:
        raise ValueError(f"expected sequences and events of at least 1, got {sequences} and {events}")
    if not (mu > 0 and 0 <= alpha < beta and 0 < stay < 1):
        raise ValueError(
            f"expected mu > 0, 0 <= alpha < beta and 0 < stay < 1, got mu={mu}, alpha={alpha}, beta={beta}, stay={stay}"
        )
    rng = np.random.default_rng(seed)
    gaps, nll = np.zeros((sequences, events)), np.zeros((sequences, events))
    excitation = np.zeros(sequences)  # sum over past events of alpha exp(-beta (now - t_i)), right after the last one
    for i in range(events):
        gap, waiting = np.zeros(sequences), np.ones(sequences, dtype=bool)
        while waiting.any():
            bound = mu + excitation * np.exp(-beta * gap)
            step = rng.exponential(1.0, sequences) / bound
            gap = np.where(waiting, gap + step, gap)
            accepted = rng.random(sequences) * bound <= mu + excitation * np.exp(-beta * gap)
            waiting &= ~accepted
        decayed = excitation * np.exp(-beta * gap)
        nll[:, i] = mu * gap + (excitation - decayed) / beta - np.log(mu + decayed)
        gaps[:, i] = gap
        excitation = decayed + alpha
    same = rng.random((sequences, events)) < stay
    same[:, 0] = rng.random(sequences) < 0.5
    marks = np.cumsum(~same, axis=1) % 2
    nll[:, 0] += np.log(2.0)
    nll[:, 1:] -= np.log(np.where(same[:, 1:], stay, 1 - stay))
    return EventSequences(torch.from_numpy(gaps).float(), torch.from_numpy(marks).long(), torch.from_numpy(nll).float())


def poisson_nll(train: EventSequences, test: EventSequences) -> Tensor:
    """Return the baseline's negative log-likelihood of each test event, ``(sequences, events)``, in nats.

    It ignores all history: waiting times are exponential with the mean gap of `train`, marks are a fair coin.
    """
    mean = train.gaps.mean()
    return mean.log() + test.gaps / mean + float(np.log(2.0))
