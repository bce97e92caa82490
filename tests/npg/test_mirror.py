"""Potentials against automatic differentiation and the families' KL, and the theorems about mirror steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor
from torch.autograd.functional import hessian

from npg import Fisher, families
from npg.mirror import (
    NegativeEntropy,
    SquaredNorm,
    dual_natural_step,
    log_partition,
    mirror_descent,
    mirror_step,
    proximal_step,
    trust_region_step,
)

FAMILIES = {
    "categorical": (families.Categorical(), 5),
    "multicategorical": (families.MultiCategorical([2, 3]), 5),
    "product": (
        families.Product(
            [families.Product([families.Bernoulli(), families.Gaussian(0.3)], [1, 2]), families.DiagonalGaussian()],
            [3, 2],
        ),
        5,
    ),
    "bernoulli": (families.Bernoulli(), 4),
    "gaussian": (families.Gaussian(variance=0.3), 4),
    "diagonal_gaussian": (families.DiagonalGaussian(), 4),
}
POTENTIALS = {
    "squared_norm": SquaredNorm(),
    "negative_entropy": NegativeEntropy(),
    **{name: log_partition(family) for name, (family, _) in FAMILIES.items()},
}
GAUGE = {"negative_entropy", "categorical", "multicategorical"}  # dual coordinates up to a constant, or θ is


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def point(name: str, seed: int, *shape: int) -> Tensor:
    """A point of the potential's domain."""
    width = FAMILIES[name][1] if name in FAMILIES else 4
    x = 0.5 * torch.randn(*shape, width, generator=generator(seed))
    if name == "negative_entropy":
        return x.softmax(-1)
    if name in FAMILIES:
        return POTENTIALS[name].natural(x)
    return x


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def convex_objective(name: str, seed: int):
    """A strictly convex function of θ; on logits one that does not see a common constant, as a likelihood."""
    n = point(name, 0).shape[-1]
    A = torch.randn(n, n, generator=generator(seed)) / n**0.5
    b = torch.randn(n, generator=generator(seed + 1))
    sizes = {"categorical": [5], "multicategorical": [2, 3]}.get(name)

    def f(theta: Tensor) -> Tensor:
        if sizes is not None:
            theta = torch.cat([t - t.mean(-1, keepdim=True) for t in theta.split(sizes, -1)], -1)
        return (0.5 * (theta @ A).square().sum(-1) + torch.nn.functional.softplus(theta @ b)).mean()

    return f


def slope(f, theta: Tensor) -> Tensor:
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(f(theta), theta)[0]


# ------------------------------------------------------------------------------------------------------- potentials


@pytest.mark.parametrize("name", POTENTIALS)
def test_gradient_and_hessian_are_those_of_the_value(name):
    potential, theta = POTENTIALS[name], point(name, 1)
    torch.testing.assert_close(potential.gradient(theta), slope(potential.value, theta), rtol=1e-10, atol=1e-12)
    dense = hessian(potential._value, theta)
    columns = potential.hessian(theta)(torch.eye(len(theta)))
    torch.testing.assert_close(columns, dense, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", POTENTIALS)
def test_inverse_gradient_inverts_the_gradient(name):
    potential, theta = POTENTIALS[name], point(name, 2, 3)
    mu = potential.gradient(theta)
    back = potential.inverse_gradient(mu)
    torch.testing.assert_close(potential.gradient(back), mu, rtol=1e-12, atol=1e-12)
    if name not in ("categorical", "multicategorical"):  # logits come back up to a constant
        torch.testing.assert_close(back, theta, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(POTENTIALS) - GAUGE))
def test_conjugate_has_the_inverse_gradient_for_gradient(name):
    potential = POTENTIALS[name]
    mu = potential.gradient(point(name, 3))
    torch.testing.assert_close(slope(potential.conjugate, mu), potential.inverse_gradient(mu), rtol=1e-10, atol=1e-12)


def test_conjugate_of_negative_entropy_is_log_sum_exp():
    # sup over the simplex of ⟨μ, p⟩ − Σ p log p
    mu = torch.randn(6, generator=generator(4))
    torch.testing.assert_close(NegativeEntropy().conjugate(mu), mu.logsumexp(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_divergence_of_a_log_partition_is_kl_with_arguments_exchanged(name):
    (family, width), potential = FAMILIES[name], POTENTIALS[name]
    new, old = (torch.randn(7, width, generator=generator(seed)) for seed in (5, 6))
    divergence = potential.divergence(potential.natural(new), potential.natural(old))
    torch.testing.assert_close(divergence, family.kl(old, new), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_hessian_of_a_log_partition_pulls_back_to_the_family_metric(name):
    (family, width), potential = FAMILIES[name], POTENTIALS[name]
    outputs = torch.randn(width, generator=generator(7))
    torch.testing.assert_close(potential.outputs(potential.natural(outputs)), outputs)
    J = torch.func.jacrev(potential.natural)(outputs)
    H = potential.hessian(potential.natural(outputs))(torch.eye(width))
    M = family.metric(outputs)(torch.eye(width))
    torch.testing.assert_close(J.T @ H @ J, M, rtol=1e-10, atol=1e-12)


def test_divergence_of_negative_entropy_is_kl():
    p, q = (torch.randn(3, 5, generator=generator(s)).softmax(-1) for s in (8, 9))
    torch.testing.assert_close(NegativeEntropy().divergence(p, q), (p * (p / q).log()).sum(-1))


@pytest.mark.parametrize("name", POTENTIALS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_divergence_is_zero_at_equality_and_positive_elsewhere(name, seed):
    potential, a, b = POTENTIALS[name], point(name, seed), point(name, seed + 1)
    assert abs(float(potential.divergence(a, a))) < 1e-12
    assert float(potential.divergence(a, b)) > 0


# ------------------------------------------------------------------------------------------------------------ steps


def test_squared_norm_step_is_gradient_descent_in_the_report_s_convention():
    # equation 15: argmin ⟨θ, g⟩ + ‖θ − θᵢ‖²/(2α)
    theta, g = torch.randn(2, 6, generator=generator(10))
    torch.testing.assert_close(mirror_step(SquaredNorm(), theta, g, 0.3), theta - 0.3 * g, rtol=1e-14, atol=1e-14)


def test_entropy_step_is_exponentiated_gradient():
    p, g = point("negative_entropy", 11), torch.randn(4, generator=generator(12))
    q = p * torch.exp(-2 * 0.3 * g)
    torch.testing.assert_close(mirror_step(NegativeEntropy(), p, g, 0.3), q / q.sum(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", POTENTIALS)
def test_mirror_step_minimises_its_model(name):
    potential, theta, alpha = POTENTIALS[name], point(name, 13), 0.02
    g = slope(convex_objective(name, 14), theta)
    new = mirror_step(potential, theta, g, alpha)

    def model(x: Tensor) -> Tensor:
        return (x @ g) + potential._divergence(x, theta) / (2 * alpha)

    gradient = slope(model, new)
    if name == "negative_entropy":  # stationary along the simplex
        gradient = gradient - gradient.mean()
    assert float(gradient.abs().max()) < 1e-10 * float(1 + g.abs().max() / alpha)


@pytest.mark.parametrize("name", POTENTIALS)
@pytest.mark.parametrize("seed", range(3))
def test_mirror_step_is_a_natural_gradient_step_along_the_dual_manifold(name, seed):
    # Raskutti & Mukherjee 2015, theorem 1
    potential, theta, alpha = POTENTIALS[name], point(name, 20 + seed), 0.02
    f = convex_objective(name, 30 + seed)
    mirror = mirror_step(potential, theta, slope(f, theta), alpha)
    natural = dual_natural_step(potential, f, theta, alpha)
    assert float((mirror - theta).abs().max()) > 1e-3
    torch.testing.assert_close(natural, mirror, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("dtype", "deviation"),
    [
        (torch.float32, [1.0, 1.0]),
        (torch.float32, [0.1, 10.0]),
        (torch.float32, [0.03, 30.0]),
        (torch.float64, [0.01, 100.0]),
        (torch.float64, [1e-3, 1e3]),
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_the_theorem_holds_in_whatever_units_the_coordinates_are(dtype, deviation, together):
    # ∇²G* has entries from 1/σ² to 1/(2σ⁴): none is small beside another, be it in one point or in several
    G, sigma = POTENTIALS["diagonal_gaussian"], torch.tensor(deviation, dtype=dtype)
    mean = torch.tensor([0.3, -0.2], dtype=dtype) * sigma
    outputs = torch.cat([mean, sigma.log()])
    if not together:
        outputs = torch.stack([mean, sigma.log()], -1)
        mean, sigma = mean[:, None], sigma[:, None]
    theta, aim = G.natural(outputs), torch.tensor(0.1, dtype=dtype)

    def f(theta: Tensor) -> Tensor:
        m, log_sigma = families.DiagonalGaussian.split(G.outputs(theta))
        return (((m - mean) / sigma - aim).square() + (log_sigma - sigma.log() - aim).square()).sum(-1).mean()

    g = torch.autograd.functional.jacobian(f, theta) * (theta.numel() // theta.shape[-1])
    alpha = 1e-2 * float((G.gradient(theta).abs() / g.abs()).min())
    mirror, natural = mirror_step(G, theta, g, alpha), dual_natural_step(G, f, theta, alpha)
    change = (mirror - theta) / theta
    assert float(change.abs().min()) > 1e-4
    torch.testing.assert_close((natural - theta) / theta, change, rtol=1e-2, atol=1e-6)


def test_a_dual_natural_step_that_cannot_be_taken_is_no_step():
    G = POTENTIALS["diagonal_gaussian"]
    theta = G.natural(torch.tensor([4e3, 0.0], dtype=torch.float32))  # m²/σ² is 1/ε
    with pytest.raises(ValueError, match=r"alpha=1e-09 cannot be taken: .* singular"):
        dual_natural_step(G, lambda t: G.outputs(t).square().sum(), theta, 1e-9)
    with pytest.raises(ValueError, match=r"alpha=10 cannot be taken: the gradient or the step is not finite"):
        dual_natural_step(SquaredNorm(), lambda t: 1e308 * t.sum(), torch.ones(2), 10.0)


def test_the_theorem_holds_for_a_batch_with_the_mean_of_the_objectives():
    theta = point("negative_entropy", 40, 3)
    f = convex_objective("negative_entropy", 41)
    steps = mirror_descent(NegativeEntropy(), f, theta, 0.1, 1)
    torch.testing.assert_close(dual_natural_step(NegativeEntropy(), f, theta, 0.1), steps[1], rtol=1e-10, atol=1e-10)
    each = torch.stack([mirror_step(NegativeEntropy(), t, slope(f, t), 0.1) for t in theta])
    torch.testing.assert_close(steps[1], each, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(POTENTIALS) - GAUGE))
def test_pull_back_of_the_hessian_is_the_dual_metric(name):
    # Jᵀ ∇²G J = ∇²G* for J = ∂θ/∂μ, the identity that makes the step above a call of the core
    potential = POTENTIALS[name]
    mu = potential.gradient(point(name, 42))
    F = Fisher(
        lambda parameters: potential._inverse_gradient(parameters["mu"]),
        (),
        families.Gaussian(),
        metric=potential.hessian,
        parameters={"mu": mu.clone()},
    )
    torch.testing.assert_close(F.dense(), hessian(potential.conjugate, mu), rtol=1e-8, atol=1e-10)


def test_mirror_descent_converges_to_the_minimum_on_the_simplex():
    p_star = torch.tensor([0.1, 0.2, 0.3, 0.4])
    path = mirror_descent(
        NegativeEntropy(), lambda p: 0.5 * (p - p_star).square().sum(), torch.full((4,), 0.25), alpha=1.0, steps=400
    )
    assert path.shape == (401, 4)
    torch.testing.assert_close(path[-1], p_star, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", POTENTIALS)
def test_proximal_step_minimises_objective_plus_divergence(name):
    potential, theta, alpha = POTENTIALS[name], point(name, 50), 0.5
    f = convex_objective(name, 51)
    new = proximal_step(potential, f, theta, alpha)
    potential.check(new)
    gradient = slope(lambda x: f(x) + potential._divergence(x, theta) / (2 * alpha), new)
    if name == "negative_entropy":
        gradient = gradient - gradient.mean()
    assert float(gradient.abs().max()) < 1e-10
    assert float(f(new)) < float(f(theta))


@pytest.mark.parametrize("deviation", [[1.0, 1.0], [1e-3, 1e3], [1e-5, 1e5], [1e-8, 1e8], [1e5, 1e-5]])
def test_a_proximal_step_moves_coordinates_of_small_numbers_too(deviation):
    # f(θ) = G(θ) − ⟨θ, μ*⟩ has its minimum where ∇G = μ*, and the step with α = ½ is half of the way there, in μ
    G, sigma = POTENTIALS["diagonal_gaussian"], torch.tensor(deviation)
    mean, aim = sigma * torch.tensor([0.3, -0.2]), sigma * torch.tensor([0.39, -0.2])  # the first component alone moves
    theta, target = (G.natural(torch.cat([m, sigma.log()])) for m in (mean, aim))
    middle = (G.gradient(theta) + G.gradient(target)) / 2
    new = proximal_step(G, lambda t: G.value(t) - t @ G.gradient(target), theta, 0.5)
    torch.testing.assert_close(G.gradient(new) / middle, torch.ones(4), rtol=0, atol=1e-10)


def test_a_proximal_step_keeps_the_digits_of_small_probabilities():
    p, q = (torch.tensor(small).log().softmax(0) for small in ([1.0, 1e-9, 1e-30], [1.0, 1e-12, 1e-24]))

    def f(x: Tensor) -> Tensor:  # KL(x ‖ q), whose proximal step with α = ½ is the geometric mean
        return (x * (x / q).log()).sum()

    expected = ((p.log() + q.log()) / 2).softmax(0)
    new = proximal_step(NegativeEntropy(), f, p, 0.5)
    torch.testing.assert_close(new / expected, torch.ones(3), rtol=0, atol=1e-8)


def test_proximal_step_of_a_quadratic_is_a_damped_newton_step():
    A = torch.randn(5, 5, generator=generator(52))
    H = A @ A.T
    theta, alpha = torch.randn(5, generator=generator(53)), 0.7
    expected = torch.linalg.solve(torch.eye(5) + alpha * H, theta)
    torch.testing.assert_close(proximal_step(SquaredNorm(), lambda x: 0.5 * x @ H @ x, theta, alpha), expected)


def test_mirror_and_proximal_step_agree_to_first_order():
    theta, f = point("negative_entropy", 54), convex_objective("negative_entropy", 55)
    gaps = []
    for alpha in (1e-2, 1e-3):
        explicit = mirror_step(NegativeEntropy(), theta, slope(f, theta), alpha)
        gaps.append(float((explicit - proximal_step(NegativeEntropy(), f, theta, alpha)).norm()))
    assert 1.9 < np.log10(gaps[0] / gaps[1]) < 2.1


# ---------------------------------------------------------------------------------------------- trust-region form (17)


def test_trust_region_of_the_squared_norm_in_closed_form():
    theta, g = torch.randn(2, 5, generator=generator(60))
    new, alpha = trust_region_step(SquaredNorm(), theta, g, radius=0.09)
    torch.testing.assert_close(new, theta - 0.3 * g / g.norm(), rtol=1e-12, atol=1e-12)
    assert alpha == pytest.approx(0.3 / float(g.norm()), rel=1e-12)


@pytest.mark.parametrize("name", POTENTIALS)
@pytest.mark.parametrize("radius", [1e-3, 0.1])
def test_trust_region_and_its_lagrangian_give_the_same_point(name, radius):
    potential, theta = POTENTIALS[name], point(name, 61)
    g = slope(convex_objective(name, 62), theta)
    new, alpha = trust_region_step(potential, theta, g, radius)
    assert float(potential.divergence(new, theta)) == pytest.approx(radius, rel=1e-9)
    torch.testing.assert_close(new, mirror_step(potential, theta, g, alpha), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["negative_entropy", "bernoulli", "gaussian"])
def test_trust_region_against_a_constrained_minimiser(name):
    # SciPy solves equation 17 as it stands, without duality
    potential, theta, radius = POTENTIALS[name], point(name, 63), 0.05
    g = slope(convex_objective(name, 64), theta)
    new, _ = trust_region_step(potential, theta, g, radius)

    def b(x: np.ndarray) -> Tensor:
        return potential._divergence(torch.as_tensor(x), theta)

    constraints = [
        {
            "type": "ineq",
            "fun": lambda x: radius - float(b(x)),
            "jac": lambda x: -slope(lambda t: potential._divergence(t, theta), torch.as_tensor(x)).numpy(),
        }
    ]
    if name == "negative_entropy":
        constraints.append({"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like})
    # at the centre itself the constraint has no slope: start beside it
    start = mirror_step(potential, theta, g, 1e-3).numpy()
    found = minimize(
        lambda x: float(g.numpy() @ (x - theta.numpy())),
        start,
        jac=lambda x: g.numpy(),
        method="SLSQP",
        constraints=constraints,
        options={"ftol": 1e-15, "maxiter": 500},
    )
    np.testing.assert_allclose(new.numpy(), found.x, atol=2e-6)
    # and it is no worse than what SciPy found
    assert float(g @ (new - theta)) <= found.fun + 1e-7


def test_trust_region_of_a_normal_is_not_beaten_by_any_point_of_the_region():
    potential, theta, radius = POTENTIALS["diagonal_gaussian"], point("diagonal_gaussian", 65), 0.05
    g = slope(convex_objective("diagonal_gaussian", 66), theta)
    new, _ = trust_region_step(potential, theta, g, radius)
    # around the minimiser and around the centre, at all scales
    scale = torch.logspace(-4, 0, 40_000).unsqueeze(-1)
    trials = torch.cat([new, theta]).view(2, 1, -1) + scale * torch.randn(40_000, 4, generator=generator(67))
    trials = trials[trials[..., 2:].amax(-1) < 0]
    inside = trials[potential._divergence(trials, theta) <= radius]
    gains = (inside - new) @ g
    assert len(inside) > 1000
    assert float(gains.min()) >= 0
    assert float(gains.min()) < 1e-3 * float((theta - new) @ g)


# ----------------------------------------------------------------------------------------------------------- bad input


def test_a_vector_outside_the_simplex_is_named():
    g = torch.zeros(3)
    with pytest.raises(ValueError, match=r"theta must lie in the probability simplex.*sum to 1\.2"):
        mirror_step(NegativeEntropy(), torch.tensor([0.4, 0.4, 0.4]), g, 0.1)
    with pytest.raises(ValueError, match=r"theta.*open probability simplex.*component -0\.1"):
        NegativeEntropy().value(torch.tensor([0.6, 0.5, -0.1]))
    with pytest.raises(ValueError, match="theta must be finite"):
        NegativeEntropy().gradient(torch.tensor([0.5, float("nan")]))


@pytest.mark.parametrize(
    ("family", "theta", "mu"),
    [
        (families.Categorical(), [0.0, float("-inf")], [0.5, 0.6]),
        (families.Bernoulli(), [float("inf")], [1.2]),
        (families.DiagonalGaussian(), [0.0, 0.5], [1.0, 0.5]),
        (families.Gaussian(), [float("nan")], [float("inf")]),
    ],
)
def test_points_outside_a_potential_s_domain_are_named(family, theta, mu):
    potential = log_partition(family)
    for method in (potential.value, potential.gradient, potential.hessian):
        with pytest.raises(ValueError, match="theta"):
            method(torch.tensor(theta))
    with pytest.raises(ValueError, match="mu"):
        potential.inverse_gradient(torch.tensor(mu))


def test_a_step_out_of_the_range_of_the_gradient_names_alpha_and_moves_nothing():
    potential, theta = POTENTIALS["bernoulli"], torch.zeros(2)
    with pytest.raises(ValueError, match=r"alpha=10 leads out of the range.*smaller alpha"):
        mirror_step(potential, theta, torch.tensor([1.0, 0.0]), 10.0)
    with pytest.raises(ValueError, match=r"alpha=10 leads out of the range"):
        dual_natural_step(potential, lambda t: t[..., 0].sum(), theta, 10.0)
    assert bool((theta == 0).all())


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_positive_and_finite(alpha):
    with pytest.raises(ValueError, match="alpha"):
        mirror_step(SquaredNorm(), torch.zeros(2), torch.ones(2), alpha)


def test_other_bad_arguments():
    theta = torch.full((3,), 1 / 3)
    with pytest.raises(ValueError, match="gradient must have the shape"):
        mirror_step(NegativeEntropy(), theta, torch.zeros(4), 0.1)
    with pytest.raises(ValueError, match="gradient must be finite"):
        mirror_step(NegativeEntropy(), theta, torch.full((3,), float("nan")), 0.1)
    with pytest.raises(ValueError, match="radius"):
        trust_region_step(NegativeEntropy(), theta, torch.ones(3), -1.0)
    with pytest.raises(ValueError, match="gradient must not be zero"):
        trust_region_step(SquaredNorm(), theta, torch.zeros(3), 0.1)
    # the farthest point of the simplex, a vertex, is log 3 away
    with pytest.raises(ValueError, match=r"radius=2 is never reached.*1\.09861"):
        trust_region_step(NegativeEntropy(), theta, torch.tensor([1.0, 2.0, 3.0]), 2.0)
    with pytest.raises(ValueError, match=r"one point \(D,\)"):
        trust_region_step(SquaredNorm(), torch.zeros(2, 2), torch.ones(2, 2), 0.1)
    with pytest.raises(ValueError, match="curvature"):
        SquaredNorm(0.0)
    with pytest.raises(TypeError, match="subclass LogPartition"):
        log_partition(families.from_torch(lambda o: torch.distributions.Poisson(o.exp()[..., 0])))
    with pytest.raises(RuntimeError, match="did not converge"):
        proximal_step(SquaredNorm(), lambda x: -10 * x.exp().sum(), torch.ones(2), 1.0)


def test_a_radius_below_rounding_is_refused():
    theta, g = torch.tensor([0.2, 0.3, 0.5]).float(), torch.tensor([1.0, 2.0, -1.0]).float()
    with pytest.raises(ValueError, match="radius=1e-18 is so small that rounding hides the divergence"):
        trust_region_step(NegativeEntropy(), theta, g, 1e-18)


@pytest.mark.parametrize("name", POTENTIALS)
@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-7])
def test_the_divergence_of_near_points_keeps_its_digits(name, size):
    """B_G ≈ ½dᵀ∇²G d; as a difference of values it is nothing but rounding from d = 10⁻⁷ on."""
    potential = POTENTIALS[name]
    old = point(name, 3)
    d = size * torch.randn(old.shape, generator=generator(4)) * (old.abs() if name == "diagonal_gaussian" else 1.0)
    if name == "negative_entropy":
        d = d - d.mean()
        d = d * old.min()
    new = old + d
    d = new - old
    quadratic = 0.5 * (d * potential.hessian(old)(d)).sum()
    assert float(potential.divergence(new, old)) == pytest.approx(float(quadratic), rel=10 * size + 1e-7)


def test_the_log_partition_of_a_product_is_that_of_its_parts():
    parts, sizes = [families.Categorical(), families.DiagonalGaussian(), families.Gaussian(0.5)], [3, 2, 2]
    whole, each = log_partition(families.Product(parts, sizes)), [log_partition(part) for part in parts]
    outputs = 0.5 * torch.randn(5, 7, generator=generator(0))
    theta = whole.natural(outputs)
    own = [part.natural(o) for part, o in zip(each, outputs.split(sizes, -1))]
    torch.testing.assert_close(theta, torch.cat(own, -1), rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.value(theta), sum(p.value(t) for p, t in zip(each, own)), rtol=1e-12, atol=0)
    mu = whole.gradient(theta)
    torch.testing.assert_close(mu, torch.cat([p.gradient(t) for p, t in zip(each, own)], -1), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"second half of theta.*log_partition\(DiagonalGaussian"):
        whole.value(-theta)
    with pytest.raises(ValueError, match=r"mu must lie in the .*log_partition\(Categorical"):
        whole.inverse_gradient(torch.cat([mu[:, :3] * 2, mu[:, 3:]], -1))
    with pytest.raises(ValueError, match="needs 7 components on the last axis, got 6"):
        whole.value(theta[:, :6])
    other = families.from_torch(lambda o: torch.distributions.Independent(torch.distributions.Poisson(o.exp()), 1))
    product = families.Product([families.Categorical(), other], [3, 1])
    with pytest.raises(TypeError, match="or a product of them, got from_torch"):
        log_partition(product)


def test_a_subclass_does_not_get_the_potential_of_its_parent():
    class Cooler(families.Categorical):
        def log_likelihood(self, outputs, targets):
            return super().log_likelihood(2 * outputs, targets)

    with pytest.raises(TypeError, match=r"a Cooler\. A subclass may have another potential"):
        log_partition(Cooler())
