import warnings

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import VecTransposeImage, is_vecenv_wrapped

from envs import make_vec_env
from envs.atari import EnvPoolAtariVecEnv, Game, ale_games, envpool_games
from envs.envpool_vec_env import import_envpool
from envs.seeding import environment_seeds

needs_envpool = pytest.mark.skipif(not envpool_games(), reason="needs EnvPool")
needs_ale = pytest.mark.skipif(not ale_games(), reason="needs ale-py")
needs_either = pytest.mark.skipif(not (envpool_games() or ale_games()), reason="needs EnvPool or ale-py")
BACKENDS = [pytest.param("envpool", marks=needs_envpool), pytest.param("gymnasium", marks=needs_ale)]


@needs_either
@pytest.mark.parametrize(
    ("env_id", "name", "sticky"),
    [
        ("ALE/Pong-v5", "pong", 0.25),
        ("Pong-v5", "pong", 0.0),
        ("PongNoFrameskip-v4", "pong", 0.0),
        ("ALE/TicTacToe3D-v5", "tictactoe3d", 0.25),
        ("SpaceInvadersNoFrameskip-v4", "spaceinvaders", 0.0),
    ],
)
def test_ids(env_id, name, sticky):
    game = Game.parse(env_id, False, {})
    assert (game.name, game.repeat_action_probability) == (name, sticky)
    assert game.episodic_life
    assert game.reward_clip


@pytest.mark.parametrize(
    "env_id", ["HalfCheetah-v5", "CartPole-v1", "Pong-v4", "ALE/PongNoFrameskip-v4", "ALE/Nothing-v5", "Nothing-v5"]
)
def test_other_ids_are_no_games(env_id):
    assert Game.parse(env_id, False, {}) is None


@needs_either
def test_settings_and_evaluation():
    assert Game.parse("Pong-v5", True, {"frame_skip": 2}) == Game("pong", 0.0, False, False, frame_skip=2)
    with pytest.raises(ValueError, match=r"\['stack'\].*frame_stack"):
        Game.parse("Pong-v5", False, {"stack": 2})


@needs_either
@pytest.mark.parametrize(
    ("name", "wrong", "right", "what"),
    [
        ("noop_max", [-1, 1.5, True, None], [0, 1], "an integer of at least 0"),
        ("frame_skip", [0, -1, "4"], [1], "an integer of at least 1"),
        ("frame_stack", [0, -1], [1], "an integer of at least 1"),
        ("max_episode_steps", [0], [1], "an integer of at least 1"),
        ("repeat_action_probability", [-0.1, 2, float("nan"), "0.5"], [0, 1, 0.5], "a number from 0 to 1"),
        ("episodic_life", [3, "no"], [True, False], "True or False"),
        ("reward_clip", [0], [True], "True or False"),
        ("full_action_space", [None], [True], "True or False"),
    ],
)
def test_values_that_no_game_can_have_are_refused(name, wrong, right, what):
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^env_kwargs\['{name}'\]={value!r} must be {what}\.$"):
            Game.parse("Pong-v5", False, {name: value})
    for value in right:
        assert getattr(Game.parse("Pong-v5", False, {name: value}), name) == value


@needs_envpool
def test_envpool_s_games_begin_with_a_step_of_doing_nothing():
    with pytest.raises(ValueError, match=r"noop_max.*=0 is not for EnvPool: use backend='gymnasium', or at least 1"):
        make_vec_env("Pong-v5", 1, backend="envpool", env_kwargs={"noop_max": 0})
    make_vec_env("Pong-v5", 1, 0, backend="envpool", env_kwargs={"noop_max": 1}).reset()


@needs_ale
def test_a_game_that_begins_at_once_is_gymnasium_s():
    env = make_vec_env("Pong-v5", 2, 0, env_kwargs={"noop_max": 0})
    assert not isinstance(env.unwrapped, EnvPoolAtariVecEnv)
    env.reset()


def play(env, steps, seed=0):
    """Random actions → rewards, and the infos of the steps that end an episode."""
    env.reset()
    rng = np.random.default_rng(seed)
    rewards, endings = [], []
    for _ in range(steps):
        observations, r, dones, infos = env.step(rng.integers(0, env.action_space.n, env.num_envs))
        assert observations.dtype == np.uint8
        rewards.append(r)
        endings += [info for info, done in zip(infos, dones) if done]
    return np.array(rewards), endings


@pytest.mark.parametrize("backend", BACKENDS)
def test_learning_sees_lives_and_signs(backend):
    env = make_vec_env("BreakoutNoFrameskip-v4", 2, seed=0, backend=backend)
    assert env.observation_space == gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    assert env.action_space == gym.spaces.Discrete(4)
    rewards, endings = play(env, 500)
    games = [ending["episode"] for ending in endings if "episode" in ending]
    assert {0.0, 1.0} >= set(np.unique(rewards))
    # Breakout has five lives; of the last game of each environment only a part was played.
    assert 5 * len(games) <= len(endings) < 5 * (len(games) + 2)
    assert len(games) >= 2
    assert all(20 < game["l"] < 400 for game in games)  # steps of four frames
    assert all(ending["terminal_observation"].shape == (4, 84, 84) for ending in endings)
    assert not any(ending["TimeLimit.truncated"] for ending in endings)


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_sees_games_and_scores(backend):
    env = make_vec_env("SpaceInvadersNoFrameskip-v4", 1, seed=0, backend=backend, evaluation=True)
    rewards, endings = play(env, 1200)
    assert rewards.max() >= 5  # the least that an invader is worth
    assert len(endings) >= 1
    length = endings[0]["episode"]["l"]
    assert endings[0]["episode"]["r"] == rewards[:length].sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_time_limit_truncates_the_game(backend):
    env = make_vec_env("PongNoFrameskip-v4", 1, seed=0, backend=backend, env_kwargs={"max_episode_steps": 40})
    _, endings = play(env, 85)
    assert [(e["TimeLimit.truncated"], e["episode"]["l"]) for e in endings] == [(True, 40), (True, 40)]


@needs_envpool
def test_statistics_are_of_the_game_whatever_the_learner_sees():
    """One life after the other goes through the same game, so that scores add up over lives."""
    env = make_vec_env("SpaceInvadersNoFrameskip-v4", 1, seed=0)
    rewards, endings = play(env, 600)
    whole = next(e["episode"] for e in endings if "episode" in e)
    assert set(np.unique(rewards)) <= {0.0, 1.0}
    assert whole["r"] % 5 == 0
    assert whole["r"] > rewards[: whole["l"]].sum()  # points, not signs


@needs_envpool
def test_no_transition_is_added_or_lost():
    """EnvPool left to itself answers the step after an ending with the next life; take those answers out."""
    n, steps = 2, 400
    env = make_vec_env("BreakoutNoFrameskip-v4", n, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pool = import_envpool().make_gymnasium(
            "Breakout-v5", num_envs=n, seed=environment_seeds(3, n), episodic_life=True, reward_clip=True
        )
    np.testing.assert_array_equal(env.reset(), pool.reset()[0])
    rng, endings = np.random.default_rng(0), 0
    for _ in range(steps):
        actions = rng.integers(0, 4, n)
        ours, rewards, dones, infos = env.step(actions)
        theirs, expected, terminated, truncated, _ = pool.step(actions)
        np.testing.assert_array_equal(rewards, expected)
        np.testing.assert_array_equal(dones, terminated | truncated)
        for i in np.flatnonzero(dones):
            np.testing.assert_array_equal(infos[i]["terminal_observation"], theirs[i])
            pool.send(np.zeros(1, dtype=np.int32), np.array([i]))
            theirs[i] = pool.recv()[0]
            endings += 1
        np.testing.assert_array_equal(ours, theirs)
    assert endings > 5


@needs_ale
def test_gymnasium_renders():
    env = make_vec_env("ALE/Pong-v5", env_kwargs={"render_mode": "rgb_array"})
    assert is_vecenv_wrapped(env, VecTransposeImage)
    env.reset()
    assert env.render().shape == (210, 160, 3)


@needs_envpool
def test_auto_takes_envpool():
    assert isinstance(make_vec_env("ALE/Pong-v5"), EnvPoolAtariVecEnv)
