"""What stays right where PyTorch makes tensors on another device than the model is on.

Tensors are on "meta" by default here, which holds no numbers: one that is made without its device would spoil all.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from npg import Fisher, TrustRegion, conjugate_gradient, families, natural_step
from npg.curvature import DenseFisher, DiagonalFisher, KroneckerFisher
from npg.optim import NGD, DiagonalNGD, KLShampoo, OnlineNGD
from npg.vision.loader import Normalization, TrainLoader

FAMILY = families.Categorical()


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*convolutions, nn.Linear(8, 3)), torch.randn(6, 1, 4, 4), torch.randint(3, (6,))


def fisher(make: Callable[[Fisher, Tensor], Tensor]) -> Callable[..., Tensor]:
    def use(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        F = Fisher(model, x, FAMILY)
        return make(F, F.linearization.parameters.get())

    return use


def steps(make: Callable[[nn.Module], Any]) -> Callable[..., Tensor]:
    """Three steps, the last one by an optimizer that was loaded from what the first left."""

    def use(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        optimizer = make(model)
        for step in range(3):
            if step == 2:
                former, optimizer = optimizer, make(model)
                optimizer.load_state_dict(former.state_dict())
            if isinstance(optimizer, (NGD, DiagonalNGD)):
                optimizer.step(x, y)
            else:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    return use


def natural(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    log_likelihood = lambda outputs: FAMILY.log_likelihood(outputs, y).mean()  # noqa: E731
    return natural_step(model, x, FAMILY, log_likelihood, trust_region=TrustRegion(0.01)).step


def images(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 3, 8, 8), dtype=np.uint8)
    normalize = Normalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), torch.device("cpu"))
    return torch.cat([batch for batch, _ in TrainLoader(pixels, np.arange(8), 4, normalize, seed=1)])


USES = {
    "product": fisher(lambda F, v: F @ v),
    "block": fisher(lambda F, v: F @ torch.stack([v, 2 * v], 1)),
    "dense": fisher(lambda F, v: F.dense()),
    "columns": fisher(lambda F, v: torch.cat(list(F._columns()), 1)),
    "diagonal": fisher(lambda F, v: F.diagonal()),
    "cg": fisher(lambda F, v: conjugate_gradient(F, v, damping=0.1).x),
    "kfac": fisher(lambda F, v: KroneckerFisher(F, probes=None).inverse(0.1)(v)),
    "diagonal curvature": fisher(lambda F, v: DiagonalFisher(F, probes=None).inverse(0.1)(v)),
    "dense curvature": fisher(lambda F, v: DenseFisher(F).inverse(0.1)(v)),
    "sampled": lambda model, x, y: Fisher(
        model, x, FAMILY, kind="sampled", generator=torch.Generator().manual_seed(2)
    ).dense(),
    "natural step": natural,
    "ngd": steps(lambda model: NGD(model, FAMILY, damping=0.1, max_kl=0.01, momentum=0.0)),
    "ngd, kfac": steps(lambda model: NGD(model, FAMILY, damping=0.1, lr=0.1, solver="kfac", probes=None)),
    "ngd, online": steps(lambda model: NGD(model, FAMILY, damping=0.1, max_kl=0.01, damping_metric="online")),
    "diagonal-ngd": steps(lambda model: DiagonalNGD(model, FAMILY, lr=0.1, probes=None)),
    "online-ngd": steps(lambda model: OnlineNGD(model.parameters(), lr=0.1)),
    "kl-shampoo": steps(lambda model: KLShampoo(model.parameters(), lr=0.1)),
    "images": images,
}


@pytest.mark.parametrize("name", USES)
def test_tensors_are_where_the_model_is(name: str) -> None:
    found = []
    for elsewhere in (nullcontext(), torch.device("meta")):
        model, x, y = problem()
        with elsewhere:
            found.append(USES[name](model, x, y))
    usual, other = found
    assert other.device.type == "cpu"
    assert float(usual.abs().sum()) > 0
    torch.testing.assert_close(other, usual, rtol=0, atol=0)
