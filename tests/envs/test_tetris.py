import copy
import subprocess
import sys
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as sb3_check

from envs import make_vec_env

tetris = pytest.importorskip("envs.tetris", exc_type=ImportError)
kernels = pytest.importorskip("envs.tetris_kernels", exc_type=ImportError)

# --------------------------------------------------------------- the slow twin: lists of rows of 0 and 1, cell by cell

PICTURES = {
    "I": ["####"],
    "O": ["##", "##"],
    "T": [".#.", "###"],
    "S": [".##", "##."],
    "Z": ["##.", ".##"],
    "J": ["#..", "###"],
    "L": ["..#", "###"],
}


def rotations(piece):
    shapes = []
    shape = [[int(c == "#") for c in row] for row in PICTURES[piece]]
    for _ in range(4):
        if shape not in shapes:
            shapes.append(shape)
        shape = [list(row) for row in zip(*shape[::-1])]
    return shapes


def drop(board, shape, x):
    """(board with the piece in 2s, row of the piece's bottom), or None if it sticks out; rows from the floor."""
    height, cells = len(board), [(y, j) for y, row in enumerate(shape[::-1]) for j, c in enumerate(row) if c]
    y = height
    while y > 0 and not any(y - 1 + dy < height and board[y - 1 + dy][x + dx] for dy, dx in cells):
        y -= 1
    if any(y + dy >= height for dy, _ in cells):
        return None
    placed = [list(row) for row in board]
    for dy, dx in cells:
        placed[y + dy][x + dx] = 2
    return placed, y


def clear(placed):
    width = len(placed[0])
    full = [row for row in placed if all(row)]
    rest = [[int(c > 0) for c in row] for row in placed if not all(row)]
    return rest + [[0] * width for _ in full], len(full), sum(c == 2 for row in full for c in row)


def column_height(board, x):
    return max((y + 1 for y in range(len(board)) if board[y][x]), default=0)


def hole_cells(board):
    return [(y, x) for x in range(len(board[0])) for y in range(column_height(board, x)) if not board[y][x]]


def bertsekas(board):
    heights = [column_height(board, x) for x in range(len(board[0]))]
    differences = [abs(a - b) for a, b in pairwise(heights)]
    return [*heights, *differences, max(heights), len(hole_cells(board)), 1]


def dellacherie_thiery(board, landing, eroded):
    height, width = len(board), len(board[0])
    walled = [[1, *row, 1] for row in board]
    row_transitions = sum(a != b for row in walled for a, b in pairwise(row))
    columns = [[1, *(row[x] for row in board), 0] for x in range(width)]
    column_transitions = sum(a != b for column in columns for a, b in pairwise(column))
    wells = 0
    for y in range(height):
        for x in range(width):
            if not board[y][x] and walled[y][x] and walled[y][x + 2]:
                below = y
                while below >= 0 and not board[below][x]:
                    wells += 1
                    below -= 1
    holes = hole_cells(board)
    depth = 0
    for x in range(width):
        hole_below = False
        for y in range(height):
            hole_below |= not board[y][x]
            depth += bool(board[y][x]) and hole_below
    heights = [column_height(board, x) for x in range(width)]
    patterns = {a - b for a, b in pairwise(heights)} & {-2, -1, 0, 1, 2}
    return [
        landing,
        eroded,
        row_transitions,
        column_transitions,
        len(holes),
        wells,
        depth,
        len({y for y, _ in holes}),
        len(patterns),
    ]


def afterstates(board, piece, features):
    """Every placement in the order of the action slots: (features, board, rows) or None where it sticks out."""
    found = []
    for shape in rotations(piece):
        for x in range(len(board[0]) - len(shape[0]) + 1):
            landed = drop(board, shape, x)
            if landed is None:
                found.append(None)
                continue
            placed, y = landed
            after, rows, cells = clear(placed)
            if features == "bertsekas":
                phi = bertsekas(after)
            else:
                phi = dellacherie_thiery(after, y + (len(shape) - 1) / 2, rows * cells)
            found.append((phi, after, rows))
    return found


# --------------------------------------------------------------------------------------------------------------- tests


def matched(slow, legal, observed):
    """The rotations of the two implementations may come in different orders; match slots by what they lead to."""
    ours = sorted(map(tuple, observed[legal][:, 1:].tolist()))
    theirs = sorted(tuple(float(f) for f in found[0]) for found in slow if found is not None)
    return ours == theirs


@pytest.mark.parametrize("features", tetris.FEATURES)
@pytest.mark.parametrize(("width", "height"), [(10, 20), (10, 10), (4, 4), (7, 9)])
def test_bitboards_play_as_the_slow_twin(width, height, features):
    """Random games: legality, features, rows, the board after the move, and the end of the game, at every placement."""
    games = tetris.Games(1, width, height, features)
    games.seed(0, np.random.default_rng(width * height))
    rng = np.random.default_rng(1)
    cleared = played = finished = 0
    which = np.zeros(1, dtype=np.intp)
    games.restart(which)
    while played < 150 or not finished:
        board = games.cells(0).astype(int).tolist()
        observation, legal = games.observe()[0], games.legal()[0]
        slow = afterstates(board, tetris.PIECES[games.pieces[0]], features)
        assert legal.sum() == sum(found is not None for found in slow)
        assert matched(slow, legal, observation)
        assert (observation[~legal] == 0).all()
        # Prefer what completes rows, so that clearing is exercised; among those, any.
        action = rng.choice(np.flatnonzero(legal))
        if features == "dellacherie-thiery":
            eroding = np.flatnonzero(legal & (observation[:, 2] > 0))
            low = np.flatnonzero(legal & (observation[:, 1] == observation[legal, 1].min()))
            action = rng.choice(eroding if len(eroding) else low)
        rewards, over = games.step(np.array([action]))
        after = games.cells(0).astype(int).tolist()
        candidates = [found for found in slow if found and found[1] == after and found[2] == rewards[0]]
        assert any(found[0] == observation[action, 1:].tolist() for found in candidates)
        assert over[0] == (not games.legal()[0].any())
        cleared += int(rewards[0])
        played += 1
        if over[0]:
            finished += 1
            games.restart(which)
    assert finished > 0
    if features == "dellacherie-thiery":
        assert cleared > 5


def test_slots_of_a_piece_are_its_rotations_times_columns():
    games = tetris.Games(1)
    counts = {}
    for piece in tetris.PIECES:
        games.set_position(0, np.zeros((20, 10)), piece)
        counts[piece] = int(games.legal().sum())
    assert counts == {"I": 17, "O": 9, "T": 34, "S": 17, "Z": 17, "J": 34, "L": 34}
    assert games.action_space.n == 34


def position(picture, piece, features="dellacherie-thiery"):
    """A game from a picture, top row first."""
    cells = np.array([[c == "#" for c in row] for row in picture[::-1]])
    games = tetris.Games(1, cells.shape[1], cells.shape[0], features)
    games.set_position(0, cells, piece)
    return games


def test_features_of_a_board_worked_out_by_hand():
    """An O dropped into the right corner of the board in the docstring of the well feature's definition."""
    picture = [
        "..........",
        "..........",
        "..........",
        "...X......",
        "...XX.....",
        ".X.XX.....",
        ".XXXXX.X..",
        ".XXXXX.X..",
        "XXXXX..X..",
        "...XXX.X..",
        "X.X..X.X..",
    ]
    games = position([row.replace("X", "#") for row in picture], "O")
    phi = dict(zip(tetris.feature_names("dellacherie-thiery"), games.observe()[0, 8, 1:]))
    # Wells: 3 + 2 + 1 in column 0, 1 in columns 1 and 2, 5 + 4 + 2 + 1 in column 6 (8 and 9 fill up to two rows).
    assert phi["cumulative wells"] == 6 + 1 + 1 + 12
    assert phi["landing height"] == 0.5
    assert phi["eroded piece cells"] == 0
    assert phi["holes"] == 1 + 2 + 1 + 1 + 1 + 1  # columns 0 to 5
    assert phi["rows with holes"] == 3
    assert phi["hole depth"] == 1 + 4 + 3 + 7 + 6 + 2


def test_four_rows_at_once():
    games = position([".#########"] * 4, "I")
    assert games.legal().sum() == 1
    (slot,) = np.flatnonzero(games.legal()[0])
    assert games.observe()[0, slot, 2] == 16  # eroded piece cells: four rows times four cells
    games.seed(0, np.random.default_rng(0))
    rewards, over = games.step(np.array([slot]))
    assert rewards[0] == 4
    assert not over[0]
    assert not games.boards.any()


def test_pieces_are_uniform():
    games = tetris.Games(1)
    games.seed(0, np.random.default_rng(0))
    draws = np.array([(kernels.random_bits(games._streams[0]) * 7) >> 32 for _ in range(70_000)])
    counts = np.bincount(draws, minlength=7)
    assert len(counts) == 7
    chi_square = ((counts - 10_000) ** 2 / 10_000).sum()
    assert chi_square < 22.5  # the 0.999 quantile with 6 degrees of freedom
    pairs = np.bincount(7 * draws[:-1] + draws[1:], minlength=49)
    assert ((pairs - 69_999 / 49) ** 2 / (69_999 / 49)).sum() < 84.1  # 0.999 quantile with 48 degrees of freedom


# The weights that Thiery and Scherrer (2009) publish for their controller, in the order of `feature_names`.
BCTS = [-12.63, 6.60, -9.22, -19.77, -13.08, -10.49, -1.61, -24.04, 0.0]


def test_published_controller_scores_as_published():
    """On 10 x 10 that controller is reported at about 4,000 rows per game; 25 games give ±800."""
    lines, placements = tetris.play(BCTS, 25, seed=3, height=10)
    assert 1500 < lines.mean() < 9000
    # Every row takes ten cells and every piece brings four; what is left lies on the last board.
    left = 4 * placements - 10 * lines
    assert ((left >= 0) & (left <= 100)).all()


@pytest.mark.parametrize("greedy", [True, False])
def test_compiled_games_follow_the_policy_of_the_environment(greedy):
    """`play` against the same policy on the environment: the greedy game move for move, the softmax in the mean."""
    theta = np.array([-1.0, 0.5, -0.6, -1.0, -1.0, -0.5, -0.1, -1.0, 0.1]) * (1 if greedy else 0.3)
    games = 12 if greedy else 400
    lines, placements = tetris.play(theta, games, seed=9, height=6, greedy=greedy)
    env = gym.make_vec("npg/Tetris-v0", games, height=6)
    observations, _ = env.reset(seed=1)
    if greedy:  # the same pieces
        env.batch._streams[:] = np.random.default_rng(9).integers(2**64, size=(games, 2, 1), dtype=np.uint64)[:, 0]
        env.batch.restart(np.arange(games))
        observations = env.batch.observe()
    rng = np.random.default_rng(0)
    total, count, running = np.zeros(games), np.zeros(games, dtype=int), np.ones(games, dtype=bool)
    while running.any():
        if greedy:
            phi = observations[..., 1:].astype(np.float64)
            score = sum(theta[k] * phi[..., k] for k in range(9))  # in the kernel's order, so that ties are the same
            action = np.where(observations[..., 0] != 0, score, -np.inf).argmax(-1)
        else:
            logits = np.where(observations[..., 0] != 0, observations[..., 1:] @ theta, -np.inf)
            p = np.exp(logits - logits.max(axis=1, keepdims=True))
            action = (p.cumsum(axis=1) > rng.random((games, 1)) * p.sum(axis=1, keepdims=True)).argmax(axis=1)
        observations, rewards, over, _, _ = env.step(action)
        total += rewards * running
        count += running
        running &= ~over
    if greedy:
        np.testing.assert_array_equal(lines, total)
        np.testing.assert_array_equal(placements, count)
    else:
        for a, b in ((lines, total), (placements, count)):
            error = np.sqrt((a.var() + b.var()) / games)
            assert error > 0
            assert abs(a.mean() - b.mean()) < 4 * error


def test_games_do_not_depend_on_how_many_are_played():
    few, _ = tetris.play(BCTS, 2, seed=0, height=8)
    many, _ = tetris.play(BCTS, 5, seed=0, height=8)
    np.testing.assert_array_equal(few, many[:2])


def test_max_placements_cuts_a_game():
    _, placements = tetris.play(BCTS, 3, seed=0, max_placements=40)
    np.testing.assert_array_equal(placements, 40)


def test_masks_are_where_maskable_ppo_looks_for_them():
    from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported

    env = make_vec_env("npg/Tetris-v0", 3, seed=0, env_kwargs={"height": 8})
    observations = env.reset()
    assert is_masking_supported(env)
    np.testing.assert_array_equal(get_action_masks(env), observations[..., 0] == 1)
    np.testing.assert_array_equal(env.get_attr("action_masks", 2)[0](), observations[2, :, 0] == 1)
    with pytest.raises(AttributeError):
        env.env_method("other")


@pytest.mark.parametrize("features", tetris.FEATURES)
def test_checkers_accept_it(features):
    gymnasium_check(gym.make("npg/Tetris-v0", features=features).unwrapped, skip_render_check=True)
    sb3_check(gym.make("npg/Tetris-v0", features=features, height=10))


def test_sampling_the_action_space_plays_legal_games():
    env = gym.make("npg/Tetris-v0", height=8)
    env.action_space.seed(0)
    env.reset(seed=0)
    over = False
    for _ in range(200):
        slot = env.action_space.sample()
        assert env.unwrapped.action_masks()[slot]
        _, _, over, _, _ = env.step(slot)
        if over:
            break
    assert over


def test_sampling_the_action_space_of_a_vector_plays_legal_games():
    env = gym.make_vec("npg/Tetris-v0", 8, height=8)
    assert env.action_space == gym.vector.utils.batch_space(env.single_action_space, 8)
    env.action_space.seed(0)
    env.reset(seed=0)
    ended, slots = 0, set()
    for _ in range(200):
        actions = env.action_space.sample()
        assert env.action_space.contains(actions)
        assert env.unwrapped.action_masks()[np.arange(8), actions].all()
        slots |= set(actions.tolist())
        _, _, over, _, _ = env.step(actions)
        ended += over.sum()
    assert ended > 8
    assert slots == set(range(34))  # all of them are drawn, not the first legal one
    copied = copy.deepcopy(env.action_space)
    assert copied == env.action_space
    assert (np.diff([copied.sample() for _ in range(50)], axis=0) != 0).any()


@pytest.mark.parametrize("size", [{"width": 3}, {"height": 3}, {"width": 33}, {"height": 61}])
def test_a_board_that_does_not_hold_the_pieces_is_refused(size):
    ((name, value),) = size.items()
    with pytest.raises(ValueError, match=f"{name} must be between 4 .* got {value}"):
        gym.make("npg/Tetris-v0", **size)
    with pytest.raises(ValueError, match=name):
        tetris.play(BCTS, 1, seed=0, **size)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"features must be one of .* got 'fahey'"):
        tetris.Games(1, features="fahey")
    with pytest.raises(ValueError, match=r"cells must have the shape \(20, 10\), got \(10, 20\)"):
        tetris.Games(1).set_position(0, np.zeros((10, 20)), "T")
    with pytest.raises(ValueError, match="piece must be one letter of IOTSZJL, got 'X'"):
        tetris.Games(1).set_position(0, np.zeros((20, 10)), "X")
    with pytest.raises(ValueError, match="theta must be 9 finite weights"):
        tetris.play(np.zeros(8), 1, seed=0)
    with pytest.raises(ValueError, match="theta must be 22 finite weights"):
        tetris.play(np.full(22, np.nan), 1, seed=0, features="bertsekas")


@pytest.mark.parametrize("action", [33, 34, -1, 0.5])
def test_an_unused_slot_is_an_error_that_names_piece_and_remedy_and_moves_nothing(action):
    env = tetris.TetrisVectorEnv(2)
    env.reset(seed=0)
    for i in range(2):
        env.batch.set_position(i, np.zeros((20, 10)), "O")
    before = env.batch.observe()
    with pytest.raises(
        ValueError, match=rf"action {action}.* piece O in copy 1: the slot is not used .* legal are \[0, 1"
    ):
        env.step(np.array([0, action]))
    np.testing.assert_array_equal(env.batch.observe(), before)
    assert not env.batch.boards.any()


def test_a_placement_above_the_top_is_an_error_that_says_so():
    games = position(["#........."] * 4, "O")
    with pytest.raises(ValueError, match="rotation 0 in column 0 would stick out of the top"):
        games.step(np.array([0]))


def test_a_finished_game_asks_for_reset():
    env = gym.make("npg/Tetris-v0", height=4).unwrapped
    env.reset(seed=0)
    over = False
    while not over:
        _, _, over, _, _ = env.step(np.flatnonzero(env.action_masks())[0])
    with pytest.raises(ValueError, match=r"the game is over, call reset\(\)"):
        env.step(0)


@pytest.mark.parametrize("mode", ["human", "ansi", "rgb_array"])
def test_rendering_shows_board_and_piece(mode, capsys):
    env = gym.make("npg/Tetris-v0", height=6, render_mode=mode)
    env.reset(seed=0)
    env.step(env.unwrapped.action_masks().argmax())
    shown = env.render()
    if mode == "rgb_array":
        assert shown.shape == (12 * 11, 120, 3)
        assert shown.dtype == np.uint8
    else:
        text = capsys.readouterr().out if mode == "human" else shown
        assert text.count("█") % 4 == 0
        assert "█" in text
        assert "next: " in text


@pytest.mark.slow
def test_without_numba_the_error_names_the_extra():
    code = (
        "import sys; sys.modules['numba'] = None; import envs.registration, gymnasium; gymnasium.make('npg/Tetris-v0')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install numba" in result.stderr
    other = code.replace("Tetris", "LQR")
    assert subprocess.run([sys.executable, "-c", other], capture_output=True, check=False).returncode == 0
