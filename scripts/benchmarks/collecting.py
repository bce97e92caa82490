r"""What a vector step costs beside the environments, part by part: ours and Stable-Baselines3's.

    python scripts/benchmarks/collecting.py --csv docs/results/collecting.csv

* act: actions from observations, by the traced program and by the modules that it is traced from;
* normalise: VecNormalize's step over environments that answer at once, `envs.VecNormalize` and Stable-Baselines3's;
* store: a step into the rollout buffer, `agents.buffer` and Stable-Baselines3's;
* environments: a step of them under random actions;
* collect: all of it, as `collect_rollouts` does it, values and advantages included.

Microseconds per vector step; all take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from interleaved import environment, machine, make_parser, measure, ratio, write_csv
from stable_baselines3.common import buffers, vec_env
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from agents import TRPO
from agents.config import resolve
from envs import VecNormalize, make_vec_env


class Answered(VecEnvWrapper):
    """Environments that answer every step with the same one."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.observations = venv.reset()
        self.step_async(np.stack([venv.action_space.sample() for _ in range(venv.num_envs)]))
        self.answer = venv.step_wait()

    def reset(self) -> Any:
        """The first observations again."""
        return self.observations

    def step_wait(self) -> Any:
        """The one answer."""
        return self.answer


def parts(env_id: str, n_envs: int, steps: int, seed: int) -> dict[str, tuple[Callable[[], object], int]]:
    """For each part one function, and how many vector steps it takes."""
    preset = resolve("trpo", env_id, seed=seed)
    options = {**preset.hyperparameters, "n_steps": steps}

    def make() -> VecEnv:
        return make_vec_env(env_id, n_envs, seed)

    agent = TRPO("MlpPolicy", VecNormalize(make(), **(preset.normalize or {})), seed=seed, device="cpu", **options)
    agent.learn(steps * n_envs)
    actor, observations = agent.networks.actor, agent.recent_observations()
    rows = observations.numpy()
    bare = make()
    bare.reset()
    actions = np.stack([bare.action_space.sample() for _ in range(n_envs)])
    act, starts, rewards = actor.acting(observations), np.zeros(n_envs, bool), np.zeros(n_envs, np.float32)
    nothing = torch.zeros(n_envs)
    shape = (steps, agent.observation_space, agent.action_space, "cpu")
    ours, theirs = type(agent.rollout_buffer)(*shape, n_envs=n_envs), buffers.RolloutBuffer(*shape, n_envs=n_envs)
    stepped = {cls: cls(Answered(make())) for cls in (VecNormalize, vec_env.VecNormalize)}
    for env in stepped.values():
        env.reset()

    @torch.no_grad()
    def program() -> None:
        if actor.unchanged():
            act(observations)

    @torch.no_grad()
    def by_modules() -> None:
        actor.family.sample(actor(actor.prepare(observations)))

    def record() -> None:
        ours.pos = 0
        ours.record(rows, actions, rewards, starts)

    def add() -> None:
        theirs.pos = 0
        theirs.add(rows, actions, rewards, starts, nothing, nothing)

    return {
        "act, program": (program, 1),
        "act, modules": (by_modules, 1),
        "normalise, ours": (stepped[VecNormalize].step_wait, 1),
        "normalise, Stable-Baselines3": (stepped[vec_env.VecNormalize].step_wait, 1),
        "store, ours": (record, 1),
        "store, Stable-Baselines3": (add, 1),
        "environments": (lambda: bare.step(actions), 1),
        "collect": (agent.collect, steps),
    }


def main() -> None:
    parser = make_parser(__doc__, rounds=12)
    parser.add_argument(
        "--env", type=environment, default="HalfCheetah-v5", metavar="ENV_ID", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--n-envs", type=int, nargs="+", default=[8, 32], help="numbers of environments (default: 8 32)"
    )
    parser.add_argument("--steps", type=int, default=128, help="vector steps of a turn (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of environments and agent (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    print(f"{'µs per vector step':<30}{'environments':>14}{'median':>10}{'/ environments':>16}")
    for n_envs in options.n_envs:
        functions = parts(options.env, n_envs, options.steps, options.seed)

        def turn(function: Callable[[], object], steps: int) -> Callable[[], None]:
            def run() -> None:
                for _ in range(options.steps // steps):
                    function()

            return run

        seconds = measure({name: turn(*part) for name, part in functions.items()}, rounds=options.rounds, turn=1)
        for name, times in seconds.items():
            low, middle, high = ratio(seconds, name, "environments")
            row = {
                "env": options.env,
                "n_envs": n_envs,
                "part": name,
                "us_per_vector_step": f"{1e6 * float(np.median(times)) / options.steps:.1f}",
                "over_environments_median": f"{middle:.3f}",
                "over_environments_quartile_1": f"{low:.3f}",
                "over_environments_quartile_3": f"{high:.3f}",
                "rounds": options.rounds,
                "seed": options.seed,
                "threads": options.threads,
                "machine": machine(),
                "torch": torch.__version__,
            }
            rows.append(row)
            print(f"{name:<30}{n_envs:>14}{row['us_per_vector_step']:>10}{row['over_environments_median']:>16}")
    write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
