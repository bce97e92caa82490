"""The two-state Markov decision process of Kakade (2001), with everything about it in closed form.

States i = 0 and j = 1. Action 1 stays, action 0 crosses to the other state. Staying in i pays 1, staying in j pays 2,
crossing pays nothing. The policy stays with probability π(1; s) = σ(θ_s), so that ρ, the average reward η and their
gradients are rational functions of σ(±θ).

The gradient of η carries the factor ρ(s): a state that is rarely visited learns slowly, and a policy that improves
where it already is visits the other state ever more rarely. That is the plateau at η = 1. The Fisher matrix carries the
same factor, and the natural gradient is rid of it (Kakade 2001, section 4 and figure 1).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit

from envs.batch import Batch, NativeVectorEnv, SingleEnv

__all__ = [
    "START",
    "TwoStateMDPEnv",
    "TwoStateMDPVectorEnv",
    "advantage",
    "average_reward",
    "fisher",
    "gradient",
    "stationary_distribution",
]

REWARDS = np.array([1.0, 2.0])
"""Reward of staying in i and in j."""

START = logit([0.8, 0.1])
"""Kakade's initial θ: stay in i with probability 0.8 and in j with 0.1, hence ρ = (0.818, 0.182)."""


def stationary_distribution(theta: ArrayLike) -> NDArray[np.float64]:
    """ρ(s) = σ(−θ_s') / (σ(−θ_i) + σ(−θ_j)) with s' the other state; θ (…, 2) → (…, 2).

    Flow out of one state equals flow out of the other: ρ(i) (1 − π(1; i)) = ρ(j) (1 − π(1; j)).
    """
    leave = expit(-np.asarray(theta, dtype=np.float64))
    return leave[..., ::-1] / leave.sum(-1, keepdims=True)


def average_reward(theta: ArrayLike) -> NDArray[np.float64]:
    """η(θ) = Σ_s ρ(s) σ(θ_s) r_s, the reward per step; θ (…, 2) → (…)."""
    theta = np.asarray(theta, dtype=np.float64)
    return (stationary_distribution(theta) * expit(theta) * REWARDS).sum(-1)


def advantage(theta: ArrayLike) -> NDArray[np.float64]:
    """A_s = Q(s, stay) − Q(s, cross) under the average-reward criterion; θ (…, 2) → (…, 2).

    The differential values h solve h_s = π(1; s)(r_s + h_s) + π(0; s) h_s' − η, whose difference is
    h_i − h_j = (r_i σ(θ_i) − r_j σ(θ_j)) / (σ(−θ_i) + σ(−θ_j)); then A_s = r_s + h_s − h_s'.
    """
    theta = np.asarray(theta, dtype=np.float64)
    income = expit(theta) * REWARDS
    difference = (income[..., 0] - income[..., 1]) / expit(-theta).sum(-1)
    return REWARDS + np.stack([difference, -difference], axis=-1)


def gradient(theta: ArrayLike) -> NDArray[np.float64]:
    """∇η(θ), with components ρ(s) σ(θ_s) σ(−θ_s) A_s (the policy gradient theorem); θ (…, 2) → (…, 2)."""
    return fisher(theta) * advantage(theta)


def fisher(theta: ArrayLike) -> NDArray[np.float64]:
    """Diagonal of the Fisher matrix F(θ) = E_ρ,π[∇log π ∇log πᵀ]: ρ(s) σ(θ_s) σ(−θ_s); θ (…, 2) → (…, 2).

    Hence F⁻¹ ∇η = A, with no trace of ρ.
    """
    theta = np.asarray(theta, dtype=np.float64)
    return stationary_distribution(theta) * expit(theta) * expit(-theta)


class TwoStateMDP(Batch):
    """n copies of the process; the observation is the state, and the first state of an episode is uniform."""

    def __init__(self, n: int) -> None:
        self.observation_space = spaces.Discrete(2)
        self.action_space = spaces.Discrete(2)
        self.states = np.zeros(n, dtype=np.int64)
        self._generators = [None] * n

    def restart(self, which: NDArray[np.intp]) -> None:
        for i in which:
            self.states[i] = self._generators[i].integers(2)

    def step(self, actions: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        bad = np.flatnonzero((actions != 0) & (actions != 1))
        if len(bad):
            raise ValueError(f"action must be 0 (cross) or 1 (stay), got {actions[bad[0]]!r} in copy {bad[0]}")
        stay = actions.astype(np.int64)
        rewards = stay * REWARDS[self.states]
        self.states = np.where(stay, self.states, 1 - self.states)
        return rewards, np.zeros(len(rewards), dtype=np.bool_)

    def observe(self) -> NDArray[np.int64]:
        return self.states.copy()

    def text(self, index: int) -> str:
        return "[i] j " if self.states[index] == 0 else " i [j]"

    def picture(self, index: int) -> NDArray[np.uint8]:
        image = np.full((64, 128, 3), 255, dtype=np.uint8)
        rows, columns = np.mgrid[:64, :128]
        for state, colour in enumerate([(0, 114, 178), (213, 94, 0)]):
            distance = np.hypot(rows - 32, columns - 32 - 64 * state)
            image[distance < 28] = colour
            if self.states[index] != state:
                image[distance < 24] = 255
        return image


class TwoStateMDPEnv(SingleEnv):
    """One copy of the two-state process. See the module's page."""

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(TwoStateMDP(1), render_mode)


class TwoStateMDPVectorEnv(NativeVectorEnv):
    """n copies of the two-state process, stepped as arrays."""

    def __init__(self, num_envs: int = 1, max_episode_steps: int | None = None, render_mode: str | None = None) -> None:
        super().__init__(TwoStateMDP(num_envs), num_envs, max_episode_steps, render_mode)
