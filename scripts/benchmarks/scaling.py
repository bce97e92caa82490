r"""How the cost of a natural step grows: over batch, parameters, conjugate-gradient iterations and processes.

    python scripts/benchmarks/scaling.py --csv docs/results/scaling.csv --png docs/results/scaling.png

The network is a tanh policy with two hidden layers. One of batch (rows), width (hence parameters), iterations and
processes varies, while the others stand at their defaults. What is timed is one Fisher-vector product, and for the
iterations one whole solve. Peak memory is that of the process above what it held before; over processes (Gloo, one
thread each, the batch shared out) it is that of process 0.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from interleaved import machine, make_parser, write_csv
from torch import nn

from npg import Fisher, families
from npg.solvers import conjugate_gradient

BATCH, WIDTH, ITERATIONS = 8192, 256, 10
AXES = {
    "batch": [1024, 2048, 4096, 8192, 16384, 32768],
    "parameters": [64, 128, 256, 512, 1024],  # widths
    "iterations": [5, 10, 20, 40, 80],
    "processes": [1, 2],
}


def fisher(batch: int, width: int, device: str = "cpu", group: dist.ProcessGroup | None = None) -> Fisher:
    """The Fisher of a policy with random weights on random observations, its program traced."""
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(17, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 6))
    made = Fisher(policy.to(device), torch.randn(batch, 17, device=device), families.Gaussian(), process_group=group)
    made @ torch.randn(made.shape[0], device=device)
    return made


class Peak:
    """The most memory held since ``start``, in bytes."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def start(self) -> None:
        """Begin to watch."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # glibc gives back what is free,
            Path("/proc/self/clear_refs").write_text("5")  # and Linux lets the high-water mark fall to what is held
            self.held = self._status("VmRSS")

    def stop(self) -> int:
        """The most that was held since, less what was held then."""
        peak = torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")
        return max(0, peak - self.held)

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def timed(function: Callable[[], object], rounds: int, peak: Peak) -> tuple[float, int]:
    """Median seconds of a call, and the most bytes that it held."""
    synchronize: Callable[[], object] = torch.cuda.synchronize if peak.cuda else lambda: None
    function()
    peak.start()
    seconds = []
    for _ in range(rounds):
        synchronize()
        started = perf_counter()
        function()
        synchronize()
        seconds.append(perf_counter() - started)
    return float(np.median(seconds)), peak.stop()


def solve(operator: Fisher, iterations: int) -> Callable[[], object]:
    b = torch.ones(operator.shape[0], device=operator.device)
    return lambda: conjugate_gradient(operator, b, damping=1e-3, max_iterations=iterations, rtol=0.0)


def product(operator: Fisher) -> Callable[[], object]:
    v = torch.ones(operator.shape[0], device=operator.device)
    return lambda: operator @ v


def _process(rank: int, world: int, rounds: int, store: str, result: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    measured = _product_of(world, rounds)
    if rank == 0:
        result.put(measured)
    # Gloo's threads end here, if nothing holds the group any more.
    dist.destroy_process_group()


def _product_of(world: int, rounds: int) -> tuple[float, int, int]:
    operator = fisher(BATCH // world, WIDTH, group=dist.group.WORLD)
    seconds, memory = timed(product(operator), rounds, Peak("cpu"))
    return seconds, memory, operator.shape[0]


def over_processes(world: int, rounds: int, store: Path) -> tuple[float, int, int]:
    """Seconds and bytes of one product by ``world`` processes that share the batch."""
    context = mp.get_context("spawn")
    result = context.SimpleQueue()
    mp.start_processes(_process, (world, rounds, str(store), result), world, start_method="spawn")
    return result.get()


def measurements(rounds: int, device: str) -> Iterator[dict[str, Any]]:
    peak = Peak(device)
    for axis, values in AXES.items():
        if axis == "processes" and device != "cpu":
            continue
        for value in values:
            batch, width = (value if axis == "batch" else BATCH), (value if axis == "parameters" else WIDTH)
            if axis == "processes":
                with TemporaryDirectory() as folder:
                    seconds, memory, size = over_processes(value, rounds, Path(folder) / "store")
            else:
                operator = fisher(batch, width, device)
                size = operator.shape[0]
                call = solve(operator, value) if axis == "iterations" else product(operator)
                seconds, memory = timed(call, rounds if axis != "iterations" else max(3, rounds // 5), peak)
            yield {
                "axis": axis,
                "value": size if axis == "parameters" else value,
                "batch": batch,
                "parameters": size,
                "ms_median": f"{1e3 * seconds:.3f}",
                "peak_bytes": memory,
                "rounds": rounds,
                "threads": 1 if axis == "processes" else torch.get_num_threads(),
                "machine": machine(device),
                "torch": torch.__version__,
            }


def exponent(rows: list[dict[str, Any]], axis: str) -> float:
    """The k of cost ∝ valueᵏ, by least squares on logarithms."""
    mine = [row for row in rows if row["axis"] == axis]
    x, y = ([np.log(float(row[key])) for row in mine] for key in ("value", "ms_median"))
    return float(np.polyfit(x, y, 1)[0])


LABELS = {
    "batch": ("rows in the batch", "one product [ms]"),
    "parameters": ("parameters", "one product [ms]"),
    "iterations": ("conjugate-gradient iterations", "one solve [ms]"),
}


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Time over each axis on logarithmic scales, with the line of slope 1; below, peak memory."""
    figure, grid = plt.subplots(2, 3, figsize=(9, 4.6), layout="constrained", sharex="col")
    for column, (axis, (x_label, y_label)) in enumerate(LABELS.items()):
        mine = [row for row in rows if row["axis"] == axis]
        x = np.array([float(row["value"]) for row in mine])
        y = np.array([float(row["ms_median"]) for row in mine])
        memory = np.array([row["peak_bytes"] for row in mine]) / 2**20
        top, bottom = grid[:, column]
        top.loglog(x, y, "o-", color="#0072B2", label=f"measured, slope {exponent(rows, axis):.2f}")
        top.loglog(x, y[-1] * x / x[-1], "--", color="0.5", label="slope 1")
        top.set_ylabel(y_label)
        top.legend(frameon=False, fontsize=8)
        bottom.semilogx(x, memory, "o-", color="#D55E00")
        bottom.set_ylim(0, 1.3 * max(memory.max(), 1))
        bottom.set_ylabel("peak memory [MiB]")
        bottom.set_xlabel(x_label)
        if axis == "iterations":
            bottom.set_xticks(x, [f"{value:g}" for value in x])
            bottom.minorticks_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = make_parser(__doc__, rounds=20)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--png", type=Path, help="draw it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    print(f"{'axis':<12}{'value':>10}{'batch':>8}{'parameters':>12}{'ms':>10}{'peak MiB':>10}")
    for row in measurements(options.rounds, options.device):
        rows.append(row)
        print(
            f"{row['axis']:<12}{row['value']:>10,}{row['batch']:>8,}{row['parameters']:>12,}{row['ms_median']:>10}"
            f"{row['peak_bytes'] / 2**20:>10.1f}",
            flush=True,
        )
    for axis in LABELS:
        print(f"cost grows as {axis}^{exponent(rows, axis):.2f}")
    write_csv(options.csv, rows)
    if options.png:
        draw(options.png, rows)


if __name__ == "__main__":
    main()
