"""EnvPool against Gymnasium: the same transitions from the same states, and the same endings."""

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("envpool")

from envs import make_vec_env
from envs.envpool_vec_env import SAME_AS_GYMNASIUM, EnvPoolVecEnv, EnvPoolVelocityVecEnv, _flat, import_envpool
from envs.seeding import environment_seeds
from envs.velocity import LIMITS, PLANAR

# --------------------------------------------------------------------- Gymnasium's state from EnvPool's observation


def classic(observation: np.ndarray) -> np.ndarray:
    return observation.astype(np.float64)


def acrobot(o: np.ndarray) -> np.ndarray:
    return np.array([np.arctan2(o[1], o[0]), np.arctan2(o[3], o[2]), o[4], o[5]], dtype=np.float64)


def hidden_root(n: int) -> Callable[[np.ndarray, Any], tuple[np.ndarray, np.ndarray]]:
    """The observation lacks the first n positions, which matter to nothing but the viewer."""

    def state(o: np.ndarray, env: Any) -> tuple[np.ndarray, np.ndarray]:
        split = env.model.nq - n
        return np.concatenate([np.zeros(n), o[:split]]), o[split : split + env.model.nv]

    return state


def double_pendulum(o: np.ndarray, env: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([o[:1], np.arctan2(o[1:3], o[3:5])]), o[5:8]


def reacher(o: np.ndarray, env: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([np.arctan2(o[2:4], o[:2]), o[4:6]]), np.concatenate([o[6:8], [0, 0]])


def pusher(o: np.ndarray, env: Any) -> tuple[np.ndarray, np.ndarray]:
    """Object and goal are observed in the world, but their joints count from where the model puts them."""
    positions, velocities = np.zeros(env.model.nq), np.zeros(env.model.nv)
    positions[:7], velocities[:7] = o[:7], o[7:14]
    env.set_state(positions, velocities)
    origin = np.concatenate([env.get_body_com("object")[:2], env.get_body_com("goal")[:2]])
    positions[-4:] = np.concatenate([o[17:19], o[20:22]]) - origin
    env.set_state(positions, velocities)
    if not np.allclose(env.get_body_com("object")[:2], o[17:19]):  # the joints may be ordered y, x
        positions[-4:] = positions[[-3, -4, -1, -2]]
    return positions, velocities


STATES = {
    "Acrobot-v1": acrobot,
    "CartPole-v1": classic,
    "MountainCar-v0": classic,
    "MountainCarContinuous-v0": classic,
    "Ant-v5": hidden_root(2),
    "HalfCheetah-v5": hidden_root(1),
    "Hopper-v5": hidden_root(1),
    "Humanoid-v5": hidden_root(2),
    "HumanoidStandup-v5": hidden_root(2),
    "InvertedDoublePendulum-v5": double_pendulum,
    "InvertedPendulum-v5": hidden_root(0),
    "Pusher-v5": pusher,
    "Reacher-v5": reacher,
    "Swimmer-v5": hidden_root(2),
    "Walker2d-v5": hidden_root(1),
}
CLASSIC = [i for i in STATES if not i.endswith("-v5")]
# These observations tell the state of an episode's beginning only: later velocities are clipped (Walker2d), angles lack
# whole turns (Reacher), and the object moves unseen (Pusher).
BEGINNING = {"Pusher-v5", "Reacher-v5", "Walker2d-v5"}
# These lie on the ground from the first step, with contacts that differ between MuJoCo's releases, of which EnvPool has
# one of its own. With that release (3.6) in Gymnasium as well they agree to 1e-12; their rewards agree at 1e-6 anyway.
GROUND = {"Ant-v5": 1e-4, "Humanoid-v5": 1e-4, "HumanoidStandup-v5": 1e-1}


class Twin:
    """One of Gymnasium's environments, put into the state of one of EnvPool's."""

    def __init__(self, env_id: str) -> None:
        if env_id not in CLASSIC:
            pytest.importorskip("mujoco")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.env = gym.make(env_id)
        self.id = env_id

    def put(self, observation: np.ndarray) -> None:
        self.env.reset(seed=0)
        inner = self.env.unwrapped
        if self.id in CLASSIC:
            inner.state = STATES[self.id](observation)
        else:
            inner.set_state(*STATES[self.id](observation, inner))

    def step(self, action: Any) -> tuple[np.ndarray, float, bool]:
        observation, reward, terminated, _, _ = self.env.step(action)
        return observation, float(reward), terminated


def native(env_id: str, n: int, seed: int) -> Any:
    """EnvPool as it is: float64, and left to itself after an ending."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_envpool().make_gymnasium(env_id, num_envs=n, seed=environment_seeds(seed, n))


def sample(space: gym.Space, n: int, rng: np.random.Generator) -> np.ndarray:
    if isinstance(space, gym.spaces.Discrete):
        return rng.integers(0, space.n, n)
    return rng.uniform(space.low, space.high, (n, *space.shape)).astype(np.float32)


def test_every_shared_id_is_compared():
    assert set(STATES) == SAME_AS_GYMNASIUM


@pytest.mark.parametrize("env_id", STATES)
def test_spaces_and_time_limit_are_gymnasiums(env_id):
    twin = Twin(env_id).env
    ours, theirs = make_vec_env(env_id), make_vec_env(env_id, backend="gymnasium")
    assert isinstance(ours, EnvPoolVecEnv)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert ours._time_limit == twin.spec.max_episode_steps


@pytest.mark.parametrize("env_id", STATES)
def test_first_steps_equal_gymnasiums(env_id):
    n, twin, rng = 16, Twin(env_id), np.random.default_rng(0)
    ours, pool = make_vec_env(env_id, n, seed=5), native(env_id, n, seed=5)
    exact = pool.reset()[0]
    np.testing.assert_array_equal(ours.reset(), exact.astype(np.float32))
    actions = sample(ours.action_space, n, rng)
    after, rewards, dones, _ = ours.step(actions)
    np.testing.assert_array_equal(after, pool.step(actions)[0].astype(np.float32))
    for i in range(n):
        twin.put(exact[i])
        observation, reward, terminated = twin.step(actions[i])
        tolerance = GROUND.get(env_id, 1e-6)
        np.testing.assert_allclose(after[i], observation, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(rewards[i], reward, rtol=1e-6, atol=1e-6)
        assert dones[i] == terminated


@pytest.mark.parametrize("env_id", [i for i in STATES if i not in GROUND])
def test_every_step_equals_gymnasiums(env_id):
    """From the states of EnvPool Gymnasium goes to the same next ones, through every kind of ending."""
    n, steps, rng = 2, 1100 if env_id == "HalfCheetah-v5" else 400, np.random.default_rng(1)
    twins = [Twin(env_id) for _ in range(n)]
    ours, pool = make_vec_env(env_id, n, seed=7), native(env_id, n, seed=7)
    exact = pool.reset()[0]
    np.testing.assert_array_equal(ours.reset(), exact.astype(np.float32))
    elapsed, finished = np.zeros(n, dtype=int), 0
    for _ in range(steps):
        actions = sample(ours.action_space, n, rng)
        if env_id == "Pusher-v5":  # gently, so that nothing collides
            actions *= 0.2
        if env_id.startswith("MountainCar"):  # swing up, so that the goal is reached
            forward = exact[:, 1] >= 0
            actions = forward * 2 if env_id == "MountainCar-v0" else np.where(forward, 1, -1)[:, None]
        before, (exact, _, _, _, _) = exact, pool.step(actions)
        after, rewards, dones, infos = ours.step(actions)
        elapsed += 1
        for i in range(n):
            if elapsed[i] == 1 or env_id not in BEGINNING:
                twins[i].put(before[i])
            observation, reward, terminated = twins[i].step(actions[i])
            truncated = elapsed[i] >= ours._time_limit
            np.testing.assert_allclose(exact[i], observation, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(rewards[i], reward, rtol=1e-6, atol=1e-6)
            assert dones[i] == (terminated or truncated)
            if not dones[i]:
                np.testing.assert_array_equal(after[i], exact[i].astype(np.float32))
                continue
            finished += 1
            np.testing.assert_array_equal(infos[i]["terminal_observation"], exact[i].astype(np.float32))
            assert infos[i]["TimeLimit.truncated"] == (truncated and not terminated)
            assert infos[i]["episode"]["l"] == elapsed[i]
            exact[i] = pool.reset(np.array([i]))[0]
            np.testing.assert_array_equal(after[i], exact[i].astype(np.float32))
            elapsed[i] = 0
    assert finished > 0 or env_id in ("Swimmer-v5", "Acrobot-v1")


# ---------------------------------------------------------------------------------------- robots with a limit


@pytest.mark.parametrize("name", LIMITS)
def test_a_robot_with_a_limit_has_gymnasium_s_costs(name):
    """From states of EnvPool, put into Gymnasium's robot; half of the steps are above the limit."""
    n, twin = 16, Twin(f"{name}-v5")
    exact = native(f"{name}-v5", n, seed=5).reset()[0]
    space = twin.env.action_space
    actions = sample(space, n, np.random.default_rng(0))
    speeds = []
    for observation, action in zip(exact, actions, strict=True):
        twin.put(observation)
        *_, info = twin.env.step(action)
        speeds.append(np.hypot(info["x_velocity"], info["y_velocity"]) if name in PLANAR else info["x_velocity"])
    limit = float(np.median([speed for speed in speeds if speed > 0]))
    costs = [float(speed > limit) for speed in speeds]
    assert 0 < sum(costs) < n - 1
    env = make_vec_env(f"npg/{name}Velocity-v5", n, seed=5, env_kwargs={"limit": limit})
    assert isinstance(env, EnvPoolVelocityVecEnv)
    env.reset()
    *_, infos = env.step(actions)
    assert [info["cost"] for info in infos] == costs


def test_a_robot_with_a_limit_has_a_cost_in_every_step_and_the_task_s_own_limit():
    """As EnvPool tells the velocities of the same steps, through the endings of episodes; the rest is the robot's."""
    n, rng = 4, np.random.default_rng(0)
    env, plain = make_vec_env("npg/HopperVelocity-v5", n, seed=3), make_vec_env("Hopper-v5", n, seed=3)
    pool = native("Hopper-v5", n, seed=3)
    pool.reset()
    assert env.limit == LIMITS["Hopper"]
    np.testing.assert_array_equal(env.reset(), plain.reset())
    found, ended = [], 0
    for _ in range(300):
        actions = sample(env.action_space, n, rng)
        velocities = pool.step(actions)[-1]["x_velocity"]
        *ours, infos = env.step(actions)
        *theirs, plain_infos = plain.step(actions)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
        costs = [info.pop("cost") for info in infos]
        assert costs == (velocities > LIMITS["Hopper"]).tolist()
        assert [info.keys() for info in infos] == [info.keys() for info in plain_infos]
        if ours[-1].any():
            pool.reset(np.flatnonzero(ours[-1]).astype(np.int32))
        found += costs
        ended += int(ours[-1].sum())
    assert 0 < sum(found) < len(found)
    assert ended > 5
    assert env.get_attr("spec")[0].id == "npg/HopperVelocity-v5"


def test_where_robots_with_a_limit_run_on_envpool():
    fast = [
        make_vec_env("npg/HopperVelocity-v5", 1, env_kwargs=kwargs)
        for kwargs in ({"limit": None}, {"limit": 1, "reset_noise_scale": 0.0})
    ]
    assert [type(env) for env in fast] == [EnvPoolVelocityVecEnv] * 2
    assert [env.limit for env in fast] == [LIMITS["Hopper"], 1.0]
    assert fast[1].get_attr("spec")[0].kwargs["limit"] == 1.0  # with which Gymnasium makes the same task
    slow = make_vec_env("npg/HopperVelocity-v5", 1, env_kwargs={"env_id": "HalfCheetah-v5"})
    assert slow.get_attr("limit") == [LIMITS["HalfCheetah"]]
    with pytest.raises(ValueError, match="limit=-1 must be a positive number of metres per second"):
        make_vec_env("npg/HopperVelocity-v5", 1, env_kwargs={"limit": -1})
    with pytest.raises(ValueError, match=r"env_kwargs has \['speed'\]"):
        make_vec_env("npg/HopperVelocity-v5", 1, backend="envpool", env_kwargs={"speed": 1})


# -------------------------------------------------------------------------------------------------------- endings


def balance(observations: np.ndarray) -> np.ndarray:
    return (observations @ [0.1, 0.5, 1.0, 1.0] > 0).astype(int)


def test_cartpole_is_truncated_at_500_and_terminated_before():
    env = make_vec_env("CartPole-v1", 2, seed=0)
    observations = env.reset()
    for step in range(1, 501):
        actions = balance(observations)
        actions[1] = 0
        observations, _, dones, infos = env.step(actions)
        assert dones[0] == (step == 500)
        if dones[1]:
            assert not infos[1]["TimeLimit.truncated"]
            assert step > 500 or abs(infos[1]["terminal_observation"][2]) > 12 * np.pi / 180
    assert infos[0]["TimeLimit.truncated"] is True
    assert infos[0]["episode"]["r"] == infos[0]["episode"]["l"] == 500
    assert np.abs(observations[0]).max() <= 0.05  # the next episode's first


@pytest.mark.parametrize("env_id", ["LunarLander-v3", "BipedalWalker-v3"])
def test_an_episode_that_fails_in_its_very_last_step_is_not_truncated(env_id):
    def end(limit: int | None = None) -> tuple[int, bool, float]:
        options = {} if limit is None else {"env_kwargs": {"max_episode_steps": limit}}
        env = make_vec_env(env_id, 1, seed=0, backend="envpool", **options)
        env.reset()
        action = np.zeros((1, *env.action_space.shape), env.action_space.dtype)
        while True:
            _, rewards, dones, infos = env.step(action)
            if dones[0]:
                return int(infos[0]["episode"]["l"]), infos[0]["TimeLimit.truncated"], float(rewards[0])

    steps, truncated, reward = end()
    assert (truncated, reward) == (False, -100)
    assert end(steps) == (steps, False, -100)
    assert end(steps - 1)[:2] == (steps - 1, True)


def test_half_cheetah_is_truncated_at_1000():
    env = make_vec_env("HalfCheetah-v5", 2, seed=0)
    env.reset()
    total = np.zeros(2)
    for step in range(1, 1001):
        _, rewards, dones, infos = env.step(np.full((2, 6), 0.1, dtype=np.float32))
        total += rewards
        assert dones.tolist() == [step == 1000] * 2
    for info, expected in zip(infos, total):
        assert info["TimeLimit.truncated"] is True
        assert info["episode"]["l"] == 1000
        np.testing.assert_allclose(info["episode"]["r"], expected, rtol=1e-6)


def test_failing_in_the_last_step_is_a_termination():
    """EnvPool itself reports it as truncated only."""

    def first_ending(limit: int) -> dict[str, Any]:
        env = make_vec_env("CartPole-v1", 1, seed=1, backend="envpool", env_kwargs={"max_episode_steps": limit})
        env.reset()
        while True:
            _, _, dones, infos = env.step(np.zeros(1, dtype=int))
            if dones[0]:
                return infos[0]

    length = first_ending(500)["episode"]["l"]
    for limit, truncated in ((length + 1, False), (length, False), (length - 1, True)):
        ending = first_ending(limit)
        assert ending["TimeLimit.truncated"] is truncated
        assert ending["episode"]["l"] == min(limit, length)


# --------------------------------------------------------------------------------------------------------- seeds


def run(env: Any, steps: int = 60) -> np.ndarray:
    first, rng = env.reset(), np.random.default_rng(0)
    return np.stack([first, *(env.step(sample(env.action_space, env.num_envs, rng))[0] for _ in range(steps))])


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Hopper-v5"])
def test_the_seed_determines_the_run(env_id):
    reference = run(make_vec_env(env_id, 3, seed=4))
    np.testing.assert_array_equal(run(make_vec_env(env_id, 3, seed=4, n_threads=1)), reference)
    env = make_vec_env(env_id, 3, seed=9)
    assert not np.array_equal(run(env), reference)
    assert env.seed(4) == environment_seeds(4, 3)
    np.testing.assert_array_equal(run(env), reference)
    assert not np.array_equal(run(env), reference)  # without a seed the streams go on


def test_environments_and_unseeded_runs_differ():
    first = run(make_vec_env("CartPole-v1", 3, seed=0), 0)[0]
    assert len(np.unique(first, axis=0)) == 3
    assert not np.array_equal(make_vec_env("CartPole-v1").reset(), make_vec_env("CartPole-v1").reset())


def test_large_seeds_are_accepted():
    first, again, other = (make_vec_env("CartPole-v1", 3, seed=2**32 - n).reset() for n in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


# -------------------------------------------------------------------------------------------------------- misuse


def test_actions_are_checked_before_envpool_sees_them():
    env = make_vec_env("CartPole-v1", 2, seed=0)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(2, dtype=int))
    env.reset()
    for actions in ([0, 2], [-1, 0]):
        with pytest.raises(ValueError, match=r"0, …, 1"):
            env.step(np.array(actions))
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        env.step(np.zeros(3, dtype=int))
    env.step(np.zeros(2, dtype=int))  # and none of this has hurt


def test_actions_may_be_overwritten_while_the_step_runs():
    stepped = []
    for overwrite in (False, True):
        env = make_vec_env("HalfCheetah-v5", 8, seed=0, n_threads=1)
        env.reset()
        actions = np.ones((8, 6))
        env.step_async(actions)
        if overwrite:
            actions[:] = -1.0
        stepped.append(env.step_wait()[0])
    np.testing.assert_array_equal(*stepped)


def test_options_reach_the_task_and_unknown_ones_are_named():
    still = EnvPoolVecEnv("HalfCheetah-v5", config={"reset_noise_scale": 0.0})
    np.testing.assert_array_equal(still.reset(), np.zeros((1, 17)))
    with pytest.raises(ValueError, match=r"\['reset_noise'\].*reset_noise_scale"):
        EnvPoolVecEnv("HalfCheetah-v5", config={"reset_noise": 0.0})
    with pytest.raises(ValueError, match="num_threads"):
        EnvPoolVecEnv("HalfCheetah-v5", config={"num_threads": 4})


@pytest.mark.parametrize("task", ["IntersectionMultiAgent-v0", "Chess-v1", "Cig-v1", "MultiDuel-v1"])
def test_tasks_with_several_actions_or_players_are_refused(task):
    with pytest.raises(ValueError, match=f"'{task}' cannot be used"):
        EnvPoolVecEnv(task)


@pytest.mark.parametrize("task", ["CheetahRun-v1", "BinPack-v2"])  # of two arrays, and of arrays within arrays
def test_several_arrays_are_a_dict(task):
    n, steps = 2, {"CheetahRun-v1": 1005, "BinPack-v2": 30}[task]
    ours = make_vec_env(task, n, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pool = import_envpool().make_gymnasium(task, num_envs=n, seed=environment_seeds(3, n))

    def assert_same(a, b, part=...):
        assert a.keys() == {f"{name}/{inner}" for name in b for inner in b[name] if isinstance(b[name], dict)} | {
            name for name in b if not isinstance(b[name], dict)
        }
        for key, value in a.items():
            expected = b
            for name in key.split("/"):
                expected = expected[name]
            np.testing.assert_array_equal(value, expected[part])

    assert_same(ours.reset(), pool.reset()[0])
    rng, ended = np.random.default_rng(0), 0
    for _ in range(steps):
        ours.action_space.seed(int(rng.integers(2**31)))
        actions = np.array([ours.action_space.sample() for _ in range(n)])
        observations, rewards, dones, infos = ours.step(actions)
        exact, expected, terminated, truncated, _ = pool.step(actions)
        np.testing.assert_array_equal(rewards, expected.astype(rewards.dtype))
        np.testing.assert_array_equal(dones, terminated | truncated)
        if dones.any():
            for i in np.flatnonzero(dones):
                assert_same(infos[i]["terminal_observation"], exact, i)
                assert infos[i]["TimeLimit.truncated"] == (truncated[i] and not terminated[i])
            ended += 1
            break
        assert_same(observations, exact)
    assert ended
    assert ours.observation_space.contains({key: value[0] for key, value in observations.items()})


@pytest.mark.parametrize("task", ["LunarLander-v3", "BipedalWalker-v3", "GardnerChess-v1", "CheetahRun-v1"])
def test_observations_lie_in_their_space(task):
    """EnvPool's own bounds are the least positive and the largest number where there are none."""
    if task == "GardnerChess-v1":  # two players
        space = _flat(import_envpool().make_spec(task).observation_space)
    else:
        env = make_vec_env(task, 4, seed=0, backend="envpool")
        space, first = env.observation_space, env.reset()
        parts = [{k: v[i] for k, v in first.items()} if isinstance(first, dict) else first[i] for i in range(4)]
        assert all(space.contains(part) for part in parts)
    for box in space.spaces.values() if isinstance(space, gym.spaces.Dict) else [space]:
        assert np.isneginf(box.low).all()
        assert np.isposinf(box.high).all()


def test_the_spec_is_that_of_what_was_asked_for():
    for env_id, kwargs in (
        ("Pong-v5", {"max_episode_steps": 40, "frame_skip": 2}),
        ("CartPole-v1", {"max_episode_steps": 7}),
        ("Hopper-v5", {"reset_noise_scale": 0.1}),
        ("Catch-v0", {}),
        ("CheetahRun-v1", {}),
    ):
        specs = make_vec_env(env_id, 2, backend="envpool", env_kwargs=kwargs).get_attr("spec")
        assert [spec.id for spec in specs] == ["ALE/Pong-v5" if env_id == "Pong-v5" else env_id] * 2
        limit = {"Hopper-v5": 1000, "Catch-v0": specs[0].max_episode_steps, "CheetahRun-v1": 1000}.get(env_id)
        assert specs[0].max_episode_steps == kwargs.get("max_episode_steps", limit)
        for name in set(kwargs) - {"max_episode_steps"}:
            assert specs[0].kwargs[name] == kwargs[name]
    assert gym.spec("CartPole-v1").max_episode_steps == 500  # the registry is as before


def test_what_envpool_cannot_start_is_named(monkeypatch):
    def absent(*args, **kwargs):
        raise RuntimeError("failed to open a database")

    env = make_vec_env("CartPole-v1", seed=0)
    monkeypatch.setattr(import_envpool(), "make_gymnasium", absent)
    with pytest.raises(
        RuntimeError, match=r"cannot start CartPole-v1: failed to open a database.*install EnvPool again"
    ):
        env.reset()


def test_an_interrupted_step_does_not_shift_the_answers(monkeypatch):
    env = make_vec_env("CartPole-v1", 2, seed=0)
    env.reset()

    class Interrupted:
        def _send(self, action):
            pass

        def _recv(self):
            raise KeyboardInterrupt

    env._pool = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        env.step(np.zeros(2, dtype=int))
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(2, dtype=int))
    assert np.abs(env.reset()).max() <= 0.05


def test_closing_twice_is_harmless():
    env = make_vec_env("CartPole-v1")
    env.reset()
    env.step_async(np.zeros(1, dtype=int))
    env.close()
    env.close()


def test_a_new_seed_does_not_hold_two_pools_at_a_time(monkeypatch):
    """Memory grew with the evaluations of a run, each of which seeds its environments."""
    env = make_vec_env("CartPole-v1", 4, seed=0, backend="envpool")
    envpool, alive = import_envpool(), []
    make = envpool.make_gymnasium

    def made(*args: Any, **kwargs: Any) -> Any:
        assert not any(pool() is not None for pool in alive)
        pool = make(*args, **kwargs)
        alive.append(weakref.ref(pool))
        return pool

    monkeypatch.setattr(envpool, "make_gymnasium", made)
    for _ in range(3):
        env.seed(1)
        first = env.reset()
    assert len(alive) == 3
    assert first.shape == (4, 4)
    env.close()
    assert alive[-1]() is None
