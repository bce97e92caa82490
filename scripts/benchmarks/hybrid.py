r"""Learning curves with a hybrid action, and with the same action as one flat Box: a row for every 2048 steps.

    python scripts/benchmarks/hybrid.py --seeds 0-4 --csv docs/results/hybrid.csv

The task is `npg/Platform-v0`, where 8 is perfect. ``hybrid`` is TRPO on its own action, a choice of three moves and
three numbers. ``flat`` is TRPO on a Box of six: a score for each move, of which the largest is taken, and the three
numbers. ``contrib-flat`` is sb3-contrib's TRPO on that Box, in its own trust region. All have the preset of TRPO for
the task, as far as they know its settings.

The columns are the way, the seed, the environment steps, the mean return of the last 100 training episodes, and after
the last step the mean and the least return of 100 episodes with the mode of the policy, on other seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from interleaved import at_least, machine, write_csv
from masks import EVERY, Curve
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from agents import TRPO
from agents.config import PRESET_KEYS, load_preset
from agents.seeds import parse_seeds
from envs import make_vec_env

TASK = "npg/Platform-v0"


class FlatBox(VecEnvWrapper):
    """The task with six numbers from −1 to 1 as its action: three scores of the moves, and the three of the task."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv, action_space=spaces.Box(-1.0, 1.0, (6,), np.float32))

    def reset(self) -> Any:
        """Begin episodes."""
        return self.venv.reset()

    def step_async(self, actions: Any) -> None:
        """The move of the largest score."""
        self.venv.step_async(list(zip(actions[:, :3].argmax(1), actions[:, 3:])))

    def step_wait(self) -> Any:
        """Finish the step."""
        return self.venv.step_wait()


def contrib(*args: Any, **kwargs: Any) -> Any:
    """The peer's."""
    from sb3_contrib import TRPO as Theirs

    return Theirs(*args, **kwargs)


WAYS: dict[str, tuple[Any, Any]] = {
    "hybrid": (TRPO, lambda env: env),
    "flat": (TRPO, FlatBox),
    "contrib-flat": (contrib, FlatBox),
}


def main() -> None:
    """Train, and write the table."""
    preset = load_preset("trpo", TASK)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", default="0-4", help="such as 0-2 or 0,3 (default 0-4)")
    parser.add_argument("--timesteps", type=at_least(EVERY), default=preset["timesteps"])
    parser.add_argument("--episodes", type=at_least(1), default=100, help="of the evaluation at the end (default 100)")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: value for name, value in preset.items() if name not in PRESET_KEYS}
    rows: list[dict[str, Any]] = []
    for way in options.ways:
        made, wrapped = WAYS[way]
        for seed in parse_seeds(options.seeds):
            curve = Curve()
            env = wrapped(make_vec_env(TASK, preset["n_envs"], seed))
            model = made("MlpPolicy", env, seed=seed, device="cpu", **settings)
            model.learn(options.timesteps, callback=curve)
            env.close()
            env = wrapped(make_vec_env(TASK, preset["n_envs"], 10_000 + seed))
            returns: Any = evaluate_policy(model, env, options.episodes, return_episode_rewards=True, warn=False)[0]
            env.close()
            about = {"machine": machine(), "way": way, "seed": seed}
            own = [{**about, "steps": s, "return_mean": r, "evaluated": "", "least": ""} for s, r in curve.points]
            own[-1] |= {"evaluated": round(float(np.mean(returns)), 4), "least": float(np.min(returns))}
            rows += own
            print(f"{way:14s} seed {seed}: return {rows[-1]['return_mean']}, of the mode {rows[-1]['evaluated']}")
            if options.csv is not None:
                write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
