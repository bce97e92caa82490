"""Every Python example of the README and of docs/ runs: page by page, its blocks one after the other, made small.

A comment ``<!-- before the examples: … -->`` holds what a page takes for granted, and ``<!-- not run: why -->`` before
a block leaves it out.
"""

from __future__ import annotations

import re
from functools import wraps
from pathlib import Path

import gymnasium as gym
import pytest
import torch

import envs
from agents.base import NaturalPolicyAlgorithm
from envs.envpool_vec_env import import_envpool

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: .+? -->\n)?```python\n(.*?)```|<!-- before the examples:\n(.*?)-->", re.S)

NEEDS = {
    "cpo.md": ["mujoco"],
    "environments.md": ["envpool", "mujoco"],  # Atari
    "kakade.md": ["numba"],
    "tuning.md": ["optuna"],
}


def blocks(page: Path) -> list[tuple[int, str]]:
    """The code of a page that is run, each with the number of the line before it."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in BLOCK.finditer(text):
        left_out, shown, hidden = block.groups()
        if not left_out:
            code = hidden if shown is None else shown
            found.append((text[: block.start(3 if shown is None else 2)].count("\n"), code))
    return found


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Few environments, and one update of each training; in an empty folder."""
    learn, make = NaturalPolicyAlgorithm.learn, envs.make_vec_env

    @wraps(learn)
    def one_update(self, total_timesteps, *args, **kwargs):
        return learn(self, min(total_timesteps, self.n_steps * self.n_envs), *args, **kwargs)

    @wraps(make)
    def few(env_id, n_envs=1, *args, **kwargs):
        return make(env_id, min(n_envs, 4), *args, **kwargs)

    monkeypatch.setattr(NaturalPolicyAlgorithm, "learn", one_update)
    monkeypatch.setattr(envs, "make_vec_env", few)
    monkeypatch.chdir(tmp_path)
    registered = dict(gym.registry)
    yield
    for name in gym.registry.keys() - registered.keys():
        del gym.registry[name]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_examples_of_a_page_run(page, small, capsys):
    for package in NEEDS.get(page.name, []):
        if (import_envpool() if package == "envpool" else None) is None:
            pytest.importorskip(package)
    torch.manual_seed(0)
    names = {"__name__": "example"}
    for line, code in blocks(page):
        exec(compile("\n" * line + code, str(page), "exec"), names)


def test_what_is_not_run_is_little():
    shown = sum(len(re.findall(r"```python\n", p.read_text(encoding="utf-8"))) for p in PAGES)
    left_out = sum(len(re.findall(r"<!-- not run: .+? -->\n```python\n", p.read_text(encoding="utf-8"))) for p in PAGES)
    assert shown > 30
    assert left_out <= 3
