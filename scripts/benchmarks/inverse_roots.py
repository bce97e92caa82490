"""Time of the ways to the powers of a factor, S^(−½) or S^(−1), as ratios to exact eigenvectors in the same run.

    python scripts/benchmarks/inverse_roots.py --csv docs/results/inverse_roots.csv

* eigenvectors: `torch.linalg.eigh`, for any power;
* Householder: one step of orthogonal iteration, as `npg.curvature.two_sided` takes it by `torch.linalg.qr`;
* Cholesky, twice: the same step by Cholesky's factorisation of the Gram matrix, and again of what that leaves;
* coupled Newton: Newton–Schulz iterations for S^(−½) from nothing, as many as S needs for three digits;
* Cholesky, p = 1: S⁻¹ alone.

Factors are averages of the gradients of a weight of 64 outputs, damped by 1e-3. All ways take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter, process_time

import numpy as np
import torch
from interleaved import at_least, machine, make_parser, measure, ratio, with_number, write_csv
from torch import Tensor

from npg.curvature.two_sided import _iterate


def factors(count: int, dim: int) -> tuple[Tensor, Tensor]:
    """Two neighbouring averages, (N, D, D): what a basis was made of, and what it is to be brought to."""
    g = torch.randn(60, count, 64, dim) * torch.logspace(0, -2, dim)
    weights = 0.95 ** torch.arange(60.0)
    past, now = (torch.einsum("t,tnmi,tnmj->nij", w, g, g) / w.sum() for w in (weights * (weights < 0.82), weights))
    return past, now


def damped(s: Tensor) -> Tensor:
    return s + 1e-3 * s.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(s.shape[-1])


def cholesky_twice(x: Tensor) -> Tensor:
    """The orthonormal factor of x."""
    x = x / torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    for _ in range(2):
        root = torch.linalg.cholesky_ex(x.mT @ x)[0]
        x = torch.linalg.solve_triangular(root, x.mT, upper=False).mT
    return x


def newton(s: Tensor, iterations: int) -> Tensor:
    """S^(−½) by Y ← Y T, Z ← T Z with T = (3 I − Z Y)/2, from S over its norm."""
    eye, norm = torch.eye(s.shape[-1]), torch.linalg.matrix_norm(s)[:, None, None]
    y, z = s / norm, eye.expand_as(s)
    for _ in range(iterations):
        t = 1.5 * eye - 0.5 * z @ y
        y, z = y @ t, t @ z
    return z / norm.sqrt()


def iterations_of_newton(s: Tensor) -> int:
    """How many give three digits of S^(−½) S S^(−½) = I."""
    eye = torch.eye(s.shape[-1])
    for count in range(1, 60):
        root = newton(s, count)
        if float((root @ s @ root - eye).abs().max()) < 1e-3:
            return count
    return 60


def main() -> None:
    parser = make_parser(__doc__, rounds=5, threads=1)
    sizes = [("8", 64), ("5", 144), ("4", 288), ("3", 576)]
    parser.add_argument("--sizes", nargs="+", type=with_number("x", 1), default=sizes, metavar="NxD")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that is not idle")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for number, dim in options.sizes:
        count, size = at_least(1)(number), f"{number}x{dim}"
        past, now = factors(count, dim)
        shift = 1e-3 * now.diagonal(dim1=1, dim2=2).mean(-1)
        s, basis = damped(now), torch.linalg.eigh(past)[1].flip(-1)
        eye, needed = torch.eye(dim), iterations_of_newton(damped(now))
        ways: dict[str, Callable[[], object]] = {
            "eigenvectors": lambda now=now: torch.linalg.eigh(now),  # type: ignore[misc]
            "Householder": lambda now=now, q=basis, x=shift: _iterate(now, q, x),  # type: ignore[misc]
            "Cholesky, twice": lambda s=s, q=basis: cholesky_twice(s @ q),  # type: ignore[misc]
            f"coupled Newton, {needed}": lambda s=s, k=needed: newton(s, k),  # type: ignore[misc]
            "Cholesky, p = 1": lambda s=s, i=eye: torch.linalg.solve_triangular(  # type: ignore[misc]
                torch.linalg.cholesky_ex(s)[0], i, upper=False
            ),
        }
        clock = process_time if options.clock == "cpu" else perf_counter
        seconds = measure(ways, rounds=options.rounds, turn=1, warm_up=1, clock=clock)
        for way in ways:
            low, middle, high = ratio(seconds, way, "eigenvectors")
            milliseconds = 1e3 * float(np.median(seconds[way]))
            print(f"{size:<8}{way:<22}{milliseconds:>9.2f} ms{middle:>8.3f}   {low:.3f} to {high:.3f}", flush=True)
            rows.append(
                {
                    "factors": size,
                    "way": way,
                    "ms_median": f"{milliseconds:.3f}",
                    "over_eigenvectors_median": f"{middle:.4f}",
                    "quartile_1": f"{low:.4f}",
                    "quartile_3": f"{high:.4f}",
                    "rounds": options.rounds,
                    "threads": options.threads,
                    "clock": options.clock,
                    "machine": machine(),
                    "torch": torch.__version__,
                }
            )
    write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
