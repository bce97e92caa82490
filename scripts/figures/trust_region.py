"""Trust-region curves: predicted against actual KL and gain of every update, for NPG, TRPO, MDPO, and for NGD.

    python scripts/figures/trust_region.py --out docs/results/trust_region --cifar PATH

Three agents on one task, and natural gradient descent with a KL radius on CIFAR-10 (`npg.optim.NGD`): what the
quadratic model promised for each step, and what the step did. ``--cifar`` takes the official archive, or image files;
without it the last panel is left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import style
import torch
from stable_baselines3.common.callbacks import BaseCallback

from agents import MDPO, NPG, TRPO
from envs import make_vec_env
from npg import families
from npg.optim import NGD
from npg.vision import model_from_name
from npg.vision.data import load
from npg.vision.loader import Normalization

TASK = "CartPole-v1"
RADIUS = 0.01
AGENTS: dict[str, tuple[type, dict[str, Any]]] = {
    "NPG": (NPG, {"target_kl": RADIUS, "cg_damping": 1e-3}),
    "TRPO": (TRPO, {"target_kl": RADIUS, "cg_damping": 1e-3}),
    "MDPO": (MDPO, {"actor_learning_rate": 1e-3}),
}
KEYS = ("predicted_kl", "kl", "predicted_gain", "actual_gain", "accepted", "backtracks")


class Record(BaseCallback):
    """Keeps what the agent logged of every update."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        values = self.logger.name_to_value
        if "train/kl" in values:
            self.rows.append({key: float(values[f"train/{key}"]) for key in KEYS})


def agent(name: str, updates: int, seed: int) -> list[dict[str, float]]:
    """The updates of one agent."""
    algorithm, options = AGENTS[name]
    env = make_vec_env(TASK, 8, seed)
    model = algorithm("MlpPolicy", env, n_steps=256, gamma=0.98, gae_lambda=0.98, seed=seed, device="cpu", **options)
    record = Record()
    # the log is read at the next rollout's start, so one more rollout than updates, and no dump in between
    model.learn((updates + 1) * 8 * 256, callback=record, log_interval=10**9)
    env.close()
    return record.rows


def classifier(data: Path, updates: int, seed: int) -> list[dict[str, float]]:
    """The updates of NGD on a Wide ResNet, batches of 256."""
    torch.manual_seed(seed)
    images = load(data)
    normalization = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), torch.device("cpu"))
    model = model_from_name("wrn-10-1")
    optimizer = NGD(model, families.Categorical(), lr=1.0, damping=0.1, max_kl=RADIUS, max_iterations=10)
    rows = []
    for _ in range(updates):
        index = torch.randint(len(images.train_labels), (256,))
        x = normalization(torch.as_tensor(images.train_images)[index])
        report = optimizer.step(x, torch.as_tensor(images.train_labels)[index])
        rows.append({key: float(getattr(report, key)) for key in KEYS})
    return rows


def draw(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    figure, axes = style.plt.subplots(
        2, len(curves), figsize=(3.1 * len(curves), 6.2), sharex=True, squeeze=False, layout="constrained"
    )
    for axis in axes[0, 1:]:
        axis.sharey(axes[0, 0])
    for column, (name, rows) in enumerate(curves.items()):
        updates = range(1, len(rows) + 1)
        for line, (predicted, actual, label) in enumerate(
            (("predicted_kl", "kl", "KL [nats]"), ("predicted_gain", "actual_gain", "gain of the objective"))
        ):
            axis = axes[line][column]
            axis.plot(updates, [r[actual] for r in rows], color=style.BLUE, lw=1.6, label="actual")
            axis.plot(updates, [r[predicted] for r in rows], color=style.VERMILION, lw=1.2, ls="--", label="predicted")
            if line == 0:
                axis.axhline(RADIUS, color=style.GREY, lw=1, ls=":", label="radius δ (MDPO has none)")
            axis.set_ylim(bottom=0 if line == 0 else None)
            if column == 0:
                axis.set_ylabel(label)
        axes[0][column].set_title(name)
        axes[1][column].set_xlabel("update")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    style.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the picture and its CSV go")
    parser.add_argument("--cifar", type=Path, metavar="PATH", help="CIFAR-10: the archive, or image files")
    parser.add_argument("--dataset", default="CIFAR-10", help="what the last panel calls its data")
    parser.add_argument(
        "--updates", type=int, default=48, help="of each agent, and steps of the classifier (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of environments, agents and classifier (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.updates < 1:
        parser.error(f"--updates must be at least 1, got {options.updates}")
    curves = {f"{name}\n{TASK}": agent(name, options.updates, options.seed) for name in AGENTS}
    if options.cifar is not None:
        curves[f"NGD\n{options.dataset}"] = classifier(options.cifar, options.updates, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    draw(curves, options.out / "trust_region.png")
    style.write_csv(
        options.out / "trust_region.csv",
        [
            {"run": name.replace("\n", ", "), "update": number, **row}
            for name, rows in curves.items()
            for number, row in enumerate(rows, 1)
        ],
    )
    for name, rows in curves.items():
        kept = [row for row in rows if row["accepted"]]
        ratio = sum(row["kl"] for row in kept) / sum(row["predicted_kl"] for row in kept)
        largest = max(row["kl"] for row in kept)
        print(f"{name.splitlines()[0]:<6} actual KL / predicted {ratio:.2f}, largest KL {largest:.4f} nats")


if __name__ == "__main__":
    main()
