"""The natural-gradient step, on one page: the same for a classifier and for a policy.

    outputs ──► Fisher F and gradient g ──► solve (F + λI)s = g ──► scale to the KL radius, backtrack ──► StepReport

Every step by a solved Fisher system, of `npg.optim.NGD` and of the agents, passes through `natural_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite, nan
from time import perf_counter
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from npg.checks import number
from npg.constraint import Constraint, Limited, limit, value_and_slope
from npg.families import Family, OutOfDomainError, in_double
from npg.families.base import check_outputs
from npg.families.mistakes import is_mistaken
from npg.fisher import Fisher
from npg.geometry import Geometry, Metric, geometry_of
from npg.linearize import Linearization
from npg.model import Buffers, Model, frozen_statistics, undone_on_error, unwrapped
from npg.parallel import mean_, mean_of_shares
from npg.randomness import replayed_randomness
from npg.solvers import Solver, Status, conjugate_gradient, norm, not_finite
from npg.solvers.solution import check_damping
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
        residual: ‖g − (F + λI)s‖/‖g‖; NaN where a curvature's inverse took the place of a solve, and with
            `npg.solvers.solve_in_metric` that of the system it transforms this one to.
        backtracks: how often the step was shortened.
        scale: the factor β of the solution s in the step d = βs; 0 where the step was refused.
        gradient_norm: ‖g‖, a number wherever g is finite.
        step_norm: ‖d‖.
        damping: λ.
        gradient: g, (P,), of the objective.
        solution: s, (P,), for a warm start of the next solve.
        step: d, (P,), the change of the parameters.
        predicted_cost: bᵀd, what the step adds to the cost of a ``constraint``, to first order; 0 without one.
        actual_cost: what the last point tried adds to it (NaN where none was evaluated; 0 at a stationary point, and
            without a constraint).
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
    2002); with both, the smaller of the two. A step that is refused leaves parameters and a module's buffers bit for
    bit as they were. A state that a model keeps in an attribute, or a function anywhere, is not known here: each
    forward pass moves it. Which steps are taken depends on what the solver found, and on nothing else of its status:

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
        inputs: a tensor, or a tuple of positional arguments (a named tuple is one of them).
        family: the predictive distribution of the outputs, or a geometry of them (`npg.geometry`).
        objective: outputs (…, D) ↦ the mean over events of what to maximise, (): a log-likelihood, a surrogate return.
            Of ``outputs.double()`` it keeps the digits of a gain that is small against it, or against an event's terms.
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
        process_group: average gradient, products, gain and KL over the processes of this group. A model in
            DistributedDataParallel brings its own.

    Raises:
        ValueError: if neither a trust region nor a learning rate is given, an argument is out of its range, or the
            family gives no metric. Outputs at which a family is not defined or not finite (`OutOfDomainError`) raise
            nothing: that step is refused. Neither may the model write to its inputs.
        RuntimeError: if a second forward pass gives other outputs than the first, so that there is no trial of a step.
            That is looked at in the 1st, 2nd, 4th, … step of a model.
    """
    _check(objective, trust_region, learning_rate, damping, constraint)
    learning_rate = None if learning_rate is None else float(learning_rate)
    model, process_group = unwrapped(model, process_group)
    geometry = geometry_of(family if metric is None else metric)
    buffers = Buffers(model)
    with buffers.restored_on_error():
        started = perf_counter()
        # 1. Outputs, gradient and curvature: one forward pass serves the objective, its gradient and the Fisher.
        linearization = Linearization(model, inputs, parameters, move_statistics=True)
        check_outputs(linearization.outputs, inputs)
        at, known = (inputs, linearization) if curvature_inputs is None else (curvature_inputs, None)
        options: dict[str, Any] = {"parameters": parameters, "process_group": process_group, "linearization": known}
        information = partial(fisher, model, at, geometry, **options)
        before, g, F = _first_order(linearization, objective, information, process_group)

        # 2. Solve.
        if F is not None and bool(torch.isfinite(g).all() & torch.isfinite(before)):
            preconditioned: dict[str, Any] = {}
            if preconditioner is not None:
                preconditioned["preconditioner"] = preconditioner(F, damping)
            solve = partial(solver, F, damping=damping, **preconditioned)
            solution, limited = solve(g, x0=x0), None
            if constraint is not None and trust_region is not None and solution.status is not Status.NON_FINITE:
                limited = limit(linearization, F, g, solution, solve, damping, constraint, trust_region, process_group)
                solution = limited.solution
        else:
            solution, limited = not_finite(g), None
        s = solution.x
        numbers = [torch.dot(g.double(), s.double()), norm(s), norm(g), solution.curvature, solution.residual_norm]
        slope_along, s_norm, g_norm, curvature, residual, objective_before = torch.stack([*numbers, before]).tolist()
        solve_seconds = perf_counter() - started

        # 3. Length: scale to the radius, backtrack on the true KL (or divergence) and the true objective.
        direction = "old_new" if trust_region is None else trust_region.kl_direction
        line = _Line(
            linearization, buffers, s, objective, objective_before, geometry, direction, process_group, limited
        )
        scale = trust_region.scale(curvature) if trust_region is not None else inf
        scale = scale if learning_rate is None else min(scale, learning_rate)
        ascent = slope_along  # of what the search asks of a trial
        if limited is not None:
            scale, ascent = limited.search(scale, ascent)
        with undone_on_error(line.restore):  # an error of the model, or an interrupt: nothing is lost
            if not isfinite(s_norm) or solution.status is Status.NON_FINITE:
                found = REFUSED
            elif (g_norm == 0 and s_norm == 0) or learning_rate == 0:
                found = SearchResult(True, 0.0, Trial(0.0, 0.0), 0)  # a stationary point, or no step is asked for
                line.change = 0.0
            elif 0 < scale * s_norm < inf:
                found = line.search(trust_region, scale, ascent, evaluate=evaluate)
            else:
                found = REFUSED
        accepted, scale, outcome, backtracks = found
        if limited is not None and line.tried is not None:
            outcome = line.tried  # the gain itself, in place of the merit that the search goes by
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
            **({} if limited is None else limited.report(scale, line.change)),
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
    if learning_rate is not None:
        number("learning_rate", learning_rate, 0)
    check_damping(damping)
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


def _first_order(
    linearization: Linearization,
    objective: Callable[[Tensor], Tensor],
    fisher: Callable[[], Fisher],
    process_group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Fisher | None]:
    """The objective, its gradient, (P,), and F; NaN and None of what is out of a family's domain."""
    old, F = linearization.outputs, None
    value = old.new_full((), nan)
    try:
        value, slope = value_and_slope(objective, linearization, "objective")
        F = fisher()
    except OutOfDomainError:
        slope = torch.full_like(old, nan)
    value = mean_of_shares(value.double(), old[..., 0].numel(), process_group)
    return value, mean_(linearization.pull_back(slope), process_group), F


class _Line:
    """The line θ + βs: going along it, and what the model does there.

    Args:
        linearization: at θ.
        buffers: before the forward pass at θ, with which every forward pass begins.
        s: the direction, (P,).
        objective: outputs ↦ its mean over events.
        objective_before: at θ, of all processes.
        geometry: whose divergence is measured.
        direction: of the divergence, "old_new" or "new_old".
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
        direction: str,
        process_group: dist.ProcessGroup | None,
        limited: Limited | None,
    ) -> None:
        self._limited = limited
        self._linearization, self._buffers, self._s = linearization, buffers, s
        self._objective, self._before, self._divergence = objective, objective_before, geometry.divergence
        self._direction = direction
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
        if self._limited is None:
            return self.tried
        self.change = cost[0] - self._limited.cost
        return self.tried._replace(gain=self._limited.merit(self.tried.gain, self.change))

    def search(self, region: TrustRegion | None, scale: float, ascent: float, *, evaluate: bool) -> SearchResult:
        """Go as far as the region allows, where it backtracks; else the whole way."""
        if evaluate or (region is not None and region.backtrack):
            self._linearization.check_repeats()
        if region is None or not region.backtrack:
            return self._take(scale, evaluate=evaluate)
        return region.search(self.trial, scale, ascent) if ascent > 0 else REFUSED

    def _take(self, scale: float, *, evaluate: bool) -> SearchResult:
        """Go to θ + βs without a search; refused where what is looked at is not finite."""
        if not evaluate:
            return SearchResult(self.move(scale), scale, UNTRIED, 0)
        outcome = self.trial(scale)
        return SearchResult(isfinite(outcome.gain) and isfinite(outcome.kl), scale, outcome, 0)
