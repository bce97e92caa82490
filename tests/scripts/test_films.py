"""scripts/figures/films.py: a small GIF of a run."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from agents.config import resolve
from agents.training import start


@pytest.fixture(scope="module")
def script(load) -> ModuleType:
    return load("figures", "films")


def test_a_gif_is_scaled_and_keeps_its_speed(script: ModuleType, tmp_path: Path) -> None:
    frames = [np.zeros((40, 160, 3), np.uint8) for _ in range(25)]
    for i, frame in enumerate(frames):
        frame[:, 6 * i : 6 * i + 10, 0] = 255  # a red bar that moves to the right
    script.write_gif(tmp_path / "x.gif", frames, fps=125 / 6, width=80, colours=8)
    with Image.open(tmp_path / "x.gif") as image:
        assert image.size == (80, 20)
        assert image.n_frames == 25
        assert image.info["duration"] == 50
        image.seek(20)
        pixels = np.asarray(image.convert("RGB"))
    red = np.flatnonzero(pixels[10, :, 0] > 128)
    assert red.mean() == pytest.approx((6 * 20 + 5) / 2, abs=1.5)
    assert pixels[..., 1:].max() < 16


def test_a_film_of_a_run(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pygame")
    config = resolve("trpo", "CartPole-v1", timesteps=64, n_envs=2, settings={"n_steps": 32}, device="cpu")
    start(config, tmp_path / "run").train(progress=False)
    arguments = [str(tmp_path / "run"), "--out", str(tmp_path / "films"), "--seconds", "0.5", "--width", "100"]
    assert script.main(arguments) == 0
    path = tmp_path / "films" / "cartpole-v1.gif"
    with Image.open(path) as image:
        assert image.size == (100, 67)
        assert 5 <= image.n_frames <= 13  # every second of 50 frames per second, for half a second or a shorter episode
    assert path.stat().st_size < 100_000
    assert str(path) in capsys.readouterr().out
    for wrong, message in (
        (["--skip", "1000"], "--skip 1000.0 is beyond the end"),
        (["--colours", "1"], "--colours 2 to 256; got 100, 1"),
        (["--seconds", "0"], "--seconds must be above 0"),
    ):
        assert script.main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert script.main([str(tmp_path / "none")]) == 2
    assert "not a run folder" in capsys.readouterr().err
