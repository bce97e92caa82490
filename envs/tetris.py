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

try:
    from numba import njit, types
    from numba.extending import intrinsic
except ImportError as error:
    raise ImportError("npg/Tetris-v0 is compiled with Numba: pip install 'npg-toolkit[tetris]'") from error

__all__ = [
    "FEATURES",
    "PIECES",
    "Games",
    "TetrisEnv",
    "TetrisVectorEnv",
    "feature_names",
    "play",
]

PIECES = "IOTSZJL"

_CELLS = {  # (column, row) of the four cells
    "I": [(0, 0), (1, 0), (2, 0), (3, 0)],
    "O": [(0, 0), (1, 0), (0, 1), (1, 1)],
    "T": [(0, 0), (1, 0), (2, 0), (1, 1)],
    "S": [(0, 0), (1, 0), (1, 1), (2, 1)],
    "Z": [(1, 0), (2, 0), (0, 1), (1, 1)],
    "J": [(0, 0), (1, 0), (2, 0), (0, 1)],
    "L": [(0, 0), (1, 0), (2, 0), (2, 1)],
}

FEATURES = ("bertsekas", "dellacherie-thiery")
_BERTSEKAS, _DELLACHERIE_THIERY = range(2)


def feature_names(features: str, width: int = 10) -> list[str]:
    """Names of φ₁, …, φ_d: 2 W + 2 of them for ``bertsekas`` (22 on the usual width), 9 for ``dellacherie-thiery``."""
    if features == "bertsekas":
        heights = [f"height {x}" for x in range(width)]
        differences = [f"difference {x}-{x + 1}" for x in range(width - 1)]
        return [*heights, *differences, "maximum height", "holes", "constant"]
    if features == "dellacherie-thiery":
        return [
            "landing height",
            "eroded piece cells",
            "row transitions",
            "column transitions",
            "holes",
            "cumulative wells",
            "hole depth",
            "rows with holes",
            "pattern diversity",
        ]
    raise ValueError(f"features must be one of {FEATURES}, got {features!r}")


def _shapes() -> tuple[NDArray[np.int64], ...]:
    """The 19 distinct rotations: column bits (19, 4), widths, heights; and where each piece's rotations begin (8,)."""
    bits, widths, heights, first = [], [], [], [0]
    for piece in PIECES:
        cells, seen = _CELLS[piece], []
        for _ in range(4):
            left, bottom = min(x for x, _ in cells), min(y for _, y in cells)
            cells = sorted((x - left, y - bottom) for x, y in cells)
            if cells not in seen:
                seen.append(cells)
                bits.append([sum(1 << y for x, y in cells if x == column) for column in range(4)])
                widths.append(1 + max(x for x, _ in cells))
                heights.append(1 + max(y for _, y in cells))
            cells = [(y, -x) for x, y in cells]
        first.append(len(bits))
    return tuple(np.array(a, dtype=np.int64) for a in (bits, widths, heights, first))


_BITS, _WIDTHS, _HEIGHTS, _FIRST = _shapes()


# --------------------------------------------------------------------------------------------------------- kernels


@intrinsic
def _popcount(typingctx, x):
    """Number of bits set in an int64."""
    return types.int64(types.int64), lambda context, builder, signature, args: builder.ctpop(args[0])


@njit(cache=True, nogil=True)
def _fill_below(bits):
    """All bits up to the highest one set; their number is the column's height."""
    for shift in (1, 2, 4, 8, 16, 32):
        bits |= bits >> shift
    return bits


@njit(cache=True, nogil=True)
def _random(stream):
    """Advance the one-element uint64 `stream` and return 32 random bits (splitmix64: Steele, Lea and Flood 2014)."""
    stream[0] += np.uint64(0x9E3779B97F4A7C15)
    z = stream[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((z ^ (z >> np.uint64(31))) >> np.uint64(32))


@njit(cache=True, nogil=True)
def _landing_row(column_heights, shape, x):
    """The row in which the bottom of `shape` comes to rest with its left side in column x."""
    row = 0
    for i in range(_WIDTHS[shape]):
        bits = _BITS[shape, i]
        row = max(row, column_heights[x + i] - _popcount((bits & -bits) - 1))
    return row


@njit(cache=True, nogil=True)
def _place(columns, shape, x, row, after):
    """Write the board after the placement into `after` → (rows completed, cells of the piece in them)."""
    full = -1
    for i in range(len(columns)):
        after[i] = columns[i]
    for i in range(_WIDTHS[shape]):
        after[x + i] |= _BITS[shape, i] << row
    for i in range(len(columns)):
        full &= after[i]
    if full == 0:
        return 0, 0
    cells = 0
    for i in range(_WIDTHS[shape]):
        cells += _popcount((_BITS[shape, i] << row) & full)
    rows = _popcount(full)
    while full != 0:
        below = _fill_below(full) >> 1  # the rows under the highest full one
        for i in range(len(columns)):
            after[i] = (after[i] & below) | ((after[i] >> 1) & ~below)
        full &= below
    return rows, cells


@njit(cache=True, nogil=True)
def _bertsekas(board, phi):
    width = len(board)
    highest = 0
    holes = 0
    previous = 0
    for x in range(width):
        filled = _fill_below(board[x])
        height = _popcount(filled)
        holes += _popcount(filled ^ board[x])
        highest = max(highest, height)
        phi[x] = height
        if x > 0:
            phi[width + x - 1] = abs(height - previous)
        previous = height
    phi[2 * width - 1] = highest
    phi[2 * width] = holes
    phi[2 * width + 1] = 1


@njit(cache=True, nogil=True)
def _dellacherie_thiery(board, board_height, landing_height, eroded, phi):
    width = len(board)
    wall = (1 << board_height) - 1
    row_transitions = 0
    column_transitions = 0
    holes = 0
    wells = 0
    hole_depth = 0
    rows_with_holes = 0
    patterns = 0
    previous = 0
    left = wall
    for x in range(width):
        column = board[x]
        right = board[x + 1] if x + 1 < width else wall
        filled = _fill_below(column)
        height = _popcount(filled)
        hole = filled ^ column
        row_transitions += _popcount(left ^ column)
        column_transitions += _popcount(column ^ (column << 1 | 1))
        holes += _popcount(hole)
        rows_with_holes |= hole
        # Clearing the run of ones that stands on the floor leaves the filled cells with an empty one below them.
        hole_depth += _popcount(column & (column + 1))
        # Every empty cell between filled neighbours counts itself and the empty cells straight below it.
        well = left & right & ~column
        while well != 0:
            wells += _popcount(well)
            well = (well >> 1) & ~column
        if x > 0 and abs(height - previous) <= 2:
            patterns |= 1 << (height - previous + 2)
        previous = height
        left = column
    row_transitions += _popcount(left ^ wall)
    phi[0] = landing_height
    phi[1] = eroded
    phi[2] = row_transitions
    phi[3] = column_transitions
    phi[4] = holes
    phi[5] = wells
    phi[6] = hole_depth
    phi[7] = _popcount(rows_with_holes)
    phi[8] = _popcount(patterns)


@njit(cache=True, nogil=True)
def _observe(columns, piece, board_height, features, scratch, out):
    """Fill `out` (slots, 1 + d) with [legal, φ] of every placement; the number of legal ones. `scratch` is (2, W)."""
    width = len(columns)
    heights, after = scratch[0], scratch[1]
    for x in range(width):
        heights[x] = _popcount(_fill_below(columns[x]))
    slot = 0
    legal = 0
    for shape in range(_FIRST[piece], _FIRST[piece + 1]):
        for x in range(width - _WIDTHS[shape] + 1):
            row = _landing_row(heights, shape, x)
            if row + _HEIGHTS[shape] <= board_height:
                rows, cells = _place(columns, shape, x, row, after)
                out[slot, 0] = 1
                if features == _BERTSEKAS:
                    _bertsekas(after, out[slot, 1:])
                else:
                    middle = row + (_HEIGHTS[shape] - 1) / 2
                    _dellacherie_thiery(after, board_height, middle, rows * cells, out[slot, 1:])
                legal += 1
            else:
                out[slot] = 0
            slot += 1
    out[slot:] = 0
    return legal


@njit(cache=True, nogil=True)
def _decode(width, piece, slot):
    """(shape, column) of an action slot, (−1, 0) where the piece has no such placement."""
    for shape in range(_FIRST[piece], _FIRST[piece + 1]):
        places = width - _WIDTHS[shape] + 1
        if 0 <= slot < places:
            return shape, slot
        slot -= places
    return -1, 0


@njit(cache=True, nogil=True)
def _move(columns, piece, slot, scratch):
    """Place the piece by a legal slot; the number of rows completed."""
    heights, after = scratch[0], scratch[1]
    for x in range(len(columns)):
        heights[x] = _popcount(_fill_below(columns[x]))
    shape, x = _decode(len(columns), piece, slot)
    rows, _ = _place(columns, shape, x, _landing_row(heights, shape, x), after)
    columns[:] = after
    return rows


@njit(cache=True, nogil=True)
def _observe_all(boards, pieces, which, board_height, features, out):
    scratch = np.empty((2, boards.shape[1]), dtype=np.int64)
    for i in which:
        _observe(boards[i], pieces[i], board_height, features, scratch, out[i])


@njit(cache=True, nogil=True)
def _step_all(boards, pieces, streams, actions, board_height, features, out, rewards, over):
    scratch = np.empty((2, boards.shape[1]), dtype=np.int64)
    for i in range(len(boards)):
        rewards[i] = _move(boards[i], pieces[i], actions[i], scratch)
        pieces[i] = (_random(streams[i]) * 7) >> 32
        over[i] = _observe(boards[i], pieces[i], board_height, features, scratch, out[i]) == 0


@njit(cache=True, nogil=True)
def _choose(observation, theta, stream, greedy):
    """The slot with the largest θᵀφ + noise over the legal ones; Gumbel noise makes it a sample of the softmax."""
    best = -1
    best_score = -np.inf
    for slot in range(len(observation)):
        if observation[slot, 0] != 0:
            score = 0.0
            for k in range(len(theta)):
                score += theta[k] * observation[slot, k + 1]
            if not greedy:
                score -= np.log(-np.log((_random(stream) + 0.5) / 4294967296.0))
            if score > best_score:
                best = slot
                best_score = score
    return best


@njit(cache=True, nogil=True)
def _play(theta, streams, width, board_height, features, slots, greedy, max_placements, lines, placements):
    scratch = np.empty((2, width), dtype=np.int64)
    observation = np.empty((slots, len(theta) + 1), dtype=np.float32)
    columns = np.empty(width, dtype=np.int64)
    for game in range(len(lines)):
        columns[:] = 0
        while placements[game] < max_placements:
            piece = (_random(streams[game, 0]) * 7) >> 32
            if _observe(columns, piece, board_height, features, scratch, observation) == 0:
                break
            slot = _choose(observation, theta, streams[game, 1], greedy)
            lines[game] += _move(columns, piece, slot, scratch)
            placements[game] += 1


# ------------------------------------------------------------------------------------------------------------ tasks


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
    _play(theta, streams, width, height, FEATURES.index(features), _slots(width), greedy, limit, lines, placements)
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
            self.pieces[i] = (_random(self._streams[i]) * 7) >> 32
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
        _observe_all(self.boards, self.pieces, which, self.height, self._features, self._observations)

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
        _step_all(
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
        shape, x = _decode(self.width, self.pieces[index], int(action)) if float(action).is_integer() else (-1, 0)
        if shape < 0:
            why = "the slot is not used by this piece"
        else:
            rotation = shape - _FIRST[self.pieces[index]]
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
        for x, y in _CELLS[PIECES[self.pieces[index]]]:
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
