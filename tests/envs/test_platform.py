"""The platforms: their rules against a slow copy, what is seen of them, and what is refused."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check

import envs  # noqa: F401
from envs.platform import FARTHEST, NEAREST, PLATFORMS, Platforms


def made(n, seed=0):
    batch = Platforms(n)
    for i in range(n):
        batch.seed(i, np.random.default_rng([seed, i]))
    batch.restart(np.arange(n))
    return batch


def slow(begin, width, amplitude, phase, on, offset, move, amount):
    """One step of one copy by scalars: on which platform the runner is, how far from its edge, and whether it fell."""

    def edge(k, time):
        return begin[k] + amplitude[k] * np.sin(phase[k] + 2 * np.pi / 12 * time)

    reach = [0.4, 0.9, 0.8][move] * (amount + 1) / 2 + [0.1, 0.5, 1.4][move]
    place = edge(on, 0) + offset + reach
    if move == 0:
        place += edge(on, 1) - edge(on, 0)
    for k in range(PLATFORMS):
        if edge(k, 1) <= place <= edge(k, 1) + width[k]:
            return k, place - edge(k, 1), False
    return on, place - edge(on, 1), True


def wise(batch):
    """Moves that know the rules: aim at the middle of the next platform, or as far as one can, or run to the edge."""
    every = np.arange(len(batch.on))
    ahead = np.minimum(batch.on + 1, PLATFORMS - 1)
    later = batch.begins + batch.amplitudes * np.sin(batch.phases + 2 * np.pi / 12)
    nearest = later[every, ahead] - batch.edges()[every, batch.on] - batch.offsets
    left = batch.widths[every, batch.on] - batch.offsets
    wanted = np.minimum(nearest + batch.widths[every, ahead] / 2, FARTHEST[2])
    far = wanted < nearest + 0.1
    wanted = np.where(far, np.minimum(0.8 * left, 0.5), wanted)
    moves = np.where(far, 0, np.where(wanted > FARTHEST[1], 2, 1))
    amounts = np.clip(2 * (wanted - NEAREST[moves]) / (FARTHEST - NEAREST)[moves] - 1, -1, 1)
    return moves, np.repeat(amounts[:, None], 3, 1).astype(np.float32)


def test_steps_are_those_of_the_slow_way():
    n, rng = 64, np.random.default_rng(0)
    batch = made(n)
    fallen = reached = ran = 0
    for _ in range(60):
        moves, amounts = rng.integers(3, size=n), rng.uniform(-1, 1, (n, 3)).astype(np.float32)
        if rng.random() < 0.7:
            moves, amounts = wise(batch)
        rows = [[a[i].copy() for a in (batch.begins, batch.widths, batch.amplitudes, batch.phases)] for i in range(n)]
        on, offsets = batch.on.copy(), batch.offsets.copy()
        rewards, over = batch.step((moves, amounts))
        for i in range(n):
            k, offset, fell = slow(*rows[i], on[i], offsets[i], moves[i], float(amounts[i, moves[i]]))
            assert (batch.on[i], over[i]) == (k, fell or k == PLATFORMS - 1)
            assert batch.offsets[i] == pytest.approx(offset, abs=1e-9)
            assert rewards[i] == k - on[i]
            fallen, reached, ran = fallen + fell, reached + (k == PLATFORMS - 1), ran + (moves[i] == 0 and not fell)
        if over.any():
            batch.restart(np.flatnonzero(over))
    assert min(fallen, reached, ran) > 20


def test_whoever_knows_the_rules_comes_to_the_end():
    batch = made(500, seed=3)
    returns, used = np.zeros(500), np.zeros(3, dtype=int)
    for _ in range(30):
        moves, amounts = wise(batch)
        open_ = ~batch.over
        batch.over[:] = False  # those at the end stay there
        before = batch.on.copy()
        rewards, _ = batch.step((np.where(open_, moves, 0), np.where(open_[:, None], amounts, -1)))
        returns += np.where(open_, rewards, 0)
        used += np.bincount(moves[open_], minlength=3)
        batch.over |= ~open_
        assert (batch.on[~open_] == before[~open_]).all()
    assert np.mean(returns == PLATFORMS - 1) > 0.99
    assert used.min() > 200  # every move has its use


def test_platforms_never_touch_and_can_be_reached():
    batch = made(2000, seed=5)
    gaps = batch.begins[:, 1:] - batch.begins[:, :-1] - batch.widths[:, :-1]
    swing = batch.amplitudes[:, 1:] + batch.amplitudes[:, :-1]
    assert (gaps - swing).min() > 0
    assert (gaps + swing).max() < FARTHEST[2]
    assert np.abs(batch.observe()).max() < 5


def test_what_is_seen_tells_where_the_next_platform_will_be():
    """A jump that is aimed by the observation alone comes down in the middle."""
    batch = made(300, seed=7)
    seen = batch.observe().astype(np.float64)
    turn = 2 * np.pi / 12
    shift = seen[:, 6] * (np.cos(turn) - 1) + seen[:, 7] * np.sin(turn)
    wanted = (seen[:, 2] + seen[:, 3]) / 2 + shift
    near = (wanted > NEAREST[1]) & (wanted < FARTHEST[2])
    moves = np.where(wanted > FARTHEST[1], 2, 1)
    amounts = np.clip(2 * (wanted - NEAREST[moves]) / (FARTHEST - NEAREST)[moves] - 1, -1, 1)
    _, over = batch.step((moves, np.repeat(amounts[:, None], 3, 1)))
    assert near.sum() > 200
    assert not over[near].any()
    np.testing.assert_allclose(batch.offsets[near], batch.widths[near, 1] / 2, atol=1e-5)
    np.testing.assert_allclose(seen[:, 0] + seen[:, 1], batch.widths[:, 0], atol=1e-6)


def test_it_is_an_environment():
    gymnasium_check(gym.make("npg/Platform-v0").unwrapped, skip_render_check=True)


def test_a_vector_is_its_copies_and_a_seed_says_all():
    vector = gym.make_vec("npg/Platform-v0", 3)
    single = [gym.make("npg/Platform-v0") for _ in range(3)]
    seen, _ = vector.reset(seed=[5, 6, 7])
    each = [env.reset(seed=5 + i)[0] for i, env in enumerate(single)]
    np.testing.assert_array_equal(seen, each)
    rng, ended = np.random.default_rng(0), 0
    for _ in range(100):
        moves, amounts = rng.integers(3, size=3), rng.uniform(-1, 1, (3, 3)).astype(np.float32)
        seen, rewards, terminated, truncated, _ = vector.step((moves, amounts))
        for i, env in enumerate(single):
            observation, reward, over, cut, _ = env.step((moves[i], amounts[i]))
            assert (rewards[i], terminated[i], truncated[i]) == (reward, over, cut)
            if over or cut:
                observation, _ = env.reset()
                ended += 1
            np.testing.assert_array_equal(seen[i], observation)
    assert ended > 20


def test_an_episode_without_an_end_is_cut_off():
    assert gym.spec("npg/Platform-v0").max_episode_steps == 50
    env = gym.make("npg/Platform-v0", max_episode_steps=2)
    env.reset(seed=0)
    for step in range(2):
        _, reward, terminated, truncated, _ = env.step((0, np.full(3, -1, np.float32)))
        assert (reward, terminated, truncated) == (0.0, False, step == 1)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ((3, np.zeros(3)), "action 3, .* in copy 0 must be a move 0, 1 or 2, and three numbers from -1 to 1"),
        ((0.5, np.zeros(3)), "must be a move"),
        ((-1, np.zeros(3)), "must be a move"),
        ((1, np.array([0, 0, 1.5])), "three numbers"),
        ((1, np.array([0, np.nan, 0])), "three numbers"),
        ((1, np.zeros(2)), r"amounts of \(1, 3\), got \(1,\) and \(1, 2\)"),
    ],
)
def test_an_action_that_cannot_be_is_refused_and_changes_nothing(action, message):
    env = gym.make("npg/Platform-v0").unwrapped
    env.reset(seed=0)
    before = env.batch.observe()
    with pytest.raises(ValueError, match=message):
        env.step(action)
    np.testing.assert_array_equal(env.batch.observe(), before)
    env.batch.over[0] = True
    with pytest.raises(ValueError, match="is over, call reset"):
        env.step((0, np.zeros(3)))


@pytest.mark.parametrize("mode", ["ansi", "rgb_array"])
def test_it_can_be_looked_at(mode):
    env = gym.make("npg/Platform-v0", render_mode=mode)
    env.reset(seed=1)
    seen = env.render()
    if mode == "ansi":
        runner, ground = seen.split("\n")
        assert runner.strip() == "o"
        assert ground[runner.index("o")] == "="
        assert " " in ground.strip()
    else:
        assert seen.shape == (80, 240, 3)
        assert (seen == [213, 94, 0]).all(-1).any()
