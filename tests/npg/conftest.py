"""Dense twins in float64, written out on their own, and the one table of tolerances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import sqrt
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    Beta,
    Independent,
    MultivariateNormal,
    Normal,
    Poisson,
)

from npg import families

# Relative to the largest entry of what is compared.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module")
def double() -> Iterator[None]:
    """Everything in float64 for the length of a module."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """``assert_close(actual, expected, scale=1)``: finite, of one shape, and equal to the tolerance of the dtype."""

    def check(actual: Tensor, expected: Tensor, scale: float = 1.0, dtype: torch.dtype | None = None) -> None:
        assert actual.shape == expected.shape
        assert torch.isfinite(actual).all()
        assert torch.isfinite(expected).all()
        tolerance = scale * TOLERANCE[dtype or actual.dtype]
        error = (actual.double() - expected.double()).abs().amax() / expected.double().abs().amax().clamp(min=1e-300)
        assert error <= tolerance, f"relative error {float(error):.2e} > {tolerance:.0e}"

    return check


@pytest.fixture(scope="session")
def jacobian() -> Callable[..., Tensor]:
    """∂outputs/∂θ row by row through plain reverse mode: (outputs.numel(), P)."""

    def rows(outputs: Tensor, parameters: list[Tensor]) -> Tensor:
        def row(output: Tensor) -> Tensor:
            gradients = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters)]
            return torch.cat([part.reshape(-1) for part in parts])

        return torch.stack([row(output) for output in outputs.reshape(-1)])

    return rows


# ------------------------------------------------------------------------------------- the metrics, from the textbook


def _categorical(logits: Tensor) -> Tensor:
    p = logits.exp() / logits.exp().sum()
    return torch.diag(p) - torch.outer(p, p)


def _bernoulli(logits: Tensor) -> Tensor:
    p = 1 / (1 + torch.exp(-logits))
    return torch.diag(p * (1 - p))


def _normal(outputs: Tensor) -> Tensor:
    log_std = outputs[len(outputs) // 2 :]
    return torch.diag(torch.cat([torch.exp(-2 * log_std), torch.full_like(log_std, 2.0)]))


def _poisson(log_rate: Tensor) -> Tensor:
    return torch.diag(log_rate.exp())


def _beta(outputs: Tensor) -> Tensor:
    # in log α and log β: the chain rule on [[ψ'(α) − ψ'(α+β), −ψ'(α+β)], [·, ψ'(β) − ψ'(α+β)]]
    a, b = outputs.exp().chunk(2)
    trigamma = torch.special.polygamma
    both = torch.diag(trigamma(1, a + b))
    information = torch.block_diag(torch.diag(trigamma(1, a)), torch.diag(trigamma(1, b))) - both.repeat(2, 2)
    return torch.outer(outputs.exp(), outputs.exp()) * information


def _tril(outputs: Tensor) -> Tensor:
    one = torch.ones_like(outputs[..., 0])
    rows = [torch.stack([outputs[..., 2].exp(), 0 * one], -1), torch.stack([outputs[..., 3], one], -1)]
    return torch.stack(rows, -2)


def _multivariate(outputs: Tensor) -> Tensor:
    # M_ij = ∂ᵢμᵀ Σ⁻¹ ∂ⱼμ + ½ tr(Σ⁻¹ ∂ᵢΣ Σ⁻¹ ∂ⱼΣ)
    def covariance(o: Tensor) -> Tensor:
        return _tril(o) @ _tril(o).T

    precision = covariance(outputs).inverse()
    moving = torch.autograd.functional.jacobian(covariance, outputs)
    metric = 0.5 * torch.einsum("ab,bci,cd,daj->ij", precision, moving, precision, moving)
    metric[:2, :2] += precision
    return metric


def _families() -> dict[str, SimpleNamespace]:
    """Every family, its number of outputs (one for all, so that networks are shared), and the metric of one event."""

    def entry(
        family: families.Family, size: int, metric: Callable[[Tensor], Tensor], **others: object
    ) -> SimpleNamespace:
        return SimpleNamespace(family=family, size=size, metric=metric, **others)

    return {
        "categorical": entry(families.Categorical(), 4, _categorical),
        "bernoulli": entry(families.Bernoulli(), 4, _bernoulli),
        "multi_categorical": entry(
            families.MultiCategorical([1, 3]),
            4,
            lambda o: torch.block_diag(_categorical(o[:1]), _categorical(o[1:])),
        ),
        "product": entry(
            families.Product(
                [families.Categorical(), families.Product([families.Bernoulli(), families.Gaussian(0.7)], [1, 1])],
                [2, 2],
            ),
            4,
            lambda o: torch.block_diag(_categorical(o[:2]), _bernoulli(o[2:3]), torch.eye(1) / 0.7),
        ),
        "diagonal_gaussian": entry(families.DiagonalGaussian(), 4, _normal),
        "gaussian": entry(families.Gaussian(variance=0.7), 4, lambda o: torch.eye(len(o)) / 0.7),
        "poisson": entry(families.from_torch(lambda o: Independent(Poisson(o.exp()), 1)), 4, _poisson),
        "beta": entry(
            families.from_torch(lambda o: Independent(Beta(o[..., :2].exp(), o[..., 2:].exp()), 1)),
            4,
            _beta,
        ),
        "normal": entry(
            families.from_torch(lambda o: Independent(Normal(o[..., :2], o[..., 2:].exp()), 1)),
            4,
            _normal,
        ),
        "multivariate_normal": entry(
            families.from_torch(lambda o: MultivariateNormal(o[..., :2], scale_tril=_tril(o))),
            4,
            _multivariate,
        ),
    }


FAMILIES = _families()


@pytest.fixture(params=list(FAMILIES))
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    """One family after the other."""
    return FAMILIES[request.param]


@pytest.fixture(scope="session")
def every_family() -> dict[str, SimpleNamespace]:
    return FAMILIES


@pytest.fixture(scope="session")
def dense_metric() -> Callable[[SimpleNamespace, Tensor], Tensor]:
    """The metric of all events as one block-diagonal matrix (events·D, events·D), from the textbook formula."""

    def blocks(case: SimpleNamespace, outputs: Tensor) -> Tensor:
        return torch.block_diag(*(case.metric(event) for event in outputs.detach().reshape(-1, case.size)))

    return blocks


@pytest.fixture(scope="session")
def mlp() -> Callable[[int], nn.Sequential]:
    """A small network of smooth functions with three inputs."""

    def build(size: int, seed: int = 0) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, size))

    return build


@pytest.fixture(scope="session")
def spd() -> Callable[..., Tensor]:
    """A symmetric positive definite matrix (n, n) of the given condition, its eigenvalues evenly spread in log."""

    def build(n: int, condition: float, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
        decades = torch.linspace(0, 1, n, dtype=torch.float64)
        return (basis * condition ** (-decades)) @ basis.T * sqrt(condition)

    return build
