r"""Steps per second of whole training runs: ours, sb3-contrib's TRPO, and the environments alone.

    python scripts/benchmarks/end_to_end.py --csv docs/results/end_to_end.csv --png docs/results/end_to_end.png

* ours: the preset of scripts/train_agent.py on `envs.make_vec_env`;
* sb3-contrib: its TRPO as people run it, on two Gymnasium environments in one process (eight for Atari), with the
  settings of RL Zoo where it has some and those of our preset where it has none;
* sb3-contrib, our envs: the same on as many of our vector environments as ours has;
* environments: those of ours under random actions, with no agent.

All take turns; a turn is a whole number of rollouts with their updates. The ratios are taken within each round.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import Any

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch
from interleaved import environment, machine, make_parser, one_turn, ratio, write_csv
from peers import trpo_settings
from stable_baselines3.common import vec_env
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack

from agents import TRPO
from agents.config import resolve
from envs import VecNormalize, make_vec_env

TASKS = ["HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5", "CartPole-v1", "PongNoFrameskip-v4"]
WAYS = ("environments", "ours", "sb3-contrib, our envs", "sb3-contrib")
CARTPOLE = {"n_steps": 512, "batch_size": 512, "cg_damping": 1e-3, "gae_lambda": 0.98, "n_critic_updates": 20}

# Takes about so many steps, and says how many they were and how many seconds of them went into updates.
Turn = Callable[[int], tuple[int, float]]


def agent_turn(agent: Any) -> Turn:
    """Learn."""
    rollout = agent.n_steps * agent.env.num_envs
    updating = 0.0
    train = agent.train

    def timed_train() -> None:
        nonlocal updating
        started = perf_counter()
        train()
        updating += perf_counter() - started

    agent.train = timed_train

    def turn(steps: int) -> tuple[int, float]:
        nonlocal updating
        before, updating = agent.num_timesteps, 0.0
        agent.learn(rollout * ceil(steps / rollout), reset_num_timesteps=False)
        return int(agent.num_timesteps - before), updating

    return turn


def random_turn(env: VecEnv) -> Turn:
    """Step with random actions, drawn beforehand."""
    env.reset()
    actions = np.array([[env.action_space.sample() for _ in range(env.num_envs)] for _ in range(64)])

    def turn(steps: int) -> tuple[int, float]:
        calls = ceil(steps / env.num_envs)
        for i in range(calls):
            env.step(actions[i % len(actions)])
        return calls * env.num_envs, 0.0

    return turn


def normalized(env: VecEnv, arguments: dict[str, Any] | None, wrapper: type[VecEnv] = vec_env.VecNormalize) -> VecEnv:
    return env if arguments is None else wrapper(env, **arguments)


def ways(task: str, seed: int) -> dict[str, Turn]:
    """One turn function for each way to step this task."""
    from sb3_contrib import TRPO as Contrib

    preset = resolve("trpo", task, seed=seed)
    own = preset.hyperparameters
    policy = preset.policy or "MlpPolicy"

    def ours() -> VecEnv:
        return make_vec_env(task, preset.n_envs, seed)

    contrib: dict[str, Any]
    shipped: VecEnv
    if "NoFrameskip" in task:
        import ale_py

        gym.register_envs(ale_py)
        known = ("policy_kwargs", "cg_max_steps", "cg_damping", "learning_rate", "batch_size", "n_critic_updates")
        contrib = {"n_steps": 2 * own["n_steps"], **{key: own[key] for key in known}}
        shipped = VecFrameStack(make_atari_env(task, preset.n_envs // 2, seed), 4)
    else:
        contrib = CARTPOLE if task.startswith("CartPole") else trpo_settings(task)
        shipped = DummyVecEnv([lambda: Monitor(gym.make(task))] * 2)
        shipped.seed(seed)
    on_ours = {**contrib, "n_steps": max(1, contrib["n_steps"] * shipped.num_envs // preset.n_envs)}
    common = {"seed": seed, "device": "cpu"}
    return {
        "environments": random_turn(ours()),
        "ours": agent_turn(TRPO(policy, normalized(ours(), preset.normalize, VecNormalize), **common, **own)),
        "sb3-contrib, our envs": agent_turn(Contrib(policy, normalized(ours(), preset.normalize), **common, **on_ours)),
        "sb3-contrib": agent_turn(Contrib(policy, normalized(shipped, preset.normalize), **common, **contrib)),
    }


def compare(task: str, seconds: float, rounds: int, seed: int) -> list[dict[str, Any]]:
    """One row per way; each has ``rounds`` turns of about so many seconds."""
    turns = ways(task, seed)
    steps = {}
    for way, turn in turns.items():  # the first turns warm up and tell how many steps make up a turn
        for _ in range(2):
            started = perf_counter()
            taken = turn(1)[0]
            spent = perf_counter() - started
            if spent > 10 * seconds:  # nothing that warms up counts beside that
                break
        steps[way] = max(1, round(taken / spent * seconds))
    times: dict[str, list[float]] = {way: [] for way in turns}
    shares: dict[str, list[float]] = {way: [] for way in turns}
    for number in range(rounds):
        for way in turns if number % 2 == 0 else reversed(list(turns)):
            with one_turn(way) as done:
                started = perf_counter()
                taken, updating = turns[way](steps[way])
                seconds_taken = perf_counter() - started
                done.units = taken
            times[way].append(seconds_taken / taken)
            shares[way].append(updating / seconds_taken)
    rows = []
    for way in turns:
        row: dict[str, Any] = {
            "env": task,
            "way": way,
            "steps_per_second": round(1 / float(np.median(times[way]))),
            "ours_over_this_median": f"{ratio(times, way, 'ours')[1]:.3f}",
            "ours_over_this_quartile_1": f"{ratio(times, way, 'ours')[0]:.3f}",
            "ours_over_this_quartile_3": f"{ratio(times, way, 'ours')[2]:.3f}",
            "share_of_updates": f"{float(np.median(shares[way])):.3f}",
            "seed": seed,
            "rounds": rounds,
            "seconds_per_turn": seconds,
            "threads": torch.get_num_threads(),
            "machine": machine(),
            "torch": torch.__version__,
        }
        rows.append(row)
        print(f"{task:<20}{way:<24}{row['steps_per_second']:>10,}{row['ours_over_this_median']:>10}", flush=True)
    return rows


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Steps per second by way, one panel per task."""
    tasks = list(dict.fromkeys(row["env"] for row in rows))
    figure, grid = plt.subplots(2, ceil(len(tasks) / 2), figsize=(9, 4.2), layout="constrained", squeeze=False)
    colours = dict(zip(WAYS, ("0.75", "#0072B2", "#009E73", "#D55E00")))
    for axes, task in zip(grid.flat, tasks):
        mine = [row for row in rows if row["env"] == task]
        values = [int(row["steps_per_second"]) for row in mine]
        bars = axes.barh([r["way"] for r in mine], values, color=[colours[r["way"]] for r in mine])
        axes.bar_label(bars, [f"{v:,}" for v in values], padding=2, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(task, fontsize=10)
        axes.margins(x=0.3)
        axes.xaxis.set_major_locator(plt.MaxNLocator(4))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.set_xlabel("environment steps per second", fontsize=8)
        if axes not in grid[:, 0]:
            axes.set_yticklabels([])
    for axes in grid.flat[len(tasks) :]:
        axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("tasks", nargs="*", type=environment, default=TASKS, help=f"default: {' '.join(TASKS)}")
    parser.add_argument("--seconds", type=float, default=4.0, help="of one turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--png", type=Path, help="draw it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    print(f"{'task':<20}{'way':<24}{'steps/s':>10}{'ours/this':>10}")
    for task in options.tasks:
        rows += compare(task, options.seconds, options.rounds, options.seed)
        write_csv(options.csv, rows)
    if options.png:
        draw(options.png, rows)


if __name__ == "__main__":
    main()
