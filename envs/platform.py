"""Platforms that slide to and fro over a void, crossed by running, hopping and leaping: a hybrid action in every step.

The runner stands on the first of nine platforms, and has to come to the last. A step is a choice of a move and how far
it goes: a run by 0.1 to 0.5, a hop by 0.5 to 1.4, or a leap by 1.4 to 2.2, each with its own number from −1, the
nearest, to 1. The action is ``(move, (of the run, of the hop, of the leap))``; the numbers of the two moves that were
not chosen do nothing. The runner moves with the platform that it stands on. Where it comes down, one step later, there
has to be a platform: else it falls, and the episode ends. Every platform that is reached pays 1, and the last one ends
the episode: 8 is perfect.

Platforms are 0.5 to 1 wide, with gaps of 0.3 to 1.8 while none moves; each swings as a sine with an amplitude of up to
0.15, once in twelve steps. All of that, and the phases, are drawn anew for each episode.

The observation (8,) has the distance to the edges of the platform behind and ahead, how far ahead the next platform
begins and ends, and of both platforms a sin φ and a cos φ, with the amplitude a and the phase φ of their motion.

After the domains "Platform" (Masson, Ranchod and Konidaris, Reinforcement learning with parameterized actions, AAAI
2016) and "Moving" and "Sliding" of parametrised actions; rules and code are our own.
"""

# ruff: noqa: D102 -- `Batch` documents what its subclasses implement.

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from envs.batch import Batch, NativeVectorEnv, SingleEnv

__all__ = ["PlatformEnv", "PlatformVectorEnv", "Platforms"]

PLATFORMS = 9
NEAREST, FARTHEST = np.array([0.1, 0.5, 1.4]), np.array([0.5, 1.4, 2.2])
"""Of a run, a hop and a leap. Nobody can wait, or a policy that does not leap would wait for ever."""
_TURN = 2 * np.pi / 12  # of the phase, in a step


class Platforms(Batch):
    """n copies; see the module's page for the rules, the actions and the observations.

    Args:
        n: number of copies.
    """

    def __init__(self, n: int) -> None:
        self.observation_space = spaces.Box(-5.0, 5.0, (8,), np.float32)
        self.action_space = spaces.Tuple((spaces.Discrete(3), spaces.Box(-1.0, 1.0, (3,), np.float32)))
        shape = (n, PLATFORMS)
        self.begins, self.widths = np.zeros(shape), np.ones(shape)
        """The left edges without motion, and the widths."""
        self.amplitudes, self.phases = np.zeros(shape), np.zeros(shape)
        self.on = np.zeros(n, dtype=np.int64)
        """The platform that the runner stands on, and how far from its left edge."""
        self.offsets = np.zeros(n)
        self.over = np.ones(n, dtype=np.bool_)
        self._generators = [None] * n

    def restart(self, which: NDArray[np.intp]) -> None:
        drawn = np.array([self._generators[i].random((4, PLATFORMS)) for i in which]).reshape(-1, 4, PLATFORMS)
        widths, gaps = 0.5 + 0.5 * drawn[:, 0], 0.3 + 1.5 * drawn[:, 1]
        self.widths[which] = widths
        self.begins[which] = np.cumsum(widths + gaps, 1) - widths - gaps
        self.amplitudes[which], self.phases[which] = 0.15 * drawn[:, 2], 2 * np.pi * drawn[:, 3]
        self.on[which], self.offsets[which] = 0, widths[:, 0] / 2
        self.over[which] = False

    def edges(self) -> NDArray[np.float64]:
        """The left edges now; (n, platforms)."""
        return self.begins + self.amplitudes * np.sin(self.phases)

    def step(self, actions: Any) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        moves, amounts = np.asarray(actions[0]), np.asarray(actions[1], dtype=np.float64)
        every = np.arange(len(self.on))
        if moves.shape != every.shape or amounts.shape != (*every.shape, 3):
            raise ValueError(
                f"actions must be moves of shape {every.shape} and amounts of {(*every.shape, 3)}, got {moves.shape} "
                f"and {amounts.shape}"
            )
        known = (moves == 0) | (moves == 1) | (moves == 2)
        inside = (np.abs(amounts) <= 1).all(1)
        if len(bad := np.flatnonzero(~(known & inside) | self.over)):
            raise ValueError(self._complaint(i := int(bad[0]), moves[i], amounts[i]))
        moves = moves.astype(np.int64)
        reach = NEAREST[moves] + (FARTHEST - NEAREST)[moves] * (0.5 + 0.5 * amounts[every, moves])
        before = self.edges()
        place = before[every, self.on] + self.offsets + reach
        self.phases = (self.phases + _TURN) % (2 * np.pi)
        # A run goes on the platform, which takes the runner with it; a jump comes down where the platforms are then.
        after = self.edges()
        place = np.where(moves == 0, place + (after - before)[every, self.on], place)
        under = (after <= place[:, None]) & (place[:, None] <= after + self.widths)
        fallen, landed = ~under.any(1), under.argmax(1)
        landed = np.where(fallen, self.on, landed)
        rewards = (landed - self.on).astype(np.float64)
        self.on, self.offsets = landed, place - after[every, landed]
        self.over = fallen | (landed == PLATFORMS - 1)
        return rewards, self.over.copy()

    def _complaint(self, index: int, move: Any, amounts: Any) -> str:
        if self.over[index]:
            return f"the episode in copy {index} is over, call reset()"
        return f"action {move}, {amounts} in copy {index} must be a move 0, 1 or 2, and three numbers from -1 to 1"

    def observe(self) -> NDArray[np.float32]:
        every, edges = np.arange(len(self.on)), self.edges()
        ahead = np.minimum(self.on + 1, PLATFORMS - 1)
        place = edges[every, self.on] + self.offsets
        parts = [self.offsets, self.widths[every, self.on] - self.offsets, edges[every, ahead] - place]
        parts.append(parts[2] + self.widths[every, ahead])
        for k in (self.on, ahead):
            amplitude, phase = self.amplitudes[every, k], self.phases[every, k]
            parts += [amplitude * np.sin(phase), amplitude * np.cos(phase)]
        return np.clip(np.stack(parts, 1), -5.0, 5.0).astype(np.float32)

    def _seen(self, index: int, x: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Where around the runner there is ground, and how far away from it these places are."""
        edges = self.edges()[index]
        place = edges[self.on[index]] + self.offsets[index]
        at = place + x[:, None]
        return ((edges <= at) & (at <= edges + self.widths[index])).any(1), np.abs(x)

    def text(self, index: int) -> str:
        ground, away = self._seen(index, np.linspace(-2.0, 4.0, 61))
        runner = "".join("o" if i == away.argmin() else " " for i in range(len(away)))
        return f"{runner.rstrip()}\n{''.join('=' if g else ' ' for g in ground).rstrip()}"

    def picture(self, index: int) -> NDArray[np.uint8]:
        ground, away = self._seen(index, np.linspace(-2.0, 4.0, 240))
        image = np.full((80, 240, 3), 255, dtype=np.uint8)
        image[50:] = np.where(ground[:, None], np.array([0, 114, 178]), 255).astype(np.uint8)
        image[35:50, away < 0.1] = [213, 94, 0]
        return image


class PlatformEnv(SingleEnv):
    """One runner."""

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(Platforms(1), render_mode)


class PlatformVectorEnv(NativeVectorEnv):
    """n runners that are stepped as arrays."""

    def __init__(self, num_envs: int = 1, max_episode_steps: int | None = None, render_mode: str | None = None) -> None:
        super().__init__(Platforms(num_envs), num_envs, max_episode_steps, render_mode)
