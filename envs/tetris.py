"""Tetris with one action per placement, on bitboards, with the afterstate features that its literature compares.

A board of width W and height H is W integers, one per column, bit y set where row y (0 is the floor) is filled. An
action chooses a rotation and a column; the piece falls straight down and comes to rest. A placement is legal when the
piece then lies wholly inside the board. The next piece is uniform over the seven, and the game is over when it has no
legal placement. The reward is the number of rows completed.

An observation has a row per action slot: [legal, φ₁, …, φ_d], with φ the features of the board after that placement
(of the afterstate), and zeros where the slot has no legal placement. Over it, a policy that is linear in the features,
π(a; s) ∝ exp(θᵀφ_sa), is one product: see `agents.afterstate`.

The kernels are compiled with Numba, which is the extra ``tetris``.

Sources: Bertsekas and Tsitsiklis, "Neuro-dynamic programming" (1996) for the 22 features; Thiery and Scherrer,
"Building controllers for Tetris" (ICGA Journal 2009) for Dellacherie's and their own; Scherrer et al., "Approximate
modified policy iteration and its application to the game of Tetris" (JMLR 2015) for the protocol and the scores.
"""

# ruff: noqa: D102 -- `Batch` documents what its subclasses implement.

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from envs.batch import Batch, NativeVectorEnv, SingleEnv
from envs.tetris_kernels import (
    CELLS,
    FEATURES,
    FIRST,
    PIECES,
    decode,
    feature_names,
    observe_all,
    play_games,
    random_bits,
    step_all,
)

__all__ = [
    "FEATURES",
    "PIECES",
    "Games",
    "TetrisEnv",
    "TetrisVectorEnv",
    "feature_names",
    "play",
]


def _slots(width: int) -> int:
    """Action slots of a board: the most placements any piece has, 4 W − 6 (two rotations 3 wide and two 2 wide)."""
    return 4 * width - 6


def _check(width: int, height: int, features: str) -> None:
    if not 4 <= width <= 32:
        raise ValueError(f"width must be between 4 (the I piece lying down) and 32, got {width}")
    if not 4 <= height <= 60:
        raise ValueError(f"height must be between 4 (the I piece upright) and 60 (a column is one word), got {height}")
    feature_names(features, width)


def play(
    theta: ArrayLike,
    games: int,
    *,
    seed: int,
    width: int = 10,
    height: int = 20,
    features: str = "dellacherie-thiery",
    greedy: bool = True,
    max_placements: int | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Play whole games with π(a; s) ∝ exp(θᵀφ_sa) → lines (games,), placements (games,).

    Game g draws its pieces and its actions from its own streams, so that the first games of a longer run are the same.

    Args:
        theta: weights (d,), in the order of `feature_names`.
        games: number of games.
        seed: of all streams.
        width: of the board, in cells.
        height: of the board, in cells.
        features: one of `FEATURES`.
        greedy: argmax (first slot on ties) instead of a sample.
        max_placements: where a game is cut, None for never (a good controller on a high board plays for a long time).

    Raises:
        ValueError: if the board is too small or large, or θ does not have one finite weight per feature.
    """
    _check(width, height, features)
    theta = np.asarray(theta, dtype=np.float64)
    names = feature_names(features, width)
    if theta.shape != (len(names),) or not np.isfinite(theta).all():
        raise ValueError(f"theta must be {len(names)} finite weights ({', '.join(names)}), got {theta}")
    streams = np.random.default_rng(seed).integers(2**64, size=(games, 2, 1), dtype=np.uint64)
    lines, placements = np.zeros(games, dtype=np.int64), np.zeros(games, dtype=np.int64)
    limit = np.iinfo(np.int64).max if max_placements is None else max_placements
    play_games(theta, streams, width, height, FEATURES.index(features), _slots(width), greedy, limit, lines, placements)
    return lines, placements


class Placements(spaces.Discrete):
    """Action slots 0, …, n − 1 of one game, of which `sample()` without a mask draws one that is legal now."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.legal: NDArray[Any] = np.zeros(n, dtype=np.bool_)
        """(n,), kept up to date by the game; where none is legal, as before the first reset, all slots are drawn."""

    def sample(self, mask: Any = None, probability: Any = None) -> np.int64:
        if mask is None and probability is None and self.legal.any():
            mask = (self.legal != 0).astype(np.int8)
        return super().sample(mask=mask, probability=probability)


class VectorPlacements(spaces.MultiDiscrete):
    """A slot for each of several games, of which `sample()` without a mask draws those that are legal now."""

    def __init__(self, legal: NDArray[Any]) -> None:
        super().__init__(np.full(len(legal), legal.shape[1]))
        self.legal = legal
        """(games, slots), kept up to date by the games."""

    def sample(self, mask: Any = None, probability: Any = None) -> NDArray[np.int64]:
        if mask is None and probability is None and self.legal.any(axis=1).all():
            mask = tuple((self.legal != 0).astype(np.int8))
        return super().sample(mask=mask, probability=probability)


class Games(Batch):
    """n games of Tetris; see the module's page for the rules, the actions and the observations.

    Args:
        n: number of games.
        width: of the boards, in cells.
        height: of the boards, in cells.
        features: one of `FEATURES`.

    Raises:
        ValueError: if a piece would not fit into the empty board upright or lying down, or `features` is unknown.
    """

    action_space: Placements

    def __init__(self, n: int, width: int = 10, height: int = 20, features: str = "dellacherie-thiery") -> None:
        _check(width, height, features)
        self.width, self.height = width, height
        self._features = FEATURES.index(features)
        shape = (_slots(width), 1 + len(feature_names(features, width)))
        # No feature exceeds the largest cumulative well of a whole board.
        self.observation_space = spaces.Box(0.0, width * height * (height + 1) / 2, shape, np.float32)
        self.action_space = Placements(shape[0])
        self.boards = np.zeros((n, width), dtype=np.int64)
        self.pieces = np.zeros(n, dtype=np.int64)
        self._streams = np.zeros((n, 1), dtype=np.uint64)
        self._observations = np.zeros((n, *shape), dtype=np.float32)
        self.legal_now = self._observations[..., 0]  # always of the present boards: the memory stays the same

    def seed(self, index: int, generator: np.random.Generator) -> None:
        self._streams[index] = generator.integers(2**64, dtype=np.uint64)

    def restart(self, which: NDArray[np.intp]) -> None:
        self.boards[which] = 0
        for i in which:
            self.pieces[i] = (random_bits(self._streams[i]) * 7) >> 32
        self._look(which)

    def set_position(self, index: int, cells: ArrayLike, piece: str) -> None:
        """Put one game into a position: a board (height, width) of 0 and 1, row 0 the floor, and the piece to place."""
        cells = np.asarray(cells, dtype=np.bool_)
        if cells.shape != (self.height, self.width):
            raise ValueError(f"cells must have the shape {(self.height, self.width)}, got {cells.shape}")
        if len(piece) != 1 or piece not in PIECES:
            raise ValueError(f"piece must be one letter of {PIECES}, got {piece!r}")
        self.boards[index] = (cells.astype(np.int64) << np.arange(self.height)[:, None]).sum(axis=0)
        self.pieces[index] = PIECES.index(piece)
        self._look(np.array([index]))

    def _look(self, which: NDArray[np.intp]) -> None:
        observe_all(self.boards, self.pieces, which, self.height, self._features, self._observations)

    def legal(self) -> NDArray[np.bool_]:
        """Which slots hold a legal placement of the piece in play; (n, slots)."""
        return self.legal_now != 0

    def step(self, actions: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        slots = self.action_space.n
        inside = (actions >= 0) & (actions < slots) & (actions == np.floor(actions))
        slot = np.where(inside, actions, 0).astype(np.int64)
        bad = np.flatnonzero(~inside | ~np.take_along_axis(self.legal(), slot[:, None], axis=1)[:, 0])
        if len(bad):
            raise ValueError(self._complaint(int(bad[0]), actions[bad[0]]))
        rewards, over = np.empty(len(slot)), np.empty(len(slot), dtype=np.bool_)
        step_all(
            self.boards,
            self.pieces,
            self._streams,
            slot,
            self.height,
            self._features,
            self._observations,
            rewards,
            over,
        )
        return rewards, over

    def _complaint(self, index: int, action: Any) -> str:
        piece = PIECES[self.pieces[index]]
        legal = np.flatnonzero(self.legal()[index])
        where = f"action {action} is no legal placement of piece {piece} in copy {index}"
        if not len(legal):
            return f"{where}: the game is over, call reset()"
        shape, x = decode(self.width, self.pieces[index], int(action)) if float(action).is_integer() else (-1, 0)
        if shape < 0:
            why = "the slot is not used by this piece"
        else:
            rotation = shape - FIRST[self.pieces[index]]
            why = f"rotation {rotation} in column {x} would stick out of the top of the board"
        return f"{where}: {why}; legal are {legal.tolist()} (the slots whose observation row begins with 1)"

    def observe(self) -> NDArray[np.float32]:
        return self._observations.copy()

    def cells(self, index: int) -> NDArray[np.bool_]:
        """The board of one game, (height, width), row 0 the floor."""
        return (self.boards[index][None, :] >> np.arange(self.height)[:, None]) & 1 == 1

    def text(self, index: int) -> str:
        rows = ["|" + "".join("█" if cell else " " for cell in row) + "|" for row in self.cells(index)[::-1]]
        return "\n".join([*rows, "+" + "-" * self.width + "+", f"next: {PIECES[self.pieces[index]]}"])

    def picture(self, index: int) -> NDArray[np.uint8]:
        # The piece to be placed floats in a band of four rows above the board.
        band = np.zeros((5, self.width), dtype=np.uint8)
        for x, y in CELLS[PIECES[self.pieces[index]]]:
            band[3 - y, x + self.width // 2 - 2] = 2
        band[4] = 3
        grid = np.vstack([band, self.cells(index)[::-1].astype(np.uint8)])
        palette = np.array([[255, 255, 255], [0, 114, 178], [213, 94, 0], [120, 120, 120]], dtype=np.uint8)
        image = palette[grid].repeat(12, axis=0).repeat(12, axis=1)
        image[::12] = image[:, ::12] = 225
        return image


class TetrisEnv(SingleEnv):
    """One game. `action_space.sample()` draws legal placements, and `action_masks()` is MaskablePPO's convention."""

    batch: Games

    def __init__(
        self,
        width: int = 10,
        height: int = 20,
        features: str = "dellacherie-thiery",
        render_mode: str | None = None,
    ) -> None:
        super().__init__(Games(1, width, height, features), render_mode)
        self.batch.action_space.legal = self.batch.legal_now[0]

    def action_masks(self) -> NDArray[np.bool_]:
        """Which action slots are legal now; (slots,)."""
        return self.batch.legal()[0]


class TetrisVectorEnv(NativeVectorEnv):
    """n games, stepped by one compiled loop. `action_space.sample()` draws a legal placement for each.

    `single_action_space` belongs to no game in particular, and its samples need not be legal.
    """

    batch: Games

    def __init__(
        self,
        num_envs: int = 1,
        width: int = 10,
        height: int = 20,
        features: str = "dellacherie-thiery",
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(Games(num_envs, width, height, features), num_envs, max_episode_steps, render_mode)
        self.action_space = VectorPlacements(self.batch.legal_now)

    def action_masks(self) -> NDArray[np.bool_]:
        """Which action slots are legal now; (num_envs, slots)."""
        return self.batch.legal()
