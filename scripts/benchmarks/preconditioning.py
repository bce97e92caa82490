r"""How far conjugate gradients get in few products, by their preconditioner: on a policy and on an image network.

    python scripts/benchmarks/preconditioning.py --data PATH --csv docs/results/preconditioning.csv \
        --png docs/results/preconditioning.png

The system is (F + λI) s = g of a step of training: of a TRPO agent after ``--before`` steps of HalfCheetah-v5, with
the surrogate's gradient and a part of the rollout for F as in its preset; and of a Wide ResNet after ``--batches``
batches of CIFAR-10. Written down is the part of the attainable gain gᵀs − ½sᵀ(F + λI)s that is reached after so many
products (the whole: 3,000 iterations with a preconditioner, or a relative residual of 1e-6), and what setting up a
preconditioner costs, in products.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import chain, count
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import torch
from interleaved import environment, machine, make_parser, measure, ratio, write_csv
from torch import Tensor
from torch.nn.functional import cross_entropy

from agents import TRPO
from agents.config import resolve
from agents.update import batch_of
from envs import VecNormalize, make_vec_env
from npg import Fisher, conjugate_gradient, families
from npg.curvature.preconditioners import diagonal_preconditioner, kronecker_preconditioner
from npg.linearize import Linearization
from npg.vision import data, model_from_name
from npg.vision.config import load_config
from npg.vision.loader import Normalization, TrainLoader

MODEL = "wrn-10-1-s2"
PRODUCTS = (1, 2, 3, 4, 6, 8, 10, 15, 20, 30)
Preconditioner = Callable[[Fisher, float], Callable[[Tensor], Tensor]]


PRECONDITIONERS: dict[str, Preconditioner | None] = {
    "none": None,
    "diagonal": diagonal_preconditioner,
    "kfac": kronecker_preconditioner,
    "ekfac": partial(kronecker_preconditioner, corrected=True),
}


def policy(env_id: str, before: int, seed: int) -> tuple[Fisher, Tensor, float]:
    """F, g and λ of the update that an agent takes next."""
    preset = resolve("trpo", env_id, seed=seed)
    venv = VecNormalize(make_vec_env(env_id, preset.n_envs, seed), **(preset.normalize or {}))
    agent = TRPO("MlpPolicy", venv, seed=seed, device="cpu", **preset.hyperparameters)
    agent.learn(before)
    agent.collect()
    batch = batch_of(agent, next(agent.rollout_buffer.get(None)))
    actor, parameters = agent.networks.actor, agent.networks.actor_parameters
    linearization = Linearization(actor, batch.inputs, parameters)
    outputs = linearization.outputs.clone().requires_grad_()
    (slope,) = torch.autograd.grad(agent.surrogate(batch)(outputs), outputs)
    inputs = batch.inputs if batch.curvature_inputs is None else batch.curvature_inputs
    fisher = Fisher(actor, inputs, actor.family, parameters=parameters)
    return fisher, linearization.pull_back(slope), agent.components * agent.cg_damping


def image(path: Path | None, batches: int, seed: int) -> tuple[Fisher, Tensor, float]:
    """F, g and λ of a network that has seen some batches."""
    torch.manual_seed(seed)
    images, config = data.load(path), load_config(MODEL, "sgd", "small")
    model = model_from_name(MODEL, len(images.classes))
    normalize = Normalization(config.mean, config.std, torch.device("cpu"))
    loader = TrainLoader(images.train_images, images.train_labels, config.batch_size, normalize, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _, (x, y) in zip(range(batches), chain.from_iterable(loader for _ in count())):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    fisher = Fisher(model, x, families.Categorical())
    slope = families.Categorical().score(fisher.outputs, y) / fisher.events
    return fisher, fisher.linearization.pull_back(slope), 1e-2


def main() -> None:
    parser = make_parser(__doc__, rounds=10)
    parser.add_argument("--systems", nargs="+", choices=("policy", "image"), default=["policy", "image"])
    parser.add_argument("--env", default="HalfCheetah-v5", help="of the policy")
    parser.add_argument("--before", type=int, default=200_000, help="steps of the agent's training")
    parser.add_argument("--batches", type=int, default=88, help="of the network's training")
    parser.add_argument("--data", type=Path, help="as for train_cifar.py [CIFAR-10, downloaded]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--png", type=Path, help="draw it here")
    options = parser.parse_args()
    if "policy" in options.systems:
        try:
            environment(options.env)
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --env: {error}")
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for system in options.systems:
        fisher, g, damping = (
            policy(options.env, options.before, options.seed)
            if system == "policy"
            else image(options.data, options.batches, options.seed)
        )
        solve = partial(conjugate_gradient, fisher, g, damping=damping)
        best = solve(preconditioner=kronecker_preconditioner(fisher, damping), max_iterations=3000, rtol=1e-6)
        setups = {name: partial(make, fisher, damping) for name, make in PRECONDITIONERS.items() if make is not None}
        seconds = measure({"product": partial(fisher.__matmul__, g), **setups}, rounds=options.rounds, turn=1)
        print(f"{system}: {fisher}, λ = {damping:g}; the whole gain by {best.iterations} products, {best.status.value}")
        print(f"{'preconditioner':<16}{'set-up, products':>17}" + "".join(f"{k:>5}" for k in PRODUCTS))
        for name, make in PRECONDITIONERS.items():
            inverse = None if make is None else make(fisher, damping)
            setup = 0.0 if make is None else ratio(seconds, name, "product")[1]
            parts = []
            for products in PRODUCTS:
                solution = solve(preconditioner=inverse, max_iterations=products, rtol=0.0)
                parts.append(float(solution.model_value / best.model_value))
                rows.append(
                    {
                        "system": system,
                        "parameters": fisher.shape[0],
                        "events": fisher.events,
                        "damping": damping,
                        "preconditioner": name,
                        "products": products,
                        "part_of_gain": f"{parts[-1]:.4f}",
                        "residual": f"{float(solution.residual_norm):.4f}",
                        "setup_in_products_median": f"{setup:.2f}",
                        "product_ms_median": f"{1e3 * median(seconds['product']):.3f}",
                        "seed": options.seed,
                        "threads": options.threads,
                        "machine": machine(),
                        "torch": torch.__version__,
                    }
                )
            print(f"{name:<16}{setup:>17.1f}" + "".join(f"{part:>5.2f}" for part in parts))
    write_csv(options.csv, rows)
    if options.png:
        draw(options.png, rows)


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    systems = list(dict.fromkeys(row["system"] for row in rows))
    figure, axes = plt.subplots(1, len(systems), figsize=(4.5 * len(systems), 3.6), squeeze=False, layout="constrained")
    colours = dict(zip(PRECONDITIONERS, ("#777777", "#E69F00", "#0072B2", "#D55E00")))
    for axis, system in zip(axes[0], systems):
        for name, colour in colours.items():
            mine = [row for row in rows if (row["system"], row["preconditioner"]) == (system, name)]
            axis.plot(
                [row["products"] for row in mine],
                [float(row["part_of_gain"]) for row in mine],
                marker="o",
                markersize=3,
                color=colour,
                linestyle="--" if name == "ekfac" else "-",
                label=name,
            )
        axis.set_title(f"{system}, {mine[0]['parameters']:,} parameters")
        axis.set_xlabel("products with F")
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("part of the attainable gain")
    axes[0][-1].legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
