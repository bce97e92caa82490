"""Preconditioners as `natural_step` takes them."""

import pytest
import torch
from torch import nn

from npg import Fisher, conjugate_gradient, families
from npg.curvature.kronecker import KroneckerFisher
from npg.curvature.preconditioners import diagonal_preconditioner, kronecker_preconditioner

pytestmark = pytest.mark.usefixtures("double")
MAKERS = [diagonal_preconditioner, kronecker_preconditioner]


@pytest.fixture
def fisher():
    """Of inputs whose sizes span three decades."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 4))
    x = torch.randn(80, 12, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 1, 12)
    return Fisher(model, x, families.Categorical())


def test_the_diagonal_one_is_a_power_of_the_estimate(fisher, assert_close):
    estimate = fisher.diagonal(4, torch.Generator().manual_seed(0))
    floor = 1e-3 * estimate.mean()
    assert (estimate < floor).any(), "otherwise the floor is not tested"
    expected = (estimate.clamp(min=floor) + 0.1) ** -0.5
    v = torch.randn(fisher.shape[0], 3, generator=torch.Generator().manual_seed(2))
    inverse = diagonal_preconditioner(fisher, 0.1, probes=4, exponent=0.5)
    assert_close(inverse(v), expected.unsqueeze(1) * v)
    assert_close(inverse(v[:, 0]), expected * v[:, 0])


@pytest.mark.parametrize("exponent", [0.0, 1.5])
def test_exponents_that_are_refused(fisher, exponent):
    with pytest.raises(ValueError, match=rf"exponent must lie in \(0, 1\], got {exponent}"):
        diagonal_preconditioner(fisher, 0.1, exponent=exponent)


def test_the_kronecker_one_is_the_inverse_of_its_approximation(fisher, assert_close):
    approximation = KroneckerFisher(fisher, probes=3, generator=torch.Generator().manual_seed(0))
    v = torch.randn(fisher.shape[0], generator=torch.Generator().manual_seed(2))
    damped = approximation.dense() + 0.1 * torch.eye(len(v))
    assert_close(kronecker_preconditioner(fisher, 0.1, probes=3)(v), torch.linalg.solve(damped, v))


@pytest.mark.parametrize("make", MAKERS)
def test_they_draw_nothing_from_the_global_generator_and_are_the_same_each_time(fisher, make):
    state = torch.get_rng_state()
    v = torch.ones(fisher.shape[0])
    assert torch.equal(make(fisher, 0.1)(v), make(fisher, 0.1)(v))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", MAKERS)
def test_they_do_not_change_the_answer(fisher, make, assert_close):
    b = fisher @ torch.randn(fisher.shape[0], generator=torch.Generator().manual_seed(3))
    plain, helped = (
        conjugate_gradient(fisher, b, damping=1e-4, rtol=1e-11, max_iterations=2000, preconditioner=p)
        for p in (None, make(fisher, 1e-4))
    )
    assert_close(helped.x, plain.x, scale=1e4)


@pytest.mark.parametrize("make", MAKERS)
def test_they_save_iterations(make):
    """Of a linear model on independent inputs of very different sizes, whose F is nearly diagonal."""
    x = torch.randn(3000, 100, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 1, 100)
    fisher = Fisher(nn.Linear(100, 2, bias=False), x, families.Gaussian())
    b = torch.ones(200)
    plain, helped = (
        conjugate_gradient(fisher, b, damping=1e-4, rtol=1e-4, max_iterations=500, preconditioner=p)
        for p in (None, make(fisher, 1e-4))
    )
    assert helped.residual_norm <= 1e-4
    assert helped.iterations < 0.8 * plain.iterations
