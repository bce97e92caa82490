"""Placements per second of Tetris: whole compiled games, and stepping the native vector environment.

    python scripts/benchmarks/tetris.py [--seconds 5] [--threads 2]

Every placement includes the features of all of its afterstates. The compiled loops release the GIL, so that threads
play side by side. Rates are per second of the clock, and per second that one thread really ran, which does not depend
on what else the machine does.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter, thread_time

import gymnasium as gym
import numpy as np

import envs  # noqa: F401 -- registers the tasks
from envs.tetris import FEATURES, feature_names, play


def policy(features: str) -> np.ndarray:
    """A policy that keeps the board low, so that games are long and boards are as they are in training."""
    shunned = {"holes": 8.0, "row transitions": 3.0, "column transitions": 3.0, "landing height": 2.0}
    return -np.array([shunned.get(name, 0.5) for name in feature_names(features)])


def games(features: str, seconds: float, seed: int) -> tuple[int, float, float]:
    """Placements, seconds and CPU seconds of `play` in one thread."""
    placements, started, cpu = 0, perf_counter(), thread_time()
    while perf_counter() - started < seconds:
        placements += int(play(policy(features), 20, seed=seed, features=features, max_placements=1000)[1].sum())
        seed += 1000
    return placements, perf_counter() - started, thread_time() - cpu


def vector(features: str, seconds: float, seed: int, num_envs: int = 512) -> tuple[int, float, float]:
    """The same of the vector environment's steps, under uniformly random legal placements."""
    env = gym.make_vec("npg/Tetris-v0", num_envs, features=features)
    rng = np.random.default_rng(seed)
    observations, _ = env.reset(seed=seed)
    placements, clock, cpu = 0, 0.0, 0.0
    while clock < seconds:
        actions = np.where(observations[..., 0] != 0, rng.random(observations.shape[:2]), -1).argmax(axis=1)
        started, cpu_started = perf_counter(), thread_time()
        observations, *_ = env.step(actions)
        clock += perf_counter() - started
        cpu += thread_time() - cpu_started
        placements += num_envs
    return placements, clock, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to measure each")
    parser.add_argument("--threads", type=int, default=2, help="threads that play at the same time")
    options = parser.parse_args()
    for features in FEATURES:
        for measure in (games, vector):
            measure(features, 0.01, 0)  # compile
            with ThreadPoolExecutor(options.threads) as pool:
                seeds = range(options.threads)
                results = list(pool.map(lambda seed, f=features, m=measure: m(f, options.seconds, seed), seeds))
            per_second = sum(placements / clock for placements, clock, _ in results)
            per_cpu_second = sum(r[0] for r in results) / sum(r[2] for r in results)
            print(
                f"{features:20s} {measure.__name__:7s} {per_second:11,.0f} placements/s in {options.threads} threads"
                f"{per_cpu_second:12,.0f} per CPU second"
            )


if __name__ == "__main__":
    main()
