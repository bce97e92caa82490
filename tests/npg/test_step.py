"""natural_step: the report equals its definitions, refusals leave no trace, and the step is geometric."""

import math
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Beta, Independent, Laplace, Normal, Poisson

from npg import Fisher, Status, TrustRegion, conjugate_gradient, dense_solve, families, natural_step
from npg.constraint import Constraint
from npg.optim import NGD
from npg.step import StepReport

pytestmark = pytest.mark.usefixtures("double")
FAMILY = families.Categorical()
ACCURATE = partial(conjugate_gradient, rtol=1e-13, max_iterations=500)


@pytest.fixture
def problem(mlp):
    """A classifier, its inputs, its labels, and the mean log-likelihood."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator)
    y = torch.randint(4, (20,), generator=generator)
    return mlp(4), x, lambda outputs: FAMILY.log_likelihood(outputs, y).mean()


@pytest.fixture
def regression():
    """A network whose Fisher is of full rank and well conditioned, so that nothing need be damped."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 30, 3, generator=generator)
    torch.manual_seed(0)
    family = families.Gaussian(variance=0.3)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh()), x, family, lambda o: family.log_likelihood(o, y).mean()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def gradient_of(model: nn.Module, x: Tensor, objective) -> Tensor:
    gradients = torch.autograd.grad(objective(model(x)), list(model.parameters()))
    return torch.cat([g.reshape(-1) for g in gradients])


def bits(model: nn.Module) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in model.parameters()]


# --------------------------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("curvature", [0.0, 1.0])
@pytest.mark.parametrize("length", ["radius", "rate", "both", "unchecked"])
def test_every_field_equals_its_definition(regression, damping, curvature, length):
    model, x, family, objective = regression
    options = {
        "radius": {"trust_region": TrustRegion(0.05)},
        "rate": {"learning_rate": 0.3},
        "both": {"trust_region": TrustRegion(0.05), "learning_rate": 0.1},
        "unchecked": {"trust_region": TrustRegion(0.05, backtrack=False)},
    }[length]
    before, old = flat(model), model(x).detach()
    F, g, value = Fisher(model, x, family).dense(), gradient_of(model, x, objective), objective(old)
    report = natural_step(
        model, x, family, objective, damping=damping, solver=ACCURATE, objective_curvature=curvature, **options
    )
    assert report.accepted
    assert report.status is Status.CONVERGED
    d, s, new = flat(model) - before, report.solution, model(x).detach()
    close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-12)
    damped = F + damping * torch.eye(len(F))
    close(s, torch.linalg.solve(damped, g))
    close(report.step, d)
    close(report.step, report.scale * s)
    for actual, expected in (
        (report.objective, value),
        (report.gradient_norm, g.norm()),
        (report.step_norm, d.norm()),
        (report.predicted_kl, 0.5 * d @ F @ d),
        (report.predicted_gain, g @ d - curvature * 0.5 * d @ F @ d),
        (report.actual_gain, objective(new) - value),
        (report.kl, family.kl(old, new).mean()),
    ):
        close(torch.tensor(actual), expected.detach())
    torch.testing.assert_close(torch.tensor(report.residual), (g - damped @ s).norm() / g.norm(), rtol=1e-3, atol=1e-8)
    full = {
        "radius": math.sqrt(2 * 0.05 / float(s @ damped @ s)),
        "rate": 0.3,
        "both": min(0.1, math.sqrt(2 * 0.05 / float(s @ damped @ s))),
        "unchecked": math.sqrt(2 * 0.05 / float(s @ damped @ s)),
    }[length]
    assert report.scale == pytest.approx(full * 0.8**report.backtracks, rel=1e-7)
    assert report.damping == damping
    assert (report.predicted_cost, report.actual_cost, report.limit) == (0.0, 0.0, "none")
    assert report.solve_seconds > 0
    assert report.search_seconds > 0


def test_without_evaluation_the_step_is_taken_unseen(problem):
    model, x, objective = problem
    before = flat(model)
    report = natural_step(model, x, FAMILY, objective, learning_rate=0.1, damping=0.1, evaluate=False)
    assert report.accepted
    assert math.isnan(report.actual_gain)
    assert math.isnan(report.kl)
    torch.testing.assert_close(flat(model) - before, report.step)


def test_cg_is_told_of_preconditioner_start_and_damping(problem):
    model, x, objective = problem
    seen = {}

    def jacobi(fisher: Fisher, damping: float):
        seen["fisher"], seen["damping"] = fisher, damping
        diagonal = fisher.diagonal() + damping
        return lambda r: r / diagonal

    state = {name: p.clone() for name, p in model.state_dict().items()}
    options = {"learning_rate": 0.1, "damping": 0.02, "solver": ACCURATE}
    plain = natural_step(model, x, FAMILY, objective, **options)
    model.load_state_dict(state)
    preconditioned = natural_step(model, x, FAMILY, objective, preconditioner=jacobi, **options)
    assert isinstance(seen["fisher"], Fisher)
    assert seen["damping"] == 0.02
    torch.testing.assert_close(preconditioned.step, plain.step, rtol=1e-7, atol=1e-10)
    model.load_state_dict(state)
    warm = natural_step(model, x, FAMILY, objective, x0=plain.solution, **{**options, "solver": conjugate_gradient})
    assert warm.iterations == 0
    torch.testing.assert_close(warm.step, plain.step)


# --------------------------------------------------------------------------------------------------- the trust region


@cache
def one_model(mlp) -> nn.Module:
    return mlp(4)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    radius=st.sampled_from([1e-6, 1e-3, 0.05, 1.0]),
    seed=st.integers(0, 100),
    damping=st.sampled_from([1e-4, 0.1]),
    direction=st.sampled_from(["old_new", "new_old"]),
)
def test_the_kl_is_within_the_radius_always(mlp, radius, seed, damping, direction):
    model, generator = one_model(mlp), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    x = 3 * torch.randn(12, 3, generator=generator, dtype=torch.float64)
    weights = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    old, origin = model(x).detach(), bits(model)
    report = natural_step(
        model,
        x,
        FAMILY,
        lambda outputs: (outputs.softmax(-1) * weights).sum(-1).mean(),
        trust_region=TrustRegion(radius, kl_direction=direction),
        damping=damping,
    )
    new = model(x).detach()
    pair = (old, new) if direction == "old_new" else (new, old)
    if report.accepted:
        assert float(FAMILY.kl(*pair).mean()) <= radius * (1 + 1e-9)
        assert report.kl == pytest.approx(float(FAMILY.kl(*pair).mean()), rel=1e-9, abs=1e-14)
        assert report.actual_gain > 0
        assert report.predicted_kl <= radius * (1 + 1e-9)
    else:
        assert bits(model) == origin


def test_a_small_step_uses_its_whole_radius(regression):
    """½dᵀFd = δ and KL → δ as δ → 0 (without damping to spend a part of it)."""
    model, x, family, objective = regression
    region = TrustRegion(1e-8, backtrack=False)
    report = natural_step(model, x, family, objective, trust_region=region, solver=ACCURATE)
    assert report.predicted_kl == pytest.approx(1e-8, rel=1e-6)
    assert report.kl == pytest.approx(1e-8, rel=1e-2)
    assert report.actual_gain == pytest.approx(report.predicted_gain, rel=1e-2)


def test_backtracking_obeys_the_true_objective(problem):
    """An objective that turns back soon: the accepted point gains, and the one before it did not."""
    model, x, objective = problem
    start = objective(model(x)).detach()

    def turning(outputs: Tensor) -> Tensor:
        gain = objective(outputs) - start
        return gain - 40 * gain**2

    report = natural_step(
        model, x, FAMILY, turning, trust_region=TrustRegion(0.1, shrink=0.7), damping=0.01, solver=ACCURATE
    )
    assert report.accepted
    assert report.backtracks > 0
    assert report.actual_gain > 0
    longer = report.step / 0.7
    origin = flat(model) - report.step
    nn.utils.vector_to_parameters(origin + longer, model.parameters())
    assert turning(model(x)) <= 0


# ---------------------------------------------------------------------------------------------------------- refusals


def refused(report: StepReport) -> None:
    assert not report.accepted
    assert report.scale == report.step_norm == report.predicted_gain == report.predicted_kl == 0
    assert torch.equal(report.step, torch.zeros_like(report.step))


def test_a_refused_step_leaves_the_parameters_bit_for_bit(problem):
    model, x, objective = problem
    model.float()
    with torch.no_grad():
        model[0].bias[0] = -0.0  # the sign of zero is a bit as well
    origin = bits(model)
    start = objective(model(x.float())).detach()

    def only_here(outputs: Tensor) -> Tensor:
        value = objective(outputs)
        return value if torch.is_grad_enabled() else value - start - 1e3

    report = natural_step(
        model, x.float(), FAMILY, only_here, trust_region=TrustRegion(0.01, max_trials=4), damping=0.1
    )
    refused(report)
    assert report.backtracks == 3
    assert report.actual_gain < 0
    assert bits(model) == origin


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{"trust_region": TrustRegion(0.01)}, {"learning_rate": 0.1}])
@pytest.mark.parametrize("evaluate", [True, False])
def test_a_non_finite_gradient_is_refused(problem, bad, options, evaluate):
    model, x, objective = problem
    origin = bits(model)
    report = natural_step(model, x, FAMILY, lambda o: objective(o) * bad, damping=0.1, evaluate=evaluate, **options)
    refused(report)
    assert report.status is Status.NON_FINITE
    assert bits(model) == origin


@pytest.mark.parametrize("options", [{"trust_region": TrustRegion(0.01, max_trials=3)}, {"learning_rate": 0.1}])
def test_a_non_finite_trial_is_refused(problem, options):
    model, x, objective = problem
    origin = bits(model)

    def cliff(outputs: Tensor) -> Tensor:
        return objective(outputs) if torch.is_grad_enabled() else objective(outputs) * math.nan

    report = natural_step(model, x, FAMILY, cliff, damping=0.1, **options)
    refused(report)
    assert math.isnan(report.actual_gain)
    assert bits(model) == origin


def test_nan_inputs_are_refused(problem):
    model, x, objective = problem
    origin = bits(model)
    x[3, 1] = math.nan
    refused(natural_step(model, x, FAMILY, objective, trust_region=TrustRegion(0.01), damping=0.1))
    assert bits(model) == origin


def test_outputs_outside_of_the_domain_of_a_distribution_are_a_failed_trial(mlp):
    """torch.distributions raises where a concentration is not positive; a shorter step is then tried."""
    family = families.from_torch(lambda o: Independent(Beta(1 + o[..., :2], 2 - o[..., 2:]), 1))
    model, x = nn.Linear(3, 4), torch.zeros(5, 3)
    nn.init.zeros_(model.bias)
    y = torch.full((5, 2), 1e-9)  # wants α → 0, and overshoots
    origin = bits(model)
    options = {"learning_rate": 1e3, "damping": 0.1}
    refused(natural_step(model, x, family, lambda o: family.log_likelihood(o, y).mean(), **options))
    assert bits(model) == origin
    region = TrustRegion(1e2, shrink=0.3, max_trials=20)
    report = natural_step(
        model, x, family, lambda o: family.log_likelihood(o, y).mean(), trust_region=region, damping=0.1
    )
    assert report.accepted
    assert report.backtracks > 0


@pytest.mark.parametrize("constraint", [None, Constraint(lambda outputs: 0 * outputs.mean(), -1.0)])
def test_out_of_the_domain_as_many_numbers_are_averaged_as_within(constraint, monkeypatch):
    """Of several processes one may be out of it: they average tensors of one shape, or wait for each other forever."""
    shapes = []

    def noted(values, group):
        shapes.append(values.shape)
        return values

    monkeypatch.setattr("npg.step.mean_", noted)
    family = families.from_torch(lambda o: Independent(Beta(1 + o[..., :2], 2 - o[..., 2:]), 1))
    model, x, y = nn.Linear(3, 4), torch.zeros(5, 3), torch.full((5, 2), 1e-9)
    nn.init.zeros_(model.bias)
    report = natural_step(
        model, x, family, lambda o: family.log_likelihood(o, y).mean(), damping=0.1, constraint=constraint,
        trust_region=TrustRegion(1e2, shrink=0.3, max_trials=20),
    )  # fmt: skip
    assert report.accepted
    assert report.backtracks > 0
    trials = shapes[1:]  # after the gradient; the objective has its number of events with it
    assert len(trials) == 1 + report.backtracks
    assert set(trials) == {(2 if constraint is None else 3,)}


def test_the_objective_is_reported_where_only_the_fisher_is_out_of_its_domain(problem):
    model, x, objective = problem
    origin, before = bits(model), objective(model(x)).item()

    def fisher(*_, **__):
        raise families.OutOfDomainError("mine")

    report = natural_step(model, x, FAMILY, objective, trust_region=TrustRegion(0.01), damping=0.1, fisher=fisher)
    assert not report.accepted
    assert report.objective == pytest.approx(before, rel=1e-6)
    assert bits(model) == origin


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_search_restores_the_parameters(problem, error):
    model, x, objective = problem
    origin = bits(model)

    def failing(outputs: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            raise error("mine")
        return objective(outputs)

    with pytest.raises(error, match="mine"):
        natural_step(model, x, FAMILY, failing, trust_region=TrustRegion(0.01), damping=0.1)
    assert bits(model) == origin


def test_a_stationary_point_is_left_alone(problem):
    model, x, _ = problem
    origin = bits(model)
    for options in ({"trust_region": TrustRegion(0.01)}, {"learning_rate": 1.0}):
        report = natural_step(model, x, FAMILY, lambda outputs: 0 * outputs.sum(), damping=0.1, **options)
        assert report.accepted
        assert report.gradient_norm == report.step_norm == report.backtracks == 0
        assert bits(model) == origin


def test_a_compiled_model_takes_the_step_of_what_is_behind_it(problem, monkeypatch):
    # torch.compile turns the checks of torch.distributions off, for good
    validate = torch.distributions.Distribution._validate_args
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", validate)
    model, x, objective = problem
    model.append(nn.BatchNorm1d(4))
    for at in (x, x * math.nan):  # taken, and refused
        twin = deepcopy(model)
        compiled = torch.compile(model, backend="eager")
        reports = [
            natural_step(m, at, FAMILY, objective, trust_region=TrustRegion(0.01), damping=0.1)
            for m in (compiled, twin)
        ]
        assert reports[0].accepted == reports[1].accepted == (at is x)
        assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))


def test_a_descent_direction_is_refused(problem):
    """A solver that returns −s gives a negative slope: the trust region does not go there."""
    model, x, objective = problem
    origin = bits(model)

    def backwards(A, b, **options):
        return conjugate_gradient(A, -b, **options)

    seen = []

    def noted(outputs):
        seen.append(outputs)
        return objective(outputs)

    refused(natural_step(model, x, FAMILY, noted, trust_region=TrustRegion(0.1), damping=0.1, solver=backwards))
    assert bits(model) == origin
    assert len(seen) == 1  # no length is tried


# ------------------------------------------------------------------------------------------- what a status comes to

LENGTHS = {
    "radius": {"trust_region": TrustRegion(0.01)},
    "unchecked": {"trust_region": TrustRegion(0.01, backtrack=False)},
    "rate": {"learning_rate": 0.1},
    "both": {"trust_region": TrustRegion(0.01), "learning_rate": 0.1},
    "unseen": {"learning_rate": 0.1, "evaluate": False},
}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("status", list(Status))
@pytest.mark.parametrize("found", ["direction", "nothing"])
def test_every_status_with_every_length(problem, length, status, found):
    """A direction is used whatever the status, but for NON_FINITE; where nothing was found nothing was accepted."""
    model, x, objective = problem
    origin = bits(model)

    def solver(A, b, **options):
        solution = conjugate_gradient(A, b, **options)
        factor = 1.0 if found == "direction" else 0.0
        return replace(solution, x=factor * solution.x, curvature=factor * solution.curvature, status=status)

    report = natural_step(model, x, FAMILY, objective, damping=0.1, solver=solver, **LENGTHS[length])
    assert report.status is status
    if found == "direction" and status is not Status.NON_FINITE:
        assert report.accepted
        assert report.step_norm > 0
    else:
        refused(report)
        assert bits(model) == origin


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    "solver",
    [conjugate_gradient, dense_solve, partial(dense_solve, method="eigh")],
    ids=["cg", "cholesky", "eigh"],
)
def test_what_solvers_find_where_f_is_zero(problem, solver, length):
    """A Cholesky breakdown was accepted with a step of zero; a stationary point is another thing."""
    model, x, _ = problem
    model.append(nn.BatchNorm1d(4))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    null = partial(Fisher, metric=lambda outputs: lambda u: 0 * u)
    report = natural_step(model, x, FAMILY, lambda o: o[:, 0].mean(), solver=solver, fisher=null, **LENGTHS[length])
    refused(report)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    report = natural_step(model, x, FAMILY, lambda o: 0 * o.sum(), solver=solver, damping=0.1, **LENGTHS[length])
    assert report.accepted
    assert report.status is Status.CONVERGED
    assert report.scale == report.step_norm == report.kl == report.actual_gain == report.predicted_kl == 0
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())
    assert not torch.equal(model[-1].running_mean, state["3.running_mean"])  # it is a training step, and not refused


def test_a_rate_of_zero_is_a_step_of_zero(problem):
    model, x, objective = problem
    origin = bits(model)
    for region in (None, TrustRegion(0.01), TrustRegion(0.01, backtrack=False)):
        report = natural_step(model, x, FAMILY, objective, damping=0.1, learning_rate=0.0, trust_region=region)
        assert report.accepted
        assert report.step_norm == 0
        assert bits(model) == origin


# ---------------------------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize(("size", "dtype"), [(1e25, torch.float32), (1e-25, torch.float32), (1e140, torch.float64)])
def test_gradients_of_extreme_size_have_a_norm_and_a_step(problem, size, dtype):
    model, x, objective = problem
    model.to(dtype)
    x = x.to(dtype)
    g = gradient_of(model, x, objective)
    report = natural_step(
        model, x, FAMILY, lambda o: size * objective(o), trust_region=TrustRegion(0.01), damping=0.1, solver=ACCURATE
    )
    assert report.gradient_norm == pytest.approx(size * float(g.double().norm()), rel=1e-5)
    assert report.accepted
    assert 0.005 < report.kl <= 0.01


@pytest.mark.parametrize("options", [{"learning_rate": 0.1}, {"learning_rate": 0.1, "evaluate": False}])
def test_an_objective_of_nan_is_refused_though_its_gradient_is_finite(problem, options):
    model, x, objective = problem
    origin = bits(model)
    report = natural_step(model, x, FAMILY, lambda o: objective(o) + math.nan, damping=0.1, **options)
    refused(report)
    assert report.status is Status.NON_FINITE
    assert bits(model) == origin


@pytest.mark.parametrize("options", [{"learning_rate": 1e9}, {"learning_rate": 1e9, "evaluate": False}])
def test_parameters_beyond_their_dtype_are_refused(options):
    """Through a tanh, an infinite weight gives outputs that are finite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).half()
    x, origin = torch.randn(10, 3).half(), None
    origin = bits(model)
    refused(natural_step(model, x, FAMILY, lambda o: o[:, 0].mean(), damping=1e-3, **options))
    assert bits(model) == origin


FROM_TORCH = {
    "poisson": (families.from_torch(lambda o: Independent(Poisson(o.exp()), 1)), 800.0),
    "normal": (families.from_torch(lambda o: Independent(Normal(o[..., :2], o[..., 2:].exp()), 1)), -800.0),
    "beta": (families.from_torch(lambda o: Independent(Beta(1 + o[..., :2], 2 - o[..., 2:]), 1)), 50.0),
    "nan": (families.from_torch(lambda o: Independent(Poisson(o.exp()), 1)), math.nan),
}


@pytest.mark.parametrize("name", FROM_TORCH)
@pytest.mark.parametrize("objective", ["likelihood", "other"])
@pytest.mark.parametrize("kind", ["exact", "sampled"])
@pytest.mark.parametrize("length", LENGTHS)
def test_outputs_beyond_a_family_are_a_refused_step(name, objective, kind, length):
    family, value = FROM_TORCH[name]
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 4))
    nn.init.constant_(model[-1].bias, value)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    y = torch.full((6, 2 if name in ("normal", "beta") else 4), 0.5 if name == "beta" else 1.0)
    likelihood = lambda outputs: family.log_likelihood(outputs, y).mean()  # noqa: E731
    chosen = likelihood if objective == "likelihood" else torch.mean
    report = natural_step(
        model, torch.randn(6, 3), family, chosen, damping=0.1, fisher=partial(Fisher, kind=kind), **LENGTHS[length]
    )
    refused(report)
    assert report.status is Status.NON_FINITE
    for key, now in model.state_dict().items():
        torch.testing.assert_close(now, state[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("family", [families.Categorical(), families.MultiCategorical([2, 2]), families.Bernoulli()])
def test_a_sampled_fisher_of_nan_outputs_is_a_refused_step(problem, family):
    model, x, _ = problem
    x[0, 0] = math.nan
    assert torch.isnan(
        Fisher(model, x, family, kind="sampled") @ torch.ones(sum(p.numel() for p in model.parameters()))
    ).all()
    report = natural_step(
        model, x, family, lambda o: o[1:].mean(), damping=0.1, learning_rate=0.1, fisher=partial(Fisher, kind="sampled")
    )
    refused(report)
    assert report.status is Status.NON_FINITE


def test_a_family_without_a_metric_is_an_error_and_no_refusal(problem):
    model, x, _ = problem
    origin = bits(model)
    laplace = families.from_torch(lambda o: Independent(Laplace(o, 1.0), 1))
    with pytest.raises(ValueError, match="does not find the curvature"):
        natural_step(model, x, laplace, torch.mean, learning_rate=0.1, damping=0.1)
    assert bits(model) == origin


def test_the_kl_of_float32_outputs_is_taken_in_float64(problem):
    """Rates of 10⁶ of a Poisson, whose KL has an error of 0.06 in float32: the step keeps its radius of 10⁻³."""
    torch.manual_seed(0)
    family = families.from_torch(lambda o: Independent(Poisson(o.exp()), 1))
    model, x = nn.Linear(3, 2).float(), torch.randn(40, 3).float()
    nn.init.constant_(model.bias, math.log(1e6))
    with torch.no_grad():
        model.weight.mul_(0.01)
        old = model(x).double()
        y = torch.poisson((old + 0.1).exp()).float()
        report = natural_step(
            model,
            x,
            family,
            lambda o: family.log_likelihood(o, y).mean(),
            trust_region=TrustRegion(1e-3),
            damping=1.0,
            solver=ACCURATE,
        )
        d = model(x).double() - old
    assert report.accepted
    kl = float((old.exp() * (torch.expm1(d) - d)).sum(-1).mean())
    assert report.kl == pytest.approx(kl, rel=1e-6)
    assert kl <= 1e-3


def test_a_divergence_that_takes_no_float64_is_taken_as_it_is(problem):
    model, x, objective = problem
    model.float()
    weights = torch.eye(4).float()

    class Weighted:
        def __call__(self, outputs):
            return lambda u: u @ weights

        def divergence(self, old, new):
            return 0.5 * ((new - old) @ weights * (new - old)).sum(-1)

    report = natural_step(
        model, x.float(), FAMILY, objective, trust_region=TrustRegion(0.01), damping=1e-3, metric=Weighted()
    )
    assert report.accepted
    assert 0 < report.kl <= 0.01


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(
        ["categorical", "bernoulli", "multi_categorical", "diagonal_gaussian", "gaussian", "poisson", "beta", "normal"]
    ),
    double=st.booleans(),
    kind=st.sampled_from(["exact", "exact", "sampled"]),
    log_size=st.sampled_from([-2.0, 0.0, 1.0, 2.0, 4.0, 8.0, 20.0]),
    log_gradient=st.sampled_from([-20.0, 0.0, 20.0]),
    radius=st.sampled_from([1e-6, 1e-3, 0.1]),
    damping=st.sampled_from([0.0, 1e-3, 0.1]),
    length=st.sampled_from(list(LENGTHS)),
    direction=st.sampled_from(["old_new", "new_old"]),
    solver=st.sampled_from([conjugate_gradient, dense_solve, partial(dense_solve, method="eigh")]),
    seed=st.integers(0, 2**16),
)
def test_at_extreme_outputs_a_step_is_inside_its_radius_or_leaves_no_trace(
    every_family, name, double, kind, log_size, log_gradient, radius, damping, length, direction, solver, seed
):
    generator, family = torch.Generator().manual_seed(seed), every_family[name].family
    dtype = torch.float64 if double else torch.float32
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        for p in model[-1].parameters():
            p.mul_(10.0**log_size)
    x, w = (torch.randn(8, n, generator=generator).to(dtype) for n in (3, 4))
    w = w * 10.0**log_gradient
    state = {key: value.clone() for key, value in model.state_dict().items()}
    options = dict(LENGTHS[length])
    if region := options.get("trust_region"):
        options["trust_region"] = replace(region, radius=radius, kl_direction=direction)
    report = natural_step(
        model,
        x,
        family,
        lambda o: (o * w).mean(),
        damping=damping,
        solver=solver,
        fisher=partial(Fisher, kind=kind, generator=torch.Generator().manual_seed(seed) if kind == "sampled" else None),
        **options,
    )
    new = {key: value.clone() for key, value in model.state_dict().items()}
    assert math.isfinite(report.gradient_norm) or report.status is Status.NON_FINITE
    if not report.accepted:
        assert all(value.numpy().tobytes() == state[key].numpy().tobytes() for key, value in new.items())
        return
    assert report.status is not Status.NON_FINITE
    assert all(torch.isfinite(value).all() for value in new.values())
    assert report.step_norm > 0
    if length in ("radius", "both"):
        assert report.actual_gain > 0
        outputs = []
        for values in (state, new):
            model.load_state_dict(values)
            outputs.append(model(x).detach().double())
        old, now = outputs if direction == "old_new" else reversed(outputs)
        assert -1e-6 * radius <= float(family.kl(old, now).mean()) <= radius * (1 + 1e-6)


# ---------------------------------------------------------------------------------- running statistics and randomness


@pytest.mark.parametrize("refuse", [False, True])
def test_running_statistics_move_once(refuse):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4))
    x, y = torch.randn(12, 3), torch.randint(4, (12,))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model(x)
    once = {name: value.clone() for name, value in model.named_buffers()}
    model.load_state_dict(state)

    def objective(outputs: Tensor) -> Tensor:
        value = FAMILY.log_likelihood(outputs, y).mean()
        return value - (1e3 if refuse and not torch.is_grad_enabled() else 0)

    report = natural_step(
        model,
        x,
        FAMILY,
        objective,
        trust_region=TrustRegion(1.0, min_gain_ratio=0.9, shrink=0.5),
        damping=0.1,
        curvature_inputs=x[:6],
        preconditioner=lambda fisher, damping: lambda r: r / (fisher.diagonal(probes=1) + damping),
    )
    assert report.backtracks > 0
    assert report.accepted != refuse
    for name, value in model.named_buffers():
        assert torch.equal(value, state[name] if refuse else once[name])
    assert model[1].track_running_stats
    assert model[1].num_batches_tracked == (0 if refuse else 1)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_random_numbers_are_drawn_by_one_forward_pass(dropout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 4))
    x, y = torch.randn(12, 3), torch.randint(4, (12,))
    torch.manual_seed(1)
    masked = model(x).detach()
    after = torch.get_rng_state()
    torch.manual_seed(1)
    report = natural_step(
        model,
        x,
        FAMILY,
        lambda o: FAMILY.log_likelihood(o, y).mean(),
        trust_region=TrustRegion(0.3, min_gain_ratio=0.8),
        damping=0.1,
    )
    assert torch.equal(torch.get_rng_state(), after)
    # the search used the mask of the gradient: gain and KL are those of one and the same network
    torch.manual_seed(1)
    new = model(x).detach()
    assert report.kl == pytest.approx(float(FAMILY.kl(masked, new).mean()), rel=1e-12)
    gain = FAMILY.log_likelihood(new, y).mean() - FAMILY.log_likelihood(masked, y).mean()
    assert report.actual_gain == pytest.approx(float(gain), rel=1e-9)


# ----------------------------------------------------------------------------------------------------------- theorems


def test_the_step_is_invariant_to_linear_reparameterisation(regression):
    """θ = Tφ: the same function after the step, although the gradient is another (the flat one would not be)."""
    model, x, family, objective = regression
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    sizes, P = [p.numel() for p in theta.values()], sum(p.numel() for p in theta.values())
    T = torch.randn(P, P) / math.sqrt(P) + 2 * torch.eye(P)

    def reparameterised(parameters, inputs):
        parts = (T @ parameters["phi"]).split(sizes)
        values = {name: part.view(p.shape) for part, (name, p) in zip(parts, theta.items())}
        return torch.func.functional_call(model, values, (inputs,))

    phi = torch.linalg.solve(T, flat(model)).requires_grad_()
    for options in ({"learning_rate": 0.2}, {"trust_region": TrustRegion(0.01)}):
        before = flat(model)
        natural = natural_step(model, x, family, objective, solver=dense_solve, **options)
        new = model(x).detach()
        nn.utils.vector_to_parameters(before, model.parameters())
        start = phi.detach().clone().requires_grad_()
        other = natural_step(
            reparameterised, x, family, objective, solver=dense_solve, parameters={"phi": start}, **options
        )
        assert other.scale == pytest.approx(natural.scale, rel=1e-6)
        assert other.kl == pytest.approx(natural.kl, rel=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(reparameterised({"phi": start}, x), new, rtol=1e-6, atol=1e-7)


def test_parameter_space_equals_sample_space(problem, jacobian):
    """(BᵀB + λI)⁻¹Bᵀe = Bᵀ(BBᵀ + λI)⁻¹e for the gradient g = Bᵀe: P × P or N × N, the same step."""
    model, x, _ = problem
    x = x[:5]
    y = torch.tensor([0, 1, 2, 3, 0])
    outputs = model(x)
    J = jacobian(outputs, list(model.parameters()))
    score = FAMILY.score(outputs.detach(), y)
    rows = torch.einsum("nd,ndp->np", score, J.view(5, 4, -1)) / math.sqrt(5)  # the empirical Fisher is BᵀB
    by_samples = rows.T @ torch.linalg.solve(rows @ rows.T + 0.1 * torch.eye(5), torch.full((5,), 5**-0.5))
    report = natural_step(
        model,
        x,
        FAMILY,
        lambda o: FAMILY.log_likelihood(o, y).mean(),
        learning_rate=1.0,
        damping=0.1,
        solver=ACCURATE,
        fisher=partial(Fisher, kind="empirical", targets=y),
    )
    torch.testing.assert_close(report.step, by_samples, rtol=1e-9, atol=1e-12)


def test_one_step_solves_linear_regression():
    """For a linear-Gaussian model the natural gradient is Newton's method: one step with rate 1 is least squares."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2), torch.randn(30, 3), torch.randn(30, 2)
    family = families.Gaussian(variance=0.3)
    natural_step(model, x, family, lambda o: family.log_likelihood(o, y).mean(), learning_rate=1.0, solver=ACCURATE)
    design = torch.cat([x, torch.ones(30, 1)], 1)
    best = torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(torch.cat([model.weight, model.bias[:, None]], 1).T.detach(), best)


# -------------------------------------------------------------------------------------------------- solvers and kinds


def test_dense_and_cg_give_the_same_step(problem):
    model, x, objective = problem
    before, steps = flat(model), []
    for solver in (ACCURATE, dense_solve, partial(dense_solve, method="eigh")):
        nn.utils.vector_to_parameters(before.clone(), model.parameters())
        steps.append(
            natural_step(model, x, FAMILY, objective, trust_region=TrustRegion(0.01), damping=1e-3, solver=solver).step
        )
    for step in steps[1:]:
        torch.testing.assert_close(step, steps[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["sampled", "empirical", "metric", "curvature_inputs"])
def test_other_curvatures(problem, kind):
    model, x, objective = problem
    y = torch.randint(4, (20,))
    options = {
        "sampled": {"kind": "sampled", "samples": 3},
        "empirical": {"kind": "empirical", "targets": y},
        "metric": {"metric": lambda outputs: lambda u: 2 * u},
        "curvature_inputs": {},
    }[kind]
    inputs = x[:7] if kind == "curvature_inputs" else None
    if kind == "sampled":
        options["generator"] = torch.Generator().manual_seed(4)
    F = Fisher(model, x if inputs is None else inputs, FAMILY, **options).dense()
    if kind == "sampled":
        options["generator"].manual_seed(4)
    g = gradient_of(model, x, objective)
    report = natural_step(
        model,
        x,
        FAMILY,
        objective,
        learning_rate=0.1,
        damping=0.05,
        solver=ACCURATE,
        fisher=partial(Fisher, **options),
        curvature_inputs=inputs,
    )
    torch.testing.assert_close(
        report.solution, torch.linalg.solve(F + 0.05 * torch.eye(len(F)), g), rtol=1e-8, atol=1e-10
    )
    assert report.predicted_kl == pytest.approx(float(0.5 * report.step @ F @ report.step), rel=1e-7)


def test_frozen_parameters_stay_and_functions_of_parameters_move(problem):
    model, x, objective = problem
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    report = natural_step(model, x, FAMILY, objective, learning_rate=0.1, damping=0.1)
    assert report.accepted
    assert torch.equal(model[0].weight, frozen)
    parameters = {"w": torch.randn(3, 4)}
    before = parameters["w"].clone()
    report = natural_step(
        lambda p, inputs: inputs @ p["w"], x, FAMILY, objective, parameters=parameters, learning_rate=0.1, damping=0.1
    )
    torch.testing.assert_close(parameters["w"] - before, report.step.view(3, 4))
    assert report.actual_gain > 0


def test_a_part_of_the_parameters(problem):
    model, x, objective = problem
    first = model[0].weight.clone()
    chosen = {name: p for name, p in model.named_parameters() if name.startswith("2.")}
    before = torch.cat([p.detach().reshape(-1).clone() for p in chosen.values()])
    report = natural_step(model, x, FAMILY, objective, parameters=chosen, trust_region=TrustRegion(0.01), damping=0.1)
    assert report.accepted
    assert torch.equal(model[0].weight, first)
    torch.testing.assert_close(torch.cat([p.detach().reshape(-1) for p in chosen.values()]) - before, report.step)


def test_bfloat16_parameters_move_to_the_nearest_representable_point(problem):
    model, x, objective = problem
    model.bfloat16()
    before = flat(model).float()
    report = natural_step(model, x.bfloat16(), FAMILY, objective, trust_region=TrustRegion(0.1), damping=0.1)
    assert report.accepted
    assert report.kl <= 0.1
    error = (flat(model).float() - before - report.step).abs()
    assert (error <= 2**-7 * (before.abs() + report.step.abs())).all()


def test_float32_steps_keep_the_radius(problem):
    model, x, objective = problem
    model.float()
    for radius in (1e-4, 1e-2):
        report = natural_step(model, x.float(), FAMILY, objective, trust_region=TrustRegion(radius), damping=1e-3)
        assert report.accepted
        assert 0 < report.kl <= radius


def test_many_steps_climb(problem):
    model, x, objective = problem
    values = [
        natural_step(model, x, FAMILY, objective, trust_region=TrustRegion(0.05), damping=1e-3).objective
        for _ in range(15)
    ]
    assert values == sorted(values)
    assert values[-1] > 0.5 * values[0]


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "trust_region or learning_rate must be given"),
        ({"learning_rate": -0.1}, r"learning_rate must lie in \[0, inf\), got -0.1"),
        ({"learning_rate": math.nan}, "learning_rate must .* got nan"),
        ({"learning_rate": math.inf}, "learning_rate must .* got inf"),
        ({"learning_rate": 0.1, "damping": -1.0}, r"damping must lie in \[0, inf\), got -1.0"),
        ({"learning_rate": 0.1, "damping": math.nan}, "damping must .* got nan"),
    ],
)
def test_bad_arguments_change_nothing(options, match):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        natural_step(model, torch.randn(5, 3), FAMILY, lambda o: o.mean(), **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bad_objectives_and_starts_are_named(problem):
    model, x, objective = problem
    origin = bits(model)
    with pytest.raises(ValueError, match=r"objective must return a mean over events, a scalar, got shape \(20,\)"):
        natural_step(model, x, FAMILY, lambda outputs: outputs.sum(-1), learning_rate=0.1)
    with pytest.raises(ValueError, match=r"x0 must have the shape \(36,\)"):
        natural_step(model, x, FAMILY, objective, learning_rate=0.1, x0=torch.zeros(3))
    with pytest.raises(ValueError, match="targets must have shape"):
        natural_step(model, x, FAMILY, lambda o: FAMILY.log_likelihood(o, torch.zeros(3)).mean(), learning_rate=0.1)
    assert bits(model) == origin


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda o: float(o.sum()), "objective must return a tensor, got float"),
        (lambda o: None, "objective must return a tensor, got NoneType"),
        (lambda o: o.detach().mean(), "objective must depend on the outputs that it is given"),
        (lambda o: torch.tensor(1.0), "objective must depend on the outputs that it is given"),
    ],
)
def test_an_objective_that_has_no_gradient_is_refused(objective, message):
    with pytest.raises((TypeError, ValueError), match=message):
        natural_step(
            nn.Linear(2, 3), torch.randn(4, 2), families.Categorical(), objective, learning_rate=0.1, damping=0.1
        )


# ------------------------------------------------------------------------------- models that are not the same each time


class Stateful(nn.Module):
    """A hidden state that goes on from batch to batch."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.GRUCell(4, 8), nn.Linear(8, 3)
        if buffer:
            self.register_buffer("h", torch.zeros(6, 8))
        else:
            self.h = torch.zeros(6, 8)

    def forward(self, x):
        h = self.cell(x, self.h)
        self.h = h.detach()
        return self.head(h)


@pytest.mark.filterwarnings("ignore:no forward mode for")
@pytest.mark.parametrize("options", [{"solver": "dense"}, {"solver": "kfac", "probes": None}, {"solver": "cg"}])
def test_a_state_in_an_attribute_is_refused_and_one_in_a_buffer_is_taken(options):
    torch.manual_seed(1)
    batches = [(torch.randn(6, 4), torch.randint(0, 3, (6,))) for _ in range(3)]
    model = Stateful(buffer=True)
    optimizer = NGD(model, families.Categorical(), lr=1.0, damping=1e-2, max_kl=1e-2, **options)
    for x, y in batches:
        h, twin = model.h.clone(), deepcopy(model)
        report = optimizer.step(x, y)
        old = twin(x)
        twin.load_state_dict({**model.state_dict(), "h": h})
        kl = families.Categorical().kl(old, twin(x)).mean()
        torch.testing.assert_close(report.kl, float(kl), rtol=1e-10, atol=1e-14)
    model = Stateful(buffer=False)
    optimizer, origin = NGD(model, families.Categorical(), lr=1.0, max_kl=1e-2, damping=1e-2, **options), bits(model)
    with pytest.raises(RuntimeError, match=r"gives other outputs than the first.*in a buffer \(register_buffer\)"):
        optimizer.step(*batches[0])
    assert bits(model) == origin


def test_a_step_without_a_trial_has_no_need_of_a_second_pass():
    model = Stateful(buffer=False)
    torch.manual_seed(1)
    optimizer = NGD(model, families.Categorical(), lr=1.0, damping=1e-2)
    with pytest.warns(UserWarning, match=r"other outputs than the first.* Keep a state .* in a buffer"):
        assert optimizer.step(torch.randn(6, 4), torch.randint(0, 3, (6,))).accepted


@pytest.mark.parametrize("solver", ["cg", "kfac", "ekfac"])
def test_inputs_that_a_model_writes_to_are_refused(solver):
    class Normalising(nn.Linear):
        def forward(self, x):
            return super().forward(x.sub_(2.0).div_(4.0))

    model, y = Normalising(4, 3), torch.randint(0, 3, (6,))
    optimizer, origin = NGD(model, families.Categorical(), lr=1.0, damping=1e-2, solver=solver), bits(model)
    with pytest.raises(ValueError, match="forward pass of Normalising writes to its inputs"):
        optimizer.step(torch.randn(6, 4), y)
    assert bits(model) == origin
