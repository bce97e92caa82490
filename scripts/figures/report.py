"""The report on natural gradients, executable: one picture and one CSV for each of its statements.

    python scripts/figures/report.py --out DIR [--quick] [--only NAME …]

``docs/report.md`` walks through them. ``DIR/numbers.csv`` holds the numbers it quotes. ``--quick`` draws every picture
from less work. Nothing here computes a Fisher, a solve or a step of its own: all of them are calls of ``npg``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import style
import torch
from style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from torch import Tensor, nn
from torch.func import functional_call

from npg import Fisher, TrustRegion, conjugate_gradient, dense_solve, families, natural_step
from npg.mirror import (
    NegativeEntropy,
    SquaredNorm,
    dual_natural_step,
    mirror_descent,
    mirror_step,
    trust_region_step,
)
from npg.optim import NGD, DiagonalNGD
from npg.transport import wasserstein

Numbers = dict[str, tuple[float, str]]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def angle(a: Tensor, b: Tensor) -> float:
    """Between two vectors, in degrees; exact also where it is tiny."""
    a, b = a / a.norm(), b / b.norm()
    return float(torch.rad2deg(2 * torch.atan2((a - b).norm(), (a + b).norm())))


def small_classifier() -> tuple[nn.Module, Tensor, families.Categorical]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))
    return model, 1.5 * randn(16, 2, seed=1), families.Categorical()


# --------------------------------------------------------------------------------- section 2.2: figure 1 of the report


def normals(out: Path, quick: bool) -> Numbers:
    """Two pairs of normals: the distance of their parameters says the contrary of the distance of the distributions."""
    rows, numbers = [], {}
    for pair, (scale, shift) in enumerate([(1000.0, 100.0), (0.1, 0.1)], 1):
        for reading, variance in (("standard deviation", scale**2), ("variance", scale)):
            kl = float(families.Gaussian(variance).kl(torch.zeros(1), torch.tensor([shift])))
            rows.append(
                {"pair": f"N(0, {scale:g}) and N({shift:g}, {scale:g})", "second_argument": reading}
                | {"parameter_distance": shift, "kl_nats": kl}
            )
            numbers[f"KL of pair {pair}, second argument a {reading}"] = (kl, "nats")
    style.write_csv(out / "normals.csv", rows)

    figure, axes = style.panels(sharey=False)
    for ax, row, deviation, shift in zip(axes, rows[::2], (1000.0, 0.1), (100.0, 0.1)):
        y = torch.linspace(-3.2 * deviation, 3.2 * deviation + shift, 400).unsqueeze(-1)
        for mean, color, dash in ((0.0, BLUE, "-"), (shift, VERMILION, "--")):
            density = families.Gaussian(deviation**2).log_likelihood(torch.full_like(y, mean), y).exp()
            ax.plot(y, density, color=color, ls=dash, label=f"mean {mean:g}")
        ax.set(xlabel="y (units of the data)", ylabel="density p(y)", ylim=(0, 1.7 * float(density.max())))
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        ax.set_title(f"two normals, σ = {deviation:g}", loc="left", y=1.08)
        ax.legend(loc="upper right")
        ax.text(0.03, 0.95, f"distance {shift:g}\nKL {row['kl_nats']:g} nats", transform=ax.transAxes, va="top")
    style.save(figure, out / "normals.png")
    return numbers


# ------------------------------------------------------------------------------------------- section 2.2: theorem 1


def steepest(out: Path, quick: bool) -> Numbers:
    """The best of all steps of one length, found by trying them, points along the (natural) gradient."""
    inputs = randn(100, 2, seed=2) @ torch.tensor([[1.8, 0.0], [1.0, 0.9]])
    family, theta = families.Bernoulli(), torch.tensor([-0.5, 1.0])
    targets = family.sample(inputs @ torch.tensor([[1.0], [-1.5]]), generator(3))

    def loss(points: Tensor) -> Tensor:
        """The mean negative log-likelihood at each of (K, 2) parameters."""
        logits = (points @ inputs.T).unsqueeze(-1)
        return -family.log_likelihood(logits, targets.expand_as(logits)).mean(-1)

    def model(parameters: dict[str, Tensor]) -> Tensor:
        return (inputs @ parameters["theta"]).unsqueeze(-1)

    F = Fisher(model, (), family, parameters={"theta": theta})
    leaf = theta.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(leaf.unsqueeze(0)).sum(), leaf)
    natural = conjugate_gradient(F, g, rtol=1e-14).x
    values, vectors = torch.linalg.eigh(F.dense())
    balls = {
        "Euclidean": (torch.eye(2), -g),
        "Fisher": (vectors @ torch.diag(values**-0.5) @ vectors.T, -natural),  # maps the unit circle to dᵀFd = 1
    }
    phi = torch.linspace(0, 2 * torch.pi, 3601)[:-1]
    lengths = torch.logspace(-2, 0, 5 if quick else 9).tolist()

    def ring(ball: Tensor, length: float, phi: Tensor) -> Tensor:
        return length * torch.stack([phi.cos(), phi.sin()], -1) @ ball.T

    def best(ball: Tensor, length: float) -> Tensor:
        """The step of this length with the least loss: of 3600 directions, then of 2001 around the best of them."""
        middle = phi[loss(theta + ring(ball, length, phi)).argmin()]
        d = ring(ball, length, middle + torch.linspace(-0.002, 0.002, 2001))
        return d[loss(theta + d).argmin()]

    rows = [
        {"ball": name, "length": length, "angle_degrees": angle(best(ball, length), direction)}
        for name, (ball, direction) in balls.items()
        for length in lengths
    ]
    style.write_csv(out / "steepest.csv", rows)

    figure, (left, right) = style.panels()
    orders: dict[str, float] = {}
    span = torch.linspace(-1.6, 1.6, 81)
    grid = torch.stack(torch.meshgrid(span, span, indexing="xy"), -1).reshape(-1, 2) + theta
    left.contour(span + theta[0], span + theta[1], loss(grid).reshape(81, 81), 16, colors="#bbbbbb", linewidths=1)
    for (name, (ball, direction)), color in zip(balls.items(), (VERMILION, BLUE)):
        curve, d = theta + ring(ball, 0.5, phi), best(ball, 0.5)
        left.plot(*curve.T, color=color, lw=1.8)
        tip = 0.5 * direction / torch.linalg.solve(ball, direction).norm()
        left.annotate(
            "", theta + 1.0 * tip, theta, arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2.2, "shrinkA": 0}
        )
        left.plot(*(theta + d), "o", color=color, mec="white", ms=9)
        errors = [r["angle_degrees"] for r in rows if r["ball"] == name]
        orders[name] = style.slope(lengths[: len(lengths) // 2 + 1], errors[: len(lengths) // 2 + 1])
        label = "circle, −∇L" if name == "Euclidean" else "ellipse, −F⁻¹∇L"
        right.loglog(lengths, errors, "o-", color=color, label=f"{label}: order {orders[name]:.1f}")
    left.set(xlabel="θ₁", ylabel="θ₂", aspect="equal")
    left.set_title("dots: best step by trial\narrows: by formula", loc="left")
    right.set(xlabel="length of the step", ylabel="angle, trial to formula (degrees)", ylim=(None, 4e2))
    right.set_title("they meet as steps shrink", loc="left")
    right.legend(loc="upper left")
    style.save(figure, out / "steepest.png")
    shortest = {name: next(r["angle_degrees"] for r in rows if r["ball"] == name) for name in balls}
    return {
        "angle at length 0.01, Euclidean ball against −∇L": (shortest["Euclidean"], "degrees"),
        "angle at length 0.01, Fisher ball against −F⁻¹∇L": (shortest["Fisher"], "degrees"),
        "angle between −∇L and −F⁻¹∇L": (angle(g, natural), "degrees"),
        "order of the angle in the length, Euclidean ball": (orders["Euclidean"], ""),
        "order of the angle in the length, Fisher ball": (orders["Fisher"], ""),
    }


# --------------------------------------------------------------------------- section 2.3: proposition 1 and theorem 2


def identities(out: Path, quick: bool) -> Numbers:
    """One Fisher in three ways: pull-back of the metric, covariance of the score, expected negative Hessian."""
    model, inputs, family = small_classifier()
    F = Fisher(model, inputs, family).dense()
    names, shapes = zip(*[(n, p.shape) for n, p in model.named_parameters()])
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])

    def log_p(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = theta.split([s.numel() for s in shapes])
        outputs = functional_call(model, {n: t.view(s) for n, t, s in zip(names, parts, shapes)}, (x.unsqueeze(0),))
        return family.log_likelihood(outputs, y.unsqueeze(0)).squeeze(0)

    # of every input (N) and every label (C) that it may have
    labels = torch.arange(3)

    def each(derivative: Callable[..., Any]) -> Tensor:
        by_label = torch.func.vmap(derivative, in_dims=(None, None, 0))
        return torch.func.vmap(by_label, in_dims=(None, 0, None))(theta, inputs, labels).detach()

    scores, hessians = each(torch.func.grad(log_p)), each(torch.func.hessian(log_p))
    p = model(inputs).softmax(-1).detach()
    outer = scores.unsqueeze(-1) * scores.unsqueeze(-2)
    covariance = (p[..., None, None] * outer).sum(1).mean(0)
    curvature = -(p[..., None, None] * hessians).sum(1).mean(0)
    mean_score = (p[..., None] * scores).sum(1)

    def error(estimate: Tensor) -> float:
        return float((estimate - F).norm() / F.norm())

    rows = []
    for samples in [4**k for k in range(4 if quick else 5)]:
        repeats = range(2 if quick else 8)
        sampled = [
            error(Fisher(model, inputs, family, kind="sampled", samples=samples, generator=generator(s)).dense())
            for s in repeats
        ]
        by_hessian = []
        for s in repeats:
            draws = torch.multinomial(p, samples, replacement=True, generator=generator(100 + s))
            share = torch.nn.functional.one_hot(draws, 3).double().mean(1)
            by_hessian.append(error(-(share[..., None, None] * hessians).sum(1).mean(0)))
        rows.append(
            {"labels_per_input": samples, "error_of_score_covariance": float(np.mean(sampled))}
            | {"error_of_negative_hessian": float(np.mean(by_hessian))}
        )
    style.write_csv(out / "identities.csv", rows)

    figure, axes = style.panels(3, 4.2, width_ratios=[1, 1, 1.6])
    limit = float(F.abs().max())
    for ax, matrix, title in zip(
        axes, (covariance, curvature), ("covariance of\nthe score", "expected negative\nHessian")
    ):
        image = ax.imshow(matrix, cmap="PuOr", norm="linear", vmin=-limit, vmax=limit)
        ax.set(xlabel="parameter", xticks=[0, 20], yticks=[0, 20])
        ax.set_title(title, loc="left")
    axes[0].set_ylabel("parameter")
    figure.colorbar(image, ax=axes[:2], location="bottom", shrink=0.8, label="entry (nats)", ticks=[-0.1, 0, 0.1])
    counts = [r["labels_per_input"] for r in rows]
    for key, marker, color, label in (
        ("error_of_score_covariance", "o", BLUE, "score covariance"),
        ("error_of_negative_hessian", "s", VERMILION, "negative Hessian"),
    ):
        axes[2].loglog(counts, [r[key] for r in rows], marker + "-", color=color, label=label)
    style.guide(axes[2], counts, [r["error_of_score_covariance"] for r in rows], -0.5, "order −½")
    axes[2].set(xlabel="sampled labels per input", ylabel="relative error")
    axes[2].set_title("sampled labels:\nboth go to the same F", loc="left")
    axes[2].set_ylim(None, 30)
    axes[2].legend(loc="upper right")
    style.save(figure, out / "identities.png")
    return {
        "relative difference of F and covariance of the score": (error(covariance), ""),
        "relative difference of F and expected negative Hessian": (error(curvature), ""),
        "largest component of the expected score": (float(mean_score.abs().max()), "nats"),
        "order of the sampled Fisher's error in the number of labels": (
            style.slope(counts, [r["error_of_score_covariance"] for r in rows]),
            "",
        ),
    }


# --------------------------------------------------------------------------- section 2.2 and appendix: KL and ½dᵀFd


def expansion(out: Path, quick: bool) -> Numbers:
    """KL is ½dᵀFd with an error of third order, in both directions: locally it is symmetric."""
    model, inputs, family = small_classifier()
    F = Fisher(model, inputs, family)
    old = F.outputs
    direction = randn(F.shape[0], seed=4)
    direction /= F.quadratic(direction).sqrt()
    origin = F.parameters.copy()
    rows = []
    for length in torch.logspace(-3.5, -0.5, 7 if quick else 13).tolist():
        F.parameters.move(origin, direction, length)
        with torch.no_grad():
            new = model(inputs)
        forward, backward = float(family.kl(old, new).mean()), float(family.kl(new, old).mean())
        quadratic = 0.5 * length**2
        rows.append(
            {"length": length, "half_dFd": quadratic, "kl_old_new": forward, "kl_new_old": backward}
            | {"error_old_new": abs(forward - quadratic), "error_new_old": abs(backward - quadratic)}
            | {"asymmetry": abs(forward - backward)}
        )
    F.parameters.restore(origin)
    style.write_csv(out / "expansion.csv", rows)

    column = {key: [r[key] for r in rows] for key in rows[0]}
    x = column["length"]
    small = slice(len(rows) // 2 + 1)
    fitted = {k: style.slope(x[small], column[k][small]) for k in ("error_old_new", "error_new_old", "asymmetry")}
    figure, (left, right) = style.panels()
    left.loglog(x, column["half_dFd"], color=GREY, lw=6, alpha=0.45, label="½ dᵀFd")
    left.loglog(x, column["kl_old_new"], "o", color=BLUE, label="KL(θ ‖ θ+d)")
    left.loglog(x, column["kl_new_old"], "x", color=VERMILION, ms=8, mew=2, label="KL(θ+d ‖ θ)")
    left.set(xlabel="length of d, √(dᵀFd)", ylabel="nats per event")
    left.set_title("both KLs are ½ dᵀFd", loc="left")
    left.legend(loc="upper left")
    for key, style_, color, label in (
        ("error_old_new", "o-", BLUE, "KL(θ ‖ θ+d) − ½ dᵀFd"),
        ("error_new_old", "x-", VERMILION, "KL(θ+d ‖ θ) − ½ dᵀFd"),
        ("asymmetry", "s-", GREEN, "KL(θ ‖ θ+d) − KL(θ+d ‖ θ)"),
    ):
        right.loglog(x, column[key], style_, color=color, label=f"{label}: order {fitted[key]:.2f}")
    right.set(xlabel="length of d, √(dᵀFd)", ylabel="difference (nats)", ylim=(None, 3e5 * max(column["asymmetry"])))
    right.set_title("what is left is of third order", loc="left")
    right.legend(loc="upper left", fontsize=10.5)
    style.save(figure, out / "expansion.png")
    return {
        "order of KL(θ ‖ θ+d) − ½dᵀFd in d": (fitted["error_old_new"], ""),
        "order of KL(θ+d ‖ θ) − ½dᵀFd in d": (fitted["error_new_old"], ""),
        "order of KL(θ ‖ θ+d) − KL(θ+d ‖ θ) in d": (fitted["asymmetry"], ""),
    }


# --------------------------------------------------------------------------- section 2.2: invariance


def invariance(out: Path, quick: bool) -> Numbers:
    """The natural gradient flow does not see the coordinates; steps of finite length see them to first order."""
    family = families.DiagonalGaussian()
    # coordinates of a normal, to and from its outputs [mean, log σ]
    charts: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "(m, log σ)": (lambda c: c, lambda o: o),
        "(m, σ²)": (
            lambda c: torch.stack([c[0], 0.5 * c[1].log()]),
            lambda o: torch.stack([o[0], torch.exp(2 * o[1])]),
        ),
        "(m/σ², 1/σ²)": (
            lambda c: torch.stack([c[0] / c[1], -0.5 * c[1].log()]),
            lambda o: torch.stack([o[0] * torch.exp(-2 * o[1]), torch.exp(-2 * o[1])]),
        ),
    }
    models = {name: (lambda parameters, to=to: to(parameters["c"]).unsqueeze(0)) for name, (to, _) in charts.items()}
    start, horizon = torch.tensor([1.5, np.log(0.8)]), 3.0
    data = torch.tensor([[-1.0], [1.0]])  # mean 0, standard deviation 1

    def objective(outputs: Tensor) -> Tensor:
        return family.log_likelihood(outputs.expand(2, 2), data).mean()

    def exact(t: float) -> Tensor:
        """The flow in closed form: the mean parameters E y, E y² approach the data's as e^−t."""
        m, log_s = start.tolist()
        first, second = m * np.exp(-t), 1 + (m**2 + np.exp(2 * log_s) - 1) * np.exp(-t)
        return torch.tensor([first, 0.5 * np.log(second - first**2)])

    def natural_path(name: str, h: float) -> Tensor:
        to, back = charts[name]
        c = back(start).clone()
        path = [start]
        for _ in range(round(horizon / h)):
            natural_step(
                models[name],
                (),
                family,
                objective,
                learning_rate=h,
                solver=dense_solve,
                parameters={"c": c},
                evaluate=False,
            )
            path.append(to(c).clone())
        return torch.stack(path)

    def plain_path(name: str) -> Tensor:
        to, back = charts[name]
        c, path = back(start).clone(), [start]
        for _ in range(500 if quick else 3000):
            leaf = c.clone().requires_grad_()
            (g,) = torch.autograd.grad(objective(to(leaf).unsqueeze(0)), leaf)
            c = c + (0.02 if quick else 0.004) * g
            path.append(to(c))
        return torch.stack(path)

    steps = [0.05, 0.025, 0.0125] if quick else [0.1, 0.05, 0.025, 0.0125]
    rows, gaps = [], []
    natural = {}
    for h in steps:
        natural = {name: natural_path(name, h) for name in charts}
        paths = torch.stack(list(natural.values()))
        truth = torch.stack([exact(i * h) for i in range(paths.shape[1])])
        errors = (paths - truth).norm(dim=-1).amax(1).tolist()
        pairs = paths.unsqueeze(0), paths.unsqueeze(1)
        gaps.append(float((pairs[0] - pairs[1]).norm(dim=-1).max()))
        rows.append(
            {"step": h, "gap_between_coordinates": gaps[-1], "largest_kl_nats": float(family.kl(*pairs).max())}
            | {f"error in {name}": e for name, e in zip(charts, errors)}
        )
    style.write_csv(out / "invariance.csv", rows)
    plain = {name: plain_path(name) for name in charts}
    # their times mean nothing to each other: from each point of one path to the nearest of another
    first, *others = plain.values()
    plain_gap = max(float(torch.cdist(other, first).amin(1).max()) for other in others)

    figure, (left, right) = style.panels()
    for (name, path), color in zip(plain.items(), (VERMILION, ORANGE, PURPLE)):
        left.plot(path[:, 0], path[:, 1].exp(), "--", color=color, label=f"gradient, {name}")
    for (name, path), color, width in zip(natural.items(), (BLUE, SKY, BLACK), (7, 4, 1.3)):
        left.plot(path[:, 0], path[:, 1].exp(), color=color, lw=width, label=f"natural, {name}")
    left.plot(0, 1, "*", color=BLACK, ms=14)
    left.plot(start[0], start[1].exp(), "o", color=BLACK)
    left.annotate("goal", (0, 1), (-10, -36), textcoords="offset points")
    left.annotate("start", (start[0], start[1].exp()), (-18, -20), textcoords="offset points")
    left.set(xlabel="mean m", ylabel="standard deviation σ", ylim=(0.55, 2.4))
    left.set_title("one start, one goal, three coordinates", loc="left")
    left.legend(loc="upper left", fontsize=10, ncols=1)
    right.loglog(steps, gaps, "o-", color=BLUE, label=f"gap: order {style.slope(steps[-3:], gaps[-3:]):.2f}")
    right.plot(steps, [gaps[-1] * h / steps[-1] for h in steps], "--", color=GREY, lw=1, label="order 1")
    right.set(
        xlabel="length of the natural step",
        ylabel="gap between coordinates",
        xticks=steps,
        xticklabels=[f"{h:g}" for h in steps],
    )
    right.tick_params(axis="x", which="minor", length=0, labelbottom=False)
    right.set_title("finite steps lose it, to first order", loc="left")
    right.legend(loc="upper left")
    style.save(figure, out / "invariance.png")
    return {
        "distance between gradient paths in the three coordinates": (plain_gap, "(m, log σ)"),
        "distance between natural paths at equal times, smallest step": (gaps[-1], "(m, log σ)"),
        "distance between natural paths and the closed form, smallest step": (max(errors), "(m, log σ)"),
        "order of the gap in the step": (style.slope(steps[-3:], gaps[-3:]), ""),
    }


# --------------------------------------------------------------------------- section 2.3: plateaus


class CommitteeMachine(nn.Module):
    """A sum of erf units, whose gradient vanishes near where two units are alike (Saad & Solla 1995)."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, D) → (N, 1)."""
        return torch.erf(inputs @ self.weights.T / 2**0.5).sum(-1, keepdim=True)


def plateau(out: Path, quick: bool) -> Numbers:
    """Gradient descent stalls on the plateau of two units that are alike; the natural gradient does not."""
    width, steps = 6, 100 if quick else 200
    inputs, family = randn(512, width, seed=5), families.Gaussian()
    teacher = CommitteeMachine(1.5 * torch.linalg.qr(randn(width, width, seed=6)).Q[:2])
    targets = teacher(inputs).detach()
    begin = 0.1 * randn(1, width, seed=7) + 1e-5 * randn(2, width, seed=8)

    # each takes a model, and gives a step that returns the negative log-likelihood before it
    def gradient_descent(lr: float) -> Callable[[nn.Module], Callable[[], float]]:
        def prepare(model: nn.Module) -> Callable[[], float]:
            optimizer = torch.optim.SGD(model.parameters(), lr=lr)

            def step() -> float:
                optimizer.zero_grad()
                nll = -family.log_likelihood(model(inputs), targets).mean()
                nll.backward()
                optimizer.step()
                return float(nll.detach())

            return step

        return prepare

    def diagonal(lr: float, damping: float) -> Callable[[nn.Module], Callable[[], float]]:
        def prepare(model: nn.Module) -> Callable[[], float]:
            # exact, without random numbers; and without momentum, as the two others
            optimizer = DiagonalNGD(model, family, lr=lr, damping=damping, probes=None, momentum=0.0)
            return lambda: float(optimizer.step(inputs, targets))

        return prepare

    def natural(lr: float) -> Callable[[nn.Module], Callable[[], float]]:
        def prepare(model: nn.Module) -> Callable[[], float]:
            optimizer = NGD(model, family, lr=lr)
            return lambda: -optimizer.step(inputs, targets).objective

        return prepare

    def train(prepare: Callable[[nn.Module], Callable[[], float]], steps: int) -> list[float]:
        """½ mean squared error before every step: the negative log-likelihood less its constant."""
        step = prepare(CommitteeMachine(begin))
        return [step() - 0.5 * float(np.log(2 * np.pi)) for _ in range(steps)]

    def to_reach(losses: list[float], level: float = 1e-3) -> int:
        """The steps after which the error stays below the level."""
        return max((i + 1 for i, loss in enumerate(losses) if not loss < level), default=0)

    # every method with the best of its options
    tried = {
        "gradient descent": [(f"lr {lr:g}", train(gradient_descent(lr), steps)) for lr in (0.3, 1.0, 2.0, 3.0, 4.0)],
        "diagonal Fisher": [
            (f"lr {lr:g}, λ {damping:g}", train(diagonal(lr, damping), steps))
            for lr in ((2.0,) if quick else (0.3, 1.0, 2.0, 3.0))
            for damping in ((0.3,) if quick else (0.03, 0.1, 0.3, 1.0))
        ],
        "natural gradient": [(f"lr {lr:g}", train(natural(lr), 30)) for lr in ((1.0,) if quick else (0.3, 1.0))],
    }
    contenders = {name: min(runs, key=lambda run: to_reach(run[1])) for name, runs in tried.items()}
    rows = [
        {"method": name, "options": options, "step": i, "half_mean_squared_error": loss}
        for name, (options, losses) in contenders.items()
        for i, loss in enumerate(losses)
    ]
    style.write_csv(out / "plateau.csv", rows)
    figure, ax = style.panels(1)
    for (name, (options, losses)), color, dash in zip(contenders.items(), (VERMILION, ORANGE, BLUE), ("--", ":", "-")):
        after = np.maximum(losses[1:], 1e-12)  # the first is that of no step, which a logarithmic axis does not have
        ax.loglog(np.arange(1, len(losses)), after, dash, color=color, label=f"{name} ({options})")
    level = contenders["gradient descent"][1][11]
    ax.annotate("plateau: both\nunits alike", (11, level), (13, level / 40), arrowprops={"arrowstyle": "->"})
    ax.set(xlabel="steps on the full batch", ylabel="½ mean squared error", ylim=(1e-7, 3), xlim=(1, steps))
    ax.legend(loc="lower left")
    style.save(figure, out / "plateau.png")
    return {f"steps to ½ MSE < 0.001, {name}": (float(to_reach(run)), "steps") for name, (_, run) in contenders.items()}


# --------------------------------------------------------------------------- section 2.4: what an inverse costs


def cost(out: Path, quick: bool) -> Numbers:
    """Time to solve F s = g over the number of parameters n: a diagonal, products alone, and the matrix."""
    repeats = 2 if quick else 4

    def best_time(function: Callable[[], Any], least: float) -> float:
        """Processor seconds of one call, the best of several trials of at least ``least`` seconds."""
        function()
        calls, trials = 1, []
        while len(trials) < repeats:
            begin = process_time()
            for _ in range(calls):
                function()
            taken = process_time() - begin
            if taken < least:
                calls *= max(2, int(least / max(taken, 1e-9)))
                continue
            trials.append(taken / calls)
        return min(trials)

    def diagonal(n: int) -> Callable[[], Any]:
        d, g, s = torch.rand(n) + 1, torch.rand(n), torch.zeros(n)
        return lambda: torch.div(g, d, out=s)

    def operator(n: int) -> tuple[Fisher, Tensor]:
        # n weights, n events: a product costs O(n²) here, and the damped solve ten of them whatever n is
        model = nn.Linear(n, 1, bias=False, dtype=torch.float32)
        inputs = torch.randn(n, n, generator=generator(n), dtype=torch.float32).div_(n**0.5)
        return Fisher(model, inputs, families.Gaussian()), randn(n, seed=n + 1).float()

    def matrix_free(n: int) -> Callable[[], Any]:
        F, g = operator(n)
        return lambda: conjugate_gradient(F, g, damping=1e-3, max_iterations=10, rtol=0.0)

    def dense(n: int) -> Callable[[], Any]:
        F, g = operator(n)
        matrix = F.dense().double()
        return lambda: dense_solve(matrix, g, damping=1e-3)

    sizes = {
        "diagonal": [2**16, 2**18] if quick else [2**22, 2**23, 2**24],
        "matrix-free": [256, 512] if quick else [3000, 4200, 6000, 8500],
        "dense": [256, 512] if quick else [1400, 2000, 2800, 4000],
    }
    makers = {"diagonal": diagonal, "matrix-free": matrix_free, "dense": dense}
    rows = [
        {"inverse": name, "parameters": n, "seconds": best_time(makers[name](n), 1e-3 if quick else 0.02)}
        for name, ns in sizes.items()
        for n in ns
    ]
    style.write_csv(out / "cost.csv", rows)
    figure, ax = style.panels(1)
    numbers: Numbers = {}
    for (name, ns), color, marker, theory in zip(sizes.items(), (GREEN, BLUE, VERMILION), "os^", (1, 2, 3)):
        seconds = [r["seconds"] for r in rows if r["inverse"] == name]
        fitted = style.slope(ns, seconds)
        numbers[f"fitted exponent of n, {name}"] = (fitted, "")
        ax.loglog(ns, seconds, marker + "-", color=color, label=f"{name}: order {theory}, measured {fitted:.2f}")
        style.guide(ax, ns, seconds, theory, "")
    ax.set(xlabel="parameters n", ylabel="processor seconds per solve")
    ax.set_title("cost of F⁻¹g: dashed, the whole orders 3, 2 and 1", loc="left")
    ax.legend(loc="upper right", bbox_to_anchor=(1.0, 0.75))
    style.save(figure, out / "cost.png")
    return numbers


# --------------------------------------------------------------------------- section 3: mirror descent


def mirror(out: Path, quick: bool) -> Numbers:
    """A mirror descent step is a natural gradient step along the dual manifold; its trust region is the same step."""
    potential, target = NegativeEntropy(), torch.tensor([0.15, 0.25, 0.6])
    start, alpha = torch.tensor([0.8, 0.17, 0.03]), 0.04

    def f(p: Tensor) -> Tensor:
        return 4 * (p - target).square().sum(-1).mean()

    steps = 10 if quick else 40
    path = mirror_descent(potential, f, start, alpha, steps)
    dual = [start]
    for _ in range(steps):
        dual.append(dual_natural_step(potential, f, dual[-1], alpha))
    natural = torch.stack(dual)
    gap = (path - natural).abs().amax(-1)

    leaf = start.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(leaf), leaf)
    plane = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]) / torch.tensor([[2.0], [6.0]]).sqrt()

    def by_trial(radius: float) -> Tensor:
        """Equation 17 without duality: the least ⟨p, ∇f⟩ of the points where B_G = ε or the simplex ends."""
        around, width = torch.linspace(0, 2 * torch.pi, 361), 2 * torch.pi / 360
        edge = start.unsqueeze(0)
        for _ in range(4):
            directions = torch.stack([around.cos(), around.sin()], -1) @ plane
            low, high = torch.zeros(len(around), 1), torch.ones(len(around), 1)
            for _ in range(60):
                middle = 0.5 * (low + high)
                p = start + middle * directions
                positive = (p > 0).all(-1)
                p = torch.where(positive.unsqueeze(-1), p, start)
                inside = (positive & (potential.divergence(p, start) < radius)).unsqueeze(-1)
                low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
            edge = start + low * directions
            around, width = around[(edge @ g).argmin()] + torch.linspace(-width, width, 101), width / 50
        return edge[(edge @ g).argmin()]

    regions = []
    for radius in torch.logspace(-4, -0.5, 4 if quick else 8).tolist():
        _, step = trust_region_step(potential, start, g, radius)
        gap_to_trial = (mirror_step(potential, start, g, step) - by_trial(radius)).abs().max()
        regions.append({"radius_nats": radius, "alpha": step, "gap_mirror_step_to_trial": float(gap_to_trial)})
    style.write_csv(
        out / "mirror.csv",
        [
            {"step": i, "p1": float(p[0]), "p2": float(p[1]), "p3": float(p[2])}
            | {"objective": float(f(p)), "gap_to_dual_natural_step": float(d)}
            for i, (p, d) in enumerate(zip(path, gap))
        ],
    )
    style.write_csv(out / "mirror_trust_region.csv", regions)

    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]])
    figure, (left, right) = style.panels(2, 4.3, width_ratios=[1.1, 1])
    left.fill(*corners.T, facecolor="#f4f4f4", edgecolor=BLACK, lw=1.2)
    n = 120
    grid = torch.stack([torch.tensor([i, j, n - i - j]) / n for i in range(n + 1) for j in range(n + 1 - i)])
    left.tricontour(*(grid @ corners).T, 4 * (grid - target).square().sum(-1), 10, colors="#c8c8c8", linewidths=1)
    left.plot(*(path @ corners).T, "-", color=SKY, lw=6, label="mirror descent")
    left.plot(*(natural @ corners).T, "o", color=BLUE, ms=4, label="natural gradient on the dual")
    euclid = mirror_descent(SquaredNorm(), f, start, alpha / 2, steps)
    euclid_inside = euclid[(euclid > 0).all(-1)]
    left.plot(*(euclid_inside @ corners).T, "--", color=VERMILION, label="gradient descent")
    left.plot(*(target @ corners), "*", color=BLACK, ms=13)
    for corner, name, offset in zip(
        corners, ("class 1", "class 2", "class 3"), ((0, -0.09), (0, -0.09), (0.16, -0.02))
    ):
        left.text(float(corner[0]) + offset[0], float(corner[1]) + offset[1], name, ha="center")
    left.set(aspect="equal", xlim=(-0.06, 1.06), ylim=(-0.1, 0.9))
    left.axis("off")
    left.legend(loc="lower center", fontsize=11, bbox_to_anchor=(0.5, 0.96))
    radii = [r["radius_nats"] for r in regions]
    right.loglog(radii, [r["alpha"] for r in regions], "o-", color=GREEN)
    right.set(xlabel="radius ε of the region (nats)", ylabel="α of the same mirror step")
    right.set_title("region ε ⟺ multiplier 1/(2α)", loc="left")
    style.save(figure, out / "mirror.png")
    return {
        "largest gap, mirror step against dual natural step": (float(gap.max()), "probability"),
        "largest gap, mirror step against the trust region's solution by trial": (
            max(r["gap_mirror_step_to_trial"] for r in regions),
            "probability",
        ),
    }


# --------------------------------------------------------------------------- section 3: TRPO


def trpo(out: Path, quick: bool) -> Numbers:
    """One call takes the step of a classifier and of a policy; the policy's is the solution of TRPO's problem."""
    family = families.Categorical()
    states = randn(48, 2, seed=9)
    # a linear softmax policy of three actions, with the two parameters that can be drawn
    features = torch.tensor([[1.0, 0.2], [-0.4, 0.8], [-0.3, -1.0]])
    theta = torch.tensor([0.5, -0.3])

    design = (states.unsqueeze(1) * features).reshape(-1, 2)

    def logits(theta: Tensor) -> Tensor:
        """(…, 2) → (…, 48, 3)."""
        return (theta @ design.T).unflatten(-1, (-1, 3))

    def model(parameters: dict[str, Tensor]) -> Tensor:
        return logits(parameters["theta"])

    old = logits(theta)
    actions = family.sample(old, generator(10))
    advantages = (states[:, 0] > 0).double() * (actions == 0) + (states[:, 1] > 0) * (actions == 2)
    advantages = advantages - advantages.mean()

    def surrogate(outputs: Tensor) -> Tensor:
        """E[π/π_old A], Schulman et al. 2015, equation 14."""
        targets = actions.expand(outputs.shape[:-1])
        ratio = (family.log_likelihood(outputs, targets) - family.log_likelihood(old, actions)).exp()
        return (ratio * advantages).mean(-1)

    def kl(d: Tensor) -> Tensor:
        return family.kl(old, logits(theta + d)).mean(-1)

    phi = torch.linspace(0, 2 * torch.pi, 361)

    def boundary(radius: float, phi: Tensor) -> Tensor:
        """The points with KL(θ ‖ θ+d) = δ in these directions; KL is about quadratic in the length, which converges."""
        circle = torch.stack([phi.cos(), phi.sin()], -1)
        length = torch.full((len(phi), 1), radius**0.5)
        for _ in range(15):
            length = length * (radius / kl(length * circle)).sqrt().unsqueeze(-1)
        return length * circle

    def best_of(radius: float) -> Tensor:
        """The point of KL ≤ δ with the largest surrogate: of 361 directions, then of 101 around the best, thrice."""
        around, width = phi, 2 * torch.pi / 360
        for _ in range(4):
            middle = around[surrogate(logits(theta + boundary(radius, around))).argmax()]
            around, width = middle + torch.linspace(-width, width, 101), width / 50
        ring = boundary(radius, around)
        return ring[surrogate(logits(theta + ring)).argmax()]

    rows, drawn = [], None
    radii = [1e-4, 1e-3, 1e-2, 1e-1] if quick else [1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    for radius in radii:
        best = best_of(radius)
        moved = theta.clone()
        report = natural_step(
            model,
            (),
            family,
            surrogate,
            trust_region=TrustRegion(radius),
            solver=partial(conjugate_gradient, rtol=1e-12),
            parameters={"theta": moved},
        )
        gain = float(surrogate(logits(theta + best)) - surrogate(old))
        rows.append(
            {"radius_nats": radius, "angle_degrees": angle(report.step, best)}
            | {"gain_of_natural_step": report.actual_gain, "gain_of_the_best_point": gain}
            | {"gain_ratio": report.actual_gain / gain, "kl_nats": report.kl, "backtracks": report.backtracks}
        )
        if radius == 1e-1:
            drawn = boundary(radius, phi), best, report
    style.write_csv(out / "trpo.csv", rows)

    # the classifier: the same call with another objective
    classes = family.sample(logits(torch.tensor([1.5, 1.0])), generator(11))
    classifier = natural_step(
        model,
        (),
        family,
        lambda outputs: family.log_likelihood(outputs, classes).mean(),
        trust_region=TrustRegion(1e-2),
        solver=partial(conjugate_gradient, rtol=1e-12),
        objective_curvature=1.0,
        parameters={"theta": theta.clone()},
    )

    figure, (left, right) = style.panels()
    assert drawn is not None
    ring, best, report = drawn
    reach = 1.35 * float(ring.abs().max())
    span = torch.linspace(-reach, reach, 61)
    grid = torch.stack(torch.meshgrid(span, span, indexing="xy"), -1).reshape(-1, 2)
    left.contour(
        span, span, surrogate(logits(theta + grid)).reshape(61, 61), 14, colors="#c8c8c8", linewidths=1, linestyles="-"
    )
    F = Fisher(model, (), family, parameters={"theta": theta}).dense()
    values, vectors = torch.linalg.eigh(F)
    ellipse = (
        (2 * 0.1) ** 0.5 * torch.stack([phi.cos(), phi.sin()], -1) @ (vectors @ torch.diag(values**-0.5) @ vectors.T)
    )
    left.plot(*ring.T, color=BLACK, lw=1.8, label="KL = 0.1 nats")
    left.plot(*ellipse.T, "--", color=BLUE, lw=1.6, label="½ dᵀFd = 0.1")
    left.annotate(
        "", report.step, (0, 0), arrowprops={"arrowstyle": "-|>", "color": BLUE, "lw": 2.4, "shrinkA": 0, "shrinkB": 0}
    )
    left.plot(*best, "o", color=VERMILION, ms=9, mec="white", label="best by trial")
    left.set(xlabel="change of θ₁", ylabel="change of θ₂", aspect="equal", ylim=(-reach, 1.75 * reach))
    left.set_title("surrogate return in grey\narrow: natural_step", loc="left")
    left.legend(loc="upper left", fontsize=10.5)
    angles = [r["angle_degrees"] for r in rows]
    right.loglog(radii, angles, "o-", color=BLUE, label="step to best point")
    style.guide(right, radii, angles, 0.5, "order ½")
    right.set(xlabel="radius δ (nats)", ylabel="angle (degrees)", ylim=(None, 3 * max(angles)))
    right.set_title("natural step and best point\nof the region agree as δ → 0", loc="left")
    right.legend(loc="upper left")
    style.save(figure, out / "trpo.png")
    at = {r["radius_nats"]: r for r in rows}
    return {
        "gain of the natural step over that of the best point, δ = 0.01": (at[1e-2]["gain_ratio"], ""),
        "gain of the natural step over that of the best point, δ = 0.0001": (at[1e-4]["gain_ratio"], ""),
        "angle between them, δ = 0.0001": (at[1e-4]["angle_degrees"], "degrees"),
        "order of the angle in δ": (style.slope(radii[:3], angles[:3]), ""),
        "KL of the classifier's step, same call, δ = 0.01": (classifier.kl, "nats"),
    }


# --------------------------------------------------------------------------- section 4, reference 6: transport


def transport(out: Path, quick: bool) -> Numbers:
    """One objective, two geometries: Fisher counts how much of the mass changes, transport how far it is carried."""
    h = 0.02

    def flow(
        family: families.Family,
        metric: families.Geometry | None,
        start: Tensor,
        objective: Callable[[Tensor], Tensor],
        times: list[float],
    ) -> Tensor:
        def model(parameters: dict[str, Tensor]) -> Tensor:
            return parameters["outputs"].unsqueeze(0)

        outputs, path = start.clone(), [start]
        steps = [round(t / h) for t in times]
        for i in range(1, steps[-1] + 1):
            natural_step(
                model,
                (),
                family,
                objective,
                learning_rate=h,
                solver=partial(dense_solve, method="eigh"),
                metric=metric,
                parameters={"outputs": outputs},
                evaluate=False,
            )
            if i in steps:
                path.append(outputs.clone())
        return torch.stack(path)

    # A normal policy paid −½(y − 4)² per draw: the expected pay is −½((m − 4)² + σ²).
    gaussian = families.DiagonalGaussian()

    def pay(outputs: Tensor) -> Tensor:
        mean, log_std = gaussian.split(outputs)
        return (-0.5 * ((mean - 4).square() + torch.exp(2 * log_std))).mean()

    begin, times = torch.tensor([0.0, np.log(0.5)]), np.arange(0.1, 1.01 if quick else 4.01, 0.1).tolist()
    both = {
        "Fisher": flow(gaussian, None, begin, pay, times),
        "transport": flow(gaussian, wasserstein(gaussian), begin, pay, times),
    }
    t = torch.tensor([0.0, *times])
    closed = {"Fisher": 4 / (1 + 0.25 * t), "transport": 4 * torch.exp(-t)}  # the distance |m − 4|

    # Nine classes in a row, the last one paid most; a little entropy keeps every class alive.
    categorical, classes = families.Categorical(), 9
    chain = torch.diag(torch.ones(classes - 1), 1)
    reward = torch.arange(classes) / 2.0

    def soft_pay(outputs: Tensor) -> Tensor:
        return (outputs.softmax(-1) @ reward + 0.2 * categorical.entropy(outputs)).mean()

    logits = -0.5 * (torch.arange(classes) - 1.0).square() / 0.6**2
    logits = logits.clamp(min=-8)
    moments = {"Fisher": [1.0, 2.0, 4.0], "transport": [1.0, 2.0, 4.0] if quick else [4.0, 8.0, 16.0]}
    rows_of = {
        "Fisher": flow(categorical, None, logits, soft_pay, moments["Fisher"]),
        "transport": flow(
            categorical, wasserstein(categorical, chain + chain.T), logits, soft_pay, moments["transport"]
        ),
    }
    style.write_csv(
        out / "transport_normal.csv",
        [
            {"metric": name, "time": float(ti), "mean": float(o[0]), "std": float(o[1].exp())}
            | {"distance_to_go": float(4 - o[0]), "distance_in_closed_form": float(c)}
            for name, path in both.items()
            for ti, o, c in zip(t, path, closed[name])
        ],
    )
    style.write_csv(
        out / "transport_classes.csv",
        [
            {"metric": name, "time": ti, "class": k + 1, "probability": float(p)}
            for name, path in rows_of.items()
            for ti, o in zip([0.0, *moments[name]], path)
            for k, p in enumerate(o.softmax(-1))
        ],
    )
    figure, axes = style.panels(3, 3.9, width_ratios=[1.3, 1, 1])
    for name, color, dash in (("Fisher", VERMILION, "--"), ("transport", BLUE, "-")):
        axes[0].semilogy(t, 4 - both[name][:, 0], dash, color=color, label=name)
        axes[0].semilogy(t[::5], closed[name][::5], "o", color=color, ms=4)
    axes[0].set(xlabel="time of the flow", ylabel="distance to the goal (units of y)")
    axes[0].set_title("a normal, narrow at first\n(dots: closed form)", loc="left")
    axes[0].legend(loc="lower left")
    for ax, (name, path) in zip(axes[1:], rows_of.items()):
        for k, (ti, o) in enumerate(zip([0.0, *moments[name]], path)):
            base = -k
            ax.bar(
                np.arange(1, classes + 1),
                0.85 * o.softmax(-1),
                bottom=base,
                width=0.85,
                color=BLUE if name == "transport" else VERMILION,
            )
            ax.axhline(base, color=BLACK, lw=0.8)
            ax.text(5, base + 0.55, f"t = {ti:g}", ha="center", fontsize=11)
        ax.set(xlabel="class", yticks=[], xticks=[1, 5, 9])
        ax.spines["left"].set_visible(False)
        ax.set_title(f"classes in a row:\n{name}", loc="left")
    axes[1].set_ylabel("probability")
    style.save(figure, out / "transport.png")
    error = max(float((4 - both[n][:, 0] - closed[n]).abs().max()) for n in both)
    middle = {name: float(path.softmax(-1)[:, 3:6].sum(-1).max()) for name, path in rows_of.items()}
    return {
        f"distance to go at t = {times[-1]:g}, Fisher": (float(4 - both["Fisher"][-1, 0]), "units of y"),
        f"distance to go at t = {times[-1]:g}, transport": (float(4 - both["transport"][-1, 0]), "units of y"),
        "largest deviation from the closed forms": (error, "units of y"),
        "most mass seen on classes 4 to 6, Fisher": (middle["Fisher"], "probability"),
        "most mass seen on classes 4 to 6, transport": (middle["transport"], "probability"),
    }


FIGURES: dict[str, Callable[[Path, bool], Numbers]] = {
    function.__name__: function
    for function in (normals, steepest, identities, expansion, invariance, plateau, cost, mirror, trpo, transport)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures and tables")
    parser.add_argument("--quick", action="store_true", help="draw every picture from less work")
    parser.add_argument(
        "--curves",
        metavar="RUN",
        nargs="+",
        default=[],
        help="also draw figures 2 and 3: run folders of train_cifar.py, or a CSV of curves (see cifar_curves.py)",
    )
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), help="draw only these")
    arguments = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # small matrices: threads would wait for each other, and for whoever shares the cores
    rows = []
    for name in arguments.only:
        begin = perf_counter()
        for quantity, (value, unit) in FIGURES[name](arguments.out, arguments.quick).items():
            rows.append({"picture": name, "quantity": quantity, "value": value, "unit": unit})
            print(f"{name:>11}  {quantity}: {value:.6g} {unit}")
        print(f"{name:>11}  {perf_counter() - begin:.1f} s")
    if arguments.curves:
        script, picture = Path(__file__).with_name("cifar_curves.py"), arguments.out / "cifar.png"
        options = ["--dataset", "CIFAR-10", "--out", picture]
        subprocess.run([sys.executable, script, *arguments.curves, *options], check=True)
    style.update_csv(arguments.out / "numbers.csv", rows, "picture")


if __name__ == "__main__":
    main()
