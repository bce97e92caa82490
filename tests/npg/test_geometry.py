"""Every geometry alike: factor, metric and divergence, and what Fisher, step and optimizer make of them."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from npg import Fisher, TrustRegion, conjugate_gradient, families, natural_step
from npg.families import Geometry
from npg.geometry import Euclidean, FisherRao, geometry_of
from npg.optim import NGD
from npg.transport import wasserstein

pytestmark = pytest.mark.usefixtures("double")

CHAIN = torch.diag(torch.ones(3, dtype=torch.float64), 1)


class Weighted:
    """A user's own, of no class of ours: M = diag(e^η)."""

    def __call__(self, outputs):
        weights = outputs.detach().exp()
        return lambda u: weights * u

    def divergence(self, old, new):
        # of the potential Σ e^η, whose Hessian M is
        return (new.exp() - old.exp() - old.exp() * (new - old)).sum(-1)


GEOMETRIES = {
    "fisher categorical": FisherRao(families.Categorical()),
    "fisher normal": FisherRao(families.DiagonalGaussian()),
    "euclidean": Euclidean(),
    "transport normal": wasserstein(families.DiagonalGaussian()),
    "transport complete": wasserstein(families.Categorical()),
    "transport chain": wasserstein(families.Categorical(), CHAIN + CHAIN.T),
    "transport bits": wasserstein(families.Bernoulli()),
    "transport classes": wasserstein(families.MultiCategorical([1, 3])),
    "transport product": wasserstein(
        families.Product([families.DiagonalGaussian(), families.MultiCategorical([2])], [2, 2])
    ),
    "own": geometry_of(Weighted()),
}


@pytest.fixture(params=GEOMETRIES)
def geometry(request) -> Geometry:
    return GEOMETRIES[request.param]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks(linear_map, events: int, dim: int = 4) -> Tensor:
    """Of a map of tangents, (events, dim, dim)."""
    return linear_map(torch.eye(dim).unsqueeze(1).expand(dim, events, dim)).movedim(0, -1)


def test_the_factor_is_one_of_the_metric(geometry, assert_close):
    outputs = randn(6, 4, seed=0)
    M = blocks(geometry(outputs), 6)
    for factor in (geometry.factor(outputs), Geometry.factor(geometry, outputs)):  # its own, and the default
        L = blocks(factor, 6)
        assert_close(L @ L.mT, M)


@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_the_factor_is_of_every_event_by_itself(geometry, leading, assert_close):
    """One event without an axis, and events on several axes, the epsilon of each in its place."""
    outputs, epsilon = randn(*leading, 4, seed=18), randn(*leading, 4, seed=19)
    for factor in (geometry.factor, partial(Geometry.factor, geometry)):
        flat = [factor(o[None])(e[None])[0] for o, e in zip(outputs.reshape(-1, 4), epsilon.reshape(-1, 4))]
        assert_close(factor(outputs)(epsilon), torch.stack(flat).reshape(*leading, 4))


def test_the_divergence_has_the_metric_as_its_second_order(geometry):
    outputs, d = randn(6, 4, seed=1), randn(6, 4, seed=2)
    quadratic = 0.5 * (d * geometry(outputs)(d)).sum(-1)
    errors = [
        float((geometry.divergence(outputs, outputs + t * d) - t**2 * quadratic).abs().max()) for t in (0.1, 0.05)
    ]
    if isinstance(geometry, Euclidean):
        assert max(errors) < 1e-14  # exact at any length
    else:
        assert 6.0 < errors[0] / errors[1] < 10.0, errors  # third order: 2³


@pytest.mark.parametrize("events", [2, 30])  # fewer rows than parameters, and more
def test_the_pull_back_equals_the_dense_twin(geometry, events, mlp, jacobian, assert_close):
    model, x = mlp(4), randn(events, 3, seed=3)
    J = jacobian(model(x), list(model.parameters()))
    F = Fisher(model, x, geometry)
    twin = J.T @ torch.block_diag(*blocks(geometry(F.outputs), events)) @ J / events
    V, root = randn(J.shape[1], 3, seed=4), randn(J.shape[1], seed=5).exp()
    assert_close(F @ V, twin @ V)
    assert_close(F.quadratic(V), ((twin @ V) * V).sum(0))
    assert_close(F.dense(), twin)
    assert_close(F.diagonal(), twin.diagonal())
    assert_close(F.diagonal(root=lambda v: root * v), root**2 * twin.diagonal())
    u = torch.stack(list(F.factor_vectors(None)))  # Σ uuᵀ is the metric within every event
    assert_close(torch.einsum("kni,knj->nij", u, u), blocks(geometry(F.outputs), events))
    assert_close(Fisher(model, x, families.Categorical(), metric=geometry).dense(), twin)


@pytest.mark.parametrize("through", ["family", "metric", "NGD"])
def test_a_step_equals_the_dense_twin(geometry, through, mlp, jacobian, assert_close):
    family, damping, radius = families.Gaussian(0.5), 1e-2, 1e-2
    model, x, y = mlp(4), randn(20, 3, seed=6), randn(20, 4, seed=7)
    parameters = list(model.parameters())
    old = model(x).detach()
    J = jacobian(model(x), parameters)
    G = J.T @ torch.block_diag(*blocks(geometry(old), 20)) @ J / 20 + damping * torch.eye(J.shape[1])
    loss = -family.log_likelihood(model(x), y).mean()
    g = -torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
    s = torch.linalg.solve(G, g)
    before = torch.cat([p.detach().flatten() for p in parameters])
    accurate = {"max_iterations": 500, "rtol": 1e-13}
    if through == "NGD":
        optimizer = NGD(model, family, lr=1e3, damping=damping, max_kl=radius, metric=geometry, **accurate)
        report = optimizer.step(x, y)
    else:
        where = {"family": geometry} if through == "family" else {"family": family, "metric": geometry}
        report = natural_step(
            model,
            x,
            objective=lambda outputs: family.log_likelihood(outputs, y).mean(),
            trust_region=TrustRegion(radius),
            damping=damping,
            solver=partial(conjugate_gradient, **accurate),
            **where,
        )
    assert report.accepted
    moved = torch.cat([p.detach().flatten() for p in parameters]) - before
    assert_close(moved, (2 * radius / float(s @ G @ s)) ** 0.5 * 0.8**report.backtracks * s, scale=100)
    assert report.kl == pytest.approx(float(geometry.divergence(old, model(x).detach()).mean()), rel=1e-10)
    assert report.kl <= radius


def test_euclid_is_the_gauss_newton_step_of_least_squares(mlp, jacobian, assert_close):
    """For an objective −½‖y − η‖² its full step without damping is that of linear least squares."""
    model, x, y = mlp(1), randn(40, 3, seed=8), randn(40, 1, seed=9)
    parameters = list(model.parameters())
    J, residual = jacobian(model(x), parameters), (y - model(x)).detach().flatten()
    before = torch.cat([p.detach().flatten() for p in parameters])
    NGD(model, families.Gaussian(), damping=0.0, metric="euclidean", solver="dense").step(x, y)
    moved = torch.cat([p.detach().flatten() for p in parameters]) - before
    assert_close(moved, torch.linalg.lstsq(J, residual).solution, scale=100)


@pytest.mark.parametrize("solver", ["kfac", "ekfac"])
@pytest.mark.parametrize("metric", ["euclidean", "wasserstein"])
def test_kronecker_factors_of_a_linear_network_are_exact_in_constant_geometries(metric, solver, assert_close):
    """M is I for both, and no gradient depends on an input: F̂ is the block-diagonal of JᵀJ."""
    model, x, y = nn.Linear(3, 2), randn(20, 3, seed=10), randn(20, 2, seed=11)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = NGD(model, families.Gaussian(0.1), damping=0.1, metric=metric, solver=solver, probes=None)
    optimizer.step(x, y)
    bar = torch.cat([x, torch.ones(20, 1)], 1)
    W = torch.cat([before[0], before[1].unsqueeze(1)], 1)
    gradient = (y - bar @ W.T).T @ bar / 20 / 0.1
    want = W + gradient @ torch.linalg.inv(bar.T @ bar / 20 + 0.1 * torch.eye(4))
    assert_close(torch.cat([model.weight.detach(), model.bias.detach().unsqueeze(1)], 1), want)


def test_max_kl_bounds_the_squared_distance_of_the_outputs(mlp):
    model, x, y = mlp(2), randn(30, 3, seed=12), randn(30, 2, seed=13) + 2
    optimizer = NGD(model, families.Gaussian(), lr=1e3, damping=1e-4, metric="euclidean", max_kl=0.05)
    losses = []
    for _ in range(8):
        old = model(x).detach()
        report = optimizer.step(x, y)
        assert 0.5 * (model(x) - old).square().sum(-1).mean() <= 0.05
        losses.append(-report.objective)
    assert all(a > b for a, b in pairwise(losses))


# ------------------------------------------------------------------------------------------------------------ bad input


class Skew(Weighted):
    def __call__(self, outputs):
        return lambda u: u @ torch.triu(torch.ones(4, 4))


class Negative(Weighted):
    def __call__(self, outputs):
        return lambda u: -u


@pytest.mark.parametrize("metric", [Skew(), Negative()])
def test_what_is_no_metric_has_no_factor(metric, mlp):
    F = Fisher(mlp(4), randn(2, 3, seed=14), metric)
    with pytest.raises(ValueError, match="not symmetric and positive semi-definite"):
        F.diagonal(probes=1)


@pytest.mark.parametrize("where", [0, 3, slice(None)])
def test_outputs_that_are_not_finite_give_nan_and_no_error(geometry, where):
    """In all of the factor of their event, and in no other's."""
    outputs = randn(3, 4, seed=15)
    outputs[1, where] = torch.nan
    L = blocks(Geometry.factor(geometry, outputs), 3)
    assert torch.isfinite(L[[0, 2]]).all()
    finite = torch.isfinite(blocks(geometry(outputs), 3)[1]).all()
    assert torch.isfinite(L[1]).all() if finite else torch.isnan(L[1]).all()
    assert not finite or where == 0 or isinstance(geometry, Euclidean)  # a mean is in no metric


def test_what_is_no_geometry_is_named(mlp):
    model, x = mlp(4), randn(5, 3, seed=16)
    for wrong in ("categorical", families.Categorical, None):
        with pytest.raises(TypeError, match=r"family must be a family of npg\.families or a geometry"):
            Fisher(model, x, wrong)
    with pytest.raises(ValueError, match="goes with kind='exact' only"):
        Fisher(model, x, Euclidean(), kind="sampled")
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TypeError, match=r"has no divergence to measure a step by: give it a method"):
        natural_step(
            model, x, lambda o: lambda u: u, lambda o: o[:, 0].mean(), trust_region=TrustRegion(0.1), damping=1
        )
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_family_is_its_fisher_rao_geometry(mlp, assert_close):
    model, x, family = mlp(4), randn(5, 3, seed=17), families.Categorical()
    assert Fisher(model, x, family).geometry == FisherRao(family)
    assert_close(Fisher(model, x, FisherRao(family)).dense(), Fisher(model, x, family).dense(), scale=0)
    kinds = [
        Fisher(model, x, g, kind="sampled", generator=torch.Generator().manual_seed(0))
        for g in (family, FisherRao(family))
    ]
    assert_close(kinds[0].dense(), kinds[1].dense(), scale=0)


def test_an_equal_family_is_the_metric_of_the_loss(mlp):
    """Whose Hessian is about F: the predicted gain is gᵀd − ½dᵀFd, and labels may be drawn from it."""
    x, y = randn(20, 3, seed=17), torch.arange(20) % 4
    gains = []
    for metric in ("fisher", FisherRao(families.Categorical())):
        model = mlp(4)
        optimizer = NGD(model, families.Categorical(), damping=0.1, metric=metric)
        report = optimizer.step(x, y)
        assert report.predicted_gain == pytest.approx(float(report.gradient @ report.step) - report.predicted_kl)
        gains.append(report.predicted_gain)
        assert NGD(model, families.Categorical(), metric=metric, fisher="sampled").step(x, y).accepted
    assert gains[0] == gains[1]
    with pytest.raises(ValueError, match="fisher must be 'exact' with another metric"):
        NGD(mlp(4), families.Gaussian(2.0), metric=FisherRao(families.Gaussian(1.0)), fisher="sampled")
