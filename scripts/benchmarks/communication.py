"""Count what a training step sends: calls and payload bytes of all-reduce.

torchrun --standalone --nproc_per_node=2 scripts/benchmarks/communication.py
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from npg.parallel import World, open_world
from npg.vision.config import Config
from npg.vision.data import ImageData
from npg.vision.training import Trainer

CASES = {
    "sgd": ("sgd", {"lr": 0.1}, 0),
    "online-ngd": ("online-ngd", {"lr": 0.1}, 0),
    "diagonal-ngd, 1 probe": ("diagonal-ngd", {"lr": 0.001}, 0),
    "ngd, 5 iterations": ("ngd", {"lr": 0.1, "damping": 0.01, "max_iterations": 5, "rtol": 0.0}, 0),
    "ngd, 10 iterations": ("ngd", {"lr": 0.1, "damping": 0.01, "max_iterations": 10, "rtol": 0.0}, 0),
    "sgd, averaged every 4 steps": ("sgd", {"lr": 0.1}, 4),
}
STEPS = 4


class Counter:
    """Stands in for ``torch.distributed.all_reduce``, and counts what goes through."""

    def __init__(self, all_reduce: Callable[..., Any]) -> None:
        self.all_reduce, self.calls, self.bytes = all_reduce, 0, 0

    def __call__(self, tensor: Any, *arguments: Any, **options: Any) -> Any:
        """Count the call and pass it on."""
        self.calls += 1
        self.bytes += tensor.numel() * tensor.element_size()
        return self.all_reduce(tensor, *arguments, **options)


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
        counter = dist.all_reduce = Counter(dist.all_reduce)
        for inputs, targets in trainer.loader:
            if optimizer in ("ngd", "diagonal-ngd"):
                trainer._natural_step(inputs, targets, {})
            else:
                trainer._train_step(inputs, targets)
        dist.all_reduce = counter.all_reduce
        if trainer.folder is not None:
            trainer.folder.close()
    return sum(p.numel() for p in trainer.model.parameters()), counter.calls / STEPS, counter.bytes / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="densenet-19")
    parser.add_argument("--out", type=Path, default=Path("docs/results/communication.csv"))
    options = parser.parse_args()
    with open_world("cpu") as world:
        rows = []
        for name, case in CASES.items():
            parameters, calls, payload = measure(options.model, case, world)
            rows.append(
                {
                    "model": options.model,
                    "optimizer": name,
                    "processes": world.size,
                    "all_reduces_per_step": f"{calls:g}",
                    "payload_bytes_per_step": f"{payload:.0f}",
                    "payload_over_gradient": f"{payload / (4 * parameters):.3f}",
                }
            )
    if world.is_main:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(options.out.read_text())


if __name__ == "__main__":
    main()
