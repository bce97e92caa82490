"""Modules of `scripts` that are no commands, and a run whose agent has hardly trained."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from agents.config import resolve
from agents.runs import RunFolder
from agents.training import start

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="session")
def load() -> Callable[[str, str], ModuleType]:
    """``load("figures", "films")``: the module scripts/figures/films.py, which imports its neighbours."""

    def module_of(folder: str, name: str) -> ModuleType:
        sys.path.insert(0, str(SCRIPTS / folder))
        try:
            spec = importlib.util.spec_from_file_location(f"{folder}_{name}", SCRIPTS / folder / f"{name}.py")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # dataclasses look it up
            spec.loader.exec_module(module)
            return module
        finally:
            sys.path.remove(str(SCRIPTS / folder))

    return module_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of TRPO on Pendulum-v1: four updates, normalised, with a checkpoint in the middle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.training.FINAL_EPISODES", 1)
        settings = {"normalize": True, "use_sde": False, "n_steps": 32, "policy_kwargs.net_arch": [8]}
        options = {"timesteps": 256, "n_envs": 2, "eval_episodes": 2, "save_freq": 128, "backend": "gymnasium"}
        config = resolve("trpo", "Pendulum-v1", settings=settings, device="cpu", **options)
        run = start(config, tmp_path_factory.mktemp("runs") / "run")
        run.train(progress=False)
    return run.folder


@pytest.fixture
def refused(trained: RunFolder, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``refused(main, *arguments)``: the message with which a command on this run ends, and leaves all as it was."""

    def message_of(main: Callable[[list[str]], int], *arguments: str) -> str:
        before = sorted(trained.path.rglob("*"))
        with pytest.raises(SystemExit) as end:
            main([str(trained.path), *arguments])
        assert end.value.code == 2
        assert sorted(trained.path.rglob("*")) == before
        return capsys.readouterr().err

    return message_of
