import json

import numpy as np
import pytest
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.results_plotter import ts2xy

from envs import make_vec_env
from envs.envpool_vec_env import import_envpool

BACKENDS = [
    pytest.param("envpool", marks=pytest.mark.skipif(import_envpool() is None, reason="needs EnvPool")),
    "gymnasium",
]


def play(path, backend="gymnasium", steps=120, env_id="CartPole-v1"):
    env = make_vec_env(env_id, 2, seed=0, backend=backend, monitor_path=path)
    env.reset()
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(steps):
        infos = env.step(rng.integers(0, env.action_space.n, 2))[3]
        episodes += [info["episode"] for info in infos if "episode" in info]
    env.close()
    return episodes


@pytest.mark.parametrize("backend", BACKENDS)
def test_stable_baselines3_reads_what_is_written(tmp_path, backend):
    episodes = play(tmp_path, backend)
    header = json.loads((tmp_path / "monitor.csv").read_text().splitlines()[0].removeprefix("#"))
    assert header["env_id"] == "CartPole-v1"
    results = load_results(str(tmp_path))
    assert results["r"].tolist() == [episode["r"] for episode in episodes]
    assert results["l"].tolist() == [episode["l"] for episode in episodes]
    steps, returns = ts2xy(results, "timesteps")
    assert steps[-1] == sum(episode["l"] for episode in episodes)
    assert returns.tolist() == results["r"].tolist()


def test_an_existing_file_is_continued_in_its_own_time(tmp_path):
    path = tmp_path / "train.monitor.csv"
    first = play(path)
    lines = path.read_text().splitlines()
    header = json.loads(lines[0][1:])
    header["t_start"] -= 100.0  # as if the first run had begun earlier
    path.write_text("\n".join([f"#{json.dumps(header)}", *lines[1:]]) + "\n")
    second = play(path)
    results = load_results(str(tmp_path))
    assert results["l"].tolist() == [episode["l"] for episode in first + second]
    assert results["t"].iloc[len(first) - 1] < 100 < results["t"].iloc[len(first)]


def test_another_environments_file_is_left_alone(tmp_path):
    play(tmp_path)
    before = (tmp_path / "monitor.csv").read_text()
    with pytest.raises(ValueError, match=r"monitor\.csv' has episodes of CartPole-v1, not of MountainCar-v0"):
        play(tmp_path, env_id="MountainCar-v0")
    assert (tmp_path / "monitor.csv").read_text() == before


@pytest.mark.parametrize("content", [b"r,l,t\n1,2,3\n", b"#{}\n", b"#[1]\n", b"\xff\xfe"])
def test_a_damaged_file_is_left_alone(tmp_path, content):
    path = tmp_path / "monitor.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="does not begin as a monitor file"):
        play(path)
    assert path.read_bytes() == content


def test_a_file_without_content_is_begun_anew(tmp_path):  # such as a power failure leaves
    (tmp_path / "monitor.csv").touch()
    episodes = play(tmp_path)
    assert load_results(str(tmp_path))["l"].tolist() == [episode["l"] for episode in episodes]


def test_other_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"monitor_path=.*monitor\.csv"):
        play(tmp_path / "episodes.csv")
    assert list(tmp_path.iterdir()) == []
