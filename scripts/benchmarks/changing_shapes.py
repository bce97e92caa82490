r"""A transformer whose sequence length changes from step to step, beside the same one at a fixed length.

    python scripts/benchmarks/changing_shapes.py --csv docs/results/changing_shapes.csv

One step is a gradient, a Fisher and ten products with it, as in an update. The lengths are drawn evenly from an
interval, and the fixed one is their mean. Written down are the seconds of a step in each block of steps, programs that
are traced on the way included, with traced programs and without (`npg.acceleration.mode`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from interleaved import machine, write_csv
from torch import Tensor, nn

from npg import Fisher, acceleration, families

TOKENS, CLASSES, WIDTH = 32, 4, 32


class Classifier(nn.Module):
    """Tokens (N, T) ↦ logits (N, C), by two layers of a transformer."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.position = nn.Parameter(0.1 * torch.randn(longest, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """The class of each sequence, from the mean over its places."""
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.encoder(x).mean(1))


def step_of(model: nn.Module, products: int, batch: int, generator: torch.Generator) -> Callable[[int], float]:
    """Length ↦ the seconds of one step on a new batch of that length."""
    parameters = list(model.parameters())

    def step(length: int) -> float:
        x = torch.randint(TOKENS, (batch, length), generator=generator)
        y = torch.randint(CLASSES, (batch,), generator=generator)
        start = perf_counter()
        gradients = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)
        v = nn.utils.parameters_to_vector(gradients)
        fisher = Fisher(model, x, families.Categorical())
        for _ in range(products):
            v = fisher @ v
            v = v / v.norm()
        seconds = perf_counter() - start
        assert torch.isfinite(v).all()
        return seconds

    return step


def blocks(seconds: Sequence[float], block: int) -> list[float]:
    """The mean of each block."""
    return [sum(seconds[i : i + block]) / block for i in range(0, len(seconds) - block + 1, block)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs=2, default=(16, 48), metavar=("LEAST", "MOST"), help="[16 48]")
    parser.add_argument("--steps", type=int, default=600, help="of each kind [%(default)s]")
    parser.add_argument("--block", type=int, default=100, help="steps of a row of the table [%(default)s]")
    parser.add_argument("--batch", type=int, default=16, help="sequences [%(default)s]")
    parser.add_argument("--products", type=int, default=10, help="of each step [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads [%(default)s]")
    parser.add_argument("--csv", type=Path, help="write the table here as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    least, most = options.lengths
    drawn = torch.randint(least, most + 1, (options.steps,), generator=torch.Generator().manual_seed(options.seed))

    steps: dict[tuple[str, str], Callable[[int], float]] = {}
    taken: dict[tuple[str, str], list[float]] = {}
    for mode in ("auto", "off"):
        for kind in ("fixed", "changing"):
            torch.manual_seed(options.seed)
            generator = torch.Generator().manual_seed(options.seed)
            steps[mode, kind] = step_of(Classifier(most), options.products, options.batch, generator)
            taken[mode, kind] = []
    for length in drawn.tolist():  # the four take turns
        for (mode, kind), step in steps.items():
            with acceleration.mode(mode):
                taken[mode, kind].append(step((least + most) // 2 if kind == "fixed" else length))

    unit = median(taken["auto", "fixed"])
    rows: list[dict[str, Any]] = []
    print(f"seconds of a step, in those of a fixed length ({1e3 * unit:.1f} ms); blocks of {options.block} steps")
    for (mode, kind), seconds in taken.items():
        means = blocks(seconds, options.block)
        print(f"acceleration {mode:<5}{kind:<10}" + "".join(f"{mean / unit:>7.2f}" for mean in means))
        rows += [
            {
                "acceleration": mode,
                "length": kind,
                "from_step": i * options.block,
                "to_step": (i + 1) * options.block,
                "over_fixed": f"{mean / unit:.3f}",
                "ms": f"{1e3 * mean:.2f}",
                "lengths": f"{least}-{most}",
                "batch": options.batch,
                "products": options.products,
                "seed": options.seed,
                "threads": options.threads,
                "machine": machine(),
                "torch": torch.__version__,
            }
            for i, mean in enumerate(means)
        ]
    write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
