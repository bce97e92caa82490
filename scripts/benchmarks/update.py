r"""Time of one TRPO update on one rollout: ours and sb3-contrib's ``train()``.

    python scripts/benchmarks/update.py --csv docs/results/update.csv --png docs/results/update.png

A policy is trained a little, and acts for one rollout of 2,048 steps of HalfCheetah-v5 and for a second one that no
update sees. Both libraries then make the same update from the same weights again and again, in turns, with the same
conjugate-gradient iterations, KL radius and damping; sb3-contrib as RL Zoo sets it. Beside the seconds stands the
explained variance of the critic after the update: of the returns that it was fitted to, and of the next rollout's, for
which a critic is there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from interleaved import environment, machine, make_parser, measure, ratio, write_csv
from peers import trpo_settings
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import explained_variance

from agents import TRPO
from envs import VecNormalize, make_vec_env

# What the variants of ours have beyond RL Zoo's settings. The first has the work per step of the small MuJoCo presets;
# those of the running tasks take larger rollouts, with as many products and critic steps on each.
FEW_LARGE_STEPS = {"n_critic_updates": 3, "batch_size": 256, "learning_rate": 2e-3}
VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {**FEW_LARGE_STEPS, "fisher_fraction": 0.25},
    "ours, whole Fisher": FEW_LARGE_STEPS,
    "ours, natural critic": {"critic": "natural", "n_critic_updates": 1, "fisher_fraction": 0.25},
    "ours, Zoo's critic": {},
}


def rollout(agent: TRPO) -> RolloutBuffer:
    """The next 2,048 steps of the agent."""
    agent.collect()
    return copy.deepcopy(agent.rollout_buffer)


def held_out(agent: Any, buffer: RolloutBuffer) -> float:
    """Explained variance of the returns in ``buffer`` by the critic as it is now."""
    with torch.no_grad():
        observations = torch.as_tensor(buffer.observations.reshape(-1, *buffer.obs_shape))
        values = agent.policy.predict_values(observations).flatten().numpy()
    return float(explained_variance(values, buffer.returns.flatten()))


def reset_of(agent: Any, weights: dict[str, torch.Tensor], buffer: RolloutBuffer) -> Callable[[], None]:
    """How to put the agent before its update: at these weights, with a fresh optimizer, and a copy of the rollout."""
    agent.set_logger(Logger(folder=None, output_formats=[]))
    state = copy.deepcopy(agent.policy.optimizer.state_dict())

    def reset() -> None:
        agent.policy.load_state_dict(weights)
        agent.policy.optimizer.load_state_dict(copy.deepcopy(state))
        agent.rollout_buffer = copy.copy(buffer)
        agent.critic_damping = 0.1

    return reset


def main() -> None:
    parser = make_parser(__doc__, rounds=10)
    parser.add_argument(
        "--env", type=environment, default="HalfCheetah-v5", metavar="ENV_ID", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--before", type=int, default=100_000, help="steps of training before the rollout (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of environments and agent (default: %(default)s)")
    parser.add_argument("--png", type=Path, help="draw it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from sb3_contrib import TRPO as Contrib

    settings = {**trpo_settings(options.env), "n_steps": 512, "seed": options.seed, "device": "cpu"}
    venv = VecNormalize(make_vec_env(options.env, 4, options.seed), gamma=settings["gamma"])
    contrib = Contrib("MlpPolicy", venv, **settings)
    agents: dict[str, Any] = {
        name: TRPO("MlpPolicy", venv, kl_reduction="mean", kl_direction="new_old", **{**settings, **variant})
        for name, variant in VARIANTS.items()
    }
    actor = agents["ours"]
    actor.learn(options.before)
    seen, unseen = rollout(actor), rollout(actor)
    weights = copy.deepcopy(actor.policy.state_dict())

    agents = {"sb3-contrib": contrib, **agents}
    resets = {name: reset_of(agent, weights, seen) for name, agent in agents.items()}
    updates = {name: agent.train for name, agent in agents.items()}
    seconds = measure(updates, rounds=options.rounds, turn=1, warm_up=2, before=resets)
    components = venv.action_space.shape[0]
    rows = []
    print(f"{'update':<27}{'ms':>8}{'times faster':>14}{'explained variance':>20}{'unseen':>8}{'KL':>8}")
    for name, update in updates.items():
        resets[name]()
        update()
        agent = agents[name]
        low, middle, high = ratio(seconds, "sb3-contrib", name)
        logged = agent.logger.name_to_value
        row = {
            "env": options.env,
            "update": name,
            "ms_median": f"{1e3 * float(np.median(seconds[name])):.2f}",
            "times_faster_median": f"{middle:.2f}",
            "times_faster_quartile_1": f"{low:.2f}",
            "times_faster_quartile_3": f"{high:.2f}",
            "explained_variance": f"{held_out(agent, seen):.4f}",
            "explained_variance_unseen": f"{held_out(agent, unseen):.4f}",
            # sb3-contrib's is the mean over the components of an action
            "kl": f"{logged.get('train/kl', components * logged.get('train/kl_divergence_loss', np.nan)):.5f}",
            "cg_max_steps": settings["cg_max_steps"],
            "steps": seen.buffer_size * seen.n_envs,
            "seed": options.seed,
            "rounds": options.rounds,
            "threads": options.threads,
            "machine": machine(),
            "torch": torch.__version__,
        }
        rows.append(row)
        print(
            f"{name:<27}{row['ms_median']:>8}{row['times_faster_median']:>14}{row['explained_variance']:>20}"
            f"{row['explained_variance_unseen']:>8}{row['kl']:>8}"
        )
    write_csv(options.csv, rows)
    if options.png:
        draw(options.png, rows)


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Bars of the milliseconds."""
    figure, axes = plt.subplots(figsize=(7, 2.4), layout="constrained")
    names = [row["update"] for row in rows]
    bars = axes.barh(names, [float(row["ms_median"]) for row in rows], color=["0.6", *["C0"] * (len(rows) - 1)])
    axes.bar_label(
        bars, [f"{float(row['ms_median']):.0f} ms, {row['times_faster_median']}×" for row in rows], padding=3
    )
    axes.invert_yaxis()
    axes.set_xlabel(f"ms per update of {rows[0]['steps']:,} steps, {rows[0]['env']}")
    axes.margins(x=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
