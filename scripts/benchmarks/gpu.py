"""What a GPU has to tell, in one command: one JSON file and one table.

    python scripts/benchmarks/gpu.py --data PATH --out docs/results/gpu
    python scripts/benchmarks/gpu.py --device cpu --small        # the same on next to nothing

1. tests: those that need CUDA;
2. products: a Fisher-vector product, in gradients, and a solve by ten iterations of CG, of WRN-16-10 and of a policy
   with two layers of 1,024;
3. overhead: a training step of each optimizer over one of SGD's, on WRN-16-10 and DenseNet-19;
4. training: two epochs of DenseNet-19, with SGD and with the best natural gradient; without --data on random images,
   whose seconds count and whose accuracies do not;
5. trpo: an update on images.

No part begins after eight minutes (--minutes), and the files say what was left out; the one under way is finished.
Ratios are taken within one run.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from time import perf_counter
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from interleaved import machine, measure, ratio, synchronize, write_csv
from optimizer_overhead import GRADIENT, MODEL, make_step
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from agents import TRPO
from npg import Fisher, conjugate_gradient, families
from npg.parallel import open_world
from npg.vision import model_from_name
from npg.vision.config import load_config
from npg.vision.data import ImageData, load
from npg.vision.training import Trainer

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Job:
    """Where and how large, and what was found: rows of (part, what, quantity, value)."""

    device: torch.device
    small: bool
    data: Path | None
    best: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    def note(self, part: str, what: str, quantity: str, value: float | str) -> None:
        """Add a row, and print it."""
        value = value if isinstance(value, str) else float(f"{value:.4g}")
        self.rows.append({"part": part, "what": what, "quantity": quantity, "value": value})
        print(f"{part:<10}{what:<40}{quantity:<30}{value}", flush=True)


def tests(job: Job) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "cuda", str(ROOT / "tests" / "test_devices.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=ROOT)
    found = re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout) or [("0", "passed")]
    for count, outcome in found:
        job.note("tests", "test_devices.py, -m cuda", outcome, float(count))
    if done.returncode:
        job.note("tests", "the last of pytest's output", "text", done.stdout[-2000:])


def policy(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(17, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 6))


def products(job: Job) -> None:
    rounds = 2 if job.small else 8
    width, rows, name, batch = (16, 32, "wrn-10-1-s2", 4) if job.small else (1024, 16384, "wrn-16-10", 128)
    problems: dict[str, tuple[nn.Module, torch.Tensor, families.Family]] = {
        f"policy {width}x{width}, batch {rows}": (policy(width), torch.randn(rows, 17), families.Gaussian()),
        f"{name}, batch {batch}": (model_from_name(name), torch.randn(batch, 3, 32, 32), families.Categorical()),
    }
    for what, (model, inputs, family) in problems.items():
        model, x = model.to(job.device), inputs.to(job.device)
        with torch.no_grad():
            targets = family.sample(model(x))
        fisher = Fisher(model, x, family)
        v = torch.randn(fisher.shape[0], device=job.device)

        def gradient(
            model: nn.Module = model, x: torch.Tensor = x, family: families.Family = family, y: torch.Tensor = targets
        ) -> object:
            return torch.autograd.grad(family.log_likelihood(model(x), y).mean(), list(model.parameters()))

        def solve(fisher: Fisher = fisher, v: torch.Tensor = v) -> object:
            return conjugate_gradient(fisher, v, damping=0.1, max_iterations=10, rtol=0.0)

        ways: dict[str, Callable[[], object]] = {
            "gradient": gradient,
            "product": lambda fisher=fisher, v=v: fisher @ v,  # type: ignore[misc]
            "cg, 10 iterations": solve,
        }
        seconds = measure(ways, rounds=rounds, turn=1 if job.small else 3, device=job.device)
        for way in ways:
            job.note("products", what, f"{way}, ms", 1e3 * float(np.median(seconds[way])))
            if way != "gradient":
                job.note("products", what, f"{way}, gradients", ratio(seconds, way, "gradient")[1])


def overhead(job: Job) -> None:
    names = ["sgd", "kl-shampoo", "kfac"] if job.small else [*GRADIENT, *MODEL]
    for model_name, batch in (("wrn-10-1-s2", 4),) if job.small else (("wrn-16-10", 128), ("densenet-19", 128)):
        x = torch.randn(batch, 3, 32, 32, device=job.device)
        y = torch.randint(10, (batch,), device=job.device)
        torch.manual_seed(0)
        steps = {}
        for name in names:
            try:
                steps[name] = make_step(name, model_from_name(model_name).to(job.device), x, y)
            except AttributeError:  # what pytorch-optimizer has
                job.note("overhead", model_name, name, "not installed")
        # a turn is a multiple of all update periods; the warm-up goes past the burn-in
        seconds = measure(
            steps, rounds=2 if job.small else 3, turn=4, warm_up=2 if job.small else 12, device=job.device
        )
        for name in steps:
            job.note("overhead", model_name, f"{name}, ms", 1e3 * float(np.median(seconds[name])))
            job.note("overhead", model_name, f"{name} over sgd", ratio(seconds, name, "sgd")[1])


def random_images(train: int) -> ImageData:
    generator = np.random.default_rng(0)
    parts = []
    for count in (train, 100):
        images = generator.integers(0, 256, (count, 3, 32, 32)).astype(np.uint8)
        parts += [images, np.arange(count) % 10]
    return ImageData(*parts, tuple(f"class {i}" for i in range(10)))


def training(job: Job) -> None:
    model, size = ("wrn-10-1-s2", 64) if job.small else ("densenet-19", 50000)
    images = random_images(size) if job.data is None else load(job.data)
    overrides: dict[str, Any] = {"epochs": 2, "device": job.device.type, "keep_checkpoints": 1, "limit_train": None}
    if job.small:
        overrides |= {"batch_size": 16, "validation_size": 16, "limit_train": 32}
    for name in ("sgd", job.best):
        config = load_config(model, name, "tuned", overrides)
        with tempfile.TemporaryDirectory() as folder, open_world(job.device.type) as world, redirect_stdout(StringIO()):
            trainer = Trainer(config, images, Path(folder) / "run", world)
            summary = trainer.run()
        on = "random images" if job.data is None else "CIFAR-10"
        job.note("training", f"{model}, {name}, {on}", "seconds per epoch", summary["train_seconds"] / 2)
        job.note("training", f"{model}, {name}, {on}", "validation % after 2 epochs", summary["final_top1"])


class Images(gym.Env[np.ndarray, int]):
    """Random images of one size, reward for one of six actions."""

    def __init__(self, size: int) -> None:
        self.observation_space = gym.spaces.Box(0, 255, (4, size, size), np.uint8)
        self.action_space = gym.spaces.Discrete(6)
        self._left = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin 50 steps."""
        super().reset(seed=seed)
        self._left = 50
        return self._image(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Another image."""
        self._left -= 1
        return self._image(), float(action == 0), False, self._left == 0, {}

    def _image(self) -> np.ndarray:
        return self.np_random.integers(0, 256, self.observation_space.shape).astype(np.uint8)


def trpo(job: Job) -> None:
    size, envs, steps = (36, 2, 8) if job.small else (84, 8, 256)
    env = DummyVecEnv([lambda: Images(size) for _ in range(envs)])
    agent = TRPO("CnnPolicy", env, n_steps=steps, batch_size=min(256, envs * steps), seed=0, device=job.device.type)
    agent.learn(envs * steps)  # it warms up
    agent.collect()
    synchronize(job.device)
    before = perf_counter()
    agent.train()
    synchronize(job.device)
    job.note("trpo", f"{envs * steps} images of 4x{size}x{size}", "update, s", perf_counter() - before)


PARTS = {"tests": tests, "products": products, "overhead": overhead, "training": training, "trpo": trpo}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --small (default: %(default)s)")
    parser.add_argument("--data", type=Path, metavar="PATH", help="as for train_cifar.py; without, random images")
    parser.add_argument("--best", default="kl-shampoo", metavar="NAME", help="to train with (default: %(default)s)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        help="no part begins after this; the one under way is finished (default: %(default)s)",
    )
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help="(default: all)"
    )
    parser.add_argument("--small", action="store_true", help="next to nothing of everything: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --small tries the script without one")
    job = Job(torch.device(options.device), options.small, options.data, options.best)
    torch.manual_seed(0)
    start, seconds = perf_counter(), {}
    for name in options.parts:
        begun = perf_counter()
        if begun - start > 60 * options.minutes:
            job.note(name, "", "left out", "no time left")
            continue
        try:
            PARTS[name](job)
        except Exception as error:  # the other parts are worth their time still
            job.note(name, "", "failed", f"{type(error).__name__}: {error}")
        seconds[name] = round(perf_counter() - begun, 1)
    found = {"machine": machine(job.device), "torch": torch.__version__, "small": job.small, "seconds": seconds}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(found | {"rows": job.rows}, indent=1) + "\n", encoding="utf-8")
    write_csv(options.out / "gpu.csv", job.rows)
    print(f"{perf_counter() - start:.0f} s; {options.out / 'gpu.json'}, {options.out / 'gpu.csv'}")
    return int(any(row["quantity"] == "failed" for row in job.rows))


if __name__ == "__main__":
    sys.exit(main())
