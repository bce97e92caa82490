"""Count what a training step, or an update of an agent, sends: calls and payload bytes of all-reduce.

torchrun --standalone --nproc_per_node=2 scripts/benchmarks/communication.py
torchrun --standalone --nproc_per_node=2 scripts/benchmarks/communication.py --agents
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

import agents
from envs import make_vec_env
from npg.parallel import World, open_world
from npg.vision.config import Config
from npg.vision.data import ImageData
from npg.vision.training import Trainer

CASES = {
    "sgd": ("sgd", {"lr": 0.1}, 0),
    "online-ngd": ("online-ngd", {"lr": 0.1}, 0),
    "diagonal-ngd, 1 probe": ("diagonal-ngd", {"lr": 0.001}, 0),
    "kfac": ("kfac", {"lr": 0.1, "damping": 0.01, "update_period": 1}, 0),
    "ngd, 5 iterations": ("ngd", {"lr": 0.1, "damping": 0.01, "max_iterations": 5, "rtol": 0.0}, 0),
    "ngd, 10 iterations": ("ngd", {"lr": 0.1, "damping": 0.01, "max_iterations": 10, "rtol": 0.0}, 0),
    "sgd, averaged every 4 steps": ("sgd", {"lr": 0.1}, 4),
}
STEPS = 4

#: Algorithm, critic, and arguments: one actor step and 10 epochs, or steps, of the critic, of 2,048 steps in all.
UPDATES = {
    "npg, no critic": (agents.NPG, {"n_critic_updates": 0}),
    "trpo, no critic": (agents.TRPO, {"n_critic_updates": 0}),
    "trpo, adam": (agents.TRPO, {"batch_size": 128}),
    "trpo, adam, large batches": (agents.TRPO, {"batch_size": 2048}),
    "trpo, natural": (agents.TRPO, {"critic": "natural"}),
    "mdpo, adam": (agents.MDPO, {"batch_size": 128}),
}


class Counter:
    """Stands in for ``torch.distributed.all_reduce``, and counts what goes through."""

    def __init__(self, all_reduce: Callable[..., Any]) -> None:
        self.all_reduce, self.calls, self.bytes = all_reduce, 0, 0

    def __call__(self, tensor: Any, *arguments: Any, **options: Any) -> Any:
        """Count the call and pass it on."""
        self.calls += 1
        self.bytes += tensor.numel() * tensor.element_size()
        return self.all_reduce(tensor, *arguments, **options)


@contextmanager
def counting() -> Iterator[Counter]:
    """Count what is sent meanwhile."""
    counter = dist.all_reduce = Counter(dist.all_reduce)
    try:
        yield counter
    finally:
        dist.all_reduce = counter.all_reduce


def measure_update(name: str, task: str, world: World) -> dict[str, Any]:
    """What one update of an agent sends, after 2,048 steps of 8 environments; collecting is not counted."""
    algorithm, options = UPDATES[name]
    model = algorithm(
        "MlpPolicy", make_vec_env(task, 8 // world.size, seed=0), n_steps=256, seed=0, device="cpu", **options
    )
    model.join(world.group)
    sent: list[Counter] = []
    update = model.train

    def counted() -> None:
        with counting() as counter:
            update()
        sent.append(counter)

    model.train = counted
    model.learn(2048)
    log = model.logger.name_to_value
    of_each = (model.networks.actor_parameters, model.networks.critic_parameters)
    actor, critic = (sum(p.numel() for p in of.values()) for of in of_each)
    products = int(log["train/cg_iterations"]) if algorithm is not agents.MDPO else model.n_actor_updates
    return {
        "task": task,
        "update": name,
        "processes": world.size,
        "actor_parameters": actor,
        "critic_parameters": critic,
        "products_or_gradient_steps": products,
        "backtracks": int(log["train/backtracks"]),
        "all_reduces": sent[0].calls,
        "payload_bytes": sent[0].bytes,
        "payload_over_gradient": f"{sent[0].bytes / (4 * actor):.3f}",
    }


def measure(model: str, case: tuple[str, dict[str, Any], int], world: World) -> tuple[int, float, float]:
    """Parameters, and calls and bytes per training step of one process."""
    optimizer, options, average_every = case
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8 * STEPS + 1, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(0, 10, len(pixels))
    data = ImageData(pixels, labels, pixels[:1], labels[:1], tuple("0123456789"))
    config = Config(model, optimizer, options, batch_size=8, validation_size=1, average_every=average_every)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, data, Path(folder) / "run", world)
        trainer.take_step(*next(iter(trainer.loader)), {})  # the first step compares, and asks, more
        with counting() as counter:
            for inputs, targets in trainer.loader:
                trainer.take_step(inputs, targets, {})
        if trainer.folder is not None:
            trainer.folder.close()
    return sum(p.numel() for p in trainer.model.parameters()), counter.calls / STEPS, counter.bytes / STEPS


def measure_step(name: str, model: str, world: World) -> dict[str, Any]:
    """What one step of an optimizer sends."""
    parameters, calls, payload = measure(model, CASES[name], world)
    return {
        "model": model,
        "optimizer": name,
        "processes": world.size,
        "all_reduces_per_step": f"{calls:g}",
        "payload_bytes_per_step": f"{payload:.0f}",
        "payload_over_gradient": f"{payload / (4 * parameters):.3f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="densenet-19")
    parser.add_argument("--agents", action="store_true", help="measure updates of agents, not steps of optimizers")
    parser.add_argument("--task", default="HalfCheetah-v5", help="of the agents")
    parser.add_argument("--out", type=Path, help="default: docs/results/communication[_agents].csv")
    options = parser.parse_args()
    out = options.out or Path(f"docs/results/communication{'_agents' if options.agents else ''}.csv")
    with open_world("cpu") as world:
        if world.size == 1:
            parser.error("one process sends nothing: start it by torchrun --standalone --nproc_per_node=2")
        if options.agents:
            rows = [measure_update(name, options.task, world) for name in UPDATES]
        else:
            rows = [measure_step(name, options.model, world) for name in CASES]
    if world.is_main:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(out.read_text())


if __name__ == "__main__":
    main()
