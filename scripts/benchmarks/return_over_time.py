r"""Evaluation return against seconds of training: our TRPO, and sb3-contrib's with the settings of RL Zoo.

    python scripts/benchmarks/return_over_time.py HalfCheetah-v5 --agents ours sb3-contrib --seeds 0 \
        --timesteps 1000000 --csv docs/results/return_over_time.csv --png docs/results/return_over_time.png

``ours`` is the preset of scripts/train_agent.py with `envs.make_vec_env`; ``sb3-contrib`` is its TRPO as people run it,
on two Gymnasium environments in one process, with VecNormalize and the hyperparameters that RL Zoo gives for the
MuJoCo tasks; ``sb3-contrib, our envs`` is the same on our vector environments, as many as ours has. Seconds are
processor time, of all threads, of collecting and training: on one core that nothing else uses, what a clock on the wall
shows. Evaluations (deterministic actions, ten whole episodes, frozen statistics) are left out.
Rows are appended to the CSV as they come, so that runs can be added one by one; a run that is complete there is not
repeated.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from time import process_time
from typing import Any

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch
from interleaved import machine
from stable_baselines3.common import vec_env
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from agents import TRPO
from agents.config import resolve
from envs import VecNormalize, make_vec_env

AGENTS = ("ours", "sb3-contrib", "sb3-contrib, our envs")
FIELDS = (
    "env",
    "agent",
    "seed",
    "timesteps",
    "cpu_seconds",
    "return_mean",
    "return_std",
    "episodes",
    "threads",
    "machine",
)
# hyperparams/trpo.yml of RL Zoo, the entries of the MuJoCo tasks.
ZOO: dict[str, Any] = {
    "n_steps": 1024,
    "batch_size": 128,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "cg_max_steps": 25,
    "cg_damping": 0.1,
    "n_critic_updates": 20,
    "learning_rate": 1e-3,
}
ZOO_OWN: dict[str, dict[str, Any]] = {"HalfCheetah-v5": {"target_kl": 0.04}, "Swimmer-v5": {"gamma": 0.9999}}


def make(agent: str, env_id: str, seed: int, timesteps: int) -> tuple[BaseAlgorithm, vec_env.VecNormalize]:
    """The agent on its training environments."""
    preset = resolve("trpo", env_id, seed=seed, timesteps=timesteps)
    if agent == "ours":
        venv = normalized(make_vec_env(env_id, preset.n_envs, seed), preset.normalize)
        return TRPO("MlpPolicy", venv, seed=seed, device="cpu", **preset.hyperparameters), venv
    from sb3_contrib import TRPO as Contrib

    options = {**ZOO, **ZOO_OWN.get(env_id, {})}
    bare: VecEnv
    if agent == "sb3-contrib":
        bare = DummyVecEnv([lambda: Monitor(gym.make(env_id))] * 2)
        bare.seed(seed)
    else:
        bare = make_vec_env(env_id, preset.n_envs, seed)
        options["n_steps"] = max(1, 2 * options["n_steps"] // preset.n_envs)
    venv = vec_env.VecNormalize(bare, gamma=options["gamma"])
    return Contrib("MlpPolicy", venv, seed=seed, device="cpu", **options), venv


def normalized(venv: VecEnv, arguments: dict[str, Any] | None) -> VecNormalize:
    return VecNormalize(venv, **(arguments or {"norm_obs": False, "norm_reward": False}))


class Evaluation(BaseCallback):
    """Evaluates every ``every`` steps, and keeps the clock of training alone."""

    def __init__(self, env_id: str, venv: vec_env.VecNormalize, every: int, episodes: int, seed: int) -> None:
        super().__init__()
        self.venv, self.every, self.episodes = venv, every, episodes
        self.test = make_vec_env(env_id, episodes, 10_000 + seed, evaluation=True)
        self.rows: list[dict[str, Any]] = []
        self.elsewhere, self.due = 0.0, 0

    def _on_training_start(self) -> None:
        self.started = process_time()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps >= self.due:
            self.evaluate()

    def evaluate(self) -> None:
        """Ten whole episodes with the frozen statistics of now; the clock stands still."""
        now = process_time()
        env = VecNormalize(self.test, training=False, norm_reward=False, norm_obs=self.venv.norm_obs)
        if self.venv.norm_obs:
            env.obs_rms, env.clip_obs, env.epsilon = self.venv.obs_rms, self.venv.clip_obs, self.venv.epsilon
        returns, _ = evaluate_policy(
            self.model, env, self.episodes, deterministic=True, return_episode_rewards=True, warn=False
        )
        self.rows.append(
            {
                "timesteps": self.num_timesteps,
                "cpu_seconds": f"{now - self.started - self.elsewhere:.2f}",
                "return_mean": f"{np.mean(returns):.2f}",
                "return_std": f"{np.std(returns):.2f}",
                "episodes": self.episodes,
            }
        )
        self.due = self.num_timesteps + self.every
        self.elsewhere += process_time() - now


def draw(path: Path, rows: list[dict[str, str]]) -> None:
    tasks = sorted({row["env"] for row in rows})
    figure, axes = plt.subplots(len(tasks), 2, figsize=(9, 3.4 * len(tasks)), squeeze=False, layout="constrained")
    colours = dict(zip(AGENTS, ("#0072B2", "#D55E00", "#009E73")))
    for line, task in zip(axes, tasks):
        for axis, (column, label) in zip(
            line, (("cpu_seconds", "processor time of training [s]"), ("timesteps", "environment steps"))
        ):
            for agent in AGENTS:
                runs = {row["seed"] for row in rows if row["env"] == task and row["agent"] == agent}
                for number, seed in enumerate(sorted(runs)):
                    mine = [r for r in rows if (r["env"], r["agent"], r["seed"]) == (task, agent, seed)]
                    axis.plot(
                        [float(r[column]) for r in mine],
                        [float(r["return_mean"]) for r in mine],
                        color=colours[agent],
                        label=agent if number == 0 else None,
                    )
            axis.set_xlabel(label)
            axis.set_ylabel(f"{task}: evaluation return")
            axis.grid(alpha=0.3)
        line[1].legend(frameon=False)
    figure.savefig(path, dpi=130)


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("envs", nargs="+", help="such as HalfCheetah-v5")
    parser.add_argument("--agents", nargs="+", choices=AGENTS, default=["ours", "sb3-contrib"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--timesteps", type=int, default=1_000_000)
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    for env_id in options.envs:
        for agent in options.agents:
            for seed in options.seeds:
                done = [
                    row
                    for row in read(options.csv)
                    if (row["env"], row["agent"], row["seed"]) == (env_id, agent, str(seed))
                    and int(row["timesteps"]) >= options.timesteps
                ]
                if done:
                    continue
                model, venv = make(agent, env_id, seed, options.timesteps)
                watch = Evaluation(env_id, venv, options.timesteps // options.evaluations, options.episodes, seed)
                model.learn(options.timesteps, callback=watch)
                watch.evaluate()
                new = not options.csv.exists()
                with options.csv.open("a", newline="") as file:
                    writer = csv.DictWriter(file, FIELDS)
                    if new:
                        writer.writeheader()
                    fixed = {"env": env_id, "agent": agent, "seed": seed, "threads": options.threads}
                    writer.writerows({**fixed, **row, "machine": machine()} for row in watch.rows)
                last = watch.rows[-1]
                speed = last["timesteps"] / float(last["cpu_seconds"])
                print(
                    f"{env_id} {agent} seed {seed}: return {last['return_mean']} ± {last['return_std']} after "
                    f"{last['timesteps']:,} steps and {last['cpu_seconds']} s ({speed:,.0f} steps/s)",
                    flush=True,
                )
                venv.close()
    if options.png:
        draw(options.png, read(options.csv))


if __name__ == "__main__":
    main()
