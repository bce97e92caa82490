"""Connect Four: its rules against a slow board, its opponent, and what is refused."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check
from scipy.stats import chisquare

import envs  # noqa: F401
from envs.connect_four import COLUMNS, ROWS, Games, wins


def four_in_a_row(board):
    """The slow way: a board (6, 7) of 0 and 1."""
    for r in range(ROWS):
        for c in range(COLUMNS):
            for dr, dc in ((0, 1), (1, 0), (1, 1), (1, -1)):
                cells = [(r + k * dr, c + k * dc) for k in range(4)]
                if all(0 <= y < ROWS and 0 <= x < COLUMNS and board[y, x] for y, x in cells):
                    return True
    return False


def test_wins_are_those_of_the_slow_way():
    rng = np.random.default_rng(0)
    boards = rng.random((600, ROWS, COLUMNS)) < rng.uniform(0.2, 0.6, (600, 1, 1))
    bits = (boards.astype(np.int64) << (7 * np.arange(COLUMNS) + np.arange(ROWS)[:, None])).sum((1, 2))
    expected = np.array([four_in_a_row(board) for board in boards])
    assert 100 < expected.sum() < 500
    np.testing.assert_array_equal(wins(bits), expected)


@pytest.mark.slow
def test_whole_games_keep_the_rules():
    n, rng = 64, np.random.default_rng(1)
    games = Games(n)
    for i in range(n):
        games.seed(i, np.random.default_rng(i))
    games.restart(np.arange(n))
    outcomes = {-1.0: 0, 0.0: 0, 1.0: 0}
    for _ in range(400):
        before = games.observe()
        legal = games.legal()
        np.testing.assert_array_equal(legal, before[:, :, -1].sum(1) == 0)
        actions = np.array([rng.choice(np.flatnonzero(row)) for row in legal])
        rewards, over = games.step(actions)
        after = games.observe()
        for i in range(n):
            mine, theirs = after[i]
            new = (after[i] - before[i]).sum((1, 2))
            assert new[0] == 1
            assert new[1] == (1 if rewards[i] != 1 and (before[i].sum() + 1 < ROWS * COLUMNS) else 0)
            assert (mine + theirs).max() == 1
            assert all((np.diff(column) <= 0).all() for column in (mine + theirs).T)  # no disc hangs in the air
            won, lost = four_in_a_row(mine), four_in_a_row(theirs)
            assert rewards[i] == won - lost
            assert over[i] == (won or lost or (mine + theirs).all())
            if over[i]:
                outcomes[rewards[i]] += 1
        if over.any():
            games.restart(np.flatnonzero(over))
    assert outcomes[1.0] > 200
    assert outcomes[-1.0] > 200


def test_a_full_board_is_a_draw():
    games = Games(1)
    games.seed(0, np.random.default_rng(0))
    games.restart(np.array([0]))
    stripes = np.zeros((ROWS, COLUMNS), dtype=int)  # 1 and 2 in pairs of rows that shift: nobody has four
    for r in range(ROWS):
        for c in range(COLUMNS):
            stripes[r, c] = 1 + (c + r // 2) % 2
    stripes[-1, 3] = 0
    weights = np.int64(1) << (7 * np.arange(COLUMNS) + np.arange(ROWS)[:, None])
    games.discs[:, 0] = [(weights * (stripes == player)).sum() for player in (1, 2)]
    games.heights[0] = (stripes != 0).sum(0)
    assert games.legal()[0].tolist() == [False] * 3 + [True] + [False] * 3
    rewards, over = games.step(np.array([3]))
    assert (rewards[0], over[0]) == (0.0, True)
    assert games.observe().sum() == ROWS * COLUMNS


def test_the_opponent_begins_every_second_game_and_plays_uniformly():
    n = 7000
    games = Games(n)
    for i in range(n):
        games.seed(i, np.random.default_rng([i, 5]))
    games.restart(np.arange(n))
    begun = games.observe()[:, 1].sum(1)  # (n, columns)
    assert abs(begun.sum() / n - 0.5) < 0.03
    assert chisquare(begun.sum(0)).pvalue > 1e-4


def test_it_is_an_environment():
    gymnasium_check(gym.make("npg/ConnectFour-v0").unwrapped, skip_render_check=True)


def test_masks_of_both_forms_tell_the_columns_that_are_not_full():
    env, vector = gym.make("npg/ConnectFour-v0"), gym.make_vec("npg/ConnectFour-v0", 2)
    env.reset(seed=0)
    vector.reset(seed=0)
    env.unwrapped.batch.heights[0, 2] = ROWS
    assert env.get_wrapper_attr("action_masks")().tolist() == [True, True, False, True, True, True, True]
    vector.unwrapped.batch.heights[1, 6] = ROWS
    assert vector.unwrapped.action_masks().sum(1).tolist() == [7, 6]


@pytest.mark.parametrize("action", [-1, 7, 2, 0.5])
def test_a_move_that_cannot_be_is_refused_and_changes_nothing(action):
    env = gym.make("npg/ConnectFour-v0").unwrapped
    env.reset(seed=0)
    env.batch.heights[0, 2] = ROWS
    before = env.batch.discs.copy()
    with pytest.raises(
        ValueError, match=r"in copy 0 must be a column that is not full; legal are \[0, 1, 3, 4, 5, 6\]"
    ):
        env.step(action)
    np.testing.assert_array_equal(env.batch.discs, before)
    env.batch.over[0] = True
    with pytest.raises(ValueError, match="is over, call reset"):
        env.step(0)


@pytest.mark.parametrize("mode", ["ansi", "rgb_array"])
def test_it_can_be_looked_at(mode):
    env = gym.make("npg/ConnectFour-v0", render_mode=mode)
    env.reset(seed=1)
    env.step(3)
    seen = env.render()
    if mode == "ansi":
        assert seen.count("X") == 1
        assert seen.count("O") in (1, 2)
    else:
        assert seen.shape == (144, 168, 3)
        assert (seen == [213, 94, 0]).all(-1).any()
