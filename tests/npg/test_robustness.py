"""What holds of every step, solver and Fisher whatever they are given: drawn cases, `NPG_CASES` of each property.

Without NPG_CASES the same cases are drawn every time. With NPG_CASES=20000 these are 100,000 new ones, of the seed that
--hypothesis-seed gives, and a failure prints its case.
"""

from __future__ import annotations

import copy
import os
from functools import cache, partial

import torch
import torch.distributions as D
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from npg import Fisher, TrustRegion, families
from npg.solvers import Status, conjugate_gradient
from npg.step import natural_step

CASES = settings(
    max_examples=int(os.environ.get("NPG_CASES", "250")),
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)

FAMILIES = {
    "categorical": (families.Categorical(), 3),
    "bernoulli": (families.Bernoulli(), 2),
    "gaussian": (families.Gaussian(0.5), 2),
    "diagonal gaussian": (families.DiagonalGaussian(), 4),
}
#: Families of which a distribution, its Hessian or a draw is not defined at extreme outputs, on which nothing is known.
ADAPTED = {
    "poisson": (lambda o: D.Independent(D.Poisson(o.exp()), 1), 2),
    "beta": (lambda o: D.Beta(o[..., 0].exp(), o[..., 1].exp()), 2),
    "normal": (lambda o: D.Normal(o[..., 0], o[..., 1].exp()), 2),
    "dirichlet": (lambda o: D.Dirichlet(o.exp()), 3),
    "probabilities": (lambda o: D.Categorical(probs=o.softmax(-1)), 3),
    "geometric": (lambda o: D.Geometric(logits=o[..., 0]), 1),
    "full covariance": (lambda o: D.MultivariateNormal(o[..., :2], torch.diag_embed(o[..., 2:].exp())), 4),
}
EVERY = FAMILIES | {name: (families.from_torch(of), width) for name, (of, width) in ADAPTED.items()}
seeds = st.integers(0, 2**31 - 1)
exponents = st.floats(-3, 2)


@cache
def network(width: int, dtype: torch.dtype) -> nn.Module:
    """One of each kind, whose traced program serves all cases."""
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, width)).to(dtype)


def problem(seed: int, family: str, weights: float, inputs: float, dtype: torch.dtype):
    """A small network with BatchNorm, inputs, a family, and the log-likelihood of labels drawn from other outputs."""
    generator = torch.Generator().manual_seed(seed)
    of, width = FAMILIES[family]
    model = network(width, dtype).train()
    model[1].reset_running_stats()
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64).mul(10**weights))
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64).mul(10**inputs).to(dtype)
    targets = of.sample(torch.randn(8, width, generator=generator, dtype=torch.float64).to(dtype))
    return model, x, of, lambda outputs: of.log_likelihood(outputs, targets).mean()


@CASES
@given(
    seed=seeds,
    family=st.sampled_from(list(FAMILIES)),
    weights=exponents,
    inputs=exponents,
    dtype=st.sampled_from([torch.float32, torch.float64]),
    radius=st.floats(-6, 1),
    damping=st.sampled_from([0.0, 1e-8, 1e-3, 1.0]),
)
def test_a_step_is_finite_within_its_radius_or_not_taken(seed, family, weights, inputs, dtype, radius, damping):
    torch.manual_seed(seed)
    model, x, of, objective = problem(seed, family, weights, inputs, dtype)
    before = copy.deepcopy(model)
    report = natural_step(model, x, of, objective, trust_region=TrustRegion(radius=10**radius), damping=damping)
    assert all(torch.isfinite(p).all() for p in model.state_dict().values())
    if not report.accepted:
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values()))
        return
    assert report.kl <= 10**radius
    if dtype == torch.float64:
        kl = of.kl(before(x), model.train()(x)).mean()
        assert float(kl) <= 10**radius * (1 + 1e-6) + 1e-12


def test_a_derivative_that_is_rounding_in_one_way_of_computing_it_and_nothing_in_another():
    """Before BatchNorm autograd's is 3e-20 here, and that of its derivatives 5e-15, beside others of 55."""
    network(4, torch.float64)
    torch.manual_seed(50812)
    model, x, of, objective = problem(50812, "diagonal gaussian", 1.0526435304916735, 1e-6, torch.float64)
    fisher = Fisher(model, x, of)
    g = torch.autograd.grad(objective(model(x)), list(model.parameters()))
    v = torch.cat([part.flatten() for part in g])
    expected = fisher.dense() @ v
    torch.testing.assert_close(fisher @ v, expected, rtol=0, atol=1e-10 * float(expected.norm()))
    report = natural_step(model, x, of, objective, trust_region=TrustRegion(radius=1.0), damping=1e-3)
    assert report.iterations > 0


@CASES
@given(seed=seeds, family=st.sampled_from(list(FAMILIES)), weights=exponents, inputs=exponents)
@example(seed=6334, family="categorical", weights=1.8386334502741866, inputs=-2.2982217854827387)  # F u is 1e-164
@example(seed=575, family="diagonal gaussian", weights=1.640625, inputs=1.0)  # F is 1e307
def test_a_fisher_is_symmetric_and_positive(seed, family, weights, inputs):
    model, x, of, _ = problem(seed, family, weights, inputs, torch.float64)
    fisher = Fisher(model.eval(), x, of)
    u, v = torch.randn(2, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    fu, fv = fisher @ u, fisher @ v
    if not (fu.isfinite().all() and fv.isfinite().all()):  # 1/σ² beyond the numbers of the type, or nearly
        assert not bool((fisher.dense().abs() <= 1e300).all())
        return
    unit = max(float(torch.cat([fu, fv]).abs().amax()), 1e-310)  # a norm squares, and below numbers lose their digits
    fu, fv = fu / unit, fv / unit
    scale = float(fu.norm() * v.norm() + fv.norm() * u.norm())
    assert abs(float(u @ fv - v @ fu)) <= 1e-10 * scale + 1e-310 / unit
    assert float(u @ fu) >= -1e-12 * float(u.norm() * fu.norm())


@CASES
@given(seed=seeds, n=st.integers(1, 12), condition=st.floats(0, 12), start=st.sampled_from([None, 0.0, 3.0, 9.0]))
def test_a_solver_says_converged_only_where_it_has(seed, n, condition, start):
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    a = (q * torch.logspace(0, -condition, n, dtype=torch.float64)) @ q.T
    b = torch.randn(n, generator=generator, dtype=torch.float64)
    x0 = None if start is None else 10**start * torch.randn(n, generator=generator, dtype=torch.float64)
    solution = conjugate_gradient(a, b, x0=x0, max_iterations=10 * n, rtol=1e-6)
    assert torch.isfinite(solution.x).all()
    if solution.status is Status.CONVERGED:
        # The residual that it carries along drifts from the true one by rounding errors of the largest iterate.
        largest = max(float(solution.x.norm()), 0.0 if x0 is None else float(x0.norm()))
        assert float((b - a @ solution.x).norm()) <= 2e-6 * float(b.norm()) + 1e-12 * largest


@CASES
@given(seed=seeds, value=st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e300]), place=seeds)
def test_what_is_not_finite_moves_nothing(seed, value, place):
    model, x, of, objective = problem(seed, "categorical", 0.0, 0.0, torch.float64)
    spoiled = (x, next(model.parameters()).data)[place % 2]
    spoiled.view(-1)[place % spoiled.numel()] = value
    before = copy.deepcopy(model.state_dict())
    solver = partial(conjugate_gradient, max_iterations=5)
    report = natural_step(model, x, of, objective, trust_region=TrustRegion(radius=0.01), damping=0.1, solver=solver)
    if value == 1e300 and report.accepted:
        assert all(torch.isfinite(p).all() for p in model.parameters())
        return
    assert not report.accepted
    assert all(torch.equal(a.nan_to_num(7.0), before[k].nan_to_num(7.0)) for k, a in model.state_dict().items())


@CASES
@given(
    seed=seeds,
    family=st.sampled_from(list(EVERY)),
    kind=st.sampled_from(["exact", "sampled"]),
    value=st.sampled_from([20.0, 90.0, -90.0, -1e4, 1e38, float("inf"), float("nan")]),
    everywhere=st.booleans(),
)
@example(seed=3248, family="geometric", kind="sampled", value=float("inf"), everywhere=False)  # its gradient is 0
def test_extreme_outputs_of_any_family_are_a_step_or_a_refused_one(seed, family, kind, value, everywhere):
    torch.manual_seed(seed)
    of, width = EVERY[family]
    model = nn.Linear(2, width)
    targets = of.sample(torch.zeros(4, width))
    model.bias.data[slice(None) if everywhere else slice(1)] = value
    before = copy.deepcopy(model.state_dict())
    report = natural_step(
        model,
        torch.randn(4, 2),
        of,
        lambda outputs: of.log_likelihood(outputs, targets).mean(),
        trust_region=TrustRegion(radius=0.01),
        damping=1e-3,
        fisher=partial(Fisher, kind=kind),
    )
    if report.accepted and report.step_norm > 0:
        assert report.kl <= 0.01
        assert all(torch.isfinite(p).all() for p in model.parameters())
    else:  # refused, or of length zero
        assert all(torch.equal(a.nan_to_num(7.0), before[k].nan_to_num(7.0)) for k, a in model.state_dict().items())
