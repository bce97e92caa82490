"""Steps per second of environments under random actions: EnvPool as it is, and make_vec_env over both backends.

All variants of one environment take turns within one run, so that their ratios mean something on a busy machine too.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import at_least, environment, machine, measure, update_csv

from envs import make_vec_env
from envs.envpool_vec_env import EnvPoolVecEnv, import_envpool

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "environments.csv"
ENVIRONMENTS = ["HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5", "CartPole-v1", "PongNoFrameskip-v4"]

Step = Callable[[np.ndarray], Any]


def envpool_alone(adapter: EnvPoolVecEnv) -> Step:
    """EnvPool's own step() of the same task with the same settings; its steps that only restart count as steps."""
    envpool = import_envpool()
    assert envpool is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pool = envpool.make_gymnasium(adapter.task, seed=0, **adapter.config)
    pool.reset()
    return pool.step


def variants(env_id: str, n_envs: int, threads: list[int]) -> Iterator[tuple[str, int, Step]]:
    """(name, threads, step function) of all ways to step `env_id` on this machine."""
    for n_threads in threads:
        env = make_vec_env(env_id, n_envs, 0, "envpool", n_threads=n_threads)
        env.reset()
        yield "EnvPool alone", n_threads, envpool_alone(env)
        yield "make_vec_env, envpool", n_threads, env.step
    try:
        env = make_vec_env(env_id, n_envs, 0, "gymnasium")
    except ImportError:
        return
    env.reset()
    yield "make_vec_env, gymnasium", 1, env.step


def compare(env_id: str, n_envs: int, threads: list[int], steps: int, rounds: int) -> Iterator[dict[str, Any]]:
    """One row for each variant: the fastest of `rounds` turns of `steps` steps, which other work disturbs least."""
    space = make_vec_env(env_id).action_space
    space.seed(0)
    actions = np.array([[space.sample() for _ in range(n_envs)] for _ in range(max(1, steps // n_envs))])

    def turn(step: Step) -> Callable[[], None]:
        def run() -> None:
            for batch in actions:
                step(batch)

        return run

    found = list(variants(env_id, n_envs, threads))
    timings = measure({str(i): turn(step) for i, (_, _, step) in enumerate(found)}, rounds=rounds, turn=1)
    for (what, n_threads, _), seconds in zip(found, timings.values()):
        yield {
            "environment": env_id,
            "n_envs": n_envs,
            "what": what,
            "threads": n_threads,
            "steps_per_second": round(len(actions) * n_envs / min(seconds)),
            "machine": machine(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "environments", nargs="*", type=environment, default=ENVIRONMENTS, help=f"default: {' '.join(ENVIRONMENTS)}"
    )
    parser.add_argument("--n-envs", type=int, nargs="+", default=[16, 32], help="default: 16 32")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4], help="EnvPool's threads; default: 1 2 4")
    parser.add_argument("--steps", type=at_least(1), default=2048, help="steps of one turn; default: 2048")
    parser.add_argument("--rounds", type=at_least(1), default=10, help="turns of each variant; default: 10")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file; default: docs/results/environments.csv")
    arguments = parser.parse_args()

    rows = []
    print(f"{'environment':20}{'n_envs':>7}  {'what':24}{'threads':>8}{'steps/s':>10}")
    for env_id in arguments.environments:
        for n_envs in arguments.n_envs:
            for row in compare(env_id, n_envs, arguments.threads, arguments.steps, arguments.rounds):
                rows.append(row)
                print(
                    f"{row['environment']:20}{row['n_envs']:7}  {row['what']:24}{row['threads']:8}"
                    f"{row['steps_per_second']:10,}",
                    flush=True,
                )
            update_csv(arguments.output, rows, "environment", "n_envs", "machine")


if __name__ == "__main__":
    main()
