r"""A point mass on a line, and episodes recorded from a controller that is drunk to varying degrees (chapter 10).

State $(x, v)$, action $a \in \{-1, 0, +1\}$:

$$v \leftarrow 0.9\,v + 0.1\,a,\qquad x \leftarrow x + v,\qquad r = -|x| .$$

The task is to reach the origin soon and to stay there. One episode has 20 steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "STEPS",
    "Episodes",
    "controller",
    "point_mass_offline",
    "point_mass_starts",
    "point_mass_step",
    "rollout",
]

STEPS = 20


@dataclass(frozen=True)
class Episodes:
    """Recorded episodes; action indices 0, 1, 2 stand for pushes of -1, 0, +1.

    Attributes:
        states: position and velocity before each action, ``(episodes, 20, 2)`` float32.
        actions: ``(episodes, 20)`` int64.
        rewards: minus the distance to the origin after each action, ``(episodes, 20)`` float32.
    """

    states: Tensor
    actions: Tensor
    rewards: Tensor

    @property
    def returns(self) -> Tensor:
        """The sum of rewards of each episode, ``(episodes,)``."""
        return self.rewards.sum(1)

    @property
    def returns_to_go(self) -> Tensor:
        """The rewards still to come at each step, that step's own included, ``(episodes, 20)``."""
        return self.rewards.flip(1).cumsum(1).flip(1)


def point_mass_starts(episodes: int, generator: torch.Generator) -> Tensor:
    """Return start states ``(episodes, 2)``: position uniform in (-2, 2), at rest."""
    x = 4 * torch.rand(episodes, generator=generator) - 2
    return torch.stack([x, torch.zeros_like(x)], dim=1)


def point_mass_step(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Apply one action ``(episodes,)`` to states ``(episodes, 2)``; return the next states and the rewards."""
    x, v = state.unbind(1)
    v = 0.9 * v + 0.1 * (action - 1)
    x = x + v
    return torch.stack([x, v], dim=1), -x.abs()


def controller(state: Tensor) -> Tensor:
    """The noise-free behaviour: push against ``x + 3 v``, rest where that is below 0.05. ``(episodes,)`` actions."""
    pull = -state[:, 0] - 3 * state[:, 1]
    return torch.where(pull.abs() < 0.05, 0, pull.sign()).long() + 1


def rollout(policy: Callable[[int, Tensor, Tensor | None], Tensor], starts: Tensor) -> Episodes:
    """Play one episode from each start; ``policy(t, state, last_reward)`` returns the actions ``(episodes,)``.

    ``last_reward`` is None at t = 0.
    """
    state, reward, record = starts, None, []
    for t in range(STEPS):
        action = policy(t, state, reward)
        following, reward = point_mass_step(state, action)
        record.append((state, action, reward))
        state = following
    return Episodes(*(torch.stack(x, dim=1) for x in zip(*record, strict=True)))


def point_mass_offline(episodes: int = 300, generator: torch.Generator | None = None) -> Episodes:
    """Record episodes of mixed quality, the "medium-replay" setting of offline reinforcement learning.

    Each episode draws a noise level eps ~ U(0, 1); each of its actions is replaced by a uniform one with
    probability eps.
    """
    if episodes < 1:
        raise ValueError(f"expected episodes of at least 1, got {episodes}")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    eps = torch.rand(episodes, generator=generator)

    def noisy(t: int, state: Tensor, reward: Tensor | None) -> Tensor:
        uniform = torch.randint(3, (episodes,), generator=generator)
        return torch.where(torch.rand(episodes, generator=generator) < eps, uniform, controller(state))

    return rollout(noisy, point_mass_starts(episodes, generator))
