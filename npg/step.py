"""The natural-gradient step, on one page: the same for a classifier and for a policy.

    outputs ──► Fisher F and gradient g ──► solve (F + λI)s = g ──► scale to the KL radius, backtrack ──► StepReport

Every step by a solved Fisher system, of `npg.optim.NGD` and of the agents, passes through `natural_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isfinite, nan
from time import perf_counter
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from npg.constraint import Constraint, constrained_step
from npg.families import Family, OutOfDomainError, in_double
from npg.families.base import check_outputs
from npg.families.mistakes import is_mistaken
from npg.fisher import Fisher
from npg.geometry import Geometry, Metric, geometry_of
from npg.linearize import Linearization
from npg.model import Buffers, Model, frozen_statistics, replayed_randomness, uncompiled, undone_on_error
from npg.parallel import mean_
from npg.solvers import Solution, Solver, Status, conjugate_gradient, norm, not_finite
from npg.solvers.solution import ORDER
from npg.trust_region import SearchResult, Trial, TrustRegion

__all__ = ["StepReport", "natural_step"]


@dataclass(frozen=True)
class StepReport:
    """What one natural step did.

    Attributes:
        accepted: whether the step was taken; if not, parameters and buffers are bit for bit what they were. What it
            says after each status is the table of `natural_step`.
        objective: the objective before the step.
        predicted_gain: gᵀd − ½c dᵀFd for the step d, with c the ``objective_curvature`` of `natural_step`.
        actual_gain: the gain in the objective at the last point tried (NaN where none was evaluated).
        predicted_kl: ½dᵀFd, in nats.
        kl: the true mean KL at the last point tried, in nats (NaN where none was evaluated); of a step with another
            ``metric``, both are its divergence, in its units.
        status: how the solver ended; ``NON_FINITE`` as well where it was not asked, because the objective, its gradient
            or F is not finite.
        iterations: products with F that the solver took.
        residual: ‖g − (F + λI)s‖/‖g‖.
        backtracks: how often the step was shortened.
        scale: the factor β of the solution s in the step d = βs; 0 where the step was refused.
        gradient_norm: ‖g‖, a number wherever g is finite.
        step_norm: ‖d‖.
        damping: λ.
        gradient: g, (P,), of the objective.
        solution: s, (P,), for a warm start of the next solve.
        step: d, (P,), the change of the parameters.
        predicted_cost: bᵀd, what the step adds to the cost of a ``constraint``, to first order; 0 without one.
        actual_cost: what the last point tried adds to it (NaN where none was evaluated; 0 without a constraint).
        limit: whether the constraint bound: ``"none"`` (there is none), ``"free"`` (the step is the one without it),
            ``"bound"``, or ``"infeasible"`` (no step in the region reaches the limit, and this one lowers the cost
            most).
        solve_seconds: time of the forward pass, gradient and solve.
        search_seconds: time of scaling and backtracking.
    """

    accepted: bool
    objective: float
    predicted_gain: float
    actual_gain: float
    predicted_kl: float
    kl: float
    status: Status
    iterations: int
    residual: float
    backtracks: int
    scale: float
    gradient_norm: float
    step_norm: float
    damping: float
    gradient: Tensor
    solution: Tensor
    step: Tensor
    solve_seconds: float
    search_seconds: float
    predicted_cost: float = 0.0
    actual_cost: float = 0.0
    limit: Literal["none", "free", "bound", "infeasible"] = "none"


def natural_step(
    model: Model,
    inputs: Any,
    family: Family | Metric,
    objective: Callable[[Tensor], Tensor],
    *,
    trust_region: TrustRegion | None = None,
    learning_rate: float | None = None,
    damping: float = 0.0,
    solver: Solver = conjugate_gradient,
    fisher: Callable[..., Fisher] = Fisher,
    metric: Metric | None = None,
    curvature_inputs: Any = None,
    preconditioner: Callable[[Fisher, float], Callable[[Tensor], Tensor]] | None = None,
    x0: Tensor | None = None,
    objective_curvature: float = 0.0,
    evaluate: bool = True,
    constraint: Constraint | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> StepReport:
    """Move the parameters in place by d = β(F + λI)⁻¹∇objective, uphill.

    With a trust region of radius δ, β is the length at which ½sᵀ(F + λI)s = δ, shortened until KL ≤ δ and the
    objective gains (TRPO: Schulman et al. 2015, appendix C); with a learning rate, β is that (Amari 1998; Kakade
    2002); with both, the smaller of the two. A step that is refused leaves parameters and buffers bit for bit as they
    were. Which steps are taken depends on what the solver found, and on nothing else of its status:

    =======================================  =======================  ================================================
    solution s                               status                   accepted
    =======================================  =======================  ================================================
    not finite                               NON_FINITE               never
    s = 0 though g ≠ 0: nothing was found    BREAKDOWN or             never
                                             NEGATIVE_CURVATURE
    s ≠ 0, the whole or a truncated solve    all others               with a region: if a trial is inside of it and
                                                                      gains, or, without backtracking, if
                                                                      sᵀ(F + λI)s > 0; with a rate alone: always
    s = 0 since g = 0, or a rate of zero     CONVERGED                always: a step of length zero, without a search
    =======================================  =======================  ================================================

    Whatever is evaluated must be finite besides.

    Args:
        model: a module, or a function ``f(parameters, *inputs)``.
        inputs: a tensor, or a tuple of positional arguments.
        family: the predictive distribution of the outputs, or a geometry of them (`npg.geometry`).
        objective: outputs (…, D) ↦ the mean over events of what to maximise, (): a log-likelihood, a surrogate return.
            A mean in float64, ``.mean(dtype=torch.float64)``, keeps the digits of a gain that is small against it.
        trust_region: the radius, of the KL or of the divergence of ``metric``, and how to keep to it.
        learning_rate: a fixed, or with a trust region the largest, multiple of the solution.
        damping: λ ≥ 0.
        solver: a function of `npg.solvers`, with its options bound by ``functools.partial``.
        fisher: `Fisher`, or a partial of it, to choose its kind.
        metric: another geometry than the family's: its metric takes the place of the Fisher information in F, and its
            divergence that of the KL in the trust region and the report.
        curvature_inputs: the inputs to take F at, where they are not ``inputs`` (a part of the batch).
        preconditioner: (fisher, λ) ↦ (r ↦ C⁻¹r), for solvers that take one.
        x0: where the solver starts, (P,), for instance a decayed ``StepReport.solution``.
        objective_curvature: c, where the Hessian of the objective is about −cF: 1 for a log-likelihood (Gauss–Newton),
            0 for a surrogate that is linear in the policy. It enters ``predicted_gain`` alone.
        evaluate: whether to measure the gain and the KL where no trust region asks for it (one more forward pass).
        constraint: a limit on a cost, to be kept beside the trust region, which must backtrack: the step is then the
            best of those that keep both, and a trial is taken if it does (`npg.constraint`). Where the limit binds,
            that takes a second solve, on the same linearisation.
        parameters: by name: needed where ``model`` is a function; for a module, all trainable ones by default.
        process_group: average gradient, products, gain and KL over the processes of this group.

    Raises:
        ValueError: if neither a trust region nor a learning rate is given, an argument is out of its range, or the
            family gives no metric. Outputs at which a family is not defined or not finite (`OutOfDomainError`) raise
            nothing: that step is refused.
    """
    _check(objective, trust_region, learning_rate, damping, constraint)
    geometry = geometry_of(family if metric is None else metric)
    model = uncompiled(model)
    buffers = Buffers(model)
    with buffers.restored_on_error():
        started = perf_counter()
        # 1. Outputs, gradient and curvature: one forward pass serves the objective, its gradient and the Fisher.
        linearization = Linearization(model, inputs, parameters, move_statistics=True)
        check_outputs(linearization.outputs, inputs)
        value, slope, F = _first_order(
            linearization,
            objective,
            partial(
                fisher,
                model,
                inputs if curvature_inputs is None else curvature_inputs,
                geometry,
                parameters=parameters,
                process_group=process_group,
                linearization=None if curvature_inputs is not None else linearization,
            ),
        )
        before = mean_(value.double(), process_group)
        g = mean_(linearization.pull_back(slope), process_group)

        # 2. Solve.
        limited = None
        if F is not None and bool(torch.isfinite(g).all() & torch.isfinite(before)):
            options: dict[str, Any] = {} if preconditioner is None else {"preconditioner": preconditioner(F, damping)}
            solution = solver(F, g, x0=x0, damping=damping, **options)
            if constraint is not None and solution.status is not Status.NON_FINITE:
                again = partial(solver, F, damping=damping, **options)
                region = cast(TrustRegion, trust_region)
                limited = _limited(linearization, F, g, solution, again, damping, constraint, region, process_group)
                solution = limited.solution
        else:
            solution = not_finite(g)
        s = solution.x
        slope_along, s_norm, g_norm, curvature, residual, objective_before = torch.stack(
            [torch.dot(g.double(), s.double()), norm(s), norm(g), solution.curvature, solution.residual_norm, before]
        ).tolist()
        solve_seconds = perf_counter() - started

        # 3. Length: scale to the radius, backtrack on the true KL (or divergence) and the true objective.
        line = _Line(
            linearization, buffers, s, objective, objective_before, geometry, trust_region, process_group, limited
        )
        scale = trust_region.scale(curvature) if trust_region is not None else inf
        scale = scale if learning_rate is None else min(scale, learning_rate)
        ascent = slope_along  # of what the search asks of a trial
        if limited is not None and limited.bound:
            scale, ascent = min(scale, 1.0), limited.ascent(slope_along)
        with undone_on_error(line.restore):  # an error of the model, or an interrupt: nothing is lost
            if not isfinite(s_norm) or solution.status is Status.NON_FINITE:
                found = REFUSED
            elif (g_norm == 0 and s_norm == 0) or learning_rate == 0:
                found = SearchResult(True, 0.0, Trial(0.0, 0.0), 0)  # a stationary point, or no step is asked for
            elif not 0 < scale * s_norm < inf:
                found = REFUSED
            elif trust_region is not None and trust_region.backtrack:
                found = trust_region.search(line.trial, scale, ascent) if ascent > 0 else REFUSED
            else:
                found = line.take(scale, evaluate=evaluate)
        accepted, scale, outcome, backtracks = found
        if limited is not None and line.tried is not None:
            outcome = line.tried  # the gain itself, in place of the constraint's merit
        if not accepted:
            line.restore()
            scale = 0.0
        predicted_kl = max(0.0, 0.5 * scale * (scale * (curvature - damping * s_norm * s_norm))) if accepted else 0.0
        report = StepReport(
            accepted=accepted,
            objective=objective_before,
            predicted_gain=scale * slope_along - objective_curvature * predicted_kl if accepted else 0.0,
            actual_gain=outcome.gain,
            predicted_kl=predicted_kl,
            kl=outcome.kl,
            status=solution.status,
            iterations=solution.iterations,
            residual=residual,
            backtracks=backtracks,
            scale=scale,
            gradient_norm=g_norm,
            step_norm=scale * s_norm if accepted else 0.0,
            damping=damping,
            gradient=g,
            solution=s,
            step=s * scale if accepted else torch.zeros_like(s),
            solve_seconds=solve_seconds,
            search_seconds=perf_counter() - started - solve_seconds,
            predicted_cost=scale * limited.slope if limited is not None and accepted else 0.0,
            actual_cost=line.change if limited is not None else 0.0,
            limit="none" if limited is None else limited.kind,
        )
    if not report.accepted:
        buffers.restore()
    return report


UNTRIED = Trial(nan, nan)
REFUSED = SearchResult(False, 0.0, UNTRIED, 0)


def _check(objective: Any, trust_region: Any, learning_rate: float | None, damping: float, constraint: Any) -> None:
    if not callable(objective) or is_mistaken(objective):
        raise TypeError(
            f"objective must be a function of the outputs that is to be maximised, got {objective!r}: write "
            "lambda outputs: -loss(outputs, targets)"
        )
    if not (trust_region is None or isinstance(trust_region, TrustRegion)):
        raise TypeError(f"trust_region must be a TrustRegion, got {trust_region!r}: write TrustRegion(radius)")
    if trust_region is None and learning_rate is None:
        raise ValueError("trust_region or learning_rate must be given: one of them sets the length of the step")
    if learning_rate is not None and not (learning_rate >= 0 and isfinite(learning_rate)):
        raise ValueError(f"learning_rate must be a finite number ≥ 0, got {learning_rate}")
    if not 0 <= damping < inf:
        raise ValueError(f"damping must be a finite number ≥ 0, got {damping}")
    if constraint is None:
        return
    if not isinstance(constraint, Constraint):
        raise TypeError(
            f"constraint must be a Constraint, got a {type(constraint).__name__}: write Constraint(cost, excess)"
        )
    if learning_rate is not None or trust_region is None or not trust_region.backtrack:
        raise ValueError(
            "constraint goes with a trust region that backtracks, and without a learning_rate: only there a step is "
            "looked at before it is taken"
        )


class _Limited(NamedTuple):
    """The solution under a constraint, and what the search along it asks."""

    solution: Solution
    constraint: Constraint
    kind: Literal["free", "bound", "infeasible"]
    slope: float
    """bᵀs."""
    cost: float
    """Before the step."""

    @property
    def bound(self) -> bool:
        return self.kind != "free"

    def ascent(self, slope_along: float) -> float:
        return self.constraint.merit(slope_along, self.slope, bound=True) if self.constraint.excess > 0 else slope_along


def _limited(
    linearization: Linearization,
    F: Fisher,
    g: Tensor,
    solution: Solution,
    solve: Callable[[Tensor], Solution],
    damping: float,
    constraint: Constraint,
    region: TrustRegion,
    process_group: dist.ProcessGroup | None,
) -> _Limited:
    """The step of ``solution`` if it keeps the constraint, to first order; else the one that is bound by it."""
    value, slope = _differentiated(constraint.cost, linearization.outputs, "constraint.cost")
    cost = mean_(value.double(), process_group)
    b = mean_(linearization.pull_back(slope), process_group)
    along, size, curvature, before = torch.stack(
        [torch.dot(b.double(), solution.x.double()), norm(b), solution.curvature, cost]
    ).tolist()
    if not (isfinite(size) and isfinite(before)):
        return _Limited(not_finite(torch.full_like(g, nan)), constraint, "free", nan, nan)
    if size == 0 or not constraint.binds(region.scale(curvature) * along):
        return _Limited(solution, constraint, "free", along, before)
    second = solve(b)
    found = None
    if second.status is not Status.NON_FINITE:
        found = constrained_step(g, b, solution.x, second.x, constraint.excess, region.radius)
    if found is None:
        lost = second.status if second.status is Status.NON_FINITE else Status.BREAKDOWN
        nothing = replace(second, x=torch.zeros_like(g), status=lost, statuses=(lost,))
        return _Limited(nothing, constraint, "bound", 0.0, before)
    x, feasible = found
    damped = F.quadratic(x).double() + damping * norm(x).square()
    worst = max(solution.status, second.status, key=ORDER.index)
    both = Solution(
        x=x,
        status=worst,
        statuses=(worst,),
        iterations=solution.iterations + second.iterations,
        residual_norm=torch.maximum(solution.residual_norm, second.residual_norm),
        curvature=damped,
        model_value=0.5 * damped - torch.dot(g.double(), x.double()),
    )
    change = float(torch.dot(b.double(), x.double()))
    return _Limited(both, constraint, "bound" if feasible else "infeasible", change, before)


def _differentiated(function: Callable[[Tensor], Tensor], old: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The value of a mean over events, and its slope in the outputs."""
    with torch.enable_grad():
        outputs = old.clone().requires_grad_()
        value = function(outputs)
        if value.ndim != 0:
            raise ValueError(f"{name} must return a mean over events, a scalar, got shape {tuple(value.shape)}")
        (slope,) = torch.autograd.grad(value, outputs)
    return value.detach(), slope


def _first_order(
    linearization: Linearization, objective: Callable[[Tensor], Tensor], fisher: Callable[[], Fisher]
) -> tuple[Tensor, Tensor, Fisher | None]:
    """The objective, its slope in the outputs, and F; NaN and None where the outputs are out of a family's domain."""
    old = linearization.outputs
    value, slope = old.new_full((), nan), torch.full_like(old, nan)
    try:
        value, ascent = _differentiated(objective, old, "objective")
        F = fisher()
    except OutOfDomainError:
        return value, slope, None
    return value, ascent, F


class _Line:
    """The line θ + βs: going along it, and what the model does there.

    Args:
        linearization: at θ.
        buffers: before the forward pass at θ, with which every forward pass begins.
        s: the direction, (P,).
        objective: outputs ↦ its mean over events.
        objective_before: at θ, of all processes.
        geometry: whose divergence is measured.
        trust_region: which says in which direction.
        process_group: means are over its processes.
        limited: what a constraint asks of a trial.

    Attributes:
        tried: the gain and the divergence of the last trial, where there is a constraint.
        change: what it adds to the cost.
    """

    tried: Trial | None = None
    change: float = nan

    def __init__(
        self,
        linearization: Linearization,
        buffers: Buffers,
        s: Tensor,
        objective: Callable[[Tensor], Tensor],
        objective_before: float,
        geometry: Geometry,
        trust_region: TrustRegion | None,
        process_group: dist.ProcessGroup | None,
        limited: _Limited | None,
    ) -> None:
        self._limited = limited
        self._linearization, self._buffers, self._s = linearization, buffers, s
        self._objective, self._before, self._divergence = objective, objective_before, geometry.divergence
        self._direction = "old_new" if trust_region is None else trust_region.kl_direction
        self._group = process_group
        self._theta = linearization.parameters
        self._origin = self._theta.copy()

    def move(self, scale: float) -> bool:
        """Go to θ + βs; whether that is finite in the precision of the parameters."""
        self._theta.move(self._origin, self._s, scale)
        return self._theta.is_finite()

    def restore(self) -> None:
        """Go back to θ, bit for bit."""
        self._theta.restore(self._origin)

    @torch.no_grad()
    def trial(self, scale: float) -> Trial:
        """Go to θ + βs; the gain and the mean divergence there, NaN where something is not finite.

        Under a constraint its merit stands in the place of the gain.
        """
        self.tried, self.change = UNTRIED, nan
        if not self.move(scale):
            return UNTRIED
        old, randomness = self._linearization.outputs, self._linearization.random_state
        with frozen_statistics(self._linearization.model), replayed_randomness(randomness, self._theta.device):
            self._buffers.restore()  # the forward pass at θ began with these
            new = self._linearization.forward()
        try:
            kl = in_double(self._divergence, *((old, new) if self._direction == "old_new" else (new, old)))
            costs = [] if self._limited is None else [self._limited.constraint.cost(new).double()]
            local = torch.stack([self._objective(new).double(), kl.double().mean(), *costs])
        except ValueError:  # torch.distributions refuses outputs that leave its domain: a trial without gain or KL
            local = old.new_full((2 if self._limited is None else 3,), nan, dtype=torch.float64)
        value, kl_mean, *cost = mean_(local, self._group).tolist()
        self.tried = Trial(value - self._before, kl_mean)
        if (limited := self._limited) is None:
            return self.tried
        self.change = cost[0] - limited.cost
        return self.tried._replace(
            gain=limited.constraint.merit(self.tried.gain, self.change, bound=limited.bound),
        )

    def take(self, scale: float, *, evaluate: bool) -> SearchResult:
        """Go to θ + βs without a search; refused where what is looked at is not finite."""
        if not evaluate:
            return SearchResult(self.move(scale), scale, UNTRIED, 0)
        outcome = self.trial(scale)
        return SearchResult(isfinite(outcome.gain) and isfinite(outcome.kl), scale, outcome, 0)
