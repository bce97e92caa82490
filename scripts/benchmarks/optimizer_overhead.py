"""Time of a training step (forward, backward, optimizer) of each optimizer, as a ratio to SGD's in the same run.

    python scripts/benchmarks/optimizer_overhead.py --csv docs/results/optimizer_overhead.csv

The optimizers take turns, over and over, so that whatever else slows the machine down slows all of them, and the ratio
is taken within each round. A round is a multiple of the update periods, 4 of OnlineNGD and 10 of KLShampoo, so that
their updates count in full. Data are random: the time of a step does not depend on them.
"""

import copy
import statistics
from collections.abc import Callable
from time import perf_counter, process_time

import torch
from interleaved import machine, make_parser, measure, ratio, write_csv
from torch import nn
from torch.nn import functional

from npg import families
from npg.optim import NGD, DiagonalNGD, KLShampoo, OnlineNGD
from npg.optim.base import UPDATE_PERIOD
from npg.vision import model_from_name, rivals

LR = 1e-3
CLOCKS = {"wall": perf_counter, "cpu": process_time}
GRADIENT = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), LR, momentum=0.9, weight_decay=1e-4),
    "adam": lambda m: torch.optim.Adam(m.parameters(), LR),
    "muon": lambda m: rivals.Muon(m.parameters(), LR, weight_decay=1e-4),
    "soap": lambda m: rivals.soap(m.parameters(), LR, precondition_frequency=UPDATE_PERIOD),
    "shampoo": lambda m: rivals.shampoo(m.parameters(), LR, preconditioning_compute_steps=UPDATE_PERIOD),
    "kl-shampoo": lambda m: KLShampoo(m.parameters(), LR, weight_decay=1e-4),
    "kl-shampoo-natural": lambda m: KLShampoo(m.parameters(), LR, weight_decay=1e-4, power=1.0),
    "online-ngd": lambda m: OnlineNGD(m.parameters(), LR, weight_decay=1e-4),
    "online-ngd-report": lambda m: OnlineNGD(m.parameters(), LR, weight_decay=1e-4, decoupled_weight_decay=False),
}
MODEL = {
    "diagonal-ngd": lambda m: DiagonalNGD(m, families.Categorical(), LR, weight_decay=1e-4),
    # its update period is one that OnlineNGD has too, so that a turn of so many steps holds one update of each
    "kfac": lambda m: NGD(
        m, families.Categorical(), LR, damping=0.1, solver="kfac", curvature_fraction=0.125, update_period=UPDATE_PERIOD
    ),
    "ngd": lambda m: NGD(m, families.Categorical(), LR, damping=0.1, max_iterations=10, rtol=0.0),
}


def make_step(name: str, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    """One training step of the named optimizer on a model of its own."""
    if name in MODEL:
        optimizer = MODEL[name](model)
        return lambda: optimizer.step(x, y)
    optimizer = GRADIENT[name](model)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def time_steps(
    steps: dict[str, Callable[[], object]],
    per_round: int,
    rounds: int,
    device: torch.device,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Seconds per step of each optimizer in each round."""
    # On a GPU the host runs ahead of the device, which a turn of one step would not let it do.
    turn = per_round if device.type == "cuda" else 1
    turns = per_round // turn
    # The warm-up goes past OnlineNGD's burn-in, and past all compilation and autotuning.
    seconds = measure(steps, rounds=rounds * turns, turn=turn, warm_up=12, device=device, clock=clock)
    return {
        name: [statistics.fmean(values[i : i + turns]) for i in range(0, len(values), turns)]
        for name, values in seconds.items()
    }


def main() -> None:
    parser = make_parser(__doc__, rounds=40)
    parser.add_argument(
        "--models", nargs="+", default=["wrn-16-1", "densenet-19"], help="(default: wrn-16-1 densenet-19)"
    )
    optimizers = [*GRADIENT, *MODEL]
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=optimizers,
        default=["online-ngd", "adam"],
        metavar="NAME",
        help=f"{', '.join(optimizers)} (default: online-ngd adam)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images in a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="per round, a multiple of 4 (default: 4; with kl-shampoo 20)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: seconds of the processor spent by this process, for a machine that is not idle (use --threads 1)",
    )
    options = parser.parse_args()
    period = 20 if {"kl-shampoo", "kl-shampoo-natural"} & {*options.optimizers} else UPDATE_PERIOD
    options.steps = period if options.steps is None else options.steps
    if options.steps < 1 or options.steps % period:
        parser.error(f"--steps {options.steps}: give a multiple of {period}, which holds whole update periods")
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: give at least 2")

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    x = torch.randn(options.batch, 3, 32, 32, device=device)
    y = torch.randint(10, (options.batch,), device=device)

    rows = []
    print(f"{'model':<14}{'optimizer':<20}{'ms/step':>9}{'× SGD':>8}   quartiles")
    for model_name in options.models:
        model = model_from_name(model_name).to(device)
        names = ["sgd", *(name for name in options.optimizers if name != "sgd")]
        steps = {name: make_step(name, copy.deepcopy(model), x, y) for name in names}
        seconds = time_steps(steps, options.steps, options.rounds, device, CLOCKS[options.clock])
        for name in names:
            low, middle, high = ratio(seconds, name, "sgd")
            milliseconds = 1e3 * statistics.median(seconds[name])
            print(f"{model_name:<14}{name:<20}{milliseconds:>9.2f}{middle:>8.3f}   {low:.3f} to {high:.3f}", flush=True)
            rows.append(
                {
                    "model": model_name,
                    "optimizer": name,
                    "device": machine(device),
                    "threads": options.threads,
                    "clock": options.clock,
                    "batch": options.batch,
                    "rounds": options.rounds,
                    "steps_per_round": options.steps,
                    "ms_per_step_median": f"{milliseconds:.3f}",
                    "ratio_to_sgd_median": f"{middle:.4f}",
                    "ratio_quartile_1": f"{low:.4f}",
                    "ratio_quartile_3": f"{high:.4f}",
                    "torch": torch.__version__,
                }
            )
    write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
