import json
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from agents import TRPO
from agents.cli import export_agent
from agents.cli.evaluate_agent import main
from agents.evaluation import make_env
from agents.runs import RunFolder, normalized, read_state
from agents.seeds import SeedsFolder
from agents.state import set_statistics
from envs.seeding import Purpose, environment_seeds, purpose_seed


def evaluate(trained, *arguments):
    assert main([str(trained.path), *map(str, arguments)]) == 0
    newest = max(trained.path.glob("evaluation_*.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text())


def test_the_return_is_that_of_the_bare_environment(trained):
    written = evaluate(trained, "--episodes", 1, "--seed", 5, "--model", "last")
    model = TRPO.load(trained.last.model)
    statistics = normalized(make_env(trained.config, 1, 0, evaluation=True), trained.config, training=False)
    set_statistics(statistics, read_state(trained.last)["statistics"])
    env = gym.make("Pendulum-v1")
    observation, _ = env.reset(seed=environment_seeds(purpose_seed(5, Purpose.EVALUATION_BY_HAND), 1)[0])
    total, done = 0.0, False
    while not done:
        action, _ = model.predict(statistics.normalize_obs(observation[None]), deterministic=True)
        observation, reward, terminated, truncated, _ = env.step(action[0])
        total += float(np.asarray(reward).item())
        done = terminated or truncated
    assert written["returns"] == [pytest.approx(total, rel=1e-4)]
    assert written["lengths"] == [200]


def test_an_evaluation_changes_no_agent_and_can_be_repeated(trained):
    agents = {path: path.read_bytes() for path in (trained.last.model, trained.best.model)}
    first, again = (evaluate(trained, "--episodes", 3, "--seed", 1)["returns"] for _ in range(2))
    assert first == again
    assert evaluate(trained, "--episodes", 3, "--seed", 2)["returns"] != first
    assert {path: path.read_bytes() for path in agents} == agents


def test_stochastic_actions_differ_from_deterministic_ones(trained):
    mode = evaluate(trained, "--episodes", 2)
    sample = evaluate(trained, "--episodes", 2, "--stochastic")
    assert (mode["deterministic"], sample["deterministic"]) == (True, False)
    assert mode["returns"] != sample["returns"]
    assert evaluate(trained, "--episodes", 2, "--stochastic")["returns"] == sample["returns"]


def test_the_table_says_what_the_file_says(trained, capsys):
    written = evaluate(trained, "--episodes", 2)
    out = capsys.readouterr().out
    assert f"{written['mean_return']:.1f} ± {written['std_return']:.1f}" in out
    assert max(map(len, out.splitlines()[:5])) <= 80


def test_a_video_shows_the_first_episode_of_the_evaluation(trained, capsys):
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")
    from moviepy.video.io.VideoFileClip import VideoFileClip

    written = evaluate(trained, "--episodes", 1, "--seed", 3, "--video")
    assert f"(return {written['mean_return']:.1f})" in capsys.readouterr().out
    with VideoFileClip(str(trained.path / "video" / "best_deterministic_seed3.mp4")) as clip:
        assert clip.n_frames == pytest.approx(200, abs=3)  # some encoders leave out the last ones
        frame = clip.get_frame(1.0)
    assert frame.std() > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--episodes", "0"], "--episodes must be at least 1, got 0"),
        (["--seed", "-1"], "seed"),
        (["--model", "worst"], "'best', 'last'"),
        (["--episode", "3"], "did you mean --episodes"),
    ],
)
def test_bad_input_is_refused(refused, arguments, message):
    assert message in refused(main, *arguments)


@pytest.mark.parametrize("command", [main, export_agent.main])
def test_what_is_no_run_folder_is_answered_with_the_folder_to_give(command, trained, tmp_path, capsys):
    def told(path):
        with pytest.raises(SystemExit) as end:
            command([str(path)])
        assert end.value.code == 2
        return capsys.readouterr().err.rstrip("\n")

    run, seeds = trained.path, tmp_path / "seeds"
    assert told(run / "last_model.zip").endswith(f"is not a run folder, it is in one: give {run} --model last")
    assert told(run / "best_model.zip").endswith(f"give {run} --model best")
    assert told(run / "checkpoints").endswith(f"give {run}")
    if command is main:
        assert told(trained.agents.all()[0]).endswith(f"is not a run folder, it is in one: give {run}")
    SeedsFolder.create(seeds, trained.config, (0, 1), [])
    assert told(seeds).endswith("that of several seeds: none of their runs has begun")
    shutil.copytree(run, seeds / "s1")
    assert told(seeds).endswith(
        f"{seeds} is not a run folder, it is that of several seeds: give that of one, such as {seeds / 's1'}"
    )
    (tmp_path / "bare").mkdir()
    assert "bare is not a run folder: it has no config.yaml; give the folder that" in told(tmp_path / "bare")
    assert "none is not a run folder: there is nothing; give the folder that" in told(tmp_path / "none")


def damaged(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("command", [main, export_agent.main])
def test_a_damaged_agent_is_answered_with_the_others_of_the_run(command, trained, tmp_path, capsys):
    def told(*arguments):
        with pytest.raises(SystemExit) as end:
            command([*map(str, arguments)])
        assert end.value.code == 2
        text = capsys.readouterr().err.rstrip("\n")
        assert "truncated or damaged" in text
        assert "--resume" not in text
        return text

    run = RunFolder(Path(shutil.copytree(trained.path, tmp_path / "run")))
    damaged(run.last.model)
    checkpoint = run.agents.all()[-1]
    others = f"; other agents of the run: {run.best.model}"
    assert told(run.path, "--model", "last").endswith(f"{others}, {checkpoint}")
    shutil.rmtree(run.checkpoints)
    assert told(run.path, "--model", "last").endswith(others)
    run.best.model.unlink()
    assert told(run.path, "--model", "last").endswith("; no other agent of the run is left")


def test_a_run_without_a_best_agent_is_told(trained, tmp_path, capsys):
    (tmp_path / "config.yaml").write_bytes((trained.path / "config.yaml").read_bytes())
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "best_model.zip" in capsys.readouterr().err
    assert RunFolder(tmp_path).config == trained.config
