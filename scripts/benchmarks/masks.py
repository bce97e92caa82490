r"""Learning curves with action masks: TRPO against sb3-contrib's MaskablePPO, a row for every 2048 steps.

    python scripts/benchmarks/masks.py --seeds 0-2 --timesteps 100000 --csv docs/results/masks.csv

Two tasks, both of which raise an error for a forbidden action. ``arms``: fifty arms, of which ten are allowed in each
of twenty steps; the best of them, which depends on the observation, pays 1, so that 20 is perfect and 2 is chance.
``connect-four``: `npg/ConnectFour-v0`, where a win pays 1 and a loss −1.

MaskablePPO has its defaults and 2048 steps of 8 environments to an update. TRPO takes 512 steps of 8 environments to an
update, target_kl=0.02 and cg_damping=0.01, for both tasks. The columns are the task, the
algorithm, the seed, the environment steps, and the mean return of the last 100 training episodes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from interleaved import at_least, machine, write_csv
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import safe_mean
from stable_baselines3.common.vec_env import VecEnv

from agents import TRPO
from agents.seeds import parse_seeds
from envs import make_vec_env

N_ENVS = 8


class Arms(gym.Env[Any, Any]):
    """Fifty arms, of which ten are allowed; the best of them, by a fixed linear score of the observation, pays 1."""

    SCORES = np.random.default_rng(0).normal(size=(50, 8))

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-5.0, 5.0, (8,), np.float32)
        self.action_space = spaces.Discrete(50)

    def action_masks(self) -> NDArray[np.bool_]:
        """Which arms are allowed; (50,)."""
        return self.allowed

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin twenty steps."""
        super().reset(seed=seed)
        self.steps = 0
        return self._draw(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Pull an arm."""
        if not self.allowed[action]:
            raise ValueError(f"arm {action} is not allowed")
        scores = np.where(self.allowed, self.SCORES @ self.seen, -np.inf)
        self.steps += 1
        return self._draw(), float(scores.argmax() == action), self.steps == 20, False, {}

    def _draw(self) -> NDArray[np.float32]:
        self.allowed = np.zeros(50, dtype=np.bool_)
        self.allowed[self.np_random.permutation(50)[:10]] = True
        self.seen = self.np_random.normal(size=8).clip(-5, 5).astype(np.float32)
        return self.seen


TASKS: dict[str, Any] = {"arms": Arms, "connect-four": "npg/ConnectFour-v0"}


def trpo(env: VecEnv, seed: int) -> Any:
    """Ours."""
    return TRPO("MlpPolicy", env, n_steps=64, target_kl=0.02, cg_damping=0.01, seed=seed, device="cpu")


def maskable_ppo(env: VecEnv, seed: int) -> Any:
    """The peer's."""
    from sb3_contrib import MaskablePPO

    return MaskablePPO("MlpPolicy", env, n_steps=256, seed=seed, device="cpu")


ALGORITHMS = {"trpo": trpo, "contrib-maskable-ppo": maskable_ppo}


EVERY = 2048


class Curve(BaseCallback):
    """Steps and mean return, after every so many steps; both algorithms have a rollout that ends there."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        episodes = self.model.ep_info_buffer or []
        if episodes and self.num_timesteps % EVERY == 0:
            self.points.append((self.num_timesteps, round(float(safe_mean([e["r"] for e in episodes])), 4)))


def main() -> None:
    """Train, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--algos", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--seeds", default="0-2", help="such as 0-2 or 0,3 (default 0-2)")
    parser.add_argument("--timesteps", type=at_least(EVERY), default=100_000)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for task in options.tasks:
        for algo in options.algos:
            for seed in parse_seeds(options.seeds):
                curve = Curve()
                env = make_vec_env(TASKS[task], N_ENVS, seed)
                ALGORITHMS[algo](env, seed).learn(options.timesteps, callback=curve)
                env.close()
                about = {"machine": machine(), "task": task, "algo": algo, "seed": seed}
                rows += [{**about, "steps": steps, "return_mean": mean} for steps, mean in curve.points]
                print(f"{task:14s} {algo:22s} seed {seed}: return {curve.points[-1][1]}", flush=True)
                if options.csv is not None:
                    write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
