r"""How good a critic is for its milliseconds: explained variance of the next rollout, by the way in which it is fitted.

    python scripts/benchmarks/critics.py --csv docs/results/critics.csv

TRPO trains for a while and records rollouts, as long as its preset's, with the returns that its critic was to be fitted
to. Each way begins with the same critic, scores it on each rollout before and after fitting it to that rollout, and
goes on to the next. The score before is of returns that the critic has not seen: its advantages are made of those.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from interleaved import at_least, environment, machine, write_csv
from stable_baselines3.common.utils import explained_variance
from torch import Tensor

from agents import TRPO
from agents.config import resolve
from agents.update import critic_of
from envs import VecNormalize, make_vec_env

Fit = Callable[[TRPO, Tensor, Tensor], object]


def adam(epochs: int, batch_size: int, learning_rate: float) -> Fit:
    """Epochs of mini-batches."""

    def fit(agent: TRPO, observations: Tensor, returns: Tensor) -> object:
        agent.critic, agent.n_critic_updates, agent.batch_size = "adam", epochs, batch_size
        for group in agent.policy.optimizer.param_groups:
            group["lr"] = learning_rate
        return critic_of(agent).fit(observations, returns)

    return fit


def natural(steps: int, products: int, fraction: float) -> Fit:
    """Gauss–Newton steps, damped by Levenberg and Marquardt's rule."""

    def fit(agent: TRPO, observations: Tensor, returns: Tensor) -> object:
        agent.critic, agent.n_critic_updates = "natural", steps
        agent.cg_max_steps, agent.fisher_fraction = products, fraction
        critic = critic_of(agent)
        critic.fit(observations, returns)
        agent.critic_damping = critic.damping
        return critic

    return fit


WAYS: dict[str, Fit] = {
    "Adam, 20 epochs of 128, 1e-3": adam(20, 128, 1e-3),
    "Adam, 5 epochs of 128, 1e-3": adam(5, 128, 1e-3),
    "Adam, 5 epochs of 256, 2e-3": adam(5, 256, 2e-3),
    "Adam, 3 epochs of 256, 2e-3": adam(3, 256, 2e-3),
    "Adam, 2 epochs of 256, 3e-3": adam(2, 256, 3e-3),
    "Adam, 8 epochs of 1024, 3e-3": adam(8, 1024, 3e-3),
    "natural, 1 step of 10 products": natural(1, 10, 1.0),
    "natural, 2 steps of 10 products": natural(2, 10, 1.0),
    "natural, 1 step of 25 products": natural(1, 25, 1.0),
    "natural, 1 of 10, on a quarter": natural(1, 10, 0.25),
}


def score(agent: TRPO, observations: Tensor, returns: Tensor) -> float:
    """Explained variance of the returns."""
    with torch.no_grad():
        return float(explained_variance(agent.policy.predict_values(observations).flatten().numpy(), returns.numpy()))


FIRST = 5  #: so many rollouts show where all began, and are not counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--env", type=environment, default="HalfCheetah-v5", metavar="ENV_ID", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--before", type=int, default=40_000, help="steps of training before the first (default: %(default)s)"
    )
    parser.add_argument(
        "--rollouts", type=at_least(FIRST + 1), default=60, help="to fit critics to (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of environments and agent (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--csv", type=Path, help="write the table here as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    preset = resolve("trpo", options.env, seed=options.seed)
    venv = VecNormalize(make_vec_env(options.env, preset.n_envs, options.seed), **(preset.normalize or {}))
    agent = TRPO("MlpPolicy", venv, seed=options.seed, device="cpu", **preset.hyperparameters)
    agent.learn(options.before)
    start, recorded = copy.deepcopy(agent.policy.state_dict()), []
    for _ in range(options.rollouts):
        agent.collect()
        buffer = agent.rollout_buffer
        observations = torch.as_tensor(buffer.observations.reshape(-1, *buffer.obs_shape)).clone()
        recorded.append((observations, torch.as_tensor(buffer.returns.flatten()).clone()))
        agent.train()

    rows: list[dict[str, Any]] = []
    print(f"{'critic':<34}{'next rollout':>14}{'fitted rollout':>16}{'CPU ms':>8}")
    for name, fit in WAYS.items():
        agent.policy.load_state_dict(start)
        agent.policy.optimizer = torch.optim.Adam(agent.policy.parameters(), fused=True)
        agent.critic_damping = 0.1
        unseen, seen, seconds = [], [], []
        for observations, returns in recorded:
            unseen.append(score(agent, observations, returns))
            started = process_time()
            fit(agent, observations, returns)
            seconds.append(process_time() - started)
            seen.append(score(agent, observations, returns))
        rows.append(
            {
                "env": options.env,
                "critic": name,
                "explained_variance_next": f"{np.mean(unseen[FIRST:]):.4f}",
                "explained_variance_fitted": f"{np.mean(seen[FIRST:]):.4f}",
                "cpu_ms_median": f"{1e3 * np.median(seconds):.2f}",
                "rollouts": options.rollouts,
                "seed": options.seed,
                "threads": options.threads,
                "machine": machine(),
                "torch": torch.__version__,
            }
        )
        row = rows[-1]
        print(
            f"{name:<34}{row['explained_variance_next']:>14}{row['explained_variance_fitted']:>16}{row['cpu_ms_median']:>8}",
            flush=True,
        )
    write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
