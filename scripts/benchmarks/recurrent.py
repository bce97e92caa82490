"""TRPO with an LSTM beside sb3-contrib's RecurrentPPO, on tasks without velocities: returns, and steps per second.

    python scripts/benchmarks/recurrent.py --seeds 0 1 2 3 4 --csv docs/results/recurrent.csv

Ours is the preset of the task. RecurrentPPO has RL Zoo's settings for it (hyperparams/ppo_lstm.yml), on the same
environments, as many as these say. Each row is one training in this process, on one thread: the return is that of whole
episodes of the last policy, by its mode, and the seconds are of collecting and learning alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from interleaved import at_least
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import sync_envs_normalization

from agents.config import ALGORITHMS, RunConfig, resolve
from agents.evaluation import evaluate, make_env
from agents.runs import normalized
from npg.runs.files import Table

TASKS = ("npg/CartPoleNoVel-v1", "npg/PendulumNoVel-v1")
COLUMNS = ("env", "agent", "seed", "timesteps", "return_mean", "return_min", "seconds", "steps_per_second", "threads")

#: RL Zoo's, with the number of environments; all else is RecurrentPPO's default.
ZOO: dict[str, dict[str, Any]] = {
    "npg/CartPoleNoVel-v1": {
        **{"n_envs": 8, "n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20},
        **{"ent_coef": 0.0, "learning_rate": lambda left: 0.001 * left, "clip_range": lambda left: 0.2 * left},
    },
    "npg/PendulumNoVel-v1": {
        **{"n_envs": 4, "n_steps": 1024, "gae_lambda": 0.95, "gamma": 0.9, "n_epochs": 10, "ent_coef": 0.0},
        **{"learning_rate": 1e-3, "clip_range": 0.2, "use_sde": True, "sde_sample_freq": 4},
    },
}


def ours(config: RunConfig) -> BaseAlgorithm:
    """The preset."""
    env = normalized(make_env(config, config.n_envs, config.seed, evaluation=False), config, training=True)
    assert config.policy is not None
    return ALGORITHMS[config.algo](config.policy, env, seed=config.seed, device="cpu", **config.hyperparameters)


def theirs(config: RunConfig) -> BaseAlgorithm:
    """RecurrentPPO."""
    from sb3_contrib import RecurrentPPO

    options = dict(ZOO[config.env])
    env = make_env(config, options.pop("n_envs"), config.seed, evaluation=False)
    return RecurrentPPO("MlpLstmPolicy", env, seed=config.seed, device="cpu", **options)


def train(config: RunConfig, make: Any, episodes: int) -> dict[str, Any]:
    """A training, and what its last policy returns."""
    model = make(config)
    started = perf_counter()
    model.learn(config.timesteps)
    seconds = perf_counter() - started
    env: Any = make_env(config, min(episodes, 10), config.seed + 1_000, evaluation=True)
    if (trained := model.get_vec_normalize_env()) is not None:
        env = normalized(env, config, training=False)
        sync_envs_normalization(trained, env)
    played = evaluate(model, env, episodes, seed=config.seed + 1_000)
    env.close()
    return {
        "timesteps": model.num_timesteps,
        "return_mean": round(played.mean_return, 2),
        "return_min": round(min(played.returns), 2),
        "seconds": round(seconds, 2),
        "steps_per_second": round(model.num_timesteps / seconds, 1),
        "threads": torch.get_num_threads(),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="(default: all)")
    parser.add_argument(
        "--agents", nargs="+", choices=("ours", "sb3-contrib"), default=("ours", "sb3-contrib"), help="(default: both)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="of the runs (default: 0)")
    parser.add_argument("--timesteps", type=int, help="by default those of our preset")
    parser.add_argument("--their-timesteps", type=int, help="of RecurrentPPO, where they are to differ")
    parser.add_argument(
        "--episodes", type=at_least(1), default=20, help="of the final evaluation (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--csv", type=Path, required=True, help="a table, to which rows are appended")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    table = Table(options.csv)
    for task in options.tasks:
        for seed in options.seeds:
            for agent in options.agents:
                other = options.their_timesteps if agent == "sb3-contrib" else None
                steps = other or options.timesteps
                config = resolve("trpo", task, seed=seed, timesteps=steps, device="cpu")
                row = train(config, ours if agent == "ours" else theirs, options.episodes)
                row = {"env": task, "agent": agent, "seed": seed, **row}
                table.append({name: row[name] for name in COLUMNS})
                print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
