"""Connect Four against an opponent that plays at random: a board game whose legal moves are an action mask.

Two players drop discs into the seven columns of a board six rows high; four of one's own in a row, upright or
aslant win. In every second game, drawn at random, the opponent moves first; it chooses uniformly among the columns
that are not full. A step is the agent's move and the opponent's answer. The reward is 1 for a win and −1 for a loss,
and 0 for everything else, a full board among it.

The observation has two planes (2, 6, 7), the agent's discs and the opponent's, with row 0 the floor. `action_masks()`
tells which columns are not full.

A player's discs are the bits of one integer, bit 7 c + r for column c and row r, with a seventh row that stays empty.
"""

# ruff: noqa: D102 -- `Batch` documents what its subclasses implement.

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from envs.batch import Batch, NativeVectorEnv, SingleEnv

__all__ = ["ConnectFourEnv", "ConnectFourVectorEnv", "Games"]

ROWS, COLUMNS = 6, 7
_STRIDE = ROWS + 1
_BITS = _STRIDE * np.arange(COLUMNS) + np.arange(ROWS)[:, None]
_BEGUN = 0.5  # by the opponent


def wins(discs: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether there are four in a row among the discs of a player; (…) → (…)."""
    won = np.zeros(np.shape(discs), dtype=np.bool_)
    for shift in (1, _STRIDE, _STRIDE - 1, _STRIDE + 1):
        pairs = discs & (discs >> shift)
        won |= (pairs & (pairs >> 2 * shift)) != 0
    return won


class Games(Batch):
    """n games; see the module's page for the rules, the actions and the observations.

    Args:
        n: number of games.
    """

    def __init__(self, n: int) -> None:
        self.observation_space = spaces.Box(0.0, 1.0, (2, ROWS, COLUMNS), np.float32)
        self.action_space = spaces.Discrete(COLUMNS)
        self.discs = np.zeros((2, n), dtype=np.int64)
        """The agent's, and the opponent's."""
        self.heights = np.zeros((n, COLUMNS), dtype=np.int64)
        self.over = np.ones(n, dtype=np.bool_)
        self._generators = [None] * n

    def restart(self, which: NDArray[np.intp]) -> None:
        self.discs[:, which] = 0
        self.heights[which] = 0
        self.over[which] = False
        self._answer(which[self._draw(which) < _BEGUN])

    def legal(self) -> NDArray[np.bool_]:
        """Which columns are not full; (n, 7)."""
        return self.heights < ROWS

    def step(self, actions: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        actions = np.asarray(actions)
        inside = (actions >= 0) & (actions < COLUMNS) & (actions == np.floor(actions))
        columns = np.where(inside, actions, 0).astype(np.int64)
        every = np.arange(len(columns))
        bad = np.flatnonzero(~inside | self.over | ~self.legal()[every, columns])
        if len(bad):
            raise ValueError(self._complaint(int(bad[0]), actions[bad[0]]))
        self._drop(0, every, columns)
        won = wins(self.discs[0])
        self._answer(np.flatnonzero(~won & self.legal().any(1)))
        lost = wins(self.discs[1])
        self.over = won | lost | ~self.legal().any(1)
        return won.astype(np.float64) - lost, self.over.copy()

    def _draw(self, which: NDArray[np.intp]) -> NDArray[np.float64]:
        """Of each game's own stream, uniform in [0, 1)."""
        return np.array([self._generators[i].random() for i in which])

    def _answer(self, which: NDArray[np.intp]) -> None:
        """A move of the opponent, uniform over the columns that are not full."""
        legal = self.legal()[which]
        chosen = np.floor(self._draw(which) * legal.sum(1))
        self._drop(1, which, (legal.cumsum(1) > chosen[:, None]).argmax(1))

    def _drop(self, player: int, which: NDArray[np.intp], columns: NDArray[np.int64]) -> None:
        self.discs[player, which] |= np.int64(1) << (_STRIDE * columns + self.heights[which, columns])
        self.heights[which, columns] += 1

    def _complaint(self, index: int, action: Any) -> str:
        if self.over[index]:
            return f"the game in copy {index} is over, call reset()"
        legal = np.flatnonzero(self.legal()[index]).tolist()
        return f"action {action} in copy {index} must be a column that is not full; legal are {legal}"

    def observe(self) -> NDArray[np.float32]:
        return (self.discs.T[..., None, None] >> _BITS & 1).astype(np.float32)

    def text(self, index: int) -> str:
        mine, theirs = self.observe()[index].astype(np.int64)
        rows = ["|" + " ".join("·XO"[cell] for cell in row) + "|" for row in (mine + 2 * theirs)[::-1]]
        return "\n".join([*rows, " " + " ".join(map(str, range(COLUMNS)))])

    def picture(self, index: int) -> NDArray[np.uint8]:
        mine, theirs = self.observe()[index].astype(np.int64)
        palette = np.array([[255, 255, 255], [213, 94, 0], [240, 228, 66]], dtype=np.uint8)
        cells = palette[(mine + 2 * theirs)[::-1]].repeat(24, axis=0).repeat(24, axis=1)
        y, x = np.mgrid[: 24 * ROWS, : 24 * COLUMNS] % 24 - 11.5
        return np.where((np.hypot(y, x) < 10)[..., None], cells, np.array([0, 114, 178], dtype=np.uint8))


class ConnectFourEnv(SingleEnv):
    """One game. `action_masks()`, sb3-contrib's convention, tells which columns are not full."""

    batch: Games

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(Games(1), render_mode)

    def action_masks(self) -> NDArray[np.bool_]:
        """Which columns are not full; (7,)."""
        return self.batch.legal()[0]


class ConnectFourVectorEnv(NativeVectorEnv):
    """n games that are stepped as arrays."""

    batch: Games

    def __init__(self, num_envs: int = 1, max_episode_steps: int | None = None, render_mode: str | None = None) -> None:
        super().__init__(Games(num_envs), num_envs, max_episode_steps, render_mode)

    def action_masks(self) -> NDArray[np.bool_]:
        """Which columns are not full; (num_envs, 7)."""
        return self.batch.legal()
