"""The board of Tetris, its pieces and features, and the kernels that play it, compiled with Numba (extra ``tetris``).

`envs.tetris` says what the board, the actions and the features are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from numba import njit, types
    from numba.extending import intrinsic
except ImportError as error:
    raise ImportError("npg/Tetris-v0 is compiled with Numba: pip install numba") from error

__all__ = [
    "CELLS",
    "FEATURES",
    "FIRST",
    "PIECES",
    "decode",
    "feature_names",
    "observe_all",
    "play_games",
    "random_bits",
    "step_all",
]

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

PIECES = "IOTSZJL"

CELLS = {  # (column, row) of the four cells
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
        cells, seen = CELLS[piece], []
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


_BITS, _WIDTHS, _HEIGHTS, FIRST = _shapes()


# --------------------------------------------------------------------------------------------------------- kernels


def _ctpop(typingctx: Any, x: Any) -> Any:
    """Number of bits set in an int64."""
    return types.int64(types.int64), lambda context, builder, signature, args: builder.ctpop(args[0])


_popcount: Any = intrinsic(_ctpop)  # a function of x, in compiled code


@njit(cache=True, nogil=True)
def _fill_below(bits: int) -> int:
    """All bits up to the highest one set; their number is the column's height."""
    for shift in (1, 2, 4, 8, 16, 32):
        bits |= bits >> shift
    return bits


@njit(cache=True, nogil=True)
def random_bits(stream: NDArray[np.uint64]) -> Any:
    """Advance the one-element uint64 `stream` and return 32 random bits (splitmix64: Steele, Lea and Flood 2014)."""
    stream[0] += np.uint64(0x9E3779B97F4A7C15)
    z = stream[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((z ^ (z >> np.uint64(31))) >> np.uint64(32))


@njit(cache=True, nogil=True)
def _landing_row(column_heights: Ints, shape: int, x: int) -> int:
    """The row in which the bottom of `shape` comes to rest with its left side in column x."""
    row = 0
    for i in range(_WIDTHS[shape]):
        bits = _BITS[shape, i]
        row = max(row, column_heights[x + i] - _popcount((bits & -bits) - 1))
    return row


@njit(cache=True, nogil=True)
def _place(columns: Ints, shape: int, x: int, row: int, after: Ints) -> tuple[int, int]:
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
def _bertsekas(board: Ints, phi: Floats) -> None:
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
def _dellacherie_thiery(board: Ints, board_height: int, landing_height: float, eroded: int, phi: Floats) -> None:
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
def _observe(columns: Ints, piece: int, board_height: int, features: int, scratch: Ints, out: Floats) -> int:
    """Fill `out` (slots, 1 + d) with [legal, φ] of every placement; the number of legal ones. `scratch` is (2, W)."""
    width = len(columns)
    heights, after = scratch[0], scratch[1]
    for x in range(width):
        heights[x] = _popcount(_fill_below(columns[x]))
    slot = 0
    legal = 0
    for shape in range(FIRST[piece], FIRST[piece + 1]):
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
def decode(width: int, piece: int, slot: int) -> tuple[int, int]:
    """(shape, column) of an action slot, (−1, 0) where the piece has no such placement."""
    for shape in range(FIRST[piece], FIRST[piece + 1]):
        places = width - _WIDTHS[shape] + 1
        if 0 <= slot < places:
            return shape, slot
        slot -= places
    return -1, 0


@njit(cache=True, nogil=True)
def _move(columns: Ints, piece: int, slot: int, scratch: Ints) -> int:
    """Place the piece by a legal slot; the number of rows completed."""
    heights, after = scratch[0], scratch[1]
    for x in range(len(columns)):
        heights[x] = _popcount(_fill_below(columns[x]))
    shape, x = decode(len(columns), piece, slot)
    rows, _ = _place(columns, shape, x, _landing_row(heights, shape, x), after)
    columns[:] = after
    return rows


@njit(cache=True, nogil=True)
def observe_all(
    boards: Ints, pieces: Ints, which: NDArray[np.intp], board_height: int, features: int, out: Floats
) -> None:
    """Write the observations of the games ``which`` into ``out``."""
    scratch = np.empty((2, boards.shape[1]), dtype=np.int64)
    for i in which:
        _observe(boards[i], pieces[i], board_height, features, scratch, out[i])


@njit(cache=True, nogil=True)
def step_all(
    boards: Ints,
    pieces: Ints,
    streams: NDArray[np.uint64],
    actions: Ints,
    board_height: int,
    features: int,
    out: Floats,
    rewards: NDArray[np.float64],
    over: NDArray[np.bool_],
) -> None:
    """One placement in every game: rewards, whether it is over, and the next observations, written in place."""
    scratch = np.empty((2, boards.shape[1]), dtype=np.int64)
    for i in range(len(boards)):
        rewards[i] = _move(boards[i], pieces[i], actions[i], scratch)
        pieces[i] = (random_bits(streams[i]) * 7) >> 32
        over[i] = _observe(boards[i], pieces[i], board_height, features, scratch, out[i]) == 0


@njit(cache=True, nogil=True)
def _choose(observation: Floats, theta: NDArray[np.float64], stream: NDArray[np.uint64], greedy: bool) -> int:
    """The slot with the largest θᵀφ + noise over the legal ones; Gumbel noise makes it a sample of the softmax."""
    best = -1
    best_score = -np.inf
    for slot in range(len(observation)):
        if observation[slot, 0] != 0:
            score = 0.0
            for k in range(len(theta)):
                score += theta[k] * observation[slot, k + 1]
            if not greedy:
                score -= np.log(-np.log((random_bits(stream) + 0.5) / 4294967296.0))
            if score > best_score:
                best = slot
                best_score = score
    return best


@njit(cache=True, nogil=True)
def play_games(
    theta: NDArray[np.float64],
    streams: NDArray[np.uint64],
    width: int,
    board_height: int,
    features: int,
    slots: int,
    greedy: bool,
    max_placements: int,
    lines: Ints,
    placements: Ints,
) -> None:
    """Whole games of one policy: lines and placements of each, written in place."""
    scratch = np.empty((2, width), dtype=np.int64)
    observation = np.empty((slots, len(theta) + 1), dtype=np.float32)
    columns = np.empty(width, dtype=np.int64)
    for game in range(len(lines)):
        columns[:] = 0
        while placements[game] < max_placements:
            piece = (random_bits(streams[game, 0]) * 7) >> 32
            if _observe(columns, piece, board_height, features, scratch, observation) == 0:
                break
            slot = _choose(observation, theta, streams[game, 1], greedy)
            lines[game] += _move(columns, piece, slot, scratch)
            placements[game] += 1
