"""The step under a cost: against a generic solver, its optimality conditions, and in `natural_step`."""

from dataclasses import replace
from functools import partial
from math import inf, nan, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn

from npg import Fisher, Status, TrustRegion, families, natural_step
from npg.constraint import Constraint, constrained_step, limit
from npg.solvers import dense_solve

pytestmark = pytest.mark.usefixtures("double")


def solution(H: Tensor, g: Tensor, b: Tensor, c: float, delta: float) -> tuple[Tensor, str]:
    """The whole rule: the free step where that keeps the limit, else `constrained_step`."""
    v, w = torch.linalg.solve(H, g), torch.linalg.solve(H, b)
    q = float(g @ v)
    free = sqrt(2 * delta / q) * v if q > 0 else torch.zeros_like(v)
    if c + float(b @ free) <= 0 or not b.any():
        return free, "free"
    x, feasible = constrained_step(g, b, v, w, c, delta)
    return x, "bound" if feasible else "infeasible"


def problem(seed: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, generator=generator)
    return A @ A.T + 0.1 * torch.eye(n), *torch.randn(2, n, generator=generator)


def by_slsqp(H: Tensor, g: Tensor, b: Tensor, c: float, delta: float) -> np.ndarray:
    """A generic solver's answer, from a point within the region; where the limit is out of reach, the least cost."""
    H, g, b = H.numpy(), g.numpy(), b.numpy()
    ball = {"type": "ineq", "fun": lambda x: delta - 0.5 * x @ H @ x, "jac": lambda x: -H @ x}
    bound = {"type": "ineq", "fun": lambda x: -c - b @ x, "jac": lambda x: -b}
    w = np.linalg.solve(H, b)
    least = -sqrt(2 * delta / (b @ w)) * w
    goal, constraints = (b, [ball]) if c + b @ least > 0 else (-g, [ball, bound])
    found = minimize(
        lambda x: goal @ x, 0.99 * least, jac=lambda x: goal, constraints=constraints, method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )  # fmt: skip
    return found.x


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 6),
    excess=st.sampled_from([-3.0, -0.5, -0.05, 0.0, 0.05, 0.5, 3.0]),
    delta=st.sampled_from([1e-3, 0.01, 0.5]),
)
def test_it_equals_a_generic_solver(seed, n, excess, delta):
    H, g, b = problem(seed, n)
    reach = sqrt(2 * delta * float(b @ torch.linalg.solve(H, b)))  # what the region changes the cost by, at the most
    c = excess * reach
    x, kind = solution(H, g, b, c, delta)
    other = torch.as_tensor(by_slsqp(H, g, b, c, delta))
    assert 0.5 * x @ H @ x <= delta * (1 + 1e-9)
    assert (kind == "infeasible") == (excess > 1)
    size = float(g @ torch.linalg.solve(H, g)) ** 0.5 * sqrt(2 * delta)
    if kind == "infeasible":
        assert float(b @ x) == pytest.approx(-reach, rel=1e-9)
        assert float(b @ x) <= float(b @ other) + 1e-6 * reach
    else:
        assert c + float(b @ x) <= 1e-9 * reach
        assert float(g @ x) == pytest.approx(float(g @ other), rel=1e-4, abs=1e-4 * size)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16), n=st.integers(2, 8), excess=st.floats(-0.99, 0.99))
def test_it_satisfies_the_optimality_conditions(seed, n, excess):
    """g = λHx + νb with λ, ν ≥ 0, and each multiplier zero or its constraint tight: enough, since all is convex."""
    delta = 0.01
    H, g, b = problem(seed, n)
    c = excess * sqrt(2 * delta * float(b @ torch.linalg.solve(H, b)))
    x, kind = solution(H, g, b, c, delta)
    basis = torch.stack([H @ x, b], -1) if kind == "bound" else (H @ x).unsqueeze(-1)
    multipliers = torch.linalg.lstsq(basis, g.unsqueeze(-1)).solution
    torch.testing.assert_close((basis @ multipliers).squeeze(-1), g, rtol=1e-8, atol=1e-9)
    assert (multipliers >= -1e-9).all()
    assert float(0.5 * x @ H @ x) == pytest.approx(delta, rel=1e-10)
    if kind == "bound":
        assert float(b @ x) == pytest.approx(-c, rel=1e-10, abs=1e-12)
        v, w = torch.linalg.solve(H, g), torch.linalg.solve(H, b)
        q, r, s = float(g @ v), float(g @ w), float(b @ w)
        dual = sqrt((q - r * r / s) / (2 * delta - c * c / s))  # λ of the page, and ν = (r + λc)/s
        assert multipliers.flatten().tolist() == pytest.approx([dual, (r + dual * c) / s], rel=1e-6)


@pytest.mark.parametrize("along", [2.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_that_are_parallel_take_the_shortest_step_to_the_limit(along, dtype):
    """g = αb, or g = 0: all that the limit leaves is as good, and rounding may not pick a direction."""
    H, _, b = (t.to(dtype) for t in problem(0, 5))
    v, w = torch.linalg.solve(H, along * b), torch.linalg.solve(H, b)
    s = float(b @ w)
    for c in (-0.3 * sqrt(0.02 * s), 0.6 * sqrt(0.02 * s), 0.0):
        x, feasible = constrained_step(along * b, b, v, w, c, 0.01)
        assert feasible
        assert x.dtype is dtype
        torch.testing.assert_close(x, -c / s * w, rtol=1e-5, atol=1e-7)


def test_opposed_gradients_are_free():
    H, _, b = problem(1, 4)
    x, kind = solution(H, -b, b, 0.0, 0.01)
    assert kind == "free"
    assert float(b @ x) < 0


def test_a_limit_that_is_just_in_reach_takes_all_of_the_radius():
    H, g, b = problem(2, 4)
    w = torch.linalg.solve(H, b)
    reach = sqrt(0.02 * float(b @ w))
    at, _ = constrained_step(g, b, torch.linalg.solve(H, g), w, reach * (1 - 1e-12), 0.01)
    beyond, feasible = constrained_step(g, b, torch.linalg.solve(H, g), w, reach * (1 + 1e-12), 0.01)
    assert not feasible
    torch.testing.assert_close(at, beyond, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e-80, torch.float64), (1e80, torch.float64), (1e-25, torch.float32), (1e25, torch.float32)]
)
def test_the_scale_of_the_cost_does_not_matter(scale, dtype):
    """Though the dtype of the gradients does not hold the square of it."""
    H, g, b = problem(3, 4)
    vectors = [t.to(dtype) for t in (g, b, torch.linalg.solve(H, g), torch.linalg.solve(H, b))]
    x, _ = constrained_step(*vectors, 0.01, 0.01)
    g, b, v, w = vectors
    y, _ = constrained_step(g, scale * b, v, scale * w, 0.01 * scale, 0.01)
    close = {"rtol": 1e-10, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(x, y, **close)


def test_a_product_that_cannot_be_one_gives_no_step():
    g = torch.ones(2)
    for w in (torch.zeros(2), -g, torch.full((2,), nan)):
        assert constrained_step(g, g, g, w, 1.0, 0.01) is None


# ---------------------------------------------------------------------------------------------------- in natural_step


def setting(seed: int = 0):
    torch.manual_seed(seed)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(40, 3)
    y, gains, costs = torch.randint(3, (40,)), torch.randn(40), torch.randn(40)
    family = families.Categorical()
    old = family.log_likelihood(model(x).detach(), y)

    def mean_of(weights: Tensor, outputs: Tensor) -> Tensor:
        return ((family.log_likelihood(outputs, y) - old).exp() * weights).mean()

    return model, x, family, partial(mean_of, gains), partial(mean_of, costs)


def step(seed: int, excess: float | None, radius: float = 1e-4, damping: float = 1e-3, **options):
    model, x, family, gain, cost = setting(seed)
    F = Fisher(model, x, family).dense() + damping * torch.eye(sum(p.numel() for p in model.parameters()))
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(f(model(x)), list(model.parameters()))])
        for f in (gain, cost)
    ]
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    report = natural_step(
        model, x, family, gain,
        trust_region=TrustRegion(radius, shrink=0.9),
        damping=damping,
        solver=dense_solve,
        constraint=None if excess is None else Constraint(cost, excess),
        **options,
    )  # fmt: skip
    moved = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    return report, moved, (F, *gradients)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("excess", [-1.0, -0.3, 0.3, 2.0])
def test_the_step_is_that_of_the_dense_problem_and_keeps_what_it_says(seed, excess):
    _, _, (F, g, b) = step(seed, None)
    reach = sqrt(2e-6 * float(b @ torch.linalg.solve(F, b)))
    report, moved, _ = step(seed, excess * reach, radius=1e-6)
    x, kind = solution(F, g, b, excess * reach, 1e-6)
    assert report.limit == kind
    assert report.accepted
    torch.testing.assert_close(moved, 0.9**report.backtracks * x, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(report.step, moved, rtol=1e-9, atol=1e-13)
    assert report.kl <= 1e-6
    assert report.predicted_cost == pytest.approx(float(b @ moved), rel=1e-8, abs=1e-14)
    assert report.predicted_gain == pytest.approx(float(g @ moved), rel=1e-8, abs=1e-14)
    assert report.actual_cost == pytest.approx(report.predicted_cost, abs=0.1 * reach)
    assert report.actual_gain == pytest.approx(report.predicted_gain, abs=0.1 * reach)
    if excess < 0:
        assert report.actual_gain > 0
        assert excess * reach + report.actual_cost <= 0
    else:
        assert report.actual_cost < 0 if kind != "free" else report.actual_cost <= 0


@pytest.mark.parametrize("excess", [-inf, -1e9])
def test_without_a_limit_in_reach_it_is_the_plain_step_to_the_last_bit(excess):
    plain, moved, _ = step(0, None)
    limited, same, _ = step(0, excess)
    assert torch.equal(moved, same)
    for name in ("accepted", "predicted_gain", "actual_gain", "predicted_kl", "kl", "scale", "iterations", "residual"):
        assert getattr(plain, name) == getattr(limited, name)
    assert (plain.limit, limited.limit) == ("none", "free")


def test_a_cost_that_does_not_depend_on_the_outputs_is_free_whatever_the_excess():
    model, x, family, gain, _ = setting()
    report = natural_step(
        model, x, family, gain, trust_region=TrustRegion(1e-3), damping=0.1, solver=dense_solve,
        constraint=Constraint(lambda outputs: 0 * outputs.sum(), 3.0),
    )  # fmt: skip
    assert report.accepted
    assert report.limit == "free"
    assert report.actual_cost == 0


def test_at_a_stationary_point_within_the_limit_nothing_changes_the_cost():
    model, x, family, _, cost = setting()
    report = natural_step(
        model, x, family, lambda outputs: 0 * outputs.sum(), trust_region=TrustRegion(1e-3), damping=0.1,
        solver=dense_solve, constraint=Constraint(cost, -1.0),
    )  # fmt: skip
    assert report.accepted
    assert (report.actual_gain, report.predicted_cost, report.actual_cost) == (0, 0, 0)


def test_a_trial_that_breaks_the_limit_is_shortened_or_refused():
    """A cost that is nothing to first order and rises to second: the limit is at hand, and no length keeps it."""
    model, x, family, gain, _ = setting()
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    old = model(x).detach()
    constraint = Constraint(lambda outputs: (outputs - old).square().mean(), 0.0)
    options = {"trust_region": TrustRegion(1e-3, shrink=0.5), "damping": 0.1, "solver": dense_solve}
    report = natural_step(model, x, family, gain, constraint=constraint, **options)
    assert not report.accepted
    assert report.actual_cost > 0
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)
    room = Constraint(constraint.cost, -1e-5)
    report = natural_step(model, x, family, gain, constraint=room, **options)
    assert report.accepted
    assert report.backtracks > 0
    assert 0 < report.actual_cost <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_search_begins_at_the_limit_where_that_is_nearer_than_the_radius(dtype):
    """What is to be gained is the cost itself, so the best step is the shortest one to the limit."""
    model, x, family, _, cost = setting()
    report = natural_step(
        model.to(dtype), x.to(dtype), family, cost, trust_region=TrustRegion(1e-4), damping=1e-3, solver=dense_solve,
        constraint=Constraint(lambda outputs: cost(outputs), -1e-4),
    )  # fmt: skip
    assert report.accepted
    assert report.limit == "bound"
    assert report.predicted_kl < 0.1 * 1e-4
    assert report.scale == pytest.approx(0.8**report.backtracks)
    assert report.predicted_cost == pytest.approx(1e-4 * report.scale, rel=1e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_of_two_solves_the_report_has_the_sum_the_larger_residual_and_the_worse_status(which):
    solutions = []

    def solver(A, b, **options):
        found = dense_solve(A, b, **options)
        status = Status.ITERATION_LIMIT if len(solutions) == which else Status.CONVERGED
        residual = torch.tensor([1e-3, 1e-4])[len(solutions)]
        solutions.append(replace(found, iterations=3 + len(solutions), status=status, residual_norm=residual))
        return solutions[-1]

    model, x, family, gain, cost = setting()
    report = natural_step(
        model, x, family, gain, trust_region=TrustRegion(1e-4), damping=1e-3, solver=solver,
        constraint=Constraint(cost, 1.0),
    )  # fmt: skip
    assert report.limit == "infeasible"
    assert (len(solutions), report.iterations, report.residual) == (2, 7, pytest.approx(1e-3))
    assert report.status is Status.ITERATION_LIMIT


def test_the_solution_under_a_limit_knows_its_quadratic_model():
    """½xᵀHx − gᵀx, and xᵀHx, of the x that is bound by the limit."""
    model, x, family, _, cost = setting()
    F = Fisher(model, x, family)
    g = torch.randn(F.shape[0], generator=torch.Generator().manual_seed(1))
    solve, region, excess = partial(dense_solve, F, damping=1e-2), TrustRegion(1e-4), Constraint(cost, 0.0)
    found = limit(F.linearization, F, g, solve(g), solve, 1e-2, excess, region, None)
    assert found.kind == "bound"
    H, step = F.dense() + 1e-2 * torch.eye(F.shape[0]), found.solution.x
    torch.testing.assert_close(found.solution.curvature, step @ H @ step)
    torch.testing.assert_close(found.solution.model_value, 0.5 * step @ H @ step - g @ step)


@pytest.mark.parametrize(
    ("second", "status"), [(Status.NON_FINITE, Status.NON_FINITE), (Status.CONVERGED, Status.BREAKDOWN)]
)
def test_a_second_solve_without_an_answer_refuses_the_step(second, status):
    """Not finite by its own word; or bᵀw = 0, which no positive H has."""
    calls = []

    def solver(A, b, **options):
        calls.append(b)
        found = dense_solve(A, b, **options)
        return found if len(calls) == 1 else replace(found, x=0 * found.x, status=second, statuses=(second,))

    model, x, family, gain, cost = setting()
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    report = natural_step(
        model, x, family, gain, trust_region=TrustRegion(1e-4), damping=1e-3, solver=solver,
        constraint=Constraint(cost, 1.0),
    )  # fmt: skip
    assert len(calls) == 2
    assert not report.accepted
    assert (report.status, report.limit, report.step_norm) == (status, "bound", 0.0)
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)


@pytest.mark.parametrize("value", [nan, inf])
def test_a_cost_that_is_not_finite_refuses_the_step(value):
    model, x, family, gain, cost = setting()
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    report = natural_step(
        model, x, family, gain, trust_region=TrustRegion(1e-3), damping=0.1, solver=dense_solve,
        constraint=Constraint(lambda outputs: cost(outputs) * value, -1.0),
    )  # fmt: skip
    assert not report.accepted
    assert report.status is Status.NON_FINITE
    assert report.predicted_cost == 0
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)


def test_what_a_constraint_cannot_go_with_is_refused():
    model, x, family, gain, cost = setting()
    call = partial(natural_step, model, x, family, gain, damping=0.1)
    kept = Constraint(cost, 0.0)
    for options in (
        {"learning_rate": 1.0},
        {"trust_region": TrustRegion(0.1), "learning_rate": 1.0},
        {"trust_region": TrustRegion(0.1, backtrack=False)},
    ):
        with pytest.raises(ValueError, match="constraint goes with a trust region that backtracks"):
            call(constraint=kept, **options)
    with pytest.raises(
        TypeError, match=r"constraint must be a Constraint, got a partial: write Constraint\(cost, excess\)"
    ):
        call(constraint=cost, trust_region=TrustRegion(0.1))
    with pytest.raises(ValueError, match=r"constraint.cost must return a mean over events, .*shape \(40,\)"):
        call(constraint=Constraint(lambda outputs: outputs[:, 0], 0.0), trust_region=TrustRegion(0.1))
    with pytest.raises(ValueError, match=r"excess must be a number, .*got nan"):
        Constraint(cost, nan)
    with pytest.raises(TypeError, match="cost must be a function of the outputs, got 3"):
        Constraint(3, 0.0)
