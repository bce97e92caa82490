"""Figures 1 and 2 of "A natural policy gradient" (Kakade 2001), redrawn from the tasks in `envs`.

    python scripts/figures/kakade.py --out DIR [--quick] [--seed 0] [--only NAME …]

``docs/kakade.md`` walks through them. ``DIR/kakade_numbers.csv`` holds the numbers it quotes (written when all pictures
are drawn), and beside each picture lies a CSV with what it shows. ``--quick`` draws every picture from less work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import style
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION
from torch import Tensor

from agents import NPG
from agents.afterstate import AfterstatePolicy
from agents.update import Batch
from envs import lqr, make_vec_env
from envs import two_state_mdp as mdp
from npg.fisher import Fisher
from npg.solvers import Solution, Status
from npg.step import StepReport
from npg.trust_region import TrustRegion

Vector = NDArray[np.float64]
Numbers = dict[str, tuple[float, str]]

DAMPING = 1e-3  # "about 1e-3 I" is added to F in all simulations of the paper


def flow(velocity: Callable[[Vector], Vector], start: Vector, times: Vector) -> Vector:
    """θ(t) of dθ/dt = velocity(θ), θ(0) = start, at the times; (T, P). Stiff, hence an implicit solver."""
    solution = solve_ivp(lambda _, theta: velocity(theta), (0, times[-1]), start, "Radau", times, rtol=1e-8, atol=1e-10)
    if not solution.success:
        raise RuntimeError(f"the flow could not be integrated: {solution.message}")
    return solution.y.T


def first_time(times: Vector, reached: NDArray[np.bool_]) -> float:
    """The first time at which a level is reached, infinity if never."""
    return float(times[reached.argmax()]) if reached.any() else float("inf")


# ------------------------------------------------------------------------------------------------- figure 1A: the LQR

SCALES = [(1.0, 1.0), (10.0, 1.0), (0.1, 1.0)]


def draw_lqr(out: Path, quick: bool, seed: int) -> Numbers:
    """Cost over the time of gradient flow, for three units of the first parameter."""
    times = np.logspace(-4, 5, 60 if quick else 400)
    figure, axes = style.panels(1, height=4.6)
    rows, numbers = [], Numbers()
    for natural, colour in ((False, VERMILION), (True, BLUE)):
        for scales, line in zip(SCALES, ("-", "--", ":")):

            def velocity(theta: Vector, natural: bool = natural, scales: tuple[float, float] = scales) -> Vector:
                descent = -lqr.gradient(theta, scales)
                if not natural:
                    return descent
                return np.linalg.solve(lqr.fisher(theta, scales) + DAMPING * np.eye(2), descent)

            path = flow(velocity, lqr.start(scales), times)
            cost = np.array([lqr.cost(theta, scales) for theta in path])
            method = "natural" if natural else "plain"
            axes.semilogx(times, cost, color=colour, ls=line, label=f"{method}, $s_1$ = {scales[0]:g}")
            rows += [
                {"method": method, "s1": scales[0], "s2": scales[1], "time": t, "cost": c, "theta1": a, "theta2": b}
                for t, c, (a, b) in zip(times, cost, path)
            ]
            for level in (22, 21, 20.5):
                numbers[f"lqr_{method}_s1_{scales[0]:g}_time_to_{level}"] = (
                    first_time(times, cost <= level),
                    f"integration time until the cost of an episode is {level}",
                )
    axes.axhline(20, color=GREY, lw=1)
    axes.text(1.3 * times[0], 20.15, "optimum", color=GREY)
    axes.axhline(22, color=GREY, lw=1, ls=":")
    axes.text(1.3 * times[0], 22.15, "22", color=GREY)
    axes.set(xlabel="integration time", ylabel="cost of an episode of 20 steps (units of $x^2$)", xlim=times[[0, -1]])
    axes.legend()
    style.save(figure, out / "kakade_lqr.png")
    style.write_csv(out / "kakade_lqr.csv", rows)
    for level in (22, 21, 20.5):
        for s1, _ in SCALES:
            plain, faster = (numbers[f"lqr_{m}_s1_{s1:g}_time_to_{level}"][0] for m in ("plain", "natural"))
            numbers[f"lqr_orders_of_magnitude_s1_{s1:g}_to_{level}"] = (
                float(np.log10(plain / faster)),
                f"log10 of plain over natural time to cost {level}",
            )
    return numbers


# ---------------------------------------------------------------------------- figures 1B-D: the two-state process


def draw_two_state(out: Path, quick: bool, seed: int) -> Numbers:
    """The plateau at reward 1, and the way through the plane of the two parameters."""
    times = np.logspace(-2, 8, 200 if quick else 2000)
    paths: dict[str, Vector] = {}
    for method in ("plain", "natural"):

        def velocity(theta: Vector, natural: bool = method == "natural") -> Vector:
            g = mdp.gradient(theta)
            return g / (mdp.fisher(theta) + DAMPING) if natural else g

        paths[method] = flow(velocity, mdp.START, times)
    rows, numbers = [], Numbers()
    figure, (curve, phase) = style.panels(2, height=4.3)
    for method, colour, line in (("plain", VERMILION, "-"), ("natural", BLUE, "--")):
        path = paths[method]
        reward, rho = mdp.average_reward(path), mdp.stationary_distribution(path)
        curve.semilogx(times, reward, color=colour, ls=line)
        done = int((reward >= 1.99).argmax()) + 1
        phase.plot(*path[:done].T, color=colour, ls=line)
        rows += [
            {"method": method, "time": t, "reward": r, "theta_i": a, "theta_j": b, "rho_i": p, "rho_j": q}
            for t, r, (a, b), (p, q) in zip(times, reward, path, rho)
        ]
        numbers[f"two_state_{method}_time_to_1.5"] = (
            first_time(times, reward >= 1.5),
            "integration time until the average reward is 1.5",
        )
        numbers[f"two_state_{method}_smallest_rho_j"] = (
            float(rho[:, 1].min()),
            "smallest stationary probability of state j on the way",
        )
    plain, natural_time = (numbers[f"two_state_{m}_time_to_1.5"][0] for m in ("plain", "natural"))
    numbers["two_state_orders_of_magnitude"] = (
        float(np.log10(plain / natural_time)),
        "log10 of plain over natural time to average reward 1.5",
    )
    curve.set(xlabel="integration time", ylabel="average reward per step", xticks=10.0 ** np.arange(-2, 9, 2))
    curve.text(2e3, 1.03, "plateau", ha="center")
    curve.text(6, 1.6, "natural\ngradient", color=BLUE)
    curve.text(1.2e6, 1.4, "plain\ngradient", color=VERMILION, ha="right")
    phase.plot(*mdp.START, "o", color=BLACK)
    phase.annotate("start", mdp.START, (-10, -18), textcoords="offset points")
    phase.set_ylim(bottom=-3.5)
    phase.set(xlabel=r"$\theta_i$ (log-odds of staying in i)", ylabel=r"$\theta_j$ (log-odds of staying in j)")
    style.save(figure, out / "kakade_two_state.png")
    style.write_csv(out / "kakade_two_state.csv", rows)
    return numbers


# --------------------------------------------------------------------------------------------------- figure 2: Tetris


RADIUS = 0.04  # nats per step in the first iteration


def gradient_itself(A: Fisher, b: Tensor, *, x0: Tensor | None = None, damping: float = 0.0) -> Solution:
    """The gradient in the place of a solution, so that the plain gradient is a natural step that leaves out F⁻¹."""
    curvature = torch.dot(b, A @ b).double()
    one = torch.ones_like(curvature)
    return Solution(b, Status.CONVERGED, (Status.CONVERGED,), 0, one, curvature, -torch.dot(b, b).double())


class PolicyGradient(NPG):
    """NPG with the plain gradient for its direction; all else, the length in KL included, is the same."""

    def actor_step(self, batch: Batch) -> StepReport:
        """As `NPG`'s, but for the solver."""
        region = None if self.step_size else TrustRegion(radius=self.target_kl, backtrack=False)
        return self.natural_step(
            batch, trust_region=region, learning_rate=self.step_size, damping=0.0, solver=gradient_itself
        )


@dataclass(frozen=True)
class Run:
    """One learning curve of figure 2."""

    method: str
    features: str
    iterations: int
    games: int
    height: int = 10
    steps: int = 64
    seed: int = 0
    step_size: float | None = None
    units: tuple[float, ...] | None = None
    evaluation_games: int = 30
    final_games: int = 200


class Units(VecEnvWrapper):
    """Features in other units: φ ↦ φ · units, while the legality of the placements stays."""

    def __init__(self, env: VecEnv, units: tuple[float, ...]) -> None:
        super().__init__(env)
        self.factors = np.array([1.0, *units], dtype=np.float32)

    def reset(self) -> Any:
        """Observations in the other units."""
        return self.venv.reset() * self.factors

    def step_wait(self) -> Any:
        """A step in the other units."""
        observations, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            if "terminal_observation" in info:
                info["terminal_observation"] = info["terminal_observation"] * self.factors
        return observations * self.factors, rewards, dones, infos


class _Progress(BaseCallback):
    """Keep θ as it is at the beginning of every iteration, and let the KL of its step fall linearly."""

    def __init__(self) -> None:
        super().__init__()
        self.thetas: list[Vector] = []

    def _on_rollout_start(self) -> None:
        self.thetas.append(self.model.policy.theta.detach().double().numpy().copy())
        self.model.target_kl = RADIUS * self.model.progress_remaining

    def _on_step(self) -> bool:
        return True


def policy_gradient(run: Run) -> list[Vector]:
    """θ, in the features' own units, after 0, 1, … iterations of NPG, or of the plain gradient in its place."""
    torch.set_num_threads(1)
    env = make_vec_env(
        "npg/Tetris-v0", run.games, run.seed, env_kwargs={"height": run.height, "features": run.features}
    )
    units = run.units or (1.0,) * (env.observation_space.shape[1] - 1)
    env = Units(env, units)
    progress = _Progress()
    agent = (NPG if run.method == "natural" else PolicyGradient)(
        AfterstatePolicy,
        env,
        n_steps=run.steps,
        gamma=0.995,
        gae_lambda=0.98,
        target_kl=RADIUS,
        step_size=run.step_size,
        cg_damping=DAMPING,
        cg_max_steps=30,
        critic="natural",
        n_critic_updates=3,
        fisher_fraction=0.25,
        seed=run.seed,
        device="cpu",
    )
    agent.learn(run.iterations * run.games * run.steps, callback=progress)
    thetas = [*progress.thetas, agent.policy.theta.detach().double().numpy()]
    return [theta * np.array(units) for theta in thetas]


def policy_iteration(run: Run) -> list[Vector]:
    """Greedy λ-policy iteration (Bertsekas and Ioffe 1996) with 22 features: θ of the greedy policies.

    V(s) = wᵀφ(s) is fitted by least squares to its λ-backups with λ = 0.6 along games of the greedy policy
    argmax_a r + V(s'). The rows that a placement completes are (cells before + 4 − cells after)/10, and the cells on a
    board are its heights less its holes; so r + V is linear in the same features, and the greedy policy is one θ.
    """
    discount = 0.6
    env = make_vec_env("npg/Tetris-v0", run.games, run.seed, env_kwargs={"height": run.height, "features": "bertsekas"})
    reward_weights = np.zeros(22)
    reward_weights[:10], reward_weights[20] = -0.1, 0.1
    w = np.zeros(22)
    w[19], w[20] = -1.0, -10.0  # the initial policy shuns height and, above all, holes
    thetas = []
    observations = env.reset()
    everyone = np.arange(run.games)
    for _ in range(run.iterations):
        thetas.append(w + reward_weights)
        phi = np.empty((run.steps, run.games, 22))
        rewards, over = np.empty((run.steps, run.games)), np.empty((run.steps, run.games), dtype=bool)
        for t in range(run.steps):
            scores = np.where(observations[..., 0] != 0, observations[..., 1:] @ thetas[-1], -np.inf)
            actions = scores.argmax(axis=1)
            phi[t] = observations[everyone, actions, 1:]
            observations, rewards[t], over[t], _ = env.step(actions)
        value = phi @ w
        # From the board after placement t: the next placement's reward and board, unless the game ended in between.
        errors = np.where(over[:-1], 0.0, rewards[1:] + value[1:]) - value[:-1]
        backup = np.zeros(run.games)
        targets = np.empty_like(errors)
        for t in reversed(range(run.steps - 1)):
            backup = errors[t] + discount * np.where(over[t], 0.0, backup)
            targets[t] = value[t] + backup
        w = np.linalg.lstsq(phi[:-1].reshape(-1, 22), targets.reshape(-1), rcond=None)[0]
    return [*thetas, w + reward_weights]


def learn(run: Run) -> list[dict[str, Any]]:
    """Points per game along a run and, as iteration −1, of the mean θ over the run's last quarter."""
    from envs.tetris import play

    thetas = (policy_iteration if run.method == "policy iteration" else policy_gradient)(run)
    shown = sorted({0, 1, 2, 3, 5, 7, 10, 15, len(thetas) - 1} | set(range(20, len(thetas), 10)))
    rows = []
    average = np.mean(thetas[len(thetas) * 3 // 4 :], axis=0)
    # The policy of a gradient method is the softmax, that of policy iteration greedy, as are the literature's scores.
    softmax = run.method != "policy iteration"
    checks = [(k, thetas[k], run.evaluation_games, not softmax) for k in shown if k < len(thetas)]
    checks += [(-1, average, run.final_games, True)]
    checks += [(-1, average, run.final_games // 2, False)] if softmax else []
    for iteration, theta, games, greedy in checks:
        lines, _ = play(theta, games, seed=10**6 + run.seed, height=run.height, features=run.features, greedy=greedy)
        rows.append(
            {
                "method": run.method,
                "features": run.features,
                "height": run.height,
                "step_size": run.step_size or "",
                "units": "own" if run.units is None else "other",
                "seed": run.seed,
                "iteration": iteration,
                "placements": max(iteration, 0) * run.games * run.steps,
                "policy": "greedy" if greedy else "softmax",
                "games": games,
                "points_per_game": float(lines.mean()),
                "standard_error": float(lines.std(ddof=1) / np.sqrt(games)),
                "theta": " ".join(f"{x:.6g}" for x in theta),
            }
        )
    return rows


def each(runs: list[Run], workers: int) -> Iterator[list[dict[str, Any]]]:
    """The curves, as many at a time as there are workers."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(learn, runs)


OTHER_UNITS = (10.0, 0.1) * 4 + (10.0,)


def tetris_curves(quick: bool, seed: int) -> list[tuple[Run, str, str, str, str]]:
    """Run, label, colour, line and marker of every curve; the longest first, so that the workers end together."""
    small: dict[str, Any] = {"features": "bertsekas", "iterations": 80, "games": 512, "seed": seed}
    large: dict[str, Any] = {"features": "dellacherie-thiery", "iterations": 60, "games": 1024, "seed": seed}
    if quick:
        for size in (small, large):
            size |= {"iterations": 2, "games": 32, "steps": 16, "evaluation_games": 4, "final_games": 4}
    kl = "same KL per step"
    return [
        (Run("natural", **large), "natural gradient", BLUE, "-", "o"),
        (Run("natural", units=OTHER_UNITS, **large), "natural, other units", BLACK, "--", "x"),
        (Run("plain", **large), f"plain, {kl}", ORANGE, "-", "s"),
        (Run("plain", units=OTHER_UNITS, **large), f"plain, {kl}, other units", VERMILION, "--", "v"),
        (Run("natural", **small), "natural gradient", BLUE, "-", "o"),
        (Run("plain", **small), f"plain, {kl}", ORANGE, "-", "s"),
        (Run("plain", step_size=30.0, **small), "plain, fixed step 30", VERMILION, "-.", "v"),
        (Run("plain", step_size=3.0, **small), "plain, fixed step 3", PURPLE, "-.", "^"),
        (Run("policy iteration", **small), "greedy λ-policy iteration", GREEN, ":", "D"),
    ]


def draw_tetris(out: Path, quick: bool, seed: int) -> Numbers:
    """Points (rows) per game on 10 × 10 over the iterations: 22 features, and 9 features in two systems of units."""
    curves = tetris_curves(quick, seed)
    figure, both = style.panels(2, height=5.0, sharey=True)
    rows, numbers = [], Numbers()
    for (run, label, colour, line, marker), rows_of_run in zip(
        curves, each([curve[0] for curve in curves], workers=1 if quick else 2)
    ):
        axes = both[int(run.features == "dellacherie-thiery")]
        path = [row for row in rows_of_run if row["iteration"] >= 0]
        axes.plot(
            [row["iteration"] for row in path],
            [max(row["points_per_game"], 0.1) for row in path],
            color=colour,
            ls=line,
            marker=marker,
            ms=4,
            lw=1.6,
            label=label,
        )
        rows += rows_of_run
        name = f"tetris_{run.features}_{label}".replace(",", "").replace(" ", "_").replace("λ", "lambda")
        for final in rows_of_run[len(path) :]:
            numbers[f"{name}_{final['policy']}"] = (
                final["points_per_game"],
                f"rows per game, {final['policy']} policy, mean theta of the last quarter, {final['games']} games, "
                f"standard error {final['standard_error']:.0f}",
            )
    for axes, title, anchor, value in (
        (both[0], "22 features (Bertsekas)", "cross-entropy method, 500", 500),
        (both[1], "9 features (Dellacherie–Thiery)", "CBMPI, 4,200", 4200),
    ):
        axes.axhline(value, color=GREY, lw=1)
        axes.text(0, 9000, f"grey line: {anchor}", color=BLACK, fontsize=11, va="center")
        axes.set(xlabel="iteration", yscale="log", title=title, ylim=(0.02, 20000))
    both[0].set_ylabel("points (rows) per game, 10 × 10 board")
    both[0].legend(loc="lower right", fontsize=10)
    both[1].legend(loc="lower right", fontsize=10)
    style.save(figure, out / "kakade_tetris.png")
    style.write_csv(out / "kakade_tetris.csv", rows)
    return numbers


DRAW = {"lqr": draw_lqr, "two-state": draw_two_state, "tetris": draw_tetris}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures and CSV files")
    parser.add_argument("--quick", action="store_true", help="draw from less work")
    parser.add_argument("--seed", type=int, default=0, help="of the learning runs")
    parser.add_argument("--only", nargs="+", choices=DRAW, default=list(DRAW), help="draw only these")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.only:
        started = perf_counter()
        numbers = DRAW[name](options.out, options.quick, options.seed)
        rows += [{"name": key, "value": value, "meaning": meaning} for key, (value, meaning) in numbers.items()]
        print(f"{name}: {perf_counter() - started:.1f} s")
        for key, (value, meaning) in numbers.items():
            print(f"  {key} = {value:.6g}  ({meaning})")
    style.update_csv(options.out / "kakade_numbers.csv", rows, "name")


if __name__ == "__main__":
    main()
